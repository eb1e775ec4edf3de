"""Products with a kernel in tiles, and conjugate gradients on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldyn._progress import Progress, progress_bar
from ldyn.kernels._tiles_store import Store, required

Array = NDArray[Any]
Product = Callable[[Array], Array]


class Solution(NamedTuple):
    """What conjugate gradients have found.

    Attributes:
        solution: (N,) or (N, C), as the right-hand side.
        iterations: steps taken, each one pass over the kernel.
        residual: ‖y − (K + λI)a‖/‖y‖ of this very solution, Frobenius norms, computed from it and not carried along. In
            float32 or float16 it can be above `rtol`, for the solution is rounded after it was found.
    """

    solution: Tensor
    iterations: int
    residual: float


class NotConverged(RuntimeError):
    """The residual has not become small enough.

    Attributes:
        solution: the best that was reached.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        """Keep what was reached.

        Args:
            message: What was expected and what came.
            solution: The best that was reached.
        """
        super().__init__(message, solution)
        self.solution = solution

    def __str__(self) -> str:
        """Return the message alone."""
        return str(self.args[0])


def products(store: Store, client: Any) -> Product:
    """Return the function that multiplies a kernel in tiles by a matrix (N2, C) in float64.

    Dask runs one task for each row of tiles. A task holds one tile at a time and adds up from left to right, so that
    the result does not depend on who computes it.

    Args:
        store: The tiles.
        client: Where to compute: None for this process.

    Returns:
        The function, with a result (N1, C).
    """
    rows = range(store.manifest.tiles[0])
    if client is not None:
        return partial(_there, store, client, rows)
    dask = required("dask")
    threads = torch.get_num_threads()
    options = {"scheduler": "threads", "num_workers": threads} if threads > 1 else {"scheduler": "synchronous"}

    def here(v: Array) -> Array:
        tasks = [dask.delayed(partial(_row, store, i, v), pure=False, traverse=False)() for i in rows]
        return np.concatenate(dask.compute(*tasks, **options))

    return here


def _there(store: Store, client: Any, rows: range, v: Array) -> Array:
    """Multiply on a cluster; the vector travels once to each worker that asks for it."""
    [shared] = client.scatter([v], hash=False)
    futures = [client.submit(_row, store, i, shared, pure=False) for i in rows]
    return np.concatenate(client.gather(futures))


def _row(store: Store, i: int, v: Array) -> Array:
    """Multiply one row of tiles."""
    total = np.zeros((store.spans((i, 0))[0].stop - store.spans((i, 0))[0].start, v.shape[1]))
    for j in range(store.manifest.tiles[1]):
        total += store.read((i, j)) @ v[store.spans((i, j))[1]]
    return total


def nystrom(apply: Product, size: int, rank: int, ridge: float) -> Product:
    """Approximate (K + λI)⁻¹ up to a factor, by the part of K that one product with random columns shows.

    The sketch KΩ gives K ≈ UΛUᵀ of rank r. On the span of U the approximation divides by Λ + λ, on the rest by Λ_r + λ
    with the least entry of Λ, as if all eigenvalues that were not seen were that large. Entries of Λ + λ that are no
    more than rounding count as not seen: r may be larger than the rank of K.

    Args:
        apply: Product with K, (N, N) and positive semidefinite.
        size: N.
        rank: r ≤ N.
        ridge: λ ≥ 0.

    Returns:
        The function, on (N, C).
    """
    columns = np.linalg.qr(np.random.default_rng(0).standard_normal((size, rank)))[0]
    sketch = apply(columns)
    # lifts the spectrum above rounding, so that the factorisation exists; taken off again below
    shift = float(np.finfo(np.float64).eps * np.sqrt(size) * np.linalg.norm(sketch))
    sketch += shift * columns
    seen, mixed = np.linalg.eigh((columns.T @ sketch + sketch.T @ columns) / 2)
    kept = seen > shift / 2
    u, s, _ = np.linalg.svd(sketch @ (mixed[:, kept] / np.sqrt(seen[kept])), full_matrices=False)
    values = np.maximum(s**2 - shift, 0.0) + ridge
    known = values > 10 * shift  # what is less is rounding, by which nothing is divided
    u, values = u[:, known], values[known]
    gain = (values.min(initial=np.inf) / values - 1)[:, None]
    return lambda v: v + u @ (gain * (u.T @ v))


