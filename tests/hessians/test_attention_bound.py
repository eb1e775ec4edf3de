"""The bound on attention's Hessian: never exceeded, attained, and free of the faults of the published one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ldyn.hessians.attention_bound import attention_hessian_bound

F64 = torch.float64


def loss_hessian(X, W_Q, W_K, W_V, Y, causal=False):
    """Differentiate the loss twice, through nothing of the library."""
    matrices = (W_Q, W_K, W_V)

    def loss(weights):
        pieces = weights.split([m.numel() for m in matrices])
        q, k, v = (piece.view_as(m) for piece, m in zip(pieces, matrices, strict=True))
        scores = (X @ q) @ (X @ k).mT / math.sqrt(q.shape[1])
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1) & causal
        weights_of_rows = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
        return (weights_of_rows @ X @ v - Y).square().mean()

    return torch.func.hessian(loss)(torch.cat([m.reshape(-1) for m in matrices]))


def block_norms(hessian, case):
    sizes = [m.numel() for m in case[1:4]]
    return torch.tensor(
        [[torch.linalg.matrix_norm(b, 2) for b in row.split(sizes, 1)] for row in hessian.split(sizes)],
        dtype=hessian.dtype,
    )


def draw(seed, *, sizes=None, decades=1.5, dtype=F64):
    """Draw a layer whose five matrices have scales that differ by up to 2 · decades powers of ten."""
    rng = np.random.default_rng(seed)
    L, d, d_k, d_v = sizes or rng.integers(1, 6, size=4)
    shapes = ((L, d), (d, d_k), (d, d_k), (d, d_v), (L, d_v))
    return tuple(
        torch.tensor(rng.normal(size=shape) * 10 ** rng.uniform(-decades, decades), dtype=dtype) for shape in shapes
    )


def two_hot(length=40, reach=2.0, height=3.0, error=1e3):
    """Let every row attend to the first two tokens alike, with no values and errors along the tokens' heights."""
    X = torch.zeros(length, 2, dtype=F64)
    X[:, 1] = torch.linspace(0.6, 0.8, length, dtype=F64) * height
    X[0], X[1] = torch.tensor([reach, height]), torch.tensor([-reach, height])
    W_Q = torch.tensor([[0.0, 0.0], [0.0, 200.0]], dtype=F64)
    Y = -error * X[:, 1:] / X[:, 1].norm() * torch.tensor([1.0, 0.0], dtype=F64)
    return X, W_Q, torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64), Y


def norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2)


# --- it holds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_no_wild_layer_exceeds_it(causal):
    largest = 0.0
    for seed in range(220):
        case = draw(seed)
        hessian = loss_hessian(*case, causal=causal)
        bound = attention_hessian_bound(*case, causal=causal)
        worst = attention_hessian_bound(*case, causal=causal, a_priori=True)
        room = 1 + 1e-9
        eigenvalues = torch.linalg.eigvalsh(hessian)
        size = eigenvalues.abs().max()
        assert size <= bound.value * room
        assert bound.value <= worst.value * room
        assert eigenvalues[0] >= bound.lowest * room - 1e-12 * size
        assert bound.lowest >= worst.lowest * room
        assert (block_norms(hessian, case) <= bound.blocks * room + 1e-12 * size).all()
        assert (bound.blocks <= worst.blocks * room).all()
        largest = max(largest, float(size / bound.value))
    assert largest > 0.99


