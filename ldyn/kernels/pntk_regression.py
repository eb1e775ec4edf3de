"""Kernel regression with one number in place of each block of a tangent kernel, and what that changes.

A pseudo-NTK κ (N, N) predicts as if the kernel were κ ⊗ I: every output by itself, with one matrix of N rows in place
of one of N·V. Its extreme eigenvalues lie between those of the kernel, and the difference of the two predictions has a
closed form. Derived in the chapter *What one number a pair predicts*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ldyn import _checks

if TYPE_CHECKING:
    from ldyn.kernels.tiles import TiledGram

__all__ = [
    "Extremes",
    "Factorisation",
    "PredictionGap",
    "extreme_eigenvalues",
    "factorise",
    "predict",
    "prediction_gap",
    "relative_ridge",
]

DENSE = 2048
"""Matrices up to this size are diagonalised in full to find their extreme eigenvalues."""

RANK = 100
"""Rank of the preconditioner with which a kernel in tiles is solved."""


@dataclass(frozen=True, eq=False)
class Factorisation:
    """A kernel on the training set, factorised once for any number of regressions.

    Attributes:
        factor: (D, D) float64 lower triangular L with LLᵀ = K + λI; D = N for a scalar kernel, D = VN for blocks, whose
            rows are ordered by outputs first: (a, i) -> aN + i.
        ridge: λ.
        examples: number N of training examples.
        outputs: number V of outputs for a kernel of blocks; None for a scalar kernel.
        dtype: dtype of the kernel, in which results are returned.
    """

    factor: Tensor
    ridge: float
    examples: int
    outputs: int | None
    dtype: torch.dtype


class Extremes(NamedTuple):
    """The ends of a spectrum."""

    smallest: float
    """λ_min."""

    largest: float
    """λ_max."""


class PredictionGap(NamedTuple):
    """What predictions with a kernel K differ by from those with numbers κ, and a bound on it, with its parts."""

    gap: Tensor
    """(M, V), f_K − f_κ at the other inputs."""

    bound: float
    """Bound on the Euclidean norm of all of `gap`: (cross_error + smoothing · error) · residual / curvature."""

    error: float
    """Operator norm ‖K − κ ⊗ I‖ on the training inputs."""

    cross_error: float
    """Operator norm ‖K* − κ* ⊗ I‖ between the other inputs and the training inputs."""

    smoothing: float
    """Operator norm ‖κ* (κ + λI)⁻¹‖: how much regression with κ can enlarge a change of the targets."""

    residual: float
    """‖y − f₀(X)‖."""

    curvature: float
    """λ_min(K) + λ."""


def factorise(kernel: Tensor, *, ridge: float = 0.0) -> Factorisation:
    """Compute the Cholesky factor of K + λI, for use in `predict`; see the chapter *What one number a pair predicts*.

    Args:
        kernel: (N, N, V, V) blocks as from `ldyn.kernels.entk.entk`, or (N, N), symmetric and positive semidefinite
            when read as a matrix.
        ridge: λ ≥ 0, added to the diagonal; in the units of the kernel.

    Returns:
        The factor in float64, whatever the dtype.

    Raises:
        ValueError: If the shape is neither, the matrix is not finite or not symmetric, the ridge is negative, or
            K + λI is singular or indefinite to the precision of the kernel's dtype.
    """
    value = _kernel(kernel, "kernel")
    shift = _checks.require_nonnegative(ridge, "ridge")
    matrix = _matrix(value).clone()
    _require_symmetric(matrix, value.dtype, "kernel")
    matrix.diagonal().add_(shift)
    scale = max(float(matrix.diagonal().amax()), 0.0)
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivot = 0.0 if int(info) else float(factor.diagonal().amin()) ** 2
    if pivot <= len(matrix) * torch.finfo(value.dtype).eps * scale:
        raise ValueError(
            f"ridge: expected one that makes K + ridge·I positive definite to the precision of {value.dtype}, got"
            f" {shift:.6g}, which leaves a pivot of {pivot / scale if scale > 0 else 0.0:.3g} times the largest entry;"
            " ldyn.kernels.regression.kernel_regression takes the pseudo-inverse of a singular kernel"
        )
    return Factorisation(factor, shift, len(value), value.shape[2] if value.ndim == 4 else None, value.dtype)


def predict(
    kernel: Tensor | Factorisation | TiledGram,
    targets: Tensor,
    cross: Tensor,
    *,
    ridge: float = 0.0,
    initial: Tensor | None = None,
    initial_cross: Tensor | None = None,
) -> Tensor:
    """Kernel (ridge) regression: f₀(x) + K(x, X) (K + λI)⁻¹ (y − f₀(X)).

    A scalar kernel predicts each output by itself with the same weights, as the kernel κ ⊗ I of blocks would, and
    needs the same λ as the kernel of blocks that it stands for. Derived in the chapter *What one number a pair
    predicts*.

    Args:
        kernel: On the training inputs: (N, N, V, V), (N, N), either one's `factorise`, or the tiles of a scalar kernel
            (`ldyn.kernels.tiles`), which are solved with by conjugate gradients.
        targets: y, (N, V); a scalar kernel also takes (N,).
        cross: (M, N, V, V) or (M, N), as the kernel, between the other inputs and the training inputs:
            ``entk(model, x_other, x_train)``.
        ridge: λ ≥ 0. For a factorisation it is known, and need not be given.
        initial: f₀(X), of the shape of `targets`; None for zero.
        initial_cross: f₀ on the other inputs, (M, V) or (M,); None for zero.

    Returns:
        (M, V), or (M,) for targets (N,), in the dtype of the kernel; computed in float64.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, the ridge is negative or not that of the factorisation,
            or K + λI is singular or indefinite to the precision of the kernel's dtype.
    """
    if isinstance(kernel, Tensor):
        solver = factorise(kernel, ridge=ridge)
    elif isinstance(kernel, Factorisation):
        solver = kernel
        if _checks.require_nonnegative(ridge, "ridge") not in (0.0, solver.ridge):
            raise ValueError(f"ridge: expected that of the factorisation, {solver.ridge:.6g}, got {ridge!r}")
    else:
        return _from_tiles(kernel, targets, cross, ridge, initial, initial_cross)
    like = solver.factor
    blocks = [] if solver.outputs is None else [solver.outputs, solver.outputs]
    rows = _fit(cross, "cross", ["M", solver.examples, *blocks], solver.dtype, like)
    residual, start = _residual(
        targets, initial, initial_cross, (len(rows), solver.examples, solver.outputs), solver.dtype, like
    )
    if solver.outputs is None:
        change = rows.to(torch.float64) @ torch.cholesky_solve(residual.reshape(solver.examples, -1), like)
        return (start + change.reshape(start.shape)).to(solver.dtype)
    weights = torch.cholesky_solve(residual.T.reshape(-1, 1), like)
    change = (_matrix(rows) @ weights).reshape(solver.outputs, -1).T
    return (start + change).to(solver.dtype)


def relative_ridge(kernel: Tensor | TiledGram, fraction: float) -> float:
    """Choose a ridge in units of the mean eigenvalue: fraction · tr K / (NV), which no rescaling of the kernel alters.

    The kernel of a standard initialisation grows with the width, so that a ridge that is fixed means something else at
    every width. Derived in the chapter *What one number a pair predicts*.

    Args:
        kernel: (N, N, V, V), (N, N), or the tiles of a scalar kernel.
        fraction: A number ≥ 0.

    Returns:
        The ridge; the same for blocks as for their trace pseudo-NTK.

    Raises:
        ValueError: If the kernel is none of these or not finite, or its trace or the fraction is negative.
    """
    share = _checks.require_nonnegative(fraction, "fraction")
    if isinstance(kernel, Tensor):
        value = _kernel(kernel, "kernel")
        diagonal = value.diagonal(dim1=0, dim2=1)  # (N,) or (V, V, N)
        numbers = diagonal if value.ndim == 2 else diagonal.diagonal(dim1=0, dim2=1)
        mean = float(numbers.mean(dtype=torch.float64))
    else:
        if not hasattr(kernel, "tile"):  # a factorisation, or a kernel of another library
            raise ValueError(f"kernel: expected a tensor or a TiledGram, got {_checks.describe(kernel)}")
        if kernel.shape[0] != kernel.shape[1]:
            raise ValueError(f"kernel: expected one of equal sides, got shape {kernel.shape}")
        count, step = kernel.shape[0], kernel.tile
        slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        mean = sum(float(kernel.block(s, s).diagonal().sum(dtype=torch.float64)) for s in slices) / count
    if mean < 0:
        raise ValueError(f"kernel: expected a trace >= 0, got a mean of {mean:.6g} on the diagonal")
    return share * mean


def extreme_eigenvalues(
    kernel: Tensor, *, factorisation: Factorisation | None = None, singular: bool = False
) -> Extremes:
    """Find the smallest and the largest eigenvalue of a kernel, without the others where it is large.

    Beyond a size of 2048 they come from the Lanczos method (``scipy.sparse.linalg.eigsh``), with K for the largest and
    with (K + λI)⁻¹ for the smallest, which is then accurate relative to λ_min + λ.

    Args:
        kernel: (N, N, V, V) or (N, N), symmetric positive semidefinite when read as a matrix.
        factorisation: Its `factorise` with any ridge, if that has been done. Symmetry is then not checked again.
        singular: Whether the kernel is known to be singular, as it is where P < NV: its smallest eigenvalue is then
            zero and is not computed.

    Returns:
        The two eigenvalues.

    Raises:
        ValueError: If the shape is neither, the kernel is not finite or not symmetric, the factorisation is of another
            size, or a large kernel without one is singular.
    """
    value = _kernel(kernel, "kernel")
    matrix = _matrix(value)
    if factorisation is None:
        _require_symmetric(matrix, value.dtype, "kernel")
    else:
        _checks.require_shape(factorisation.factor, "factorisation.factor", tuple(matrix.shape))
    if len(matrix) <= DENSE:
        values = torch.linalg.eigvalsh(matrix)
        return Extremes(0.0 if singular else float(values[0]), float(values[-1]))
    largest = _lanczos(lambda v: matrix @ v, matrix)
    if singular:
        return Extremes(0.0, largest)
    solver = factorise(kernel) if factorisation is None else factorisation
    smallest = 1 / _lanczos(lambda v: torch.cholesky_solve(v, solver.factor), matrix) - solver.ridge
    return Extremes(smallest, largest)


def prediction_gap(
    kernel: Tensor,
    numbers: Tensor,
    targets: Tensor,
    cross: Tensor,
    cross_numbers: Tensor,
    *,
    ridge: float = 0.0,
    initial: Tensor | None = None,
) -> PredictionGap:
    """Difference of the predictions with a kernel and with numbers, by the exact error identity, and its bound.

    With P = κ ⊗ I, Δ = K − P and r = y − f₀(X) the difference is (Δ* − P*(P + λI)⁻¹Δ)(K + λI)⁻¹ r. Derived in the
    chapter *What one number a pair predicts*. Operator norms take a few diagonalisations of size NV.

    Args:
        kernel: K, (N, N, V, V).
        numbers: κ, (N, N), symmetric positive semidefinite.
        targets: y, (N, V).
        cross: K*, (M, N, V, V), between the other inputs and the training inputs.
        cross_numbers: κ*, (M, N).
        ridge: λ ≥ 0, the same for both.
        initial: f₀(X), (N, V); None for zero. Its value at the other inputs cancels.

    Returns:
        The difference and the bound with its parts.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, the ridge is negative, or either matrix plus λI is
            singular or indefinite to the precision of the dtype.
    """
    value = _checks.require_shape(_kernel(kernel, "kernel"), "kernel", ("N", "N", "V", "V"))
    count, outputs = len(value), value.shape[2]
    whole = factorise(value, ridge=ridge)
    kappa = _fit(numbers, "numbers", [count, count], value.dtype, value)
    _require_symmetric(_matrix(kappa), value.dtype, "numbers")
    rows = _fit(cross, "cross", ["M", count, outputs, outputs], value.dtype, value)
    few = _fit(cross_numbers, "cross_numbers", [len(rows), count], value.dtype, value).to(torch.float64)
    residual, _ = _residual(targets, initial, None, (len(rows), count, outputs), value.dtype, value)
    reduced = factorise(kappa, ridge=ridge)
    identity = torch.eye(outputs, dtype=torch.float64, device=value.device)
    delta = _matrix(value) - torch.kron(identity, kappa.to(torch.float64))
    delta_cross = _matrix(rows) - torch.kron(identity, few)
    weights = torch.cholesky_solve(residual.T.reshape(-1, 1), whole.factor)
    smoother = torch.cholesky_solve(few.T, reduced.factor).T  # (M, N), κ* (κ + λI)⁻¹
    change = (delta_cross @ weights).reshape(outputs, -1) - (delta @ weights).reshape(outputs, -1) @ smoother.T
    error, cross_error, smoothing = (float(torch.linalg.matrix_norm(m, 2)) for m in (delta, delta_cross, smoother))
    curvature = extreme_eigenvalues(value, factorisation=whole).smallest + whole.ridge
    length = float(torch.linalg.vector_norm(residual))
    return PredictionGap(
        change.T.to(value.dtype),
        (cross_error + smoothing * error) * length / curvature,
        error,
        cross_error,
        smoothing,
        length,
        curvature,
    )


def _from_tiles(
    gram: TiledGram, targets: Tensor, cross: Tensor, ridge: float, initial: Tensor | None, initial_cross: Tensor | None
) -> Tensor:
    """Predict with a scalar kernel that is kept in tiles."""
    from ldyn.kernels.tiles import TiledGram, solve  # late: only those who have tiles need what reads them

    if not isinstance(gram, TiledGram):
        raise ValueError(f"kernel: expected a tensor, a Factorisation or a TiledGram, got {_checks.describe(gram)}")
    count, like = gram.shape[0], torch.empty(0)
    rows = _fit(cross, "cross", ["M", count], gram.dtype, like)
    residual, start = _residual(targets, initial, initial_cross, (len(rows), count, None), gram.dtype, like)
    weights = solve(gram, residual.reshape(count, -1).to(gram.dtype), ridge=ridge, rank=RANK).solution
    change = rows.to(torch.float64) @ weights.to(torch.float64)
    return (start + change.reshape(start.shape)).to(gram.dtype)


def _kernel(value: object, name: str) -> Tensor:
    """Require blocks (N, N, V, V) or a matrix (N, N), detached."""
    kernel = _checks.require_real(value, name, min_ndim=2).detach()
    if kernel.ndim == 4:
        return _checks.require_shape(kernel, name, ("N", "N", "V", "V"))
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"{name}: expected shape (N, N, V, V) or (N, N), got {_checks.describe(kernel)}")
    return kernel


def _matrix(kernel: Tensor) -> Tensor:
    """Read blocks (M, N, V, V) as a float64 matrix (VM, VN), outputs first: a view of what `entk` returns."""
    if kernel.ndim == 2:
        return kernel.to(torch.float64)
    rows, columns, out, into = kernel.shape
    return kernel.permute(2, 0, 3, 1).reshape(out * rows, into * columns).to(torch.float64)


def _require_symmetric(matrix: Tensor, dtype: torch.dtype, name: str) -> None:
    """Refuse a matrix that is not symmetric to half the digits of a dtype, without a second one of its size."""
    limit = torch.finfo(dtype).eps ** 0.5 * float(torch.linalg.vector_norm(matrix.diagonal(), ord=torch.inf))
    for start in range(0, len(matrix), DENSE):
        rows, columns = matrix[start : start + DENSE, start:], matrix[start:, start : start + DENSE]
        apart = float((rows - columns.T).abs().amax())
        if apart > limit:
            raise ValueError(f"{name}: expected a symmetric matrix, got entries that differ by {apart:.3g}")


def _fit(value: object, name: str, shape: list[int | str | None], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Check a tensor that goes with the kernel, and return it detached."""
    tensor = _checks.require_shape(_checks.require_real(value, name), name, shape).detach()
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected the dtype of kernel ({dtype}), got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected the device of kernel ({like.device}), got {tensor.device}")
    return tensor


