"""Kernels larger than memory: computed in tiles into an array on disk, and solved with from there.

A kernel of N examples has N² numbers whatever the model. `tiled_gram` computes it tile by tile into a Zarr array, on
this machine or on a Dask cluster, and takes up again what a killed run has left; `solve` finds (K + λI)⁻¹ y by
conjugate gradients, which need nothing of the kernel but products with vectors. Both work in the memory of a few
tiles. Needs the extra ``tiles``: ``pip install "ldyn[tiles]"``. The chapter is *Kernels larger than memory*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import Inputs
from ldyn._progress import progress_bar
from ldyn.kernels._frozen import Patterns
from ldyn.kernels._tiles_engine import Job, require_client, run
from ldyn.kernels._tiles_solve import NotConverged, Solution, conjugate_gradients, products
from ldyn.kernels._tiles_store import (
    DTYPES,
    Place,
    Store,
    as_path,
    create,
    is_new,
    locked,
    open_store,
    require_match,
    required,
)

__all__ = ["NotConverged", "Solution", "TiledGram", "open_gram", "solve", "tiled_gram"]


@dataclass(frozen=True, eq=False)
class TiledGram:
    """A finished kernel on disk, of which nothing is in memory.

    Attributes:
        path: the folder, a Zarr array that other programs can read as well.
        shape: numbers (N1, N2) of examples.
        tile: examples along a side of a tile.
        dtype: dtype of the numbers.
        kind: "trace", "sum" or "first", as for `ldyn.kernels.entk.pntk`.
        symmetric: whether both sides are the same examples.
    """

    path: Path
    shape: Place
    tile: int
    dtype: torch.dtype
    kind: str
    symmetric: bool
    _store: Store = field(repr=False)

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Read a part of the kernel.

        Args:
            rows: Which rows, without a step.
            columns: Which columns, likewise.

        Returns:
            (rows, columns), on the CPU.

        Raises:
            ValueError: If a slice is none or has a step, or a tile on the way is missing or damaged.
        """
        (top, end), (left, right) = (
            _bounds(span, name, size)
            for span, name, size in zip((rows, columns), ("rows", "columns"), self.shape, strict=True)
        )
        result = np.empty((end - top, right - left), dtype=self._store.manifest.dtype)
        height, width = self._store.manifest.chunk
        for i in range(top // height, -(-end // height)):
            for j in range(left // width, -(-right // width)):
                down, across = self._store.spans((i, j))
                inner = (
                    slice(max(down.start, top), min(down.stop, end)),
                    slice(max(across.start, left), min(across.stop, right)),
                )
                there = _shifted(inner[0], top), _shifted(inner[1], left)
                here = _shifted(inner[0], down.start), _shifted(inner[1], across.start)
                result[there] = self._store.read((i, j))[here]
        return torch.from_numpy(result)

    def tensor(self) -> Tensor:
        """Read the whole kernel into memory.

        Returns:
            (N1, N2), on the CPU.
        """
        return self.block(slice(None), slice(None))

    def numpy(self) -> NDArray[Any]:
        """Read the whole kernel into memory, as an array.

        Returns:
            (N1, N2).
        """
        return np.asarray(self.tensor())

    def array(self) -> Any:
        """Open the kernel as a ``dask.array``, for whatever else Dask can do with it.

        Returns:
            A lazy array (N1, N2) with a tile for a chunk. A damaged tile is an error when it is read; a missing one is
            NaN, as in any Zarr array that is written so.
        """
        return required("dask.array").from_zarr(self._store.array)

    def matmul(self, v: Tensor, *, client: Any = None) -> Tensor:
        """Multiply by a vector or by several, in one pass over the tiles; sums are taken in float64.

        Args:
            v: (N2,) or (N2, C), in the kernel's dtype and on the CPU.
            client: A ``distributed.Client`` whose workers read the tiles, or None for this process.

        Returns:
            (N1,) or (N1, C).

        Raises:
            ValueError: If v does not fit, or a tile is missing or damaged.
        """
        factor = _columns(v, "v", self.shape[1], self.dtype)
        product = products(self._store, require_client(client))(factor.numpy())
        return torch.from_numpy(product).to(self.dtype).reshape(self.shape[0], *v.shape[1:])


def tiled_gram(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    path: str | Path,
    kind: str = "trace",
    params: Patterns = None,
    method: str = "auto",
    tile: int = 1024,
    client: Any = None,
    repair: bool = False,
    progress: bool = True,
) -> TiledGram:
    """Compute a pseudo-NTK tile by tile into a folder, or finish one that was begun there.

    Every tile is written as soon as it is known and depends on nothing but the model and its rows and columns, so that
    the same call takes up a run that was killed, with at most the tile lost that was being computed (on a cluster one
    for each worker), and ends with the same bits as one that was never interrupted; products of matrices have other
    last bits where PyTorch uses another number of threads, or runs on another processor. The tiles that are there are
    read and checked first. A store of another kernel is refused, and stays as it is. After a power failure the tiles
    that the system had not yet brought to the disk may be damaged, which is noticed; `repair` computes them again.

    Memory is needed for one tile, for what `ldyn.kernels.entk.pntk` needs for it, and for the model and the inputs,
    on each worker. A symmetric kernel is computed once above the diagonal and written twice.

    Args:
        model: As for `ldyn.kernels.entk.entk`; parameters in float16, float32 or float64.
        x1: N1 examples, as for `ldyn.kernels.entk.entk`.
        x2: N2 examples, or None for those of x1.
        path: A folder: new or empty, or with a store that the same call began. Workers must reach it by this path.
        kind: "trace", "sum" or "first".
        params: Which parameters count, as for `ldyn.kernels.entk.entk`.
        method: As for `ldyn.kernels.entk.entk`.
        tile: Examples along a side of a tile.
        client: A ``distributed.Client`` on whose workers to compute, or None for this process. It is not closed.
        repair: Whether damaged tiles, and tiles that a finished store has lost, are computed again and not refused.
        progress: Whether to show how far it is.

    Returns:
        The kernel, on disk.

    Raises:
        OSError: If the folder cannot be written or the disk is full; what is there can be taken up again.
        ValueError: If an argument is refused as by `ldyn.kernels.entk.pntk`; if `path` holds something else, another
            kernel or, without `repair`, damaged tiles; or if another process is filling it.
    """
    size, place = _checks.require_integer(tile, "tile"), as_path(path)
    require_client(client)
    required("zarr"), required("dask")
    job = Job(model, x1, x2, kind, params, method)
    manifest = job.manifest(size)
    job.between(slice(0, 1), slice(0, 1))  # a model that is refused leaves no folder behind
    place.mkdir(parents=True, exist_ok=True)
    with locked(place):
        store, finished = (create(place, manifest), False) if is_new(place) else open_store(place, write=True)
        require_match(store.manifest, manifest, place)
        if not repair:
            _check(store, finished, progress, store.check)
        sound = next((one for one in store.places() if store.is_sound(one)), None)
        if sound is not None:
            job.require_same_kernel(store, sound)
        if repair:
            if finished:
                store.reopen()
                finished = False
            _check(store, finished, progress, store.repair)
        if not finished:
            run(job, store, client=client, progress=progress)
            store.finish()
    return _opened(store)


def open_gram(path: str | Path, *, verify: bool = False) -> TiledGram:
    """Open a finished kernel.

    Args:
        path: The folder that `tiled_gram` wrote.
        verify: Whether to read and check every tile now. Otherwise a tile is checked when it is read.

    Returns:
        The kernel, on disk.

    Raises:
        OSError: If it cannot be read.
        ValueError: If there is no such store, it is damaged, or `tiled_gram` has not finished it.
    """
    place = as_path(path)
    store, finished = open_store(place, write=False)
    missing = store.missing()
    if not finished:
        rows, columns = store.manifest.tiles
        raise ValueError(
            f"path: expected a finished store, got {place} with {rows * columns - len(missing)} of {rows * columns}"
            " tiles; the call of tiled_gram that began it takes it up again"
        )
    if missing:
        store.read(missing[0])
    if verify:
        _check(store, finished, True, store.check)
    return _opened(store)


def solve(
    kernel: TiledGram | Tensor,
    rhs: Tensor,
    *,
    ridge: float = 0.0,
    rtol: float = 1e-8,
    max_iter: int = 1000,
    initial: Tensor | None = None,
    rank: int = 0,
    client: Any = None,
    progress: bool = True,
) -> Solution:
    """Solve (K + λI) a = y by conjugate gradients, in float64 and with no more of K than products with vectors.

    All columns of y are solved for at once, so that one pass over the tiles serves them all. After t passes the error
    is at most 2((√c − 1)/(√c + 1))ᵗ of that at the start, in the norm of K + λI, where c ≤ 1 + λ_max(K)/λ is its
    condition number. A preconditioner takes the largest eigenvalues out of c: it costs one more pass and N·rank
    numbers in memory, and saves many passes where the spectrum falls steeply, as those of tangent kernels do. Derived
    in the chapter *Kernels larger than memory*.

    Args:
        kernel: A symmetric kernel (N, N), positive semidefinite: in tiles, or as a tensor.
        rhs: (N,) or (N, C), in the dtype and on the device of the kernel (a kernel in tiles is on the CPU).
        ridge: λ ≥ 0, added to the diagonal.
        rtol: Norm of the residual y − (K + λI)a that is small enough, over all columns and relative to that of y, for
            the solution in float64, which is then rounded to the dtype of the kernel.
        max_iter: Passes over the tiles that are allowed.
        initial: Where to start, of the shape of `rhs`; None for zero.
        rank: Rank of the preconditioner, at most N: a randomised Nyström approximation of K (Frangella, Tropp and
            Udell, 2023) from a generator of its own with a fixed seed; 0 for none.
        client: As for `TiledGram.matmul`.
        progress: Whether to show it.

    Returns:
        The solution, how many passes it took, and its residual, which is recomputed at the end from what is returned.

    Raises:
        NotConverged: If the residual does not get that small; the error has what was reached as ``.solution``.
        ValueError: If an argument does not fit or is out of range, or a tile is missing or damaged.
    """
    if isinstance(kernel, TiledGram):
        if not kernel.symmetric:
            raise ValueError(f"kernel: expected a symmetric one (x2 left out), got shape {kernel.shape} with x2 given")
        apply, dtype, device = products(kernel._store, require_client(client)), kernel.dtype, torch.device("cpu")
        size = kernel.shape[0]
    else:
        matrix = _checks.require_shape(_checks.require_real(kernel, "kernel", ndim=2), "kernel", ("N", "N"))
        if client is not None:
            raise ValueError("client: expected it only together with a kernel in tiles, got it with a tensor")
        asymmetry = float((matrix - matrix.T).abs().amax())
        if asymmetry > torch.finfo(matrix.dtype).eps ** 0.5 * float(matrix.abs().amax()):
            raise ValueError(f"kernel: expected a symmetric matrix, got entries that differ by {asymmetry:.3g}")
        wide = matrix.detach().to("cpu", torch.float64).numpy()
        apply, dtype, device, size = wide.__matmul__, matrix.dtype, matrix.device, len(wide)
    right = _columns(rhs, "rhs", size, dtype, device)
    start = np.zeros_like(right) if initial is None else _columns(initial, "initial", size, dtype, device).numpy()
    if initial is not None:
        _checks.require_shape(initial, "initial", tuple(rhs.shape))
    return conjugate_gradients(
        apply,
        right.numpy(),
        start,
        ridge=_checks.require_nonnegative(ridge, "ridge"),
        rtol=_checks.require_positive(rtol, "rtol"),
        max_iter=_checks.require_integer(max_iter, "max_iter"),
        rank=min(_checks.require_integer(rank, "rank", minimum=0), size),
        like=rhs,
        progress=progress,
    )


def _opened(store: Store) -> TiledGram:
    """Hand out a finished store."""
    told = store.manifest
    return TiledGram(store.path, told.shape, told.tile, DTYPES[told.dtype], told.kind, told.symmetric, store)


def _check(store: Store, finished: bool, progress: bool, check: Callable[[Place], None]) -> None:
    """Read every tile there is, and of a finished store every tile there should be."""
    places = [place for place in store.places() if finished or store.has(place)]
    with progress_bar(len(places), desc="reading tiles", unit="tile", leave=False, shown=progress) as bar:
        for place in places:
            check(place)
            bar.update()


def _columns(value: object, name: str, size: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Check (size,) or (size, C) against a kernel, and return (size, C) in float64 on the CPU."""
    tensor = _checks.require_real(value, name, min_ndim=1)
    if tensor.ndim > 2 or len(tensor) != size:
        raise ValueError(f"{name}: expected shape ({size},) or ({size}, C), got {_checks.describe(tensor)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected the dtype of the kernel ({dtype}), got {tensor.dtype}")
    if tensor.device != (device or torch.device("cpu")):
        raise ValueError(f"{name}: expected the device of the kernel ({device or 'cpu'}), got {tensor.device}")
    return tensor.detach().to("cpu", torch.float64).reshape(size, -1)


def _bounds(span: object, name: str, size: int) -> tuple[int, int]:
    """Read a slice without a step."""
    if not isinstance(span, slice) or span.step not in (None, 1):
        raise ValueError(f"{name}: expected a slice without a step, got {span!r}")
    start, stop, _ = span.indices(size)
    return start, max(start, stop)


def _shifted(span: slice, by: int) -> slice:
    """Move a slice towards zero."""
    return slice(span.start - by, span.stop - by)
