"""The structured tangent kernel of many layers, some odd, against gradients taken one output at a time."""

import pytest
import torch
from torch import Tensor, nn

from ldyn.kernels import entk as module
from ldyn.kernels.entk import entk, entk_vector_product, pntk
from tests.kernels.odd_models import NAMES, Calls, build, one_by_one, sequences, vectors

F64 = torch.float64

# What no rule covers in full; everything else must be structured, or speed is lost without notice.
GENERAL = {
    "slice": ["w", "b"],
    "masked": ["w"],
    "known and unknown": ["w"],
    "own function": ["w"],
    "einsum": ["w"],
    "bilinear": ["two.weight", "two.bias"],
    "prelu": ["1.weight"],
    "weight norm": ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
    "parameters without data": ["p", "q"],
    "nn attention, positions first": ["mix.bias_k", "mix.bias_v"],
    "nn cross attention": ["mix.in_proj_weight", "mix.in_proj_bias"],
    "gru": ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"],
    "lstm": ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"],
    "class token": ["c"],
    "separate projections": ["mix.in_proj_bias"],
    "embedding, renormalised": ["embed.weight"],
    "embedding bag": ["embed.weight"],
    "position embedding": ["place.weight"],
    "transposed convolution": ["a.weight", "a.bias"],
    "normalised": ["3.weight", "3.bias"],
    "weight-normed convolution": ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
    "one call unbatched": ["a.weight", "a.bias", "b.weight", "b.bias"],
}


def off(value: Tensor, reference: Tensor) -> float:
    """Worst error relative to the largest entry."""
    return float((value - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_every_method_agrees_with_one_gradient_at_a_time(name):
    model, (x1, x2) = build(name, 4, 3)
    one, two = one_by_one(model, x1), one_by_one(model, x2)
    expected = torch.einsum("iap,jbp->ijab", one, two)
    own = torch.einsum("iap,jbp->ijab", one, one)
    for method in module.METHODS:
        assert off(entk(model, x1, x2, method=method), expected) < 1e-12
    assert off(entk(model, x1, method="structured"), own) < 1e-12
    assert off(entk(model, x1[:1], x2, method="structured"), expected[:1]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_reductions_and_products_agree_with_the_blocks(name):
    model, (x1, x2) = build(name, 3, 2)
    blocks = torch.einsum("iap,jbp->ijab", one_by_one(model, x1), one_by_one(model, x2))
    outputs = blocks.shape[-1]
    expected = {
        "trace": blocks.diagonal(dim1=2, dim2=3).sum(-1) / outputs,
        "sum": blocks.sum((2, 3)) / outputs,
        "first": blocks[:, :, 0, 0],
    }
    for kind in module.KINDS:
        for method in ("structured", "jacobian"):
            assert off(pntk(model, x1, x2, kind=kind, method=method), expected[kind]) < 1e-12
    v = torch.randn(2, outputs, dtype=F64)
    if name != "returns a dict":
        assert off(entk_vector_product(model, x1, x2, v), torch.einsum("ijab,jb->ia", blocks, v)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_structured_route_covers_what_it_should(name, monkeypatch):
    model, (x,) = build(name, 3)
    asked = []
    plain = module.Features._plain
    monkeypatch.setattr(module.Features, "_plain", lambda self, names: asked.append(names) or plain(self, names))
    entk(model, x, method="structured")
    assert sorted(asked[0] if asked else []) == sorted(GENERAL.get(name, []))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_any_chunk_size_gives_the_same_kernel(size):
    for name in ("called twice", "causal attention", "tied", "normalised", "lstm", "position embedding"):
        model, (x1, x2) = build(name, 7, 4)
        for method in ("structured", "jacobian"):
            whole, cut = entk(model, x1, x2, method=method), entk(model, x1, x2, method=method, chunk_size=size)
            assert off(cut, whole) < 1e-12
            assert off(entk(model, x1, method=method, chunk_size=size), entk(model, x1, x1)) < 1e-12
            assert off(pntk(model, x1, x2, method=method, chunk_size=size), pntk(model, x1, x2)) < 1e-12


def test_layers_with_positions_agree_by_both_routes(monkeypatch):
    """Pairs of positions and formed gradients, whatever the cost rule would choose, in one piece and in many."""
    from ldyn.kernels import _gram

    for name in ("output at each position", "encoder layer", "convolution", "tied", "embedding, padded"):
        model, (x1, x2) = build(name, 4, 3)
        expected = entk(model, x1, x2, method="jacobian")
        for workspace in (2**24, 300):
            monkeypatch.setattr(_gram, "WORKSPACE", workspace)
            for pairs in (True, False):
                monkeypatch.setattr(_gram, "_pairs_are_cheaper", lambda left, right, pairs=pairs: pairs)
                assert off(entk(model, x1, x2, method="structured"), expected) < 1e-12
        monkeypatch.undo()


def test_near_misses_are_far_away():
    """Summing over positions before multiplying, and leaving out the bias: both are wrong by a margin."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).to(F64)
    model = Calls(lambda m, x: torch.tanh(m.layer(x)).sum((1, 2)), layer=layer)
    x = sequences(3)
    slopes = 1 - torch.tanh(layer(x)).detach() ** 2
    pairs = torch.einsum("iti,jsi->ijts".replace("iti", "itd").replace("jsi", "jsd"), x, x)
    grams = torch.einsum("itd,jsd->ijts", slopes, slopes)
    kernel = entk(model, x, method="structured")[:, :, 0, 0]
    assert off(((pairs + 1) * grams).sum((2, 3)), kernel) < 1e-13
    assert off((pairs * grams).sum((2, 3)), kernel) > 0.01
    summed = (x.sum(1) @ x.sum(1).T + 1) * (slopes.sum(1) @ slopes.sum(1).T)
    assert off(summed, kernel) > 0.01


def test_a_function_without_batching_rule_is_swept_row_by_row():
    """torch.vmap refuses this backward pass, because it looks at the values."""

    class Peeks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 if float(grad.sum()) < 1e9 else grad

    torch.manual_seed(0)
    body, head = nn.Linear(6, 5).to(F64), nn.Linear(5, 3).to(F64)
    model = Calls(lambda m, x: m.head(torch.tanh(Peeks.apply(m.body(x)))), body=body, head=head)
    x = vectors(4)
    own = one_by_one(model, x)
    assert off(entk(model, x, method="structured"), torch.einsum("iap,jbp->ijab", own, own)) < 1e-12
    assert off(entk(model, x, method="jacobian"), torch.einsum("iap,jbp->ijab", own, own)) < 1e-12


def test_where_torch_func_is_silently_wrong_the_jacobian_is_right():
    """vmap(jacrev) of PReLU mixes examples up when there are as many as outputs; the oracle must not."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 7), nn.PReLU(7), nn.Linear(7, 3)).to(F64)
    x = vectors(3)
    own = one_by_one(model, x)
    for method in module.METHODS:
        assert off(entk(model, x, method=method), torch.einsum("iap,jbp->ijab", own, own)) < 1e-12
