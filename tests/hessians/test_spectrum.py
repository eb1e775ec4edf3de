"""Extreme eigenvalues and spectral densities, against dense linear algebra."""

import math

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldyn.hessians.spectrum import SymmetricOperator, curvature_operator, spectral_density, top_eigenvalues
from ldyn.models import mlp

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- top_eigenvalues ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 6), st.sampled_from(["largest", "smallest", "magnitude"]), st.integers(0, 10**6)
)
def test_extreme_eigenvalues_equal_those_of_the_dense_matrix(size, k, which, seed):
    matrix = normal(size, size, seed=seed)
    matrix = matrix + matrix.T
    k = min(k, size)
    pairs = top_eigenvalues(matrix, k, which=which)
    exact = torch.linalg.eigvalsh(matrix)
    key = {"largest": -exact, "smallest": exact, "magnitude": -exact.abs()}[which]
    assert torch.allclose(pairs.values, exact[key.argsort()[:k]], atol=1e-10 * size)
    assert torch.allclose(pairs.vectors.T @ pairs.vectors, torch.eye(k, dtype=F64), atol=1e-10)
    assert torch.allclose(matrix @ pairs.vectors, pairs.vectors * pairs.values, atol=1e-8 * size)
    assert (pairs.residuals <= 1e-8 * size).all()


def test_residuals_bound_the_error_when_the_tolerance_is_loose():
    matrix = torch.diag(torch.linspace(0, 1, 400, dtype=F64))
    pairs = top_eigenvalues(matrix, 3, tolerance=0.03)
    exact = torch.diag(matrix)
    distance = (pairs.values[:, None] - exact).abs().min(1).values
    assert (distance <= pairs.residuals + 1e-14).all()
    assert float(pairs.residuals.max()) > 1e-6
    tight = top_eigenvalues(matrix, 3)
    assert torch.allclose(tight.values, exact.flip(0)[:3], atol=1e-10)
    assert float(tight.residuals.max()) < 1e-8


def test_low_rank_and_repeated_eigenvalues():
    v = normal(80, seed=1)
    one = SymmetricOperator(80, F64, v.device, lambda rows: torch.outer(rows @ v, v))
    pairs = top_eigenvalues(one, 2)
    assert float(pairs.values[0]) == pytest.approx(float(v @ v), rel=1e-12)
    assert abs(float(pairs.values[1])) < 1e-10
    again = top_eigenvalues(one, 2)
    assert torch.equal(again.values, pairs.values) and torch.equal(again.vectors, pairs.vectors)
    twins = torch.diag(torch.cat([torch.linspace(0, 1, 60, dtype=F64), torch.full((2,), 5.0, dtype=F64)]))
    assert torch.allclose(top_eigenvalues(twins, 2).values, torch.full((2,), 5.0, dtype=F64))


