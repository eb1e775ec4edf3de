"""A kernel on a training set in its eigenbasis, and a regression written as matrices.

The private half of `ldyn.kernels.regression`: shapes, checks and the filters that act on each eigenvector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldyn import _checks


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A kernel on the training set in its eigenbasis, D = N·V for blocks and D = N for a scalar kernel.

    Attributes:
        eigenvalues: (D,) float64, ascending, not negative.
        vectors: (D, D) float64, an orthonormal eigenvector in each column.
        rank: number of eigenvalues that are not zero up to rounding.
        examples: number N of training examples.
        outputs: number V of outputs for a kernel of blocks; None for a scalar kernel, the same for every output.
        dtype: dtype of the kernel, in which results are returned.
    """

    eigenvalues: Tensor
    vectors: Tensor
    rank: int
    examples: int
    outputs: int | None
    dtype: torch.dtype


def spectrum(kernel: Tensor, *, tolerance: float | None = None) -> Spectrum:
    """Diagonalise a kernel on the training set once, for use in all the functions of this module.

    Derived in the chapter kernels/regression.

    Args:
        kernel: (N, N, V, V) blocks as from `ldyn.kernels.entk.entk`, or (N, N) for a scalar kernel. Symmetric and
            positive semidefinite when read as a matrix.
        tolerance: An eigenvalue counts as zero if it is at most this multiple ≥ 0 of the largest one; by default D
            times the machine epsilon of the kernel's dtype.

    Returns:
        The spectrum; computed in float64 whatever the dtype.

    Raises:
        ValueError: If the shape is neither, the matrix is not finite, not symmetric or has an eigenvalue that is
            clearly negative, or the tolerance is negative.
    """
    value = _checks.require_real(kernel, "kernel", min_ndim=2).detach()
    if value.ndim == 4:
        _checks.require_shape(value, "kernel", ("N", "N", "V", "V"))
    elif value.ndim != 2 or value.shape[0] != value.shape[1]:
        raise ValueError(f"kernel: expected shape (N, N, V, V) or (N, N), got {_checks.describe(value)}")
    epsilon = torch.finfo(value.dtype).eps
    matrix = as_matrix(value)
    scale = float(matrix.abs().amax())
    asymmetry = float((matrix - matrix.T).abs().amax())
    if asymmetry > math.sqrt(epsilon) * scale:
        raise ValueError(f"kernel: expected a symmetric matrix, got entries that differ by {asymmetry:.3g}")
    eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if smallest < -math.sqrt(epsilon) * max(largest, 0.0):
        raise ValueError(f"kernel: expected a positive semidefinite matrix, got the eigenvalue {smallest:.6g}")
    size = len(eigenvalues)
    cut = size * epsilon if tolerance is None else _checks.require_nonnegative(tolerance, "tolerance")
    rank = int((eigenvalues > cut * largest).sum())
    outputs = value.shape[2] if value.ndim == 4 else None
    return Spectrum(eigenvalues.clamp_min(0), vectors, rank, len(value), outputs, value.dtype)


class Problem(NamedTuple):
    """A regression as matrices in float64: C columns are solved at once with one kernel matrix."""

    targets: Tensor  # (D, C)
    residual: Tensor  # (D, C), targets minus initial predictions
    cross: Tensor | None  # (E, D)
    initial_cross: Tensor | None  # (E, C)
    shape: torch.Size
    cross_shape: tuple[int, ...]
    outputs: int
    dtype: torch.dtype


def as_matrix(kernel: Tensor) -> Tensor:
    """Read blocks (M, N, V, V) as a matrix (MV, NV), entry (i, a), (j, b) from [i, j, a, b], in float64."""
    wide = kernel.detach().to(torch.float64)
    if wide.ndim == 2:
        return wide
    rows, columns, out, into = wide.shape
    return wide.permute(0, 2, 1, 3).reshape(rows * out, columns * into)


def as_spectrum(kernel: Tensor | Spectrum) -> Spectrum:
    """Diagonalise a kernel unless that has been done."""
    return kernel if isinstance(kernel, Spectrum) else spectrum(kernel)


def read_times(value: object, name: str, *, whole: bool) -> tuple[Tensor, bool]:
    """Read one time or several as float64 (T,), and say whether it was one."""
    listed: object = value.tolist() if hasattr(value, "tolist") else value
    many = isinstance(listed, Sequence) and not isinstance(listed, str)
    items = list(listed) if isinstance(listed, Sequence) and many else [listed]
    if not items:
        raise ValueError(f"{name}: expected at least one number, got none")
    if whole:
        numbers: list[float] = [_checks.require_integer(item, name, minimum=0) for item in items]
    else:
        numbers = [_checks.require_nonnegative(item, name) for item in items]
    return torch.tensor(numbers, dtype=torch.float64), not many


