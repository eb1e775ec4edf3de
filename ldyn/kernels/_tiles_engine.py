"""Fills a store of tiles: which kernel it is, one tile of it, and Dask, which runs through the tiles."""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import Inputs
from ldyn._progress import progress_bar
from ldyn.kernels._frozen import Frozen, Patterns, checked, length
from ldyn.kernels._tiles_store import DTYPES, METADATA, Manifest, Place, Store, required
from ldyn.kernels.entk import KINDS, METHODS, pntk

_TURN = threading.Lock()  # a model runs for one thread at a time, and one tile is in memory


@dataclass(frozen=True, eq=False)
class Job:
    """A kernel to compute.

    Attributes:
        model: the caller's, which stays as it is.
        x1: N1 examples.
        x2: N2 examples, or None.
        kind: reduction of a block.
        params: patterns.
        method: way to compute.
    """

    model: nn.Module
    x1: Inputs
    x2: Inputs | None
    kind: str
    params: Patterns
    method: str

    def manifest(self, tile: int) -> Manifest:
        """Check everything, and say whose kernel it is.

        Args:
            tile: Examples along a side of a tile.

        Returns:
            What a store of this kernel says about itself.

        Raises:
            ValueError: As for `ldyn.kernels.entk.pntk`, or if the dtype has no counterpart on disk.
        """
        for name, value, known in (("kind", self.kind, KINDS), ("method", self.method, METHODS)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {_checks.describe(value)}")
        frozen = Frozen(self.model, self.params)
        dtype = str(frozen.first.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"model: expected parameters in one of {sorted(DTYPES)}, got {dtype}")
        rows = length(checked(self.x1, "x1", frozen.first))
        columns = rows if self.x2 is None else length(checked(self.x2, "x2", frozen.first))
        first = _hash_inputs(self.x1)
        state = itertools.chain(
            self.model.named_parameters(remove_duplicate=False), self.model.named_buffers(remove_duplicate=False)
        )
        return Manifest(
            kind=self.kind,
            shape=(rows, columns),
            tile=tile,
            dtype=dtype,
            symmetric=self.x2 is None,
            method=self.method,
            # addresses of functions differ from process to process
            architecture=_hash([("", re.sub(r" at 0x[0-9a-fA-F]+", "", f"{_name(self.model)} {self.model!r}"))]),
            selected=_hash((name, "") for name in sorted(frozen.selected)),
            parameters=_hash(state),
            x1=first,
            x2=first if self.x2 is None else _hash_inputs(self.x2),
        )

    def between(self, rows: slice, columns: slice) -> Tensor:
        """Compute a part of the kernel, symmetric to the bit where it is its own mirror image."""
        left = _part(self.x1, rows)
        if self.x2 is None and rows == columns:
            value = pntk(self.model, left, kind=self.kind, params=self.params, method=self.method)
            value = value.triu() + value.triu(1).T
        else:
            right = _part(self.x1 if self.x2 is None else self.x2, columns)
            value = pntk(self.model, left, right, kind=self.kind, params=self.params, method=self.method)
        return _checks.require_finite(value, "the kernel of model")

    def require_same_kernel(self, store: Store, place: Place) -> None:
        """Compare the first number of a tile with what the model says now: a `forward` has no hash.

        Args:
            store: The store.
            place: A tile that it has.

        Raises:
            ValueError: If they differ by more than rounding.
        """
        (top, left), stored = (span.start for span in store.spans(place)), store.read(place)
        now = float(self.between(slice(top, top + 1), slice(left, left + 1)))
        scale = float(abs(stored).max())
        if abs(now - float(stored[0, 0])) > torch.finfo(DTYPES[store.manifest.dtype]).eps ** 0.5 * scale:
            raise ValueError(
                f"path: expected a store of this kernel, got {store.path} with {float(stored[0, 0]):.6g} between"
                f" examples {top} and {left}, where the model now says {now:.6g}"
            )

    def fill(self, store: Store, place: Place) -> None:
        """Compute and write a tile that is missing, and then its mirror image, to the same bits.

        Args:
            store: The store.
            place: The tile, above the diagonal if the kernel is symmetric.

        Raises:
            ValueError: If the store is not to be found from here.
        """
        mirror = (place[1], place[0])
        with _TURN:
            if not (store.path / METADATA).is_file():
                raise ValueError(f"path: expected a folder that every worker can reach, got {store.path}")
            value: NDArray[Any]
            if known := store.has(place):
                value = store.read(place)
            else:
                value = self.between(*store.spans(place)).cpu().numpy()
                store.write(place, value)
            if store.manifest.symmetric and place != mirror and not (known and store.has(mirror)):
                store.write(mirror, value.T)


def require_client(client: object) -> Any:
    """Require a client of a Dask cluster, or none.

    Args:
        client: The argument.

    Returns:
        The same.

    Raises:
        ValueError: If it is something else, or asynchronous.
    """
    if client is not None:
        if not all(hasattr(client, name) for name in ("submit", "scatter", "gather", "nthreads")):
            raise ValueError(f"client: expected a distributed.Client or None, got {_checks.describe(client)}")
        if getattr(client, "asynchronous", False):
            raise ValueError("client: expected a distributed.Client that waits for results, got an asynchronous one")
    return client


def open_tasks(store: Store) -> list[Place]:
    """List the tiles to be computed or mirrored; of a symmetric kernel those above the diagonal."""
    missing = store.missing()
    if not store.manifest.symmetric:
        return missing
    return sorted({(min(place), max(place)) for place in missing})


def run(job: Job, store: Store, *, client: Any, progress: bool) -> None:
    """Fill a store.

    Args:
        job: The kernel.
        store: The store, whose tiles are sound as far as there are any.
        client: Where to compute: None for this process.
        progress: Whether to show it.
    """
    tasks = open_tasks(store)
    rows, columns = store.manifest.tiles
    total = rows * (rows + 1) // 2 if store.manifest.symmetric else rows * columns
    with progress_bar(total, desc="kernel", unit="tile", done=total - len(tasks), shown=progress) as bar:
        for _ in _here(job, store, tasks) if client is None else _there(job, store, tasks, client):
            bar.update()


def _here(job: Job, store: Store, tasks: list[Place]) -> Iterator[None]:
    """Fill tiles in this process, one after the other."""
    dask = required("dask")
    for place in tasks:
        dask.delayed(partial(job.fill, store, place), pure=False, traverse=False)().compute(scheduler="synchronous")
        yield


def _there(job: Job, store: Store, tasks: list[Place], client: Any) -> Iterator[None]:
    """Fill tiles on a cluster; each worker has what it is doing and one more, so that none waits."""
    distributed = required("distributed")
    [shared] = client.scatter([(job, store)], hash=False)
    todo = iter(tasks)
    ahead = 2 * max(1, sum(client.nthreads().values()))
    running = distributed.as_completed()

    def submit(places: Iterable[Place]) -> None:
        for place in places:
            running.add(client.submit(_fill, shared, place, pure=False))

    try:
        submit(itertools.islice(todo, ahead))
        for future in running:
            future.result()
            yield
            submit(itertools.islice(todo, 1))
    finally:
        client.cancel([shared, *running.futures])


def _fill(shared: tuple[Job, Store], place: Place) -> None:
    """Fill a tile on a worker."""
    job, store = shared
    job.fill(store, place)


def _part(x: Inputs, rows: slice) -> Inputs:
    """Return some examples."""
    if isinstance(x, Mapping):
        return {key: value[rows] if isinstance(value, Tensor) else value for key, value in x.items()}
    return x[rows]


def _name(model: nn.Module) -> str:
    """Return the full name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _hash_inputs(x: Inputs) -> str:
    """Return a hash of inputs."""
    return _hash(sorted(x.items()) if isinstance(x, Mapping) else [("", x)])


def _hash(items: Iterable[tuple[str, object]]) -> str:
    """Return a hash of named values: of tensors and arrays, also in lists and mappings, dtype, shape and bytes."""
    total = hashlib.sha256()
    for name, value in items:
        total.update(f"{name!r}:".encode())
        if isinstance(value, Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            total.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())  # its text leaves numbers out
        elif isinstance(value, (list, tuple, Mapping)):
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            total.update(f"{type(value).__name__}{_hash((repr(key), each) for key, each in inner)}".encode())
        else:
            total.update(repr(value).encode())
    return total.hexdigest()