def conjugate_gradients(
    apply: Product,
    rhs: Array,
    start: Array,
    *,
    ridge: float,
    rtol: float,
    max_iter: int,
    rank: int,
    like: Tensor,
    progress: bool,
) -> Solution:
    """Solve (K + λI) a = y; SciPy takes the steps, on all columns as one vector.

    The residual that the iteration carries along drifts away from the true one. So the true one is computed where the
    iteration ends, which goes on from there as long as that halves it at least.

    Args:
        apply: Product with K.
        rhs: (N, C) y in float64.
        start: (N, C) where to begin.
        ridge: λ ≥ 0.
        rtol: Relative residual to reach.
        max_iter: Steps that are allowed.
        rank: Rank of the preconditioner; 0 for none.
        like: The caller's right-hand side, for shape, dtype and device of the result.
        progress: Whether to show it.

    Returns:
        The solution.

    Raises:
        NotConverged: If the residual does not get there.
    """
    peak = float(np.abs(rhs).max())
    unit = 2.0 ** (math.frexp(peak)[1] - 1)  # a power of two, so that squares neither overflow nor vanish, to the bit
    rhs, start = rhs / unit, start / unit
    scale = float(np.linalg.norm(rhs))
    linalg = required("scipy.sparse.linalg")

    def times(flat: Array) -> Array:
        v = flat.reshape(rhs.shape)
        return (apply(v) + ridge * v).reshape(-1)

    def distance(x: Array) -> float:
        return float(np.linalg.norm(rhs.reshape(-1) - times(x))) / scale

    def found(x: Array, taken: int, residual: float) -> Solution:
        value = torch.from_numpy(x * unit).to(like.dtype)
        if like.dtype != torch.float64:
            residual = distance(value.numpy().astype(np.float64) / unit)
        return Solution(value.to(like.device).reshape(like.shape), taken, residual)

    if peak == 0:
        return Solution(torch.zeros_like(like), 0, 0.0)
    best = start.reshape(-1)
    residual, taken = distance(best), 0
    operator = linalg.LinearOperator((rhs.size, rhs.size), matvec=times, dtype=np.float64)
    preconditioner = None
    if rank and residual > rtol:
        near = nystrom(apply, len(rhs), rank, ridge)
        preconditioner = linalg.LinearOperator(
            operator.shape, matvec=lambda flat: near(flat.reshape(rhs.shape)).reshape(-1), dtype=np.float64
        )
    with progress_bar(None, desc="conjugate gradients", unit="pass", shown=progress) as bar:
        while not residual <= rtol and taken < max_iter:
            count = _Count(bar)
            with np.errstate(
                all="ignore"
            ):  # where a system has no solution, steps become infinite, which is seen below
                x, _ = linalg.cg(
                    operator,
                    rhs.reshape(-1),
                    x0=best,
                    rtol=rtol,
                    atol=0.0,
                    maxiter=max_iter - taken,
                    M=preconditioner,
                    callback=count,
                )
            taken += count.steps
            before, now = residual, distance(x) if np.isfinite(x).all() else np.inf
            if now < before:
                best, residual = x, now
            if not now < before / 2:
                break
    result = found(best, taken, residual)
    if not residual <= rtol:
        raise NotConverged(
            f"expected a relative residual of {rtol:.3g}, got {residual:.3g} after {taken} iterations: allow more of"
            " them (max_iter), starting where these ended (initial=error.solution.solution), a higher rank, or a larger"
            " ridge",
            result,
        )
    return result


class _Count:
    """Counts steps, and shows them."""

    def __init__(self, bar: Progress) -> None:
        self.steps, self._bar = 0, bar

    def __call__(self, _: Array) -> None:
        self.steps += 1
        self._bar.update()
