"""Attention's Hessian in its three weights: both parts against automatic differentiation, and what must vanish."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian, jacrev
from torch.nn import functional

from ldyn.foundations.softmax import softmax_hessian_contraction, softmax_jacobian
from ldyn.hessians import _attention_core, _attention_products
from ldyn.hessians import attention as at
from ldyn.hessians.losses import cross_entropy, squared_error

F64 = torch.float64
NAMES = ("W_Q", "W_K", "W_V")
sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))


def normal(*shape, seed=0, scale=1.0, dtype=F64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(shape, seed=0, scale=1.0):
    """Draw X, W_Q, W_K, W_V with L tokens of width d, keys of width k, values of width v."""
    length, d, k, v = shape
    parts = ((length, d), (d, k), (d, k), (d, v))
    return tuple(normal(*part, seed=4 * seed + n, scale=scale) for n, part in enumerate(parts))


def plain(X, W_Q, W_K, W_V, causal=False):
    """Evaluate attention row by row, each row with the tokens that it sees."""
    rows = []
    for i, x in enumerate(X):
        seen = X[: i + 1] if causal else X
        scores = (seen @ W_K) @ (W_Q.T @ x) / math.sqrt(W_Q.shape[1])
        rows.append(scores.softmax(0) @ (seen @ W_V))
    return torch.stack(rows)


def flat(function, arguments):
    """Make a function of several tensors one of a single vector."""
    shapes = [a.shape for a in arguments]
    lengths = [a.numel() for a in arguments]

    def of_vector(w):
        return function(*(part.view(shape) for part, shape in zip(w.split(lengths), shapes, strict=True)))

    return of_vector, torch.cat([a.reshape(-1) for a in arguments])


def output_curvature(length, outputs, full, seed):
    """Draw any gradient and any symmetric Hessian at the outputs."""
    R = normal(length, outputs, seed=seed)
    if full:
        S = normal(length * outputs, length * outputs, seed=seed + 1)
        return R, (S + S.T).view(length, outputs, length, outputs)
    S = normal(length, outputs, outputs, seed=seed + 1)
    return R, S + S.mT


def dense(S):
    if S.ndim == 3:
        return torch.block_diag(*S)
    return S.reshape(S.shape[0] * S.shape[1], -1)


def assert_near(value, expected, tolerance=1e-12, scale=None):
    """Compare, relative to the largest entry."""
    assert value.shape == expected.shape and value.dtype == expected.dtype
    largest = float((expected if scale is None else scale).abs().max())
    assert float((value - expected).abs().max()) <= tolerance * max(largest, 1e-3)


# --- against automatic differentiation -------------------------------------------------------------------------


@settings(max_examples=40)
@given(sizes, st.booleans(), st.booleans(), st.sampled_from([0.3, 1.0, 1.5]), st.integers(0, 1000))
def test_both_parts_equal_automatic_differentiation(shape, causal, full, scale, seed):
    X, *weights = case(shape, seed, scale)
    R, S = output_curvature(shape[0], shape[3], full, seed)
    found = at.attention_loss_hessian(X, *weights, R, S, causal=causal)
    outputs, w = flat(lambda *W: plain(X, *W, causal), weights)
    assert_near(at.attention(X, *weights, causal=causal), outputs(w))
    J = jacrev(lambda v: outputs(v).reshape(-1))(w)
    functional_part = hessian(lambda v: (R * outputs(v)).sum())(w)
    outer = J.T @ dense(S) @ J
    assert found.names == NAMES
    scale = torch.maximum(outer.abs().max(), functional_part.abs().max())
    assert_near(found.matrix(part="gauss_newton"), outer, scale=scale)
    assert_near(found.matrix(part="functional"), functional_part, scale=scale)
    assert_near(found.matrix(), outer + functional_part, scale=scale)
    assert_near(torch.cat(at.attention_jacobians(X, *weights, causal=causal), dim=1), J)


@settings(max_examples=15)
@given(sizes, st.booleans(), st.sampled_from(["squared_error", "cross_entropy"]), st.integers(0, 1000))
def test_losses_give_their_hessian(shape, causal, loss, seed):
    X, *weights = case(shape, seed)
    if loss == "squared_error":
        targets = normal(shape[0], shape[3], seed=seed + 50)
        curvature = squared_error(plain(X, *weights, causal), targets)
        value, w = flat(lambda *W: functional.mse_loss(plain(X, *W, causal), targets), weights)
    else:
        labels = torch.randint(shape[3], (shape[0],), generator=torch.Generator().manual_seed(seed))
        curvature = cross_entropy(plain(X, *weights, causal), labels)
        value, w = flat(lambda *W: functional.cross_entropy(plain(X, *W, causal), labels), weights)
    found = at.attention_loss_hessian(X, *weights, curvature.gradient, curvature.hessian, causal=causal)
    assert_near(found.matrix(), hessian(value)(w))


def test_pieces_of_any_size_give_the_same(monkeypatch):
    X, *weights = case((6, 4, 3, 5))
    R, S = output_curvature(6, 5, False, 9)
    whole = at.attention_loss_hessian(X, *weights, R, S)
    for chunk in (1, 40, 100):
        monkeypatch.setattr(_attention_core, "_CHUNK", chunk)
        monkeypatch.setattr(_attention_products, "_CHUNK", chunk)
        pieces = at.attention_loss_hessian(X, *weights, R, S)
        for part in ("gauss_newton", "functional"):
            assert_near(pieces.matrix(part=part), whole.matrix(part=part))


# --- moments of the tokens -------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(sizes, st.sampled_from([0.3, 1.0, 5.0]), st.integers(0, 1000))
def test_moments_are_derivatives_of_softmax(shape, scale, seed):
    X = case(shape, seed)[0]
    scores, U = normal(shape[0], shape[0], seed=seed, scale=scale), normal(shape[0], shape[1], seed=seed + 1)
    A = scores.softmax(-1)
    expected = X.T @ softmax_jacobian(scores) @ X
    assert_near(at.token_covariances(A, X), expected)
    bent = X.T @ softmax_hessian_contraction(scores, U @ X.T) @ X
    assert_near(_attention_core.token_third_moments(A, X, U), bent)


@pytest.mark.parametrize("gap", [1.0, 40.0, 300.0])
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_sharp_attention_keeps_its_small_covariance(gap, far):
    X = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=F64) + far
    A = torch.tensor([[0.0, -gap], [-gap, 0.0]], dtype=F64).softmax(-1)
    difference = torch.tensor([2.0, -3.0], dtype=F64)
    small = torch.tensor(math.exp(-gap) / (1 + math.exp(-gap)) ** 2, dtype=F64)
    for covariance in at.token_covariances(A, X):
        torch.testing.assert_close(covariance, small * difference.outer(difference), rtol=1e-11, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_saturated_scores_stay_finite(causal):
    X, W_Q, W_K, W_V = case((6, 4, 3, 5))
    scores = X @ W_Q @ W_K.T @ X.T
    W_Q = W_Q * 1e3 / float(scores.abs().max())
    R, S = output_curvature(6, 5, False, 9)
    found = at.attention_loss_hessian(X, W_Q, W_K, W_V, R, S, causal=causal)
    outputs, w = flat(lambda *W: plain(X, *W, causal), (W_Q, W_K, W_V))
    J = jacrev(lambda v: outputs(v).reshape(-1))(w)
    reference = J.T @ dense(S) @ J + hessian(lambda v: (R * outputs(v)).sum())(w)
    assert bool(torch.isfinite(found.matrix()).all())
    assert_near(found.matrix(), reference)


# --- what must vanish ------------------------------------------------------------------------------------------


def test_values_alone_do_not_bend_the_output():
    X, *weights = case((4, 3, 2, 5))
    found = at.attention_loss_hessian(X, *weights, *output_curvature(4, 5, False, 9))
    assert not found.functional["W_V", "W_V"].any()
    assert all(found.functional[pair].any() for pair in found.functional if pair != ("W_V", "W_V"))


def test_one_token_has_nothing_to_choose():
    X, *weights = case((1, 3, 2, 5))
    found = at.attention_loss_hessian(X, *weights, *output_curvature(1, 5, False, 9))
    for a, b in found.gauss_newton:
        if (a, b) != ("W_V", "W_V"):
            assert not found[a, b].any()
    assert found["W_V", "W_V"].any()


def test_a_causal_row_sees_no_later_token():
    X, W_Q, W_K, W_V = case((5, 3, 2, 4))
    A = at.attention_weights(X, W_Q, W_K, causal=True)
    assert not A.triu(1).any() and A[0, 0] == 1
    torch.testing.assert_close(A.sum(1), torch.ones(5, dtype=F64))
    later = X.clone()
    later[3:] = normal(2, 3, seed=77)
    first = slice(None, 3)
    for f in (at.attention, lambda *args, causal: at.attention_weights(*args[:3], causal=causal)):
        before, after = f(X, W_Q, W_K, W_V, causal=True), f(later, W_Q, W_K, W_V, causal=True)
        assert torch.equal(before[first, :3], after[first, :3])


@pytest.mark.parametrize("full", [False, True])
def test_a_change_of_basis_between_queries_and_keys_is_flat(full):
    X, W_Q, W_K, W_V = case((5, 4, 3, 2))
    S = output_curvature(5, 2, full, 9)[1]
    found = at.attention_loss_hessian(X, W_Q, W_K, W_V, torch.zeros(5, 2, dtype=F64), S)
    B = normal(3, 3, seed=8)
    along = torch.cat([(W_Q @ B).reshape(-1), -(W_K @ B.T).reshape(-1)])
    H = found.matrix(("W_Q", "W_K"))
    assert float((H @ along).abs().max()) < 1e-12 * float(H.abs().max())
    assert float((H @ along.roll(1)).abs().max()) > 1e-3 * float(H.abs().max())


# --- types, graphs, and what the caller keeps ------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_single_precision_stays_and_is_near(full):
    X, *weights = case((6, 4, 3, 5), scale=0.7)
    R, S = output_curvature(6, 5, full, 9)
    exact = at.attention_loss_hessian(X, *weights, R, S).matrix()
    rounded = at.attention_loss_hessian(*(a.float() for a in (X, *weights, R, S))).matrix()
    assert rounded.dtype == torch.float32
    assert_near(rounded.double(), exact, 1e-4)


def test_nothing_of_the_callers_changes():
    arguments = [a.requires_grad_() for a in (*case((4, 3, 2, 5)), *output_curvature(4, 5, False, 9))]
    copies = [a.detach().clone() for a in arguments]
    state = torch.get_rng_state()
    with torch.no_grad():
        found = at.attention_loss_hessian(*arguments)
    assert not found.matrix().requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    for argument, copy in zip(arguments, copies, strict=True):
        assert torch.equal(argument, copy) and argument.grad is None and argument.requires_grad


@pytest.mark.parametrize("length", [2, 4])
def test_the_result_can_be_differentiated(length):
    shape = (length, 3, 2, 2)
    arguments = [a.requires_grad_() for a in (*case(shape), *output_curvature(length, 2, False, 9))]
    weight = normal(18, 18, seed=5)

    def weighted(*args):
        return (weight * at.attention_loss_hessian(*args[:-1], args[-1] + args[-1].mT).matrix()).sum()

    assert torch.autograd.gradcheck(weighted, arguments)


# --- bad input -------------------------------------------------------------------------------------------------


def changed(**values):
    X, W_Q, W_K, W_V = case((4, 3, 2, 5))
    R, S = output_curvature(4, 5, False, 9)
    return {"X": X, "W_Q": W_Q, "W_K": W_K, "W_V": W_V, "R": R, "S": S} | values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"X": normal(3)}, "X: expected a tensor with 2"),
        ({"X": [1.0]}, "X: expected a torch.Tensor"),
        ({"X": normal(4, 3) * math.nan}, "X: expected finite"),
        ({"X": torch.ones(4, 3, dtype=torch.int64)}, "X: expected a real floating-point"),
        ({"W_Q": normal(2, 2)}, r"W_Q: expected shape \(3, n\)"),
        ({"W_K": normal(3, 4)}, r"W_K: expected shape \(3, 2\)"),
        ({"W_V": normal(3, 5, dtype=torch.float32)}, "W_V: expected the dtype of X"),
        ({"R": normal(4, 3)}, r"R: expected shape \(4, 5\)"),
        ({"S": normal(4, 5, 4)}, "S: expected shape"),
        ({"S": normal(4, 5, 5)}, "S: expected a symmetric Hessian"),
        ({"S": normal(4, 5, 4, 5)}, "S: expected a symmetric Hessian"),
        ({"causal": 1}, "causal: expected True or False"),
    ],
)
def test_bad_input_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        at.attention_loss_hessian(**changed(**values))


def test_bad_weights_of_attention_are_named():
    X = normal(4, 3)
    with pytest.raises(ValueError, match=r"A: expected shape \(4, 4\)"):
        at.token_covariances(normal(3, 3).softmax(-1), X)
    with pytest.raises(ValueError, match="A: expected probabilities"):
        at.token_covariances(normal(4, 4), X)
    with pytest.raises(ValueError, match="A: expected the dtype of X"):
        at.token_covariances(normal(4, 4).softmax(-1).float(), X)
    with pytest.raises(ValueError, match="W_K: expected shape"):
        at.attention_weights(X, normal(3, 2), normal(3, 1))
