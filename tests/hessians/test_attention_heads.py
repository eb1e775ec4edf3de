"""Several heads, their biases, the readout and the tokens: both parts against automatic differentiation."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import hessian, jacrev

from ldyn.hessians import _attention_gauss_newton, _attention_input
from ldyn.hessians import attention as at

F64 = torch.float64
LETTERS = "QKVO"
MATRICES = tuple(f"W_{letter}" for letter in LETTERS)
EVERYTHING = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O", "X")
# L, d, H, k, v, o
sizes = st.tuples(*(st.integers(1, top) for top in (4, 3, 3, 2, 3, 3)))
SHAPE = (5, 4, 2, 3, 2, 5)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(shape, biased=LETTERS, seed=0):
    """Draw the tokens, weights and biases, in the order of their names."""
    length, d, heads, k, v, o = shape
    matrices = {"W_Q": (d, heads * k), "W_K": (d, heads * k), "W_V": (d, heads * v), "W_O": (heads * v, o)}
    shapes = {"X": (length, d)} | matrices | {f"b_{s}": (matrices[f"W_{s}"][1],) for s in biased}
    values = {name: normal(*shapes[name], seed=9 * seed + n) for n, name in enumerate(EVERYTHING) if name in shapes}
    return {name: value.requires_grad_(False) for name, value in values.items()}


def plain(values, heads, causal):
    """Evaluate head by head and row by row."""
    X = values["X"]
    Q, K, V = (X @ values[f"W_{s}"] + values.get(f"b_{s}", 0.0) for s in "QKV")
    read = []
    for q, k, v in zip(*(part.chunk(heads, dim=1) for part in (Q, K, V)), strict=True):
        rows = []
        for i, query in enumerate(q):
            seen = slice(i + 1 if causal else None)
            rows.append((k[seen] @ query / k.shape[1] ** 0.5).softmax(0) @ v[seen])
        read.append(torch.stack(rows))
    return torch.cat(read, dim=1) @ values["W_O"] + values.get("b_O", 0.0)


def called(values, function, *extra, **options):
    biases = {name: value for name, value in values.items() if name.startswith("b")}
    return function(values["X"], *(values[name] for name in MATRICES), *extra, **biases, **options)


def found(values, R, S, heads, causal=False, wrt=None):
    return called(values, at.multihead_attention_loss_hessian, R, S, heads=heads, causal=causal, wrt=wrt)


def output_curvature(length, outputs, full, seed=3):
    """Draw any gradient and any symmetric Hessian at the outputs, the latter also as one matrix."""
    R = normal(length, outputs, seed=seed)
    if full:
        S = normal(length * outputs, length * outputs, seed=seed + 1)
        S = S + S.T
        return R, S.view(length, outputs, length, outputs), S
    S = normal(length, outputs, outputs, seed=seed + 1)
    S = S + S.mT
    return R, S, torch.block_diag(*S)


def by_autograd(values, R, S, heads, causal, fixed=None):
    """Compute both parts in all variables at once, others being fixed."""
    lengths = [value.numel() for value in values.values()]

    def outputs(w):
        parts = w.split(lengths)
        shaped = {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}
        return plain((fixed or {}) | shaped, heads, causal)

    w = torch.cat([value.reshape(-1) for value in values.values()])
    J = jacrev(lambda v: outputs(v).reshape(-1))(w)
    return J.T @ S @ J, hessian(lambda v: (R * outputs(v)).sum())(w)


def assert_near(value, expected, tolerance=1e-12, largest=None):
    """Compare, relative to the largest entry."""
    assert value.shape == expected.shape and value.dtype == expected.dtype
    largest = float(expected.abs().max()) if largest is None else largest
    assert float((value - expected).abs().max()) <= tolerance * largest


@settings(max_examples=30)
@given(sizes, st.sets(st.sampled_from(LETTERS)), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_both_parts_equal_automatic_differentiation(shape, biased, causal, full, seed):
    heads = shape[2]
    values = case(shape, biased, seed)
    R, S, matrix = output_curvature(shape[0], shape[5], full, seed)
    H = found(values, R, S, heads, causal, wrt=tuple(values))
    outer, bent = by_autograd(values, R, matrix, heads, causal)
    largest = float(torch.maximum(outer.abs().max(), bent.abs().max()))
    assert_near(called(values, at.multihead_attention, heads=heads, causal=causal), plain(values, heads, causal))
    assert_near(H.matrix(part="gauss_newton"), outer, largest=largest)
    assert_near(H.matrix(part="functional"), bent, largest=largest)
    assert_near(H.matrix(), outer + bent, largest=largest)


@pytest.mark.parametrize(("biased", "causal"), list(product([False, True], repeat=2)))
def test_outputs_are_those_of_the_torch_module(biased, causal):
    heads, width, length = 3, 6, 5
    module = nn.MultiheadAttention(width, heads, bias=biased, batch_first=True, dtype=F64)
    parts = module.in_proj_weight.detach().chunk(3)
    values = {"X": normal(length, width)} | {f"W_{s}": w.T for s, w in zip("QKV", parts, strict=True)}
    values["W_O"] = module.out_proj.weight.detach().T
    if biased:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
        biases = (*module.in_proj_bias.detach().chunk(3), module.out_proj.bias.detach())
        values |= {f"b_{s}": b for s, b in zip(LETTERS, biases, strict=True)}
    mask = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    X = values["X"].unsqueeze(0)
    expected = module(X, X, X, attn_mask=mask, need_weights=False)[0].squeeze(0).detach()
    assert_near(called(values, at.multihead_attention, heads=heads, causal=causal), expected)


@pytest.mark.parametrize("full", [False, True])
def test_the_key_bias_is_exactly_flat(full):
    values = case(SHAPE)
    R, S, _ = output_curvature(5, 5, full)
    H = found(values, R, S, 2, wrt=EVERYTHING)
    for name in EVERYTHING:
        assert not H["b_K", name].any() and not H[name, "b_K"].any()
        assert name == "b_K" or H["b_Q", name].any()
    moved = values | {"b_K": values["b_K"] + 5}
    outputs = (called(v, at.multihead_attention, heads=2) for v in (values, moved))
    assert_near(*outputs)


def test_heads_meet_in_the_readout_only():
    values = case(SHAPE)
    R, S, _ = output_curvature(5, 5, False)
    H = found(values, R, S, 2)
    for a, b in product("QKV", repeat=2):
        names = f"W_{a}", f"W_{b}"
        shapes = [values[name].unflatten(1, (2, -1)).shape for name in names]
        apart = {}
        for part in ("gauss_newton", "functional"):
            block = getattr(H, part)[names].view(*shapes[0], *shapes[1])
            apart[part] = block[:, 0, :, :, 1], block[:, 1, :, :, 0]
        assert all(block.any() for block in apart["gauss_newton"])
        assert not any(block.any() for block in apart["functional"])


def test_what_the_functional_part_leaves_at_zero():
    H = found(case(SHAPE), *output_curvature(5, 5, False)[:2], 2, wrt=EVERYTHING)
    zero = {("W_V", "W_V"), ("W_V", "b_V"), ("b_V", "b_V"), ("W_O", "W_O")}
    zero |= {(name, "b_V") for name in ("W_Q", "b_Q", "W_K", "X")}
    zero |= {(name, bias) for name in EVERYTHING for bias in ("b_O", "b_K")}
    for a, b in H.functional:
        assert bool(H.functional[a, b].any()) == ((a, b) not in zero and (b, a) not in zero), (a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_one_head_without_readout_is_single_attention(causal):
    length, d, _, k, v, _ = SHAPE
    values = case((length, d, 1, k, v, v), "") | {"W_O": torch.eye(v, dtype=F64)}
    R, S, _ = output_curvature(length, v, False)
    many = found(values, R, S, 1, causal, wrt=("W_Q", "W_K", "W_V"))
    one = at.attention_loss_hessian(values["X"], *(values[f"W_{s}"] for s in "QKV"), R, S, causal=causal)
    for part in ("gauss_newton", "functional"):
        assert_near(many.matrix(part=part), one.matrix(part=part))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "wrt", [("X",), ("b_K", "b_V"), ("W_O", "X", "b_Q"), ["b_O", "W_V"], EVERYTHING[::-1], ("b_K",)]
)
def test_any_choice_of_variables_in_any_order(wrt, full):
    values = case(SHAPE)
    R, S, _ = output_curvature(5, 5, full)
    every, some = found(values, R, S, 2, wrt=EVERYTHING), found(values, R, S, 2, wrt=wrt)
    assert some.names == tuple(wrt) and dict(some.shapes) == {name: values[name].shape for name in wrt}
    for part in ("gauss_newton", "functional"):
        largest = float(every.matrix(part=part).abs().max())
        assert_near(some.matrix(part=part), every.matrix(wrt, part=part), largest=largest)


def test_without_a_choice_all_weights_and_biases():
    values = case(SHAPE, "QV")
    H = found(values, *output_curvature(5, 5, False)[:2], 2)
    assert H.names == ("W_Q", "b_Q", "W_K", "W_V", "b_V", "W_O")


@pytest.mark.parametrize("same", [False, True])
def test_a_loss_that_is_the_same_for_all_tokens_takes_a_shorter_way(same):
    values = case(SHAPE)
    R, S, _ = output_curvature(5, 5, False)
    S = S[:1].expand(5, -1, -1) if same else S
    outer, bent = by_autograd(values, R, torch.block_diag(*S), 2, False)
    H = found(values, R, S, 2, wrt=tuple(values))
    assert_near(H.matrix(part="gauss_newton"), outer)
    assert_near(H.matrix(part="functional"), bent)


def test_pieces_of_any_size_give_the_same(monkeypatch):
    values = case(SHAPE)
    R, S, _ = output_curvature(5, 5, False)
    whole = found(values, R, S, 2, wrt=EVERYTHING)
    for chunk in (1, 150):
        monkeypatch.setattr(_attention_gauss_newton, "_CHUNK", chunk)
        monkeypatch.setattr(_attention_input, "_CHUNK", chunk)
        pieces = found(values, R, S, 2, wrt=EVERYTHING)
        for part in ("gauss_newton", "functional"):
            assert_near(pieces.matrix(part=part), whole.matrix(part=part))


def test_many_tokens_go_in_strips():
    values = case((15, 10, 1, 1, 1, 2), "")
    R, S, matrix = output_curvature(15, 2, False)
    outer, bent = by_autograd({"X": values["X"]}, R, matrix, 1, False, values)
    H = found(values, R, S, 1, wrt=("X",))
    assert_near(H.matrix(part="gauss_newton"), outer)
    assert_near(H.matrix(part="functional"), bent)


def test_single_precision_stays_and_is_near():
    values = case(SHAPE)
    R, S, _ = output_curvature(5, 5, False)
    exact = found(values, R, S, 2, wrt=EVERYTHING)
    rounded = found({n: v.float() for n, v in values.items()}, R.float(), S.float(), 2, wrt=EVERYTHING)
    for part in ("gauss_newton", "functional"):
        assert rounded.matrix(part=part).dtype == torch.float32
        assert_near(rounded.matrix(part=part).double(), exact.matrix(part=part), 1e-4)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_everything_happens_on_the_device_of_the_tokens(full, causal):
    values = {name: value.to("meta") for name, value in case(SHAPE).items()}
    R, S, _ = (value.to("meta") for value in output_curvature(5, 5, full))
    H = found(values, R, S, 2, causal, wrt=EVERYTHING)
    assert all(part[pair].is_meta for part in (H.gauss_newton, H.functional) for pair in part)
    assert H.matrix().shape == 2 * (sum(value.numel() for value in values.values()),)


def test_nothing_of_the_callers_changes():
    values = {name: value.requires_grad_() for name, value in case(SHAPE).items()}
    R, S, _ = output_curvature(5, 5, False)
    copies = {name: value.detach().clone() for name, value in values.items()}
    H = found(values, R, S, 2, wrt=EVERYTHING)
    assert H["W_Q", "X"].requires_grad
    assert all(torch.equal(values[name], copies[name]) and values[name].grad is None for name in values)


def test_the_result_can_be_differentiated():
    values = case((3, 2, 2, 1, 2, 2))
    R, S, _ = output_curvature(3, 2, False)
    count = sum(value.numel() for value in values.values())
    weight = normal(count, count, seed=5)

    def weighted(*parts):
        moved = dict(zip(values, parts, strict=True))
        return (weight * found(moved, R, S, 2, wrt=EVERYTHING).matrix()).sum()

    assert torch.autograd.gradcheck(weighted, [value.requires_grad_() for value in values.values()])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"W_O": normal(3, 5)}, {}, r"W_O: expected shape \(4, o\)"),
        ({"W_O": normal(4, 5, dtype=torch.float32)}, {}, "W_O: expected the dtype of X"),
        ({"b_Q": normal(4)}, {}, r"b_Q: expected shape \(6\)"),
        ({"b_K": normal(6) * torch.nan}, {}, "b_K: expected finite"),
        ({"b_V": normal(4, dtype=torch.float32)}, {}, "b_V: expected the dtype of X"),
        ({"b_O": normal(4)}, {}, r"b_O: expected shape \(5\)"),
        ({}, {"heads": 4}, "heads: expected a divisor of the 6 columns of W_Q, got 4"),
        ({"W_V": normal(4, 3), "W_O": normal(3, 5), "b_V": normal(3)}, {}, "heads: expected a divisor of the 3 col"),
        ({}, {"heads": 0}, "heads: expected an integer >= 1"),
        ({}, {"wrt": ()}, "wrt: expected distinct names"),
        ({}, {"wrt": "X"}, "wrt: expected distinct names"),
        ({}, {"wrt": ("X", "X")}, "wrt: expected distinct names"),
        ({}, {"wrt": ("W_Q", "W_1")}, "wrt: expected distinct names"),
    ],
)
def test_bad_input_is_named(values, options, message):
    R, S, _ = output_curvature(5, 5, False)
    with pytest.raises(ValueError, match=message):
        found(case(SHAPE) | values, R, S, **({"heads": 2} | options))


def test_a_bias_that_is_not_there_cannot_be_asked_for():
    R, S, _ = output_curvature(5, 5, False)
    with pytest.raises(ValueError, match="wrt: expected distinct names among W_Q, W_K, W_V, W_O, X, got"):
        found(case(SHAPE, ""), R, S, 2, wrt=("b_Q",))