def _fit(value: object, name: str, shape: Sequence[int | str | None], modes: Spectrum) -> Tensor:
    """Check a tensor that goes with the kernel, and return it detached."""
    tensor = _checks.require_shape(_checks.require_real(value, name), name, shape)
    if tensor.dtype != modes.dtype:
        raise ValueError(f"{name}: expected the dtype of kernel ({modes.dtype}), got {tensor.dtype}")
    if tensor.device != modes.vectors.device:
        raise ValueError(f"{name}: expected the device of kernel ({modes.vectors.device}), got {tensor.device}")
    return tensor.detach()


def as_problem(
    modes: Spectrum, targets: Tensor, initial: Tensor | None, cross: Tensor | None, initial_cross: Tensor | None
) -> Problem:
    """Check the parts of a regression against each other and write them as matrices."""
    flat = modes.outputs is None and isinstance(targets, Tensor) and targets.ndim == 1
    tail: list[int | str | None] = [] if flat else [modes.outputs or "V"]
    wanted = _fit(targets, "targets", [modes.examples, *tail], modes)
    start = torch.zeros_like(wanted) if initial is None else _fit(initial, "initial", list(wanted.shape), modes)
    columns = 1 if flat or modes.outputs is not None else wanted.shape[1]
    y = wanted.to(torch.float64).reshape(-1, columns)
    residual = y - start.to(torch.float64).reshape(-1, columns)
    outputs = 1 if flat else wanted.shape[1]
    if cross is None:
        if initial_cross is not None:
            raise ValueError("initial_cross: expected it only together with cross, got it alone")
        return Problem(y, residual, None, None, wanted.shape, (), outputs, modes.dtype)
    blocks = [] if modes.outputs is None else [modes.outputs, modes.outputs]
    rows = _fit(cross, "cross", ["M", modes.examples, *blocks], modes)
    shape = (len(rows), *wanted.shape[1:])
    before = rows.new_zeros(shape) if initial_cross is None else _fit(initial_cross, "initial_cross", shape, modes)
    return Problem(
        y,
        residual,
        as_matrix(rows),
        before.to(torch.float64).reshape(-1, columns),
        wanted.shape,
        shape,
        outputs,
        modes.dtype,
    )


def powers(x: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return q = (1 − x)^t and 1 − q, both (T, D), without cancellation for small x and without NaN for any."""
    t, below = steps[:, None], x < 1
    logarithm = torch.where(below, torch.log1p(-x.clamp_max(0.5)), 0.0)
    logarithm = torch.where(x > 0.5, (1 - x).abs().log(), logarithm)  # −inf at x = 1, where t = 0 still gives 1
    exponent = torch.where(t == 0, 0.0, t * logarithm)
    sign = torch.where(below | (t % 2 == 0), 1.0, -1.0)
    kept = sign * exponent.exp()
    return kept, torch.where(below, -exponent.expm1(), 1 - kept)


def gains(modes: Spectrum, learned: Tensor, rate: float, times: Tensor) -> Tensor:
    """Divide the learned share of each mode by its eigenvalue; where that is zero, take the limit rate·t."""
    values = modes.eigenvalues
    floor = torch.finfo(torch.float64).eps ** 2 * values[-1]
    slope = rate * times.to(values.device)[:, None]
    return torch.where(values > floor, learned / values.clamp_min(torch.finfo(torch.float64).tiny), slope)


def predictions(problem: Problem, modes: Spectrum, kept: Tensor, gain: Tensor) -> tuple[Tensor, Tensor | None]:
    """Apply the filters (T, D) to the residual, and return predictions (T, ...) in the kernel's dtype."""
    times = len(kept)
    amplitudes = modes.vectors.T @ problem.residual
    # a mode that holds no residual stays empty, also where its filter has overflowed
    left, gained = (torch.where(amplitudes == 0, 0.0, f[:, :, None] * amplitudes) for f in (kept, gain))
    train = problem.targets - modes.vectors @ left
    train = train.reshape(times, *problem.shape).to(problem.dtype)
    if problem.cross is None or problem.initial_cross is None:
        return train, None
    other = problem.initial_cross + (problem.cross @ modes.vectors) @ gained
    return train, other.reshape(times, *problem.cross_shape).to(problem.dtype)


def all_finite(*tensors: Tensor | None) -> bool:
    """Tell whether all the numbers are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)
