"""Kernel regression with one number a pair: against dense solves in another order of rows, and the theorems' bounds."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldyn.kernels import pntk_regression as pr
from ldyn.kernels._pntk_blocks import pseudo_ntks
from ldyn.kernels.regression import kernel_regression

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blocks(first, second):
    """K[i, j, a, b] of features (N, V, P)."""
    return torch.einsum("iap,jbp->ijab", first, second)


def problem(n, v, m, p, seed=0):
    """A kernel of rank at most P, and data."""
    train, other = normal(n, v, p, seed=seed), normal(m, v, p, seed=seed + 1)
    y, f, g = normal(n, v, seed=seed + 2), normal(n, v, seed=seed + 3), normal(m, v, seed=seed + 4)
    return blocks(train, train), blocks(other, train), y, f, g


def matrix(kernel):
    """The stacked matrix (i, a), (j, b) as NumPy: examples first, the other order than the library's."""
    m, n, v, w = kernel.shape
    return kernel.permute(0, 2, 1, 3).reshape(m * v, n * w).numpy()


def dense(kernel, cross, y, f, g, ridge):
    """The formula, written down with a general solver."""
    K, C = matrix(kernel), matrix(cross)
    weights = np.linalg.solve(K + ridge * np.eye(len(K)), (y - f).numpy().reshape(-1))
    return g + torch.tensor((C @ weights).reshape(g.shape))


def spread(numbers, outputs):
    """κ ⊗ I as blocks."""
    return numbers[:, :, None, None] * torch.eye(outputs, dtype=numbers.dtype)


sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))