@pytest.mark.parametrize(("seed", "causal"), [(0, False), (1, True)])
def test_a_search_cannot_break_it(seed, causal):
    start = draw(seed, sizes=(3, 2, 1, 1), decades=0.5)
    shapes, sizes = [m.shape for m in start], [m.numel() for m in start]

    def ratio(vector):
        pieces = np.split(vector, np.cumsum(sizes)[:-1])
        case = [torch.tensor(p).reshape(s) for p, s in zip(pieces, shapes, strict=True)]
        bound = attention_hessian_bound(*case, causal=causal).value
        return float(norm(loss_hessian(*case, causal=causal)) / bound) if bound > 1e-9 else 0.0

    vector = np.concatenate([m.numpy().reshape(-1) for m in start])
    found = minimize(lambda v: -ratio(v), vector, method="Nelder-Mead", options={"maxfev": 600})
    assert ratio(vector) < -found.fun <= 1 + 1e-9


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.booleans())
def test_jacobians_stay_below_theirs(seed, causal):
    X, W_Q, W_K, W_V, Y = draw(seed, decades=0.7)
    Y = torch.zeros_like(Y)
    # at a minimum with loss zero the Hessian of each matrix is 2/n times its Jacobian's square
    bound = attention_hessian_bound(X, W_Q, W_K, W_V, Y, causal=causal)
    forward = attention_output(X, W_Q, W_K, W_V, causal)
    fitted = loss_hessian(X, W_Q, W_K, W_V, forward, causal=causal)
    exact = (block_norms(fitted, (X, W_Q, W_K, W_V, Y)).diagonal() * Y.numel() / 2).sqrt()
    assert (exact <= bound.jacobians * (1 + 1e-9) + 1e-9 * exact.max()).all()


def attention_output(X, W_Q, W_K, W_V, causal=False):
    scores = (X @ W_Q) @ (X @ W_K).mT / math.sqrt(W_Q.shape[1])
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1) & causal
    return torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ X @ W_V


# --- it is attained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 12, 40])
def test_two_hot_attention_attains_it(length):
    case = two_hot(length)
    ratio = attention_hessian_bound(*case).value / norm(loss_hessian(*case))
    assert 1 <= ratio < 1.001


@pytest.mark.parametrize("zero", ["scores", "values"])
def test_layers_at_zero_loss_attain_it(zero):
    X, W_Q, W_K, W_V, _ = draw(7, sizes=(4, 3, 2, 2), decades=0.3)
    if zero == "scores":
        W_Q, W_K = torch.zeros_like(W_Q), torch.zeros_like(W_K)
    else:
        W_V = torch.zeros_like(W_V)
    Y = attention_output(X, W_Q, W_K, W_V)
    bound = attention_hessian_bound(X, W_Q, W_K, W_V, Y)
    torch.testing.assert_close(norm(loss_hessian(X, W_Q, W_K, W_V, Y)), bound.value)


# --- special layers --------------------------------------------------------------------------------------------


def test_one_token_has_no_attention_to_bend():
    case = draw(3, sizes=(1, 3, 2, 4), decades=0.3)
    bound = attention_hessian_bound(*case)
    assert bound.functional.abs().max() < 1e-25
    torch.testing.assert_close(bound.value, norm(loss_hessian(*case)))


def test_zero_values_leave_the_blocks_of_the_values_alone():
    X, W_Q, W_K, W_V, Y = draw(4, sizes=(4, 3, 2, 2), decades=0.3)
    bound = attention_hessian_bound(X, W_Q, W_K, torch.zeros_like(W_V), Y)
    assert (bound.blocks[:2, :2] == 0).all()
    assert (bound.blocks[2] > 0).all()


def test_zero_loss_leaves_gauss_newton_alone():
    X, W_Q, W_K, W_V, _ = draw(5, sizes=(4, 3, 2, 2), decades=0.3)
    bound = attention_hessian_bound(X, W_Q, W_K, W_V, attention_output(X, W_Q, W_K, W_V))
    assert bound.lowest > -1e-12
    expected = 2 / (4 * 2) * bound.jacobians.square().sum()
    torch.testing.assert_close(bound.value, expected)


def test_zero_keys_at_zero_loss_follow_the_queries():
    """At this minimum the largest eigenvalue grows like ‖W_Q‖²; a bound without the key-key block misses it."""
    X, W_Q, W_K, W_V, _ = draw(6, sizes=(4, 3, 2, 2), decades=0.3)
    W_K = torch.zeros_like(W_K)
    Y = attention_output(X, W_Q, W_K, W_V)
    exact = [norm(loss_hessian(X, s * W_Q, W_K, W_V, Y)) for s in (1, 100)]
    bound = [attention_hessian_bound(X, s * W_Q, W_K, W_V, Y).value for s in (1, 100)]
    assert exact[1] > 1e3 * exact[0]
    assert all(e <= b <= 100 * e for e, b in zip(exact, bound, strict=True))


