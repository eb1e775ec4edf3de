"""The tangent kernel's algebra, options, and what it leaves alone."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ldyn.kernels import entk as module
from ldyn.kernels._gram import WORTH_CUTTING
from ldyn.kernels.entk import entk, entk_vector_product, pntk
from ldyn.models import mlp
from tests.kernels.odd_models import Calls, build, one_by_one, vectors, weight
from tests.language_models import small

F64 = torch.float64


def off(value, reference):
    return float((value - reference).abs().max() / reference.abs().max())


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["tanh", "relu", "identity", "gelu"]),
    st.integers(0, 99),
)
def test_a_network_of_any_shape_agrees_with_its_gradients(sizes, n1, n2, bias, activation, seed):
    model = mlp(sizes, activation=activation, bias=bias, seed=seed)
    torch.manual_seed(seed)
    x1, x2 = vectors(n1, width=sizes[0]), vectors(n2, width=sizes[0])
    one, two = one_by_one(model, x1), one_by_one(model, x2)
    expected = torch.einsum("iap,jbp->ijab", one, two)
    scale = float(one.norm() * two.norm())
    for method in module.METHODS:
        kernel = entk(model, x1, x2, method=method)
        assert kernel.shape == (n1, n2, sizes[-1], sizes[-1])
        assert float((kernel - expected).abs().max()) <= 1e-13 * scale
        for size in (1, 2):
            assert float((entk(model, x1, x2, method=method, chunk_size=size) - expected).abs().max()) <= 1e-13 * scale


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_positions_of_any_number_and_size(count, positions, inputs, outputs, classes, bias):
    torch.manual_seed(count + 7 * positions)
    body, head = nn.Linear(inputs, outputs, bias=bias), nn.Linear(outputs, classes)
    model = Calls(lambda m, x: m.head(torch.tanh(m.body(x)).mean(1)), body=body, head=head).to(F64)
    x = torch.randn(count, positions, inputs, dtype=F64)
    own = one_by_one(model, x)
    for method in ("structured", "jacobian"):
        assert off(entk(model, x, method=method), torch.einsum("iap,jbp->ijab", own, own)) < 1e-12
    assert off(pntk(model, x), torch.einsum("iap,jap->ij", own, own) / classes) < 1e-12


@pytest.mark.parametrize("outputs", [1, 3, 5])
@pytest.mark.parametrize("rows", [WORTH_CUTTING - 1, WORTH_CUTTING, 2 * WORTH_CUTTING + 1])
def test_a_triangle_in_one_piece_or_in_four(outputs, rows):
    count = -(-rows // outputs)
    model = mlp((4, 3, outputs), activation="tanh")
    x = vectors(count, width=4)
    kernel = entk(model, x, method="structured")
    own = one_by_one(model, x)
    assert off(kernel, torch.einsum("iap,jbp->ijab", own, own)) < 1e-12
    assert torch.equal(kernel, kernel.permute(1, 0, 3, 2))
    assert off(pntk(model, x, kind="sum"), kernel.sum((2, 3)) / outputs) < 1e-12


def test_transposition_and_positivity():
    model, (x1, x2) = build("encoder layer", 4, 3)
    kernel = entk(model, x1, x2)
    assert off(entk(model, x2, x1).permute(1, 0, 3, 2), kernel) < 1e-14
    assert off(kernel[:3].transpose(2, 3), kernel[:3]) > 1e-3  # a block of two different examples is not symmetric
    own = entk(model, x1).permute(0, 2, 1, 3).reshape(12, 12)
    assert off(own.T, own) < 1e-14
    assert torch.linalg.eigvalsh(own).min() > -1e-10


def test_the_closed_form_of_one_hidden_layer():
    """No automatic differentiation: K = (x·x' + 1) V D D' Vᵀ + (φ·φ' + 1) I for f = V tanh(W x + b) + c."""
    model = mlp((5, 7, 3), seed=1)
    torch.manual_seed(0)
    x1, x2 = vectors(4, width=5), vectors(2, width=5)
    head = model[2].weight.detach()
    f1, f2 = (torch.tanh(model[0](x)).detach() for x in (x1, x2))
    body = torch.einsum("ij,ah,ih,jh,bh->ijab", x1 @ x2.T + 1, head, 1 - f1**2, 1 - f2**2, head)
    expected = body + (f1 @ f2.T + 1)[:, :, None, None] * torch.eye(3, dtype=F64)
    for method in module.METHODS:
        assert off(entk(model, x1, x2, method=method), expected) < 1e-14
    for near_miss in (body + (f1 @ f2.T)[:, :, None, None] * torch.eye(3, dtype=F64), body):
        assert off(near_miss, expected) > 0.05


def test_three_pseudo_kernels_and_their_order():
    """Trace is the best multiple of the identity; the three differ; averaging traced axes is the convention."""
    model, (x,) = build("mlp", 5)
    blocks = entk(model, x)
    found = {kind: pntk(model, x, kind=kind) for kind in module.KINDS}
    eye = torch.eye(3, dtype=F64)
    errors = {kind: (blocks - value[..., None, None] * eye).norm(dim=(2, 3)) for kind, value in found.items()}
    assert (errors["trace"] <= errors["sum"] + 1e-12).all() and (errors["trace"] <= errors["first"] + 1e-12).all()
    assert off(found["trace"], blocks.diagonal(dim1=2, dim2=3).mean(-1)) < 1e-14
    assert off(found["sum"], blocks.sum((2, 3)) / 3) < 1e-13
    assert off(found["sum"], found["trace"]) > 0.01 and off(found["first"], found["trace"]) > 0.01


def test_parameters_split_the_kernel():
    model, (x1, x2) = build("encoder layer", 3, 2)
    names = [name for name, _ in model.named_parameters()]
    whole = entk(model, x1, x2)
    for method in module.METHODS:
        parts = torch.stack([entk(model, x1, x2, params=name, method=method) for name in names])
        assert off(parts.sum(0), whole) < 1e-12
        pair = entk(model, x1, x2, params=["head.*", "*.weight"], method=method)
        wanted = torch.tensor([name.startswith("head.") or name.endswith(".weight") for name in names])
        assert off(parts[wanted].sum(0), pair) < 1e-12


def test_a_tied_parameter_counts_once_and_answers_to_all_its_names():
    torch.manual_seed(0)
    embed, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embed.weight
    model = Calls(lambda m, x: m.head(torch.tanh(m.embed(x)).mean(1)), embed=embed, head=head).to(F64)
    x = torch.randint(9, (5, 3))
    own = one_by_one(model, x)
    expected = torch.einsum("iap,jbp->ijab", own, own)
    for method in module.METHODS:
        for params in (None, "embed.weight", "head.weight"):
            assert off(entk(model, x, params=params, method=method), expected) < 1e-12


def test_frozen_parameters_count_unless_left_out():
    model, (x,) = build("mlp", 3)
    expected = entk(model, x)
    model[0].requires_grad_(False)
    for method in module.METHODS:
        assert (
            torch.equal(entk(model, x, method=method), entk(model, x, method=method))
            and off(entk(model, x, method=method), expected) < 1e-13
        )
    assert off(entk(model, x, params="2.*"), expected) > 0.01
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad


def test_a_parameter_that_nothing_depends_on_has_the_zero_kernel():
    model, (x,) = build("unused parameter", 2)
    for method in module.METHODS:
        assert torch.equal(entk(model, x, params="b.*", method=method), torch.zeros(2, 2, 3, 3, dtype=F64))


@pytest.mark.parametrize("method", module.METHODS)
def test_dtype_comes_from_the_parameters_and_not_from_the_default(method):
    model, (x,) = build("causal attention", 3)
    expected = entk(model, x, method="jacobian")
    single = entk(copy.deepcopy(model).float(), x.float(), method=method)
    assert single.dtype is torch.float32 and off(single.double(), expected) < 1e-5
    assert torch.get_default_dtype() is torch.float32
    assert entk(model, x, method=method).dtype is F64 and off(entk(model, x, method=method), expected) < 1e-13
    assert pntk(model, x, method=method).dtype is F64


def test_inputs_by_keyword():
    torch.manual_seed(0)
    embed, head = nn.Embedding(9, 4), nn.Linear(4, 3)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = embed, head

        def forward(self, input_ids, attention_mask=None, scale=1.0):
            hidden = torch.tanh(self.embed(input_ids)) * scale
            if attention_mask is not None:
                hidden = torch.where(attention_mask[..., None], hidden, 0.0)
            return self.head(hidden.sum(1))

    model = Masked().to(F64)
    ids, mask = torch.randint(9, (4, 5)), torch.rand(4, 5) > 0.3
    x = {"input_ids": ids, "attention_mask": mask, "scale": 0.5}
    expected = entk(model, x, method="jacobian")
    assert off(entk(model, x, method="structured", chunk_size=3), expected) < 1e-12
    assert off(entk(model, {"input_ids": ids}, method="structured"), expected) > 0.01
    v = torch.randn(4, 3, dtype=F64)
    assert off(entk_vector_product(model, x, x, v), torch.einsum("ijab,jb->ia", expected, v)) < 1e-12


def test_equal_examples_and_ambiguous_sizes():
    """As many positions as examples as units, and examples alike: where a guess of the batch dimension goes wrong."""
    torch.manual_seed(0)
    for layout in ("batch first", "positions first", "flat", "flat, positions outside"):
        body, head = nn.Linear(4, 4), nn.Linear(4, 4)

        def call(m, x, layout=layout):
            if layout == "batch first":
                return m.head(torch.tanh(m.body(x)).mean(1))
            if layout == "positions first":
                return m.head(torch.tanh(m.body(x.transpose(0, 1))).mean(0))
            x = x if layout == "flat" else x.transpose(0, 1)
            hidden = torch.tanh(m.body(x.reshape(-1, 4))).unflatten(0, (-1, 4) if layout == "flat" else (4, -1))
            return m.head(hidden.mean(1 if layout == "flat" else 0))

        model = Calls(call, body=body, head=head).to(F64)
        plain = torch.randn(4, 4, 4, dtype=F64)
        for x in (plain, plain[:1].expand(4, 4, 4), plain[[0, 0, 1, 1]], plain[:, :1].expand(4, 4, 4)):
            own = one_by_one(model, x)
            assert off(entk(model, x, method="structured"), torch.einsum("iap,jbp->ijab", own, own)) < 1e-12


def test_a_model_that_reorders_its_examples():
    """Sorted on the way and put back, with the first example where it was: one example tells nothing of the others."""
    torch.manual_seed(0)

    def call(m, x):
        order = torch.argsort(x[:, 0])
        return m.b(torch.tanh(m.a(x[order]))[torch.argsort(order)])

    model = Calls(call, a=nn.Linear(6, 5), b=nn.Linear(5, 3)).to(F64)
    x = vectors(4)
    x[:, 0] = torch.tensor([0.0, 3.0, 1.0, 2.0])
    own = one_by_one(model, x)
    expected = torch.einsum("iap,jbp->ijab", own, own)
    for method in module.METHODS:
        assert off(entk(model, x, method=method), expected) < 1e-12
        assert off(pntk(model, x, method=method, kind="first"), expected[:, :, 0, 0]) < 1e-12


class Fails(nn.Module):
    """Works so many times, then stops in the middle of its forward pass."""

    def __init__(self, times):
        super().__init__()
        self.a, self.b, self.times, self.calls = nn.Linear(6, 5), nn.Linear(5, 3), times, 0
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        hidden = self.a(x)
        self.count += 1
        self.calls += 1
        if self.calls > self.times:
            raise RuntimeError("stopped on purpose")
        return self.b(torch.tanh(hidden))


@pytest.mark.parametrize("method", module.METHODS)
@pytest.mark.parametrize("times", [0, 1, 2, 3, 10**6])
def test_nothing_of_the_callers_is_changed(method, times):
    model = Fails(times).to(F64)
    model.b.weight.grad = torch.ones_like(model.b.weight)
    model.a.requires_grad_(False)
    x = vectors(4)
    before, data, state = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    handles = [len(part._forward_hooks) + len(part._backward_hooks) for part in model.modules()]
    try:
        with torch.no_grad():
            entk(model, x, method=method, chunk_size=2)
    except RuntimeError as error:
        assert times < 10**6 and "on purpose" in str(error)
    else:
        assert times > 3
    assert not torch.overrides._get_current_function_mode_stack()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, data) and torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert torch.equal(model.b.weight.grad, torch.ones_like(model.b.weight)) and model.a.weight.grad is None
    assert not model.a.weight.requires_grad and model.b.weight.requires_grad and model.training
    assert handles == [len(part._forward_hooks) + len(part._backward_hooks) for part in model.modules()]


def test_the_result_needs_no_gradient_and_works_in_inference_mode():
    model, (x,) = build("encoder layer", 3)
    expected = entk(model, x)
    assert not expected.requires_grad and not pntk(model, x).requires_grad
    assert not entk_vector_product(model, x, x, torch.ones(3, 3, dtype=F64)).requires_grad
    with torch.inference_mode():
        assert torch.equal(entk(model, x), expected)


def test_hooks_of_the_callers_still_run_and_remain():
    model, (x,) = build("mlp", 3)
    expected, seen = entk(model, x), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(entk(model, x), expected) and seen
    handle.remove()


def test_long_work_shows_progress_on_stderr_and_short_work_is_silent(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    model, (x,) = build("mlp", 4)
    entk(model, x, chunk_size=1)
    assert capsys.readouterr() == ("", "")
    ticks = itertools.count(0.0, 3.0)
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks))
    entk(model, x, chunk_size=1)
    out, err = capsys.readouterr()
    assert out == "" and "tangent kernel" in err


