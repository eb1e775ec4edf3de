"""The Hessian of Transformer blocks, both parts, against automatic differentiation of a block that is written out.

LayerNorm is written out in the reference on purpose. Second derivatives of PyTorch's own `layer_norm` in its weight and
its input at once come out wrong under `torch.vmap`, on which `torch.func.hessian` rests.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import hessian, jacrev
from torch.nn import functional as F

from ldyn.hessians import block as bl
from ldyn.hessians._output import dense
from ldyn.hessians.losses import cross_entropy, squared_error

F64 = torch.float64
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
}


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def parameters(d=4, heads=2, k=1, v=2, m=5, seed=0, without=()):
    shapes = {
        "ln1.weight": (d,),
        "ln1.bias": (d,),
        "attn.W_Q": (d, heads * k),
        "attn.b_Q": (heads * k,),
        "attn.W_K": (d, heads * k),
        "attn.b_K": (heads * k,),
        "attn.W_V": (d, heads * v),
        "attn.b_V": (heads * v,),
        "attn.W_O": (heads * v, d),
        "attn.b_O": (d,),
        "ln2.weight": (d,),
        "ln2.bias": (d,),
        "ffn.W1": (m, d),
        "ffn.b1": (m,),
        "ffn.W2": (d, m),
        "ffn.b2": (d,),
    }
    assert tuple(shapes) == bl.NAMES
    made = {name: normal(*shape, seed=seed + i, scale=0.7) for i, (name, shape) in enumerate(shapes.items())}
    for name in ("ln1.weight", "ln2.weight"):
        made[name] += 1
    return {name: value for name, value in made.items() if name not in without}


# --- the reference ---------------------------------------------------------------------------------------------------


def written_out(x, p, *, heads, norm="pre", activation="gelu", eps=1e-5, causal=False):
    """The block in elementary operations."""

    def normalise(t, name):
        centred = t - t.mean(-1, keepdim=True)
        hat = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return hat * p[f"{name}.weight"] + p.get(f"{name}.bias", 0)

    def attend(u):
        q, k, v = (u @ p[f"attn.W_{c}"] + p.get(f"attn.b_{c}", 0) for c in "QKV")
        read = []
        for one, two, three in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
            scores = one @ two.mT / math.sqrt(one.shape[1])
            if causal:
                scores = torch.where(torch.ones_like(scores).tril() > 0, scores, -1e300)
            read.append(scores.softmax(-1) @ three)
        return torch.cat(read, 1) @ p["attn.W_O"] + p.get("attn.b_O", 0)

    def feed(u):
        hidden = ACTIVATIONS[activation](u @ p["ffn.W1"].mT + p.get("ffn.b1", 0))
        return hidden @ p["ffn.W2"].mT + p.get("ffn.b2", 0)

    if norm == "pre":
        x = x + attend(normalise(x, "ln1"))
        return x + feed(normalise(x, "ln2"))
    x = normalise(x + attend(x), "ln1")
    return normalise(x + feed(x), "ln2")


def by_automatic_differentiation(x, stack, names, r, S, **options):
    """Both parts of the Hessian in the named variables, as matrices."""
    values = {f"{i}.{name}": value for i, p in enumerate(stack) for name, value in p.items()} | {"x": x}
    sizes = [values[name].numel() for name in names]

    def outputs(flat):
        here = dict(values)
        pieces = zip(names, flat.split(sizes), strict=True)
        here |= {name: piece.reshape(values[name].shape) for name, piece in pieces}
        out = here["x"]
        for i, p in enumerate(stack):
            out = written_out(out, {name: here[f"{i}.{name}"] for name in p}, **options)
        return out

    flat = torch.cat([values[name].reshape(-1) for name in names])
    J = jacrev(lambda w: outputs(w).reshape(-1))(flat)
    return J.mT @ dense(S) @ J, hessian(lambda w: (outputs(w) * r).sum())(flat)


def assert_equal(got, wanted, tolerance=1e-12):
    error = float((got - wanted).abs().max())
    assert error <= tolerance * max(1.0, float(wanted.abs().max())), error


def symmetric(tokens, d, seed):
    S = normal(tokens * d, tokens * d, seed=seed)
    return (S + S.mT).reshape(tokens, d, tokens, d)


sizes = st.fixed_dictionaries(
    {
        "d": st.integers(2, 5),
        "heads": st.integers(1, 3),
        "k": st.integers(1, 3),
        "v": st.integers(1, 3),
        "m": st.integers(1, 6),
        "seed": st.integers(0, 10_000),
        "without": st.sets(st.sampled_from([n for n in bl.NAMES if n.endswith("bias") or ".b_" in n or ".b1" in n])),
    }
)
options = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["pre", "post"]),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "causal": st.booleans(),
        "eps": st.sampled_from([1e-5, 1e-2, 1.0]),
    }
)


@settings(max_examples=25)
@given(sizes, options, st.integers(1, 4), st.sampled_from(["mse", "ce", "coupled"]))
def test_both_parts_equal_automatic_differentiation(size, option, tokens, loss):
    p = parameters(**size)
    x = normal(tokens, size["d"], seed=size["seed"] + 100)
    option = {**option, "heads": size["heads"]}
    y = bl.block(x, p, **option)
    assert_equal(y, written_out(x, p, **option))
    if loss == "ce":
        _, r, S = cross_entropy(y, torch.arange(tokens) % size["d"])
    else:
        _, r, S = squared_error(y, normal(*y.shape, seed=7))
        S = symmetric(*y.shape, seed=8) if loss == "coupled" else S
    H = bl.block_loss_hessian(x, p, r, S, wrt=["x", *p], **option)
    assert H.names == ("x", *p)
    outer, bent = by_automatic_differentiation(x, [p], [*(f"0.{n}" for n in p), "x"], r, S, **option)
    assert_equal(H.matrix([*p, "x"], part="gauss_newton"), outer)
    assert_equal(H.matrix([*p, "x"], part="functional"), bent)
    # without the input another route is taken through attention
    alone = bl.block_loss_hessian(x, p, r, S, **option)
    assert alone.names == tuple(p)
    for part in ("gauss_newton", "functional"):
        assert_equal(alone.matrix(part=part), H.matrix(list(p), part=part))


@settings(max_examples=8)
@given(options, st.integers(0, 1000), st.integers(1, 3))
def test_a_stack_equals_automatic_differentiation(option, seed, tokens):
    stack = [parameters(d=3, m=4, seed=seed), parameters(d=3, v=1, m=2, seed=seed + 50, without=("ln1.bias",))]
    x = normal(tokens, 3, seed=seed + 99)
    out = x
    for p in stack:
        out = written_out(out, p, heads=2, **option)
    _, r, S = cross_entropy(out, torch.zeros(tokens, dtype=torch.long))
    names = [f"{i}.{name}" for i, p in enumerate(stack) for name in p]
    H = bl.stack_loss_hessian(x, stack, r, S, heads=2, wrt=[*names, "x"], **option)
    outer, bent = by_automatic_differentiation(x, stack, [*names, "x"], r, S, heads=2, **option)
    assert_equal(H.matrix(part="gauss_newton"), outer)
    assert_equal(H.matrix(part="functional"), bent)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_curvature_at_every_interface(norm):
    stack = [parameters(seed=s) for s in (0, 30, 60)]
    x, target = normal(3, 4, seed=1), normal(3, 4, seed=2)
    inputs = [x]
    for p in stack:
        inputs.append(written_out(inputs[-1], p, heads=2, norm=norm))
    _, r, S = squared_error(inputs[-1], target)
    found = bl.propagate_curvature(x, stack, r, S, heads=2, norm=norm)
    assert len(found) == 4
    for depth, here in enumerate(found):
        outer, bent = by_automatic_differentiation(inputs[depth], stack[depth:], ["x"], r, S, heads=2, norm=norm)
        assert here.gauss_newton.shape == here.functional.shape == (3, 4, 3, 4)
        assert_equal(here.gauss_newton.reshape(12, 12), outer)
        assert_equal(here.functional.reshape(12, 12), bent)
    assert_equal(found[-1].gradient, r, 0)
    whole = bl.stack_loss_hessian(x, stack, r, S, heads=2, norm=norm, wrt=["x"])
    assert_equal(found[0].functional.reshape(12, 12), whole.functional["x", "x"])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_loss_of_one_number_is_differentiated_twice(norm):
    """The total against the Hessian of the loss itself, which knows of no parts."""
    p, x, labels = parameters(), normal(3, 4, seed=1), torch.tensor([0, 3, 1])
    _, r, S = cross_entropy(bl.block(x, p, heads=2, norm=norm), labels)
    H = bl.block_loss_hessian(x, p, r, S, heads=2, norm=norm)
    counts = [value.numel() for value in p.values()]

    def loss(flat):
        pieces = zip(p, flat.split(counts), strict=True)
        here = {name: piece.reshape(p[name].shape) for name, piece in pieces}
        return F.cross_entropy(written_out(x, here, heads=2, norm=norm), labels)

    assert_equal(H.matrix(), hessian(loss)(torch.cat([value.reshape(-1) for value in p.values()])))


# --- structure -------------------------------------------------------------------------------------------------------


def zero_blocks(table, names):
    return {(a, b) for i, a in enumerate(names) for b in names[i:] if not table[a, b].any()}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_which_blocks_vanish(norm, activation):
    without = [name for name in bl.NAMES if ".b_" in name]
    p = parameters(d=6, k=3, v=3, m=10, without=without)
    x = normal(4, 6, seed=3)
    _, r, S = squared_error(bl.block(x, p, heads=2, norm=norm, activation=activation), normal(4, 6, seed=4))
    H = bl.block_loss_hessian(x, p, r, S, heads=2, norm=norm, activation=activation)
    assert not zero_blocks(H, H.names)
    assert not zero_blocks(H.gauss_newton, H.names)
    flat = zero_blocks(H.functional, H.names)
    last, scale = {"pre": ("ffn.b2", "ffn.W2"), "post": ("ln2.bias", "ln2.weight")}[norm]
    always = {pair for pair in flat if last in pair} | {(scale, scale)}
    assert len(always) == 13
    assert len(flat) == (33 if (norm, activation) == ("pre", "relu") else 13)
    assert always <= flat


def test_the_bias_of_the_keys_has_no_curvature_at_all():
    p, x = parameters(), normal(3, 4, seed=1)
    _, r, S = squared_error(bl.block(x, p, heads=2), normal(3, 4, seed=2))
    H = bl.block_loss_hessian(x, p, r, S, heads=2, wrt=[*p, "x"])
    for name in H.names:
        assert not H["attn.b_K", name].any()
    outer, bent = by_automatic_differentiation(x, [p], ["0.attn.b_K"], r, S, heads=2)
    assert float(outer.abs().max()) < 1e-25
    assert float(bent.abs().max()) < 1e-14


@pytest.mark.parametrize("wrt", [["ffn.W2"], ["ln1.bias"], ["x"], ["x", "ln1.weight"], ["attn.b_K", "ln2.weight"]])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_some_variables_alone(wrt, norm):
    p, x = parameters(), normal(3, 4, seed=1)
    _, r, S = squared_error(bl.block(x, p, heads=2, norm=norm), normal(3, 4, seed=2))
    everything = bl.block_loss_hessian(x, p, r, S, heads=2, norm=norm, wrt=[*p, "x"])
    some = bl.block_loss_hessian(x, p, r, S, heads=2, norm=norm, wrt=wrt)
    assert set(some.names) == set(wrt)
    for a in wrt:
        assert some.shapes[a] == (x.shape if a == "x" else p[a].shape)
        for b in wrt:
            assert_equal(some.gauss_newton[a, b], everything.gauss_newton[a, b])
            assert_equal(some.functional[a, b], everything.functional[a, b])


def test_a_pytorch_layer_can_be_given():
    torch.manual_seed(0)
    for norm_first in (True, False):
        for activation, bias in (("relu", True), ("gelu", True), (nn.SiLU(), False), (nn.GELU("tanh"), True)):
            layer = nn.TransformerEncoderLayer(
                6, 3, 7, 0.1, activation, 1e-3, True, norm_first, bias=bias, dtype=F64
            ).eval()
            with torch.no_grad():
                for value in layer.parameters():
                    value.add_(0.3 * torch.randn_like(value))
            found = bl.block_parameters(layer)
            assert sum(value.numel() for value in found.parameters.values()) == sum(
                value.numel() for value in layer.parameters()
            )
            x = normal(5, 6)
            y = bl.block(x, found.parameters, **found.options)
            assert_equal(y, layer(x[None])[0].detach())
            mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=F64)
            seen = layer(x[None], src_mask=mask, is_causal=True)[0].detach()
            assert_equal(bl.block(x, found.parameters, causal=True, **found.options), seen)
            _, r, S = squared_error(y, torch.zeros_like(y))
            H = bl.block_loss_hessian(x, found.parameters, r, S, wrt=["ffn.W1"], **found.options)
            assert H.matrix().shape == (42, 42)


def test_single_precision_stays_single():
    p, x = parameters(d=6, k=3, v=3, m=10), normal(4, 6, seed=1)
    for norm in ("pre", "post"):
        _, r, S = squared_error(bl.block(x, p, heads=2, norm=norm), normal(4, 6, seed=2))
        H = bl.block_loss_hessian(x, p, r, S, heads=2, norm=norm)
        low = bl.block_loss_hessian(
            x.float(), {n: v.float() for n, v in p.items()}, r.float(), S.float(), heads=2, norm=norm
        )
        assert low.matrix().dtype == torch.float32
        for part in ("gauss_newton", "functional"):
            assert_equal(low.matrix(part=part).double(), H.matrix(part=part), 1e-4)


def test_nothing_of_the_callers_changes():
    p, x = parameters(), normal(3, 4, seed=1).requires_grad_()
    p["attn.W_Q"].requires_grad_()
    _, r, S = squared_error(bl.block(x, p, heads=2).detach(), normal(3, 4, seed=2))
    before = {name: value.detach().clone() for name, value in {**p, "x": x, "r": r, "S": S}.items()}
    state = torch.get_rng_state()
    H = bl.block_loss_hessian(x, p, r, S, heads=2)
    bl.propagate_curvature(x, [p, p], r, S, heads=2)
    for name, value in {**p, "x": x, "r": r, "S": S}.items():
        assert torch.equal(value, before[name])
    assert torch.equal(state, torch.get_rng_state())
    assert x.grad is None
    plain = bl.block_loss_hessian(x.detach(), {n: v.detach() for n, v in p.items()}, r, S, heads=2)
    assert_equal(H.matrix().detach(), plain.matrix())