def test_saturated_attention_bounds_curvature_to_almost_nothing():
    X, W_Q, W_K, W_V, Y = draw(8, sizes=(5, 3, 3, 2), decades=0.0)
    bound = attention_hessian_bound(X, 1e4 * W_Q, 1e4 * W_K, W_V, Y)
    assert torch.isfinite(bound.value)
    assert norm(bound.blocks[:2, :2]) < 1e-9 * bound.blocks[2, 2]
    worst = attention_hessian_bound(X, 1e4 * W_Q, 1e4 * W_K, W_V, Y, a_priori=True)
    assert worst.value > 1e9 * bound.value


def test_a_priori_bound_does_not_grow_with_the_length():
    values = []
    for length in (8, 64, 512):
        rng = np.random.default_rng(length)
        X = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(length, 4))), dim=-1)
        Y = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(length, 4))), dim=-1)
        weights = [torch.eye(4, dtype=F64)] * 3
        values.append(float(attention_hessian_bound(X, *weights, Y, a_priori=True).value))
    assert max(values) < 2 * min(values)


def test_a_priori_bound_knows_only_norms():
    X, W_Q, W_K, W_V, Y = draw(9, sizes=(5, 3, 2, 2), decades=0.3)
    turn = torch.linalg.qr(draw(10, sizes=(3, 3, 3, 3))[1])[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = attention_hessian_bound(X, W_Q, W_K, W_V, Y, a_priori=True)
    turned = attention_hessian_bound(X[order] @ turn, -W_Q, W_K, W_V, -Y, causal=True, a_priori=True)
    torch.testing.assert_close(turned.blocks, plain.blocks)
    assert not torch.allclose(
        attention_hessian_bound(X @ turn, -W_Q, W_K, W_V, -Y).blocks,
        attention_hessian_bound(X, W_Q, W_K, W_V, Y).blocks,
    )


# --- the caller's things ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("a_priori", [False, True])
def test_float32_in_float32_out(a_priori):
    double = draw(11, sizes=(6, 4, 3, 2), decades=0.3)
    single = attention_hessian_bound(*(m.float() for m in double), a_priori=a_priori)
    assert all(part.dtype == torch.float32 for part in single)
    torch.testing.assert_close(
        single.blocks.double(), attention_hessian_bound(*double, a_priori=a_priori).blocks, rtol=1e-4, atol=1e-4
    )


def test_the_arguments_stay_as_they_are():
    case = draw(12, sizes=(4, 3, 2, 2))
    copies = [m.clone() for m in case]
    attention_hessian_bound(*case, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(case, copies, strict=True))


def test_it_can_be_differentiated():
    X, W_Q, W_K, W_V, Y = draw(13, sizes=(4, 3, 2, 2), decades=0.3)
    W_V.requires_grad_()
    attention_hessian_bound(X, W_Q, W_K, W_V, Y).value.backward()
    assert torch.isfinite(W_V.grad).all()
    assert W_V.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, dtype=F64), "X: expected a tensor with 2 dimension"),
        (0, torch.zeros(0, 3, dtype=F64), "X: expected at least one element"),
        (0, torch.full((4, 3), math.nan, dtype=F64), "X: expected finite"),
        (1, torch.zeros(4, 2, dtype=F64), "W_Q: expected shape"),
        (2, torch.zeros(3, 3, dtype=F64), "W_K: expected shape"),
        (3, torch.zeros(2, 2, dtype=F64), "W_V: expected shape"),
        (4, torch.zeros(4, 3, dtype=F64), "Y: expected shape"),
        (4, torch.zeros(4, 2), "Y: expected the dtype"),
        (1, [[1.0]], "W_Q: expected a torch.Tensor"),
        (2, torch.ones(3, 2, dtype=torch.int64), "W_K: expected a real floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(position, wrong, message):
    case = list(draw(14, sizes=(4, 3, 2, 2)))
    case[position] = wrong
    with pytest.raises(ValueError, match=message):
        attention_hessian_bound(*case)


@pytest.mark.parametrize("option", ["causal", "a_priori"])
def test_options_are_true_or_false(option):
    with pytest.raises(ValueError, match=f"{option}: expected True or False, got 1"):
        attention_hessian_bound(*draw(15), **{option: 1})