def test_deterministic_and_the_generators_are_left_alone():
    matrix = normal(50, 50)
    matrix = matrix @ matrix.T
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (top_eigenvalues(matrix, 2) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_operators_of_curvlinops_are_accepted(kind):
    model, x, y = mlp((3, 4, 3), activation="gelu", seed=3), normal(5, 3), torch.tensor([0, 2, 1, 1, 0])
    make = {"hessian": HessianLinearOperator, "gauss_newton": GGNLinearOperator}[kind]
    theirs = make(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    ours = curvature_operator(model, x, y, kind=kind)
    v = normal(ours.size, seed=2)
    assert torch.allclose(theirs @ v, ours @ v, atol=1e-14)
    assert torch.allclose(top_eigenvalues(theirs, 3).values, top_eigenvalues(ours, 3).values, atol=1e-12)
    one, other = (spectral_density(op, steps=6, probes=2) for op in (theirs, ours))
    assert torch.allclose(one.density, other.density, atol=1e-8)


def test_bad_requests_are_named():
    matrix = torch.eye(40, dtype=F64)
    bad = [
        ("k", lambda: top_eigenvalues(matrix, 0)),
        ("k", lambda: top_eigenvalues(matrix, 41)),
        ("which", lambda: top_eigenvalues(matrix, 1, which="LM")),
        ("tolerance", lambda: top_eigenvalues(matrix, 1, tolerance=0)),
        ("seed", lambda: top_eigenvalues(matrix, 1, seed=0.5)),
        ("operator", lambda: top_eigenvalues(matrix[:3], 1)),
        ("operator", lambda: top_eigenvalues(matrix.long(), 1)),
        ("steps", lambda: spectral_density(matrix, steps=0)),
        ("probes", lambda: spectral_density(matrix, probes=0)),
        ("width", lambda: spectral_density(matrix, width=0.0)),
        ("points", lambda: spectral_density(matrix, points=1)),
        ("seed", lambda: spectral_density(matrix, seed=-1)),
        ("order", lambda: spectral_density(matrix).moment(-1)),
    ]
    for name, call in bad:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()


# --- spectral_density ---------------------------------------------------------------------------------------


def test_moments_are_traces_of_powers_on_average():
    values = torch.cat([torch.linspace(-1, 1, 40, dtype=F64), torch.tensor([3.0, 4.0], dtype=F64)])
    frame = torch.linalg.qr(normal(42, 42)).Q
    density = spectral_density(frame @ torch.diag(values) @ frame.T, steps=6, probes=4000)
    for order in range(6):
        powers = values**order
        spread = math.sqrt(2 / (44 * 4000) * float(powers.square().mean() - powers.mean() ** 2))
        assert abs(density.moment(order) - float(powers.mean())) <= 4 * spread + 1e-13
    # the variance is the exact one, not just an upper bound
    each = (density.weights * density.nodes**2).view(4000, 6).sum(1) * 4000
    powers = values**2
    assert float(each.var()) == pytest.approx(2 / 44 * float(powers.square().mean() - powers.mean() ** 2), rel=0.1)


def test_density_is_one_in_total_and_smooths_the_nodes():
    matrix = torch.diag(torch.linspace(-2, 3, 60, dtype=F64))
    density = spectral_density(matrix, steps=20, probes=3)
    assert float(density.weights.sum()) == pytest.approx(1, abs=1e-14)
    assert density.nodes.shape == density.weights.shape == (60,)
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=2e-6)
    # smoothing with a normal density keeps the mean and adds its variance
    grid, mass = density.grid, density.density
    mean = float(torch.trapezoid(grid * mass, grid))
    assert mean == pytest.approx(density.moment(1), abs=1e-5)
    second = float(torch.trapezoid(grid**2 * mass, grid))
    assert second == pytest.approx(density.moment(2) + density.width**2, abs=1e-4)


def test_outliers_stand_at_their_place_with_weight_one_over_p():
    bulk = normal(200, 200, seed=4) / math.sqrt(400)
    matrix = (bulk + bulk.T) / 2
    spikes = torch.linalg.qr(normal(200, 3, seed=5)).Q
    matrix = matrix + spikes @ torch.diag(torch.tensor([10.0, 20.0, 30.0], dtype=F64)) @ spikes.T
    exact = torch.linalg.eigvalsh(matrix)
    density = spectral_density(matrix, steps=30, probes=60)
    for outlier in exact[-3:]:
        near = (density.nodes - outlier).abs() < 1e-6
        assert near.sum() == 60
        assert float(density.weights[near].sum()) == pytest.approx(1 / 200, rel=0.6)


def test_probes_are_independent_and_seeded():
    matrix = torch.diag(torch.linspace(0, 1, 50, dtype=F64))
    one, same, other = (spectral_density(matrix, steps=5, probes=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.nodes, same.nodes) and not torch.allclose(one.nodes, other.nodes)
    assert not torch.allclose(one.nodes[:5], one.nodes[5:])


def test_a_multiple_of_the_identity_has_a_density_too():
    for factor in (0.0, 3.0):
        density = spectral_density(factor * torch.eye(8, dtype=F64), probes=3)
        assert density.nodes.tolist() == pytest.approx([factor] * 3, abs=1e-14)
        assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=2e-6)


def test_a_progress_bar_changes_nothing(capsys):
    matrix = torch.diag(torch.linspace(0, 1, 10, dtype=F64))
    quiet, shown = (spectral_density(matrix, steps=3, probes=2, progress=flag) for flag in (False, True))
    assert torch.equal(quiet.density, shown.density)
    assert capsys.readouterr().out == ""