def test_the_import_stays_light():
    heavy = "matplotlib", "scipy", "sklearn", "sphinx", "sympy", "transformers"
    code = f"import sys; import ldyn.kernels.entk; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_weight_modified_after_use_is_refused_or_right():
    model = Calls(lambda m, x: F.linear(torch.tanh(F.linear(x, m.w)), m.w.mul(2)), w=weight(6, 6)).to(F64)
    x = vectors(3)
    own = one_by_one(model, x)
    assert off(entk(model, x, method="structured"), torch.einsum("iap,jbp->ijab", own, own)) < 1e-12


@pytest.mark.parametrize("config", ["Llama", "GPT2", "Llama tied", "Qwen2"])
def test_language_models_of_hugging_face(config):
    """Rotary positions, grouped heads, hand-made RMSNorm, fused projections, ties, masks; every position."""
    family, *tied = config.split()
    model = small(family, tied=bool(tied), vocab_size=13).to(F64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    x = {"input_ids": torch.randint(13, (3, 4)), "attention_mask": mask, "use_cache": False}
    rows = []
    for i in range(3):
        one = {key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in x.items()}
        logits = model(**one).logits.reshape(-1)[::7]
        grads = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in logits]
        rows.append(torch.stack([torch.cat([part.reshape(-1) for part in each]) for each in grads]))
    own = torch.stack(rows)
    kernel = entk(model, x, method="structured")
    assert kernel.shape == (3, 3, 52, 52)
    assert off(kernel[:, :, ::7, ::7], torch.einsum("iap,jbp->ijab", own, own)) < 1e-12


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_stacked_kernel_of_one_set_is_symmetric_to_the_last_bit(chunk_size):
    x = torch.randn(5, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
    for model in (mlp((7, 16, 3)), mlp((7, 130, 90, 3), activation="relu")):
        kernel = entk(model, x, chunk_size=chunk_size)
        assert torch.equal(kernel, kernel.permute(1, 0, 3, 2))