def _residual(
    targets: object,
    initial: object,
    initial_cross: object,
    sizes: tuple[int, int, int | None],
    dtype: torch.dtype,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return y − f₀(X) and f₀ on the other inputs in float64, for sizes (M, N, V), V None for a scalar kernel."""
    others, count, outputs = sizes
    flat = outputs is None and isinstance(targets, Tensor) and targets.ndim == 1
    shape: list[int | str | None] = [count] if flat else [count, outputs or "V"]
    wanted = _fit(targets, "targets", shape, dtype, like)
    tail = list(wanted.shape[1:])
    before = torch.zeros_like(wanted) if initial is None else _fit(initial, "initial", [count, *tail], dtype, like)
    if initial_cross is None:
        start = wanted.new_zeros((others, *tail))
    else:
        start = _fit(initial_cross, "initial_cross", [others, *tail], dtype, like)
    return wanted.to(torch.float64) - before.to(torch.float64), start.to(torch.float64)


def _lanczos(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Find the largest eigenvalue of a symmetric matrix given by its products with a column, of the size of another."""
    from scipy.sparse.linalg import LinearOperator, eigsh  # late: scipy loads only where it is used

    def matvec(v: Any) -> Any:
        return product(torch.tensor(v, dtype=torch.float64, device=like.device).reshape(-1, 1)).cpu().numpy().ravel()

    # an eigenvalue converges with the square of the residual that the tolerance is for
    start = torch.randn(len(like), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    operator = LinearOperator(tuple(like.shape), matvec=matvec, dtype="float64")
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-6, return_eigenvectors=False)[0])