# --- prediction -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(sizes, st.floats(1e-2, 10))
def test_ridge_regression_equals_a_dense_solve(size, ridge):
    kernel, cross, y, f, g = problem(*size)
    got = pr.predict(kernel, y, cross, ridge=ridge, initial=f, initial_cross=g)
    torch.testing.assert_close(got, dense(kernel, cross, y, f, g, ridge), rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_without_a_ridge_it_is_the_limit_of_gradient_descent(n, v, m, seed):
    kernel, cross, y, f, g = problem(n, v, m, 4 * n * v, seed)
    got = pr.predict(kernel, y, cross, initial=f, initial_cross=g)
    want = kernel_regression(kernel, y, initial=f, cross=cross, initial_cross=g).cross
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@settings(max_examples=40)
@given(sizes, st.sampled_from(["first", "sum", "trace"]))
def test_a_number_predicts_as_its_multiple_of_the_identity_with_the_same_ridge(size, kind):
    kernel, cross, y, f, g = problem(*size)
    kappa, few = (getattr(pseudo_ntks(blocks), kind) for blocks in (kernel, cross))
    v = y.shape[1]
    got = pr.predict(kappa, y, few, ridge=0.3, initial=f, initial_cross=g)
    want = dense(spread(kappa, v), spread(few, v), y, f, g, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_flat_targets_are_one_output():
    kernel, cross, y, f, g = problem(6, 1, 3, 9)
    flat = pr.predict(kernel[:, :, 0, 0], y[:, 0], cross[:, :, 0, 0], initial=f[:, 0], initial_cross=g[:, 0], ridge=0.1)
    assert flat.shape == (3,)
    torch.testing.assert_close(flat, dense(kernel, cross, y, f, g, 0.1)[:, 0])


def test_a_factorisation_serves_many_regressions_and_knows_its_ridge():
    kernel, cross, y, f, _ = problem(5, 3, 4, 30)
    solver = pr.factorise(kernel, ridge=0.2)
    rebuilt = solver.factor @ solver.factor.T
    order = kernel.permute(2, 0, 3, 1).reshape(15, 15)
    torch.testing.assert_close(rebuilt, order + 0.2 * torch.eye(15, dtype=F64))
    for targets in (y, f):
        for given_ridge in (0.0, 0.2):
            got = pr.predict(solver, targets, cross, ridge=given_ridge)
            torch.testing.assert_close(got, pr.predict(kernel, targets, cross, ridge=0.2), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"ridge: expected that of the factorisation, 0\.2, got 0\.1"):
        pr.predict(solver, y, cross, ridge=0.1)


def test_single_precision_is_solved_in_double_and_returned_in_single():
    parts = [part.float() for part in problem(5, 2, 3, 30)]
    kernel, cross, y, f, g = parts
    got = pr.predict(kernel, y, cross, ridge=0.1, initial=f, initial_cross=g)
    assert got.dtype == torch.float32
    wide = dense(*(part.double() for part in parts), 0.1)
    torch.testing.assert_close(got, wide.float(), rtol=0, atol=1e-6)


def test_nothing_of_the_callers_changes():
    kernel, cross, y, f, g = problem(4, 2, 3, 20)
    kernel.requires_grad_()
    before = [part.detach().clone() for part in (kernel, cross, y, f, g)]
    state = torch.random.get_rng_state()
    pr.predict(kernel, y, cross, ridge=0.1, initial=f, initial_cross=g)
    kappa, few = pseudo_ntks(kernel).trace, pseudo_ntks(cross).trace
    pr.prediction_gap(kernel, kappa, y, cross, few, ridge=0.1, initial=f)
    pr.extreme_eigenvalues(kernel)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(part.detach(), old) for part, old in zip((kernel, cross, y, f, g), before, strict=True))
    assert kernel.grad is None


def test_tiles_predict_as_the_matrix_does(tmp_path):
    pytest.importorskip("zarr")
    from ldyn import models
    from ldyn.kernels.entk import pntk
    from ldyn.kernels.tiles import tiled_gram

    model = models.mlp((5, 16, 3), seed=1)
    x, other, y, g = normal(11, 5), normal(4, 5, seed=1), normal(11, 3, seed=2), normal(4, 3, seed=3)
    gram = tiled_gram(model, x, path=tmp_path / "gram", tile=4, progress=False)
    kappa, few = pntk(model, x), pntk(model, other, x)
    ridge = pr.relative_ridge(gram, 0.1)
    assert ridge == pytest.approx(0.1 * float(kappa.diagonal().mean()), rel=1e-12)
    got = pr.predict(gram, y, few, ridge=ridge, initial_cross=g)
    torch.testing.assert_close(got, pr.predict(kappa, y, few, ridge=ridge, initial_cross=g), rtol=1e-6, atol=1e-7)
    assert pr.predict(gram, y[:, 0], few, ridge=ridge).shape == (4,)
    with pytest.raises(ValueError, match="targets: expected the dtype of kernel"):
        pr.predict(gram, y.float(), few, ridge=ridge)
    wide = tiled_gram(model, x, other, path=tmp_path / "cross", tile=4, progress=False)
    with pytest.raises(ValueError, match="kernel: expected one of equal sides"):
        pr.relative_ridge(wide, 0.1)
    with pytest.raises(ValueError, match="kernel: expected a symmetric one"):
        pr.predict(wide, y, few, ridge=ridge)


# --- the ridge ----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(sizes, st.floats(1e-3, 10), st.floats(1e-3, 1e3))
def test_a_relative_ridge_does_not_see_the_scale(size, fraction, scale):
    kernel, cross, y, *_ = problem(*size)
    ridge = pr.relative_ridge(kernel, fraction)
    assert ridge == pytest.approx(fraction * np.trace(matrix(kernel)) / (kernel.shape[0] * kernel.shape[2]))
    assert ridge == pytest.approx(pr.relative_ridge(pseudo_ntks(kernel).trace, fraction))
    larger = pr.relative_ridge(scale * kernel, fraction)
    torch.testing.assert_close(
        pr.predict(kernel, y, cross, ridge=ridge),
        pr.predict(scale * kernel, y, scale * cross, ridge=larger),
        rtol=1e-6,
        atol=1e-8,
    )


def test_only_the_sum_that_is_not_normalised_needs_another_ridge():
    kernel, cross, y, *_ = problem(6, 4, 3, 40)
    kappa, few = pseudo_ntks(kernel).sum, pseudo_ntks(cross).sum
    want = pr.predict(kappa, y, few, ridge=0.5)
    torch.testing.assert_close(pr.predict(4 * kappa, y, 4 * few, ridge=4 * 0.5), want)
    assert (pr.predict(4 * kappa, y, 4 * few, ridge=0.5) - want).abs().max() > 1e-3
    assert (pr.predict(kappa, y, few, ridge=4 * 0.5) - want).abs().max() > 1e-3


# --- eigenvalues --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(sizes)
def test_the_ends_of_every_pseudo_ntk_lie_between_those_of_the_kernel(size):
    kernel, *_ = problem(*size)
    low, high = pr.extreme_eigenvalues(kernel)
    values = np.linalg.eigvalsh(matrix(kernel))
    assert (low, high) == pytest.approx((values[0], values[-1]), abs=1e-12 * values[-1])
    for numbers in pseudo_ntks(kernel):
        ends = pr.extreme_eigenvalues(numbers)
        distance = np.linalg.norm(matrix(kernel - spread(numbers, kernel.shape[2])), 2)
        slack = 1e-12 * high
        assert low - slack <= ends.smallest <= low + distance + slack
        assert high - distance - slack <= ends.largest <= high + slack


def test_lanczos_finds_what_diagonalisation_finds(monkeypatch):
    kernel, *_ = problem(20, 3, 1, 80)
    want = pr.extreme_eigenvalues(kernel)
    monkeypatch.setattr(pr, "DENSE", 10)
    assert pr.extreme_eigenvalues(kernel) == pytest.approx(want, rel=1e-9)
    assert pr.extreme_eigenvalues(kernel, factorisation=pr.factorise(kernel, ridge=0.1)) == pytest.approx(want)
    flat, *_ = problem(20, 3, 1, 30)
    with pytest.raises(ValueError, match="ridge: expected one that makes"):
        pr.extreme_eigenvalues(flat)
    largest = np.linalg.eigvalsh(matrix(flat))[-1]
    assert pr.extreme_eigenvalues(flat, singular=True) == pytest.approx((0.0, largest), rel=1e-9)
    solver = pr.factorise(flat, ridge=0.1)
    assert pr.extreme_eigenvalues(flat, factorisation=solver) == pytest.approx((0.0, largest), abs=1e-9 * largest)


# --- the error identity -------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(sizes, st.sampled_from(["first", "sum", "trace"]), st.floats(1e-2, 1))
def test_the_gap_is_the_difference_of_two_predictions_and_within_its_bound(size, kind, ridge):
    kernel, cross, y, f, g = problem(*size)
    kappa, few = (getattr(pseudo_ntks(part), kind) for part in (kernel, cross))
    v = y.shape[1]
    result = pr.prediction_gap(kernel, kappa, y, cross, few, ridge=ridge, initial=f)
    want = dense(kernel, cross, y, f, g, ridge) - dense(spread(kappa, v), spread(few, v), y, f, g, ridge)
    torch.testing.assert_close(result.gap, want, rtol=1e-8, atol=1e-8)
    assert float(result.gap.norm()) <= result.bound * (1 + 1e-9)
    P, P_cross = matrix(spread(kappa, v)), matrix(spread(few, v))
    parts = [
        np.linalg.norm(matrix(kernel) - P, 2),
        np.linalg.norm(matrix(cross) - P_cross, 2),
        np.linalg.norm(P_cross @ np.linalg.inv(P + ridge * np.eye(len(P))), 2),
        float((y - f).norm()),
        np.linalg.eigvalsh(matrix(kernel))[0] + ridge,
    ]
    assert list(result[2:]) == pytest.approx(parts, rel=1e-8, abs=1e-10)
    error, cross_error, smoothing, residual, curvature = result[2:]
    assert result.bound == pytest.approx((cross_error + smoothing * error) * residual / curvature)


def test_the_bound_is_attained_by_one_example():
    one = torch.ones(1, 1, dtype=F64)
    off = 0.5 * torch.tensor([[0.0, 1], [1, 0]], dtype=F64)
    kernel, cross = (torch.eye(2, dtype=F64) + sign * off for sign in (-1, 1))
    y = torch.tensor([[1.0, 1.0]], dtype=F64)  # the eigenvector of the smallest eigenvalue
    result = pr.prediction_gap(kernel[None, None], one, y, cross[None, None], one)
    assert float(result.gap.norm()) == pytest.approx(result.bound, rel=1e-12)
    assert result.bound > 1


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_singular_kernel_is_refused_and_told_what_to_do():
    kernel, cross, y, *_ = problem(5, 2, 3, 4)
    with pytest.raises(ValueError, match=r"ridge: expected .* got 0,.*kernel_regression takes the pseudo-inverse"):
        pr.predict(kernel, y, cross)
    assert torch.isfinite(pr.predict(kernel, y, cross, ridge=1e-3)).all()
    with pytest.raises(ValueError, match=r"ridge: .* got 1e-17"):
        pr.predict(kernel, y, cross, ridge=1e-17)
    with pytest.raises(ValueError, match="positive definite"):
        pr.predict(-kernel, y, cross, ridge=1e-3)
    with pytest.raises(ValueError, match="positive definite"):
        pr.factorise(torch.zeros(3, 3, dtype=F64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": normal(5, 5)}, "kernel: expected a symmetric matrix"),
        ({"kernel": normal(5, 4)}, r"kernel: expected shape \(N, N, V, V\) or \(N, N\)"),
        ({"kernel": normal(5, 5, 2, 3)}, "kernel: expected shape"),
        ({"kernel": torch.eye(5, dtype=F64) * torch.nan}, "kernel: expected finite values"),
        ({"kernel": "gram"}, "kernel: expected a tensor, a Factorisation or a TiledGram"),
        ({"targets": normal(4, 3)}, r"targets: expected shape \(5, V\)"),
        ({"targets": normal(5, 3).float()}, "targets: expected the dtype of kernel"),
        ({"cross": normal(2, 4)}, r"cross: expected shape \(M, 5\)"),
        ({"cross": normal(2, 5, 3, 3)}, "cross: expected shape"),
        ({"cross": normal(0, 5)}, "cross: expected at least one element"),
        ({"initial": normal(5, 2)}, r"initial: expected shape \(5, 3\)"),
        ({"initial_cross": normal(5, 3)}, r"initial_cross: expected shape \(2, 3\)"),
        ({"ridge": -1.0}, "ridge: expected a number >= 0"),
        ({"ridge": float("nan")}, "ridge: expected a finite real number"),
    ],
)
def test_bad_arguments_of_predict_are_refused(change, message):
    good = {"kernel": torch.eye(5, dtype=F64), "targets": normal(5, 3), "cross": normal(2, 5)}
    with pytest.raises(ValueError, match=message):
        pr.predict(**(good | change))


def test_bad_arguments_of_the_others_are_refused():
    kernel, cross, y, f, _ = problem(4, 2, 3, 20)
    kappa, few = pseudo_ntks(kernel).trace, pseudo_ntks(cross).trace
    with pytest.raises(ValueError, match=r"kernel: expected shape \(N, N, V, V\)"):
        pr.prediction_gap(kappa, kappa, y, cross, few)
    with pytest.raises(ValueError, match=r"numbers: expected shape \(4, 4\)"):
        pr.prediction_gap(kernel, few, y, cross, few)
    with pytest.raises(ValueError, match=r"cross_numbers: expected shape \(3, 4\)"):
        pr.prediction_gap(kernel, kappa, y, cross, kappa)
    with pytest.raises(ValueError, match=r"initial: expected shape \(4, 2\)"):
        pr.prediction_gap(kernel, kappa, y, cross, few, initial=f[:, :1])
    with pytest.raises(ValueError, match="fraction: expected a number >= 0"):
        pr.relative_ridge(kernel, -0.1)
    with pytest.raises(ValueError, match="kernel: expected a trace >= 0"):
        pr.relative_ridge(-kernel, 0.1)
    with pytest.raises(ValueError, match=r"factorisation.factor: expected shape \(8, 8\)"):
        pr.extreme_eigenvalues(kernel, factorisation=pr.factorise(kappa, ridge=1.0))


def test_the_import_is_light():
    heavy = "{'zarr', 'dask', 'scipy', 'sklearn'}"
    code = f"import sys, ldyn.kernels.pntk_regression; print(*sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == ""
