"""Kernel regression with one number a pair, at its edges: rounding, dtypes, large matrices, tiles, and refusals."""

import numpy as np
import pytest
import torch

from ldyn.kernels import pntk_regression as pr

F64, F32 = torch.float64, torch.float32


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positive(n, v, seed=0):
    """A positive definite kernel of blocks."""
    features = normal(n, v, 2 * n * v, seed=seed)
    return torch.einsum("iap,jbp->ijab", features, features)


def with_spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


# --- rounding and dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [2, 16])
def test_a_pivot_is_judged_by_the_size_and_the_rounding_of_the_dtype(dtype, size):
    """Of a diagonal matrix the last entry is the last pivot."""
    limit = size * torch.finfo(dtype).eps
    diagonal = torch.full((size,), 100, dtype=dtype)
    diagonal[-1] = 100 * 4 * limit
    torch.testing.assert_close(
        pr.factorise(diagonal.diag()).factor.diagonal(), diagonal.double().sqrt(), rtol=1e-12, atol=0
    )
    diagonal[-1] = 100 * limit / 4
    with pytest.raises(ValueError, match=rf"precision of {dtype}, got 0, which .* a pivot of {limit / 4:.3g} times"):
        pr.factorise(diagonal.diag())
    assert pr.factorise(diagonal.diag(), ridge=100 * 4 * limit).ridge == 100 * 4 * limit


def test_what_is_left_to_learn_is_taken_in_double_precision():
    """A nearly singular kernel magnifies a difference of targets that single precision would round away."""
    apart, step = 2.0**-12, 2.0**-26
    kernel = torch.tensor([[1, 1 - apart], [1 - apart, 1]], dtype=F32)
    targets = torch.ones(2, dtype=F32)
    initial = torch.tensor([step, 0], dtype=F32)
    got = pr.predict(kernel, targets, torch.tensor([[1, -1]], dtype=F32), initial=initial)
    assert got.dtype == F32
    assert float(got) == pytest.approx(-step / apart, rel=1e-6)
    blocks = kernel[:, :, None, None]
    cross = torch.tensor([1, -1], dtype=F32).reshape(1, 2, 1, 1)
    whole = pr.predict(blocks, targets[:, None], cross, initial=initial[:, None])
    assert float(whole) == pytest.approx(-step / apart, rel=1e-6)


def test_a_relative_ridge_adds_up_in_double_precision():
    kernel = torch.diag(torch.rand(999, generator=torch.Generator().manual_seed(0)))
    want = np.mean(kernel.diagonal().numpy().astype(np.float64))
    assert pr.relative_ridge(kernel, 0.5) == pytest.approx(0.5 * want, rel=1e-13)
    assert pr.relative_ridge(kernel[:, :, None, None], 0.5) == pytest.approx(0.5 * want, rel=1e-13)
    assert pr.relative_ridge(torch.zeros(3, 3), 0.5) == 0.0


def test_the_gap_keeps_the_dtype_and_needs_no_graph():
    kernel, y, cross = positive(3, 2), normal(3, 2), normal(4, 3, 2, 2, seed=1)
    kappa, few = kernel[..., 0, 0], cross[..., 0, 0]
    parts = [part.float().requires_grad_() for part in (kernel, kappa, y, cross, few)]
    single = pr.prediction_gap(*parts, ridge=0.1)
    double = pr.prediction_gap(*(part.detach().double() for part in parts), ridge=0.1)
    assert (single.gap.dtype, double.gap.dtype) == (F32, F64)
    torch.testing.assert_close(single.gap, double.gap.float(), rtol=1e-6, atol=1e-6)
    kernel, kappa, y, cross, few = parts
    assert not single.gap.requires_grad
    assert not pr.factorise(kernel, ridge=0.1).factor.requires_grad
    for one, new in ((kernel, cross), (kappa, few), (kernel.detach(), cross)):
        assert not pr.predict(one, y, new, ridge=0.1, initial=y, initial_cross=normal(4, 2).float()).requires_grad


# --- large matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kernel", "numbers"])
@pytest.mark.parametrize("place", [(0, 1), (0, 4), (2, 4), (1, 2), (4, 3)])
def test_symmetry_is_checked_everywhere(place, name, monkeypatch):
    """In pieces of two rows, as a large matrix is in pieces of 2048."""
    monkeypatch.setattr(pr, "DENSE", 2)
    good, y = positive(5, 1), normal(5, 1)
    bad = good[..., 0, 0].clone()
    pr.factorise(bad)
    bad[place] += 1e-4
    if name == "kernel":
        for function in (pr.factorise, pr.extreme_eigenvalues):
            with pytest.raises(ValueError, match=r"kernel: expected a symmetric matrix, got .* differ by 0\.0001"):
                function(bad)
        for size in (2, 2048):  # singular: without a factor, which would look as well
            monkeypatch.setattr(pr, "DENSE", size)
            with pytest.raises(ValueError, match="kernel: expected a symmetric matrix"):
                pr.extreme_eigenvalues(bad, singular=True)
    else:
        with pytest.raises(ValueError, match=r"numbers: expected a symmetric matrix, got .* differ by 0\.0001"):
            pr.prediction_gap(good, bad, y, good, bad)


def test_asymmetry_is_judged_by_half_the_digits_of_the_dtype():
    for dtype in (F32, F64):
        limit = torch.finfo(dtype).eps ** 0.5
        for share, refused in ((0.5, False), (2.0, True)):
            matrix = 100 * torch.eye(3, dtype=dtype)
            matrix[0, 2] = share * 100 * limit
            if refused:
                with pytest.raises(ValueError, match="kernel: expected a symmetric matrix"):
                    pr.factorise(matrix)
            else:
                pr.factorise(matrix)


