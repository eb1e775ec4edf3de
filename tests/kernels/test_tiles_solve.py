"""Conjugate gradients on kernels in tiles and in memory, against a factorisation and against their own theory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldyn.kernels import tiles
from ldyn.models import mlp

pytest.importorskip("scipy")

F64 = torch.float64


def spectral(values, seed=0):
    """Build a symmetric matrix of given eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=F64))[0]
    matrix = basis * torch.as_tensor(values, dtype=F64) @ basis.T
    return (matrix + matrix.T) / 2


def columns(size, count=3, seed=1):
    return torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=F64)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 12),
    count=st.integers(0, 3),
    ridge=st.floats(0.1, 10),
    rank=st.sampled_from([0, 1, 4, 99]),
    seed=st.integers(0, 99),
)
def test_solutions_are_those_of_a_factorisation(size, count, ridge, rank, seed):
    values = torch.linspace(0, 5, size, dtype=F64) ** 2
    kernel, rhs = spectral(values, seed), columns(size, max(count, 1), seed)
    rhs = rhs if count else rhs[:, 0]
    found = tiles.solve(kernel, rhs, ridge=ridge, rank=rank, rtol=1e-12, progress=False)
    exact = torch.linalg.solve(kernel + ridge * torch.eye(size, dtype=F64), rhs)
    torch.testing.assert_close(found.solution, exact, rtol=1e-8, atol=1e-9)
    assert found.residual <= 1e-12 and found.solution.shape == rhs.shape


def test_a_kernel_in_tiles_is_solved_like_one_in_memory(tmp_path):
    x, y = columns(40), columns(40, 4)
    gram = tiles.tiled_gram(mlp((3, 8, 2)), x, path=tmp_path / "k", tile=16)
    ridge = 0.01 * float(gram.tensor().trace()) / 40
    whole = gram.tensor() + ridge * torch.eye(40, dtype=F64)
    for rank in (0, 8):
        found = tiles.solve(gram, y, ridge=ridge, rank=rank, rtol=1e-11)
        torch.testing.assert_close(found.solution, torch.linalg.solve(whole, y), rtol=1e-8, atol=1e-9)
        assert found.residual == pytest.approx(float((y - whole @ found.solution).norm() / y.norm()), rel=1e-3)


def test_with_few_eigenvalues_few_steps_are_enough():
    kernel = spectral([1.0] * 20 + [7.0] * 20 + [50.0] * 10)
    assert tiles.solve(kernel, columns(50), rtol=1e-10).iterations == 3
    assert tiles.solve(kernel, columns(50), rtol=1e-10, rank=50).iterations <= 2
    assert tiles.solve(spectral([2.0] * 9), columns(9)).iterations == 1


def test_a_preconditioner_takes_the_large_eigenvalues_out():
    values = np.concatenate([np.geomspace(1e6, 10, 20), np.ones(80)])
    kernel, rhs = spectral(values), columns(100)
    plain, helped = (tiles.solve(kernel, rhs, ridge=0.1, rank=rank).iterations for rank in (0, 40))
    assert helped < plain / 4


def test_the_error_keeps_to_its_bound_in_every_step():
    kernel, rhs, ridge = spectral(np.geomspace(1e-3, 1, 60)), columns(60, 1), 1e-2
    shifted = kernel + ridge * torch.eye(60, dtype=F64)
    exact, ratio = torch.linalg.solve(shifted, rhs), (1 + ridge) / (1e-3 + ridge)
    rate = (math.sqrt(ratio) - 1) / (math.sqrt(ratio) + 1)

    def length(v):
        return float((v * (shifted @ v)).sum().sqrt())

    for steps in (1, 3, 10, 20):
        with pytest.raises(tiles.NotConverged) as caught:
            tiles.solve(kernel, rhs, ridge=ridge, max_iter=steps, rtol=1e-15)
        reached = caught.value.solution
        assert reached.iterations == steps
        assert length(exact - reached.solution) <= 2 * rate**steps * length(exact)


