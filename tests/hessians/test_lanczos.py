"""Lanczos' process: its invariants, its quadrature rule, its ends, and what goes wrong without reorthogonalisation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldyn.hessians.spectrum import Lanczos, SymmetricOperator, lanczos

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def symmetric(values, seed=0, dtype=F64):
    """A matrix with given eigenvalues in random directions."""
    values = torch.as_tensor(values, dtype=dtype)
    frame = torch.linalg.qr(torch.randn(len(values), len(values), dtype=dtype, generator=generator(seed))).Q
    return frame @ (values[:, None] * frame.T)


def defects(matrix, found):
    """How far A Q − Q T − r eᵀ, QᵀQ − I and Qᵀr are from zero."""
    steps = found.T.shape[0]
    last = torch.zeros(steps, dtype=matrix.dtype)
    last[-1] = 1
    recurrence = matrix @ found.Q - found.Q @ found.T - torch.outer(found.residual, last)
    gram = found.Q.T @ found.Q - torch.eye(steps, dtype=matrix.dtype)
    return [float(part.abs().max()) for part in (recurrence, gram, found.Q.T @ found.residual)]


def without_reorthogonalisation(matrix, steps, start):
    """The three-term recurrence alone, as textbooks print it: the control."""
    q, before, beta = start / start.norm(), torch.zeros_like(start), 0.0
    alphas, betas = [], []
    for _ in range(steps):
        image = matrix @ q - beta * before
        alphas.append(q @ image)
        residual = image - alphas[-1] * q
        beta = residual.norm()
        betas.append(beta)
        before, q = q, residual / beta
    beside = torch.diag(torch.stack(betas[:-1]), 1)
    return torch.diag(torch.stack(alphas)) + beside + beside.T


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6]))
def test_invariants_hold_for_every_size_and_scale(size, steps, seed, scale):
    matrix = symmetric(scale * torch.randn(size, generator=generator(seed), dtype=F64), seed)
    found = lanczos(matrix, steps, seed=seed)
    count = found.T.shape[0]
    assert found.Q.shape == (size, count) and count == min(size, steps)
    recurrence, gram, across = defects(matrix, found)
    assert recurrence < 1e-13 * scale * size and across < 1e-13 * scale * size
    assert gram < 1e-13
    assert torch.equal(found.T, found.T.T)
    assert torch.equal(found.T, found.T.tril(1).triu(-1))
    assert (found.T.diagonal(1) >= 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_quadrature_is_exact_to_degree_two_m_minus_one_and_no_further(steps):
    matrix = symmetric(torch.linspace(-1, 1.5, 40), 1)
    start = torch.randn(40, dtype=F64, generator=generator(2))
    found = lanczos(matrix, steps, start=start)
    rule = found.quadrature()
    unit = start / start.norm()
    power = unit
    for degree in range(2 * steps):
        assert float((rule.weights * rule.nodes**degree).sum()) == pytest.approx(float(unit @ power), abs=1e-13)
        power = matrix @ power
    miss = float(unit @ power) - float((rule.weights * rule.nodes ** (2 * steps)).sum())
    betas = [*found.T.diagonal(1).tolist(), float(found.residual.norm())]
    assert miss == pytest.approx(math.prod(beta**2 for beta in betas), rel=1e-8)
    assert miss > 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_weights_are_a_probability_distribution(size, seed):
    matrix = symmetric(torch.randn(size, generator=generator(seed), dtype=F64), seed)
    rule = lanczos(matrix, size, seed=seed).quadrature()
    assert float(rule.weights.sum()) == pytest.approx(1, abs=1e-15)
    assert (rule.weights >= 0).all() and (rule.nodes.diff() >= 0).all()


def test_five_outliers_stay_five_where_the_plain_recurrence_makes_copies():
    values = torch.cat([torch.linspace(0, 1, 300), torch.tensor([20.0, 40.0, 60.0, 80.0, 100.0])])
    matrix = symmetric(values, 3)
    start = torch.randn(len(values), dtype=F64, generator=generator(4))
    ritz = lanczos(matrix, 120, start=start).quadrature().nodes
    assert (ritz > 10).sum() == 5
    assert torch.allclose(ritz[-5:], values[-5:].double(), atol=1e-10)
    ghosts = torch.linalg.eigvalsh(without_reorthogonalisation(matrix, 120, start))
    assert (ghosts > 10).sum() >= 15


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_stops_at_an_invariant_subspace(rank):
    values = torch.zeros(25)
    values[:rank] = torch.arange(1.0, rank + 1)
    matrix = symmetric(values, rank)
    start = torch.randn(25, dtype=F64, generator=generator(5))
    found = lanczos(matrix, 20, start=start)
    # the start vector has a part in the kernel: one dimension more than the rank, and what rounding may add
    assert found.complete and rank + 1 <= found.T.shape[0] <= rank + 2
    assert max(defects(matrix, found)) < 1e-12
    rule = found.quadrature()
    exact, frame = torch.linalg.eigh(matrix)
    mass = (frame.T @ (start / start.norm())).square()
    for value in range(rank + 1):
        near = float(rule.weights[(rule.nodes - value).abs() < 1e-8].sum())
        assert near == pytest.approx(float(mass[(exact - value).abs() < 1e-8].sum()), abs=1e-13)


@pytest.mark.parametrize("factor", [0.0, 1.0, -1e-8, 3e9])
def test_a_multiple_of_the_identity_ends_at_once(factor):
    found = lanczos(factor * torch.eye(9, dtype=F64), 5)
    assert found.complete and found.Q.shape == (9, 1)
    assert float(found.T[0, 0]) == pytest.approx(factor, rel=1e-14, abs=1e-300)
    assert float(found.quadrature().weights) == 1


def test_an_eigenvector_ends_at_once_and_the_full_space_is_no_breakdown():
    matrix = torch.diag(torch.arange(1.0, 7.0, dtype=F64))
    assert lanczos(matrix, 4, start=torch.eye(6, dtype=F64)[2]).T.tolist() == [[3.0]]
    whole = lanczos(matrix, 50, seed=1)
    assert whole.T.shape == (6, 6)
    assert torch.allclose(whole.quadrature().nodes, torch.arange(1.0, 7.0, dtype=F64), atol=1e-12)


def test_single_precision_is_kept_and_orthonormal_too():
    matrix = symmetric(torch.cat([torch.linspace(0, 1, 150), torch.tensor([50.0, 100.0])]), 6, torch.float32)
    found = lanczos(matrix, 60)
    assert {found.Q.dtype, found.T.dtype, found.residual.dtype} == {torch.float32}
    recurrence, gram, _ = defects(matrix, found)
    assert recurrence < 2e-4 and gram < 2e-6
    assert (found.quadrature().nodes > 10).sum() == 2


def test_the_scale_of_the_start_vector_does_not_matter():
    matrix = symmetric(torch.linspace(0, 1, 12), 7)
    start = torch.randn(12, dtype=F64, generator=generator(8))
    one = lanczos(matrix, 6, start=start)
    for factor in (1e-200, 1e200, 8.0):
        assert torch.allclose(lanczos(matrix, 6, start=factor * start).T, one.T, atol=1e-13)


def test_seeds_decide_and_the_global_generator_is_left_alone():
    matrix = symmetric(torch.linspace(0, 1, 12), 9)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, again, other = (lanczos(matrix, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.Q, again.Q) and not torch.allclose(first.Q, other.Q)
    assert isinstance(first, Lanczos)


def test_bad_arguments_are_named():
    matrix = symmetric(torch.linspace(0, 1, 5), 10)
    cases = [
        ("operator", lambda: lanczos(matrix[:3], 2)),
        ("operator", lambda: lanczos(matrix.half(), 2)),
        ("operator", lambda: lanczos(matrix + torch.ones(5, 5, dtype=F64).triu(1), 2)),
        ("operator", lambda: lanczos(matrix * float("nan"), 2)),
        ("operator", lambda: lanczos("matrix", 2)),
        ("operator", lambda: lanczos(torch.zeros(0, 0), 2)),
        ("steps", lambda: lanczos(matrix, 0)),
        ("steps", lambda: lanczos(matrix, 2.0)),
        ("seed", lambda: lanczos(matrix, 2, seed=-1)),
        ("start", lambda: lanczos(matrix, 2, start=torch.zeros(5, dtype=F64))),
        ("start", lambda: lanczos(matrix, 2, start=torch.ones(4, dtype=F64))),
        ("start", lambda: lanczos(matrix, 2, start=torch.ones(5))),
        ("operator, its product", lambda: lanczos(overflowing(), 3)),
        ("operator, its product", lambda: lanczos(SymmetricOperator(4, F64, matrix.device, lambda v: v[:, :2]), 3)),
    ]
    for name, call in cases:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()


def overflowing():
    return SymmetricOperator(4, F64, torch.device("cpu"), lambda rows: rows / 0.0)