def test_lanczos_converges_where_eigenvalues_lie_close_and_always_says_the_same(monkeypatch):
    values = torch.linspace(1, 2, 300, dtype=F64)
    matrix = with_spectrum(values)
    monkeypatch.setattr(pr, "DENSE", 10)
    first = pr.extreme_eigenvalues(matrix)
    assert first == pytest.approx((1, 2), rel=1e-9)
    assert all(pr.extreme_eigenvalues(matrix) == first for _ in range(3))


def test_lanczos_uses_the_factor_that_it_is_given(monkeypatch):
    """Of a kernel that has no inverse the ridge of a factorisation makes one."""
    values = torch.linspace(0, 3, 40, dtype=F64)
    matrix = with_spectrum(values)
    monkeypatch.setattr(pr, "DENSE", 10)
    solver = pr.factorise(matrix, ridge=0.25)
    assert pr.extreme_eigenvalues(matrix, factorisation=solver) == pytest.approx((0, 3), abs=1e-9)


@pytest.mark.parametrize("dense", [10, 2048])
def test_a_kernel_that_is_known_to_be_singular_has_a_zero(dense, monkeypatch):
    features = normal(20, 3, seed=2)
    matrix = features @ features.T
    monkeypatch.setattr(pr, "DENSE", dense)
    low, high = pr.extreme_eigenvalues(matrix, singular=True)
    assert low == 0.0
    assert high == pytest.approx(float(torch.linalg.matrix_norm(features, 2)) ** 2)


# --- tiles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiles(tmp_path):
    """Tiles of single precision, of sizes that differ."""
    pytest.importorskip("zarr")
    from ldyn import models
    from ldyn.kernels.tiles import tiled_gram

    model = models.mlp((5, 16, 3), seed=1).float()
    return tiled_gram(model, normal(11, 5).float(), path=tmp_path / "gram", tile=4, progress=False)


def test_tiles_learn_what_the_initial_function_leaves(tiles):
    matrix, ridge = tiles.tensor(), pr.relative_ridge(tiles, 0.1)
    assert matrix.dtype == F32
    assert ridge == pytest.approx(0.1 * float(matrix.diagonal().double().mean()), rel=1e-14)
    few, y, f, g = (normal(*shape, seed=k).float() for k, shape in enumerate([(4, 11), (11, 3), (11, 3), (4, 3)]))
    got = pr.predict(tiles, y, few, ridge=ridge, initial=f, initial_cross=g)
    assert got.dtype == F32
    K = matrix.double().numpy() + ridge * np.eye(11)
    want = g.double() + few.double() @ torch.tensor(np.linalg.solve(K, (y.double() - f.double()).numpy()))
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, pr.predict(tiles, y, few, ridge=ridge, initial_cross=g), atol=0.1)
    flat = pr.predict(tiles, y[:, 1], few, ridge=ridge, initial=f[:, 1], initial_cross=g[:, 1])
    torch.testing.assert_close(flat, want[:, 1].float(), rtol=1e-4, atol=1e-4)


def test_products_with_what_tiles_have_solved_are_taken_in_double_precision(tiles):
    """Rows that cancel: what single precision would lose is all that there is."""
    from ldyn.kernels.tiles import solve

    y = normal(11, 3, seed=1).float()
    weights = solve(tiles, y, ridge=1.0, rank=pr.RANK).solution.double()
    row = normal(11, seed=3)
    few = (row - (row @ weights[:, 0]) / (weights[:, 0] @ weights[:, 0]) * weights[:, 0]).float()[None]
    got = pr.predict(tiles, y, few, ridge=1.0)
    torch.testing.assert_close(got, (few.double() @ weights).float(), rtol=1e-6, atol=0)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["gram", np.eye(3), None, pr.factorise(torch.eye(3))])
def test_a_relative_ridge_of_what_is_no_kernel_is_refused(kernel):
    with pytest.raises(ValueError, match="kernel: expected a tensor or a TiledGram, got"):
        pr.relative_ridge(kernel, 0.1)


def test_another_device_is_refused_by_name():
    kernel, y, cross = torch.eye(3, dtype=F64), normal(3, 2), normal(4, 3)
    good = {"targets": y, "cross": cross, "initial": y, "initial_cross": normal(4, 2)}
    for name, value in good.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected the device of kernel \(cpu\), got meta"):
            pr.predict(kernel, **(good | {name: value.to("meta")}))


@pytest.mark.parametrize("name", ["numbers", "targets", "cross", "cross_numbers", "initial"])
def test_the_gap_refuses_other_dtypes_and_values_by_name(name):
    kernel, cross = positive(3, 2), normal(4, 3, 2, 2, seed=1)
    good = {"numbers": kernel[..., 0, 0], "targets": normal(3, 2), "cross": cross, "cross_numbers": cross[..., 0, 0]}
    good |= {"initial": normal(3, 2)}
    pr.prediction_gap(kernel, **good)
    for wrong, message in (
        (good[name].float(), r"expected the dtype of kernel \(torch.float64\), got torch.float32"),
        (good[name] * torch.nan, "expected finite values"),
        (good[name][:, 1:], "expected shape"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: {message}"):
            pr.prediction_gap(kernel, **(good | {name: wrong}))