def test_what_was_reached_is_kept_and_can_be_gone_on_from():
    kernel, rhs = spectral(np.geomspace(1e-4, 1, 50)), columns(50)
    with pytest.raises(
        tiles.NotConverged, match=r"^expected a relative residual of 1e-08, got \d\S* after 20 "
    ) as caught:
        tiles.solve(kernel, rhs, ridge=1e-4, max_iter=20)
    half = caught.value.solution
    assert half.iterations == 20 and 1e-8 < half.residual < 1
    rest = tiles.solve(kernel, rhs, ridge=1e-4, initial=half.solution)
    assert rest.residual <= 1e-8
    assert tiles.solve(kernel, rhs, ridge=1e-4, initial=rest.solution).iterations == 0


def test_a_singular_system_is_solved_if_it_has_a_solution_and_never_silently_if_not():
    kernel = spectral([0.0, 0.0, 1.0, 2.0, 3.0])
    inside = kernel @ columns(5)
    found = tiles.solve(kernel, inside)
    torch.testing.assert_close(found.solution, torch.linalg.pinv(kernel) @ inside, rtol=1e-6, atol=1e-8)
    for rank in (0, 3, 5):
        with pytest.raises(tiles.NotConverged, match="a larger ridge") as caught:
            tiles.solve(kernel, columns(5), rank=rank, max_iter=200)
        assert torch.isfinite(caught.value.solution.solution).all() and caught.value.solution.residual <= 1


def test_more_than_the_dtype_can_give_is_not_promised():
    kernel, rhs = spectral(np.geomspace(1e-9, 1, 40)), columns(40)
    with pytest.raises(tiles.NotConverged) as caught:
        tiles.solve(kernel, rhs, rtol=1e-17)
    assert caught.value.solution.residual < 1e-3


def test_zero_needs_no_steps_and_dtypes_are_kept():
    kernel = spectral([1.0, 2.0, 3.0]).float()
    nothing = tiles.solve(kernel, torch.zeros(3))
    assert nothing.iterations == 0 and nothing.residual == 0 and torch.equal(nothing.solution, torch.zeros(3))
    assert tiles.solve(kernel, torch.ones(3), rtol=1e-4).solution.dtype == torch.float32


def test_nothing_of_the_callers_changes():
    kernel, rhs, initial = spectral([1.0, 2.0, 30.0]), columns(3), columns(3, seed=5)
    kept, noise = [t.clone() for t in (kernel, rhs, initial)], torch.get_rng_state()
    tiles.solve(kernel, rhs, initial=initial, rank=2)
    assert all(torch.equal(one, other) for one, other in zip((kernel, rhs, initial), kept, strict=True))
    assert torch.equal(noise, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": torch.eye(2, 3, dtype=F64)}, r"^kernel: expected shape \(N, N\)"),
        ({"kernel": torch.triu(torch.ones(3, 3, dtype=F64))}, r"^kernel: expected a symmetric matrix, .* differ by 1"),
        ({"kernel": None}, r"^kernel: expected a torch\.Tensor, got None"),
        ({"rhs": torch.ones(2, dtype=F64)}, r"^rhs: expected shape \(3,\) or \(3, C\), got .*\(2,\)"),
        ({"rhs": torch.ones(3, 1, 1, dtype=F64)}, r"^rhs: expected shape \(3,\) or \(3, C\)"),
        ({"rhs": torch.ones(3)}, r"^rhs: expected the dtype of the kernel \(torch\.float64\), got torch\.float32"),
        ({"rhs": torch.tensor([1.0, math.nan, 0.0], dtype=F64)}, "^rhs: expected finite values"),
        ({"initial": torch.ones(3, 1, dtype=F64)}, r"^initial: expected shape \(3\), got .*\(3, 1\)"),
        ({"ridge": -1.0}, "^ridge: expected a number >= 0, got -1"),
        ({"rtol": 0.0}, "^rtol: expected a number > 0"),
        ({"max_iter": 0}, "^max_iter: expected an integer >= 1, got 0"),
        ({"rank": -1}, "^rank: expected an integer >= 0, got -1"),
        ({"client": object()}, "^client: expected it only together with a kernel in tiles"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    options = {"kernel": torch.eye(3, dtype=F64), "rhs": torch.ones(3, dtype=F64), **changes}
    with pytest.raises(ValueError, match=message):
        tiles.solve(**options)


def test_a_kernel_between_two_sets_is_refused(tmp_path):
    gram = tiles.tiled_gram(mlp((3, 2)), columns(3), columns(3, seed=4), path=tmp_path / "k")
    with pytest.raises(ValueError, match=r"^kernel: expected a symmetric one \(x2 left out\)"):
        tiles.solve(gram, columns(3))
