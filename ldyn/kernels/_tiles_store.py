"""A kernel's tiles on disk: one Zarr array, and beside it what is needed to know whose kernel it is.

Each tile is one chunk of the array, stored as it is with a CRC-32C at its end, so that every chunk has the same known
size and a changed byte is noticed when it is read. Zarr writes a chunk into a file of another name and renames it, so
that a chunk that exists is complete; nothing else marks a tile as done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldyn import _checks

FORMAT = 1
ATTRIBUTE = "ldyn_tiled_gram"
METADATA = "zarr.json"
CHECKSUM_BYTES = 4
PARTIAL = "*.partial"
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_WORDS = {
    "format": "version of the format",
    "kind": "kind",
    "shape": "shape",
    "tile": "tile",
    "dtype": "dtype",
    "symmetric": "symmetry (x2 left out or given)",
    "method": "method",
    "architecture": "architecture of the model",
    "selected": "choice of parameters (params)",
    "parameters": "parameters or buffers of the model",
    "x1": "inputs x1",
    "x2": "inputs x2",
}

Place = tuple[int, int]
"""Row and column of a tile, counted in tiles."""


def required(name: str) -> Any:
    """Import a package of the extra.

    Args:
        name: Its name.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        message = f'kernels in tiles need zarr, Dask and SciPy, and {name} is missing: pip install "ldyn[tiles]"'
        raise ImportError(message) from error


@dataclass(frozen=True)
class Manifest:
    """What a store holds, and of whom.

    Attributes:
        kind: reduction of a block.
        shape: numbers (N1, N2) of examples.
        tile: examples along a side of a tile.
        dtype: name of the dtype.
        symmetric: whether both sides are the same examples.
        method: way to compute.
        architecture: hash of the model's structure.
        selected: hash of the names of the parameters that count.
        parameters: hash of all parameters and buffers.
        x1: hash of the first inputs.
        x2: hash of the second.
        format: version of all this.
    """

    kind: str
    shape: Place
    tile: int
    dtype: str
    symmetric: bool
    method: str
    architecture: str
    selected: str
    parameters: str
    x1: str
    x2: str
    format: int = FORMAT

    @property
    def chunk(self) -> Place:
        """Return the sizes of a chunk: no larger than the kernel."""
        return min(self.tile, self.shape[0]), min(self.tile, self.shape[1])

    @property
    def tiles(self) -> Place:
        """Return the numbers of tiles along both sides."""
        (rows, columns), (height, width) = self.shape, self.chunk
        return -(-rows // height), -(-columns // width)

    @property
    def digest(self) -> str:
        """Return a hash of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Store:
    """An opened store.

    Attributes:
        path: its folder.
        array: the Zarr array.
        manifest: what it holds.
    """

    path: Path
    array: Any
    manifest: Manifest

    def places(self) -> Iterator[Place]:
        """List all tiles, row by row."""
        rows, columns = self.manifest.tiles
        return ((i, j) for i in range(rows) for j in range(columns))

    def spans(self, place: Place) -> tuple[slice, slice]:
        """Return the rows and columns of a tile."""
        starts = [i * size for i, size in zip(place, self.manifest.chunk, strict=True)]
        ends = [start + size for start, size in zip(starts, self.manifest.chunk, strict=True)]
        return slice(starts[0], min(ends[0], self.manifest.shape[0])), slice(
            starts[1], min(ends[1], self.manifest.shape[1])
        )

    def file(self, place: Place) -> Path:
        """Return the file of a tile."""
        return self.path / str(self.array.metadata.encode_chunk_key(place))

    def has(self, place: Place) -> bool:
        """Tell whether a tile exists, damaged or not."""
        return self.file(place).is_file()

    def missing(self) -> list[Place]:
        """List the tiles that do not exist."""
        return [place for place in self.places() if not self.has(place)]

    def read(self, place: Place) -> NDArray[Any]:
        """Read a tile.

        Args:
            place: Which.

        Returns:
            Its numbers.

        Raises:
            ValueError: If it is missing or damaged.
        """
        file = self.file(place)
        height, width = self.manifest.chunk
        wanted = height * width * np.dtype(self.manifest.dtype).itemsize + CHECKSUM_BYTES
        try:
            size = file.stat().st_size
        except FileNotFoundError as error:
            raise ValueError(
                f"path: expected a whole store, got none of the tile {place}: {file} is missing"
            ) from error
        if size != wanted:
            raise ValueError(f"path: expected intact tiles, got {file} with {size} bytes for {wanted}")
        try:
            value: NDArray[Any] = self.array[self.spans(place)]
        except ValueError as error:
            raise ValueError(f"path: expected intact tiles, got {file} with a wrong checksum") from error
        return value

    def write(self, place: Place, value: NDArray[Any]) -> None:
        """Write a tile, which exists afterwards, or does not where this fails."""
        self.array[self.spans(place)] = value

    def check(self, place: Place) -> None:
        """Read a tile, and compare it with its mirror image if both exist.

        Args:
            place: Which.

        Raises:
            ValueError: If it is missing or damaged, or contradicts its mirror image.
        """
        value, mirror = self.read(place), (place[1], place[0])
        if not np.isfinite(value).all():
            raise ValueError(f"path: expected finite numbers, got others in {self.file(place)}")
        if not self.manifest.symmetric or place[0] > place[1] or not self.has(mirror):
            return
        if not np.array_equal(value, self.read(mirror).T):
            raise ValueError(f"path: expected a symmetric kernel, got {self.file(mirror)} that is not the mirror image")

    def is_sound(self, place: Place) -> bool:
        """Tell whether a tile exists and nothing is wrong with it."""
        try:
            self.check(place)
        except ValueError:
            return False
        return True

    def repair(self, place: Place) -> None:
        """Take a tile and its mirror image away unless both are sound."""
        if not self.is_sound(place):
            for one in (place, (place[1], place[0])) if self.manifest.symmetric else (place,):
                self.file(one).unlink(missing_ok=True)

    def reopen(self) -> None:
        """Note that tiles may be missing again."""
        self.array.update_attributes({ATTRIBUTE: _noted(self.manifest, finished=False)})

    def finish(self) -> None:
        """Note that all tiles have been written, and take away what killed runs have left."""
        if lost := self.missing():
            raise ValueError(
                f"path: expected a folder that every worker writes to, got no tile {lost[0]} in {self.path}"
            )
        self.array.update_attributes({ATTRIBUTE: _noted(self.manifest, finished=True)})
        for left in self.path.rglob(PARTIAL):
            with suppress(OSError):
                left.unlink()


def as_path(path: object) -> Path:
    """Read a path, and make it one that does not depend on the working directory.

    Args:
        path: The argument.

    Returns:
        The absolute path.

    Raises:
        ValueError: If it is none but an address on the network, for instance, or there is a file.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "://" in str(path):
        raise ValueError(f"path: expected a path to a folder, got {_checks.describe(path)}")
    found = Path(path).absolute()
    if found.exists() and not found.is_dir():
        raise ValueError(f"path: expected a folder, got the file {found}")
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes of this machine from filling the same store; the system forgets it with the process.

    Args:
        path: The folder, which exists.

    Yields:
        Nothing.

    Raises:
        ValueError: If another process is filling it.
    """
    try:
        fcntl = import_module("fcntl")
    except ImportError:  # not a Unix system: tiles are written atomically, so that two runs only waste time
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"path: expected a store that nobody else is filling, got {path}, which is in use"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def create(path: Path, manifest: Manifest) -> Store:
    """Begin a store in an empty folder.

    Args:
        path: The folder.
        manifest: What it will hold.

    Returns:
        The store, without tiles.
    """
    zarr, codecs = required("zarr"), required("zarr.codecs")
    array = zarr.create_array(
        store=path,  # as a string, some names would be read as addresses
        shape=manifest.shape,
        chunks=manifest.chunk,
        dtype=manifest.dtype,
        serializer=codecs.BytesCodec(endian="little"),
        compressors=[codecs.Crc32cCodec()],
        filters=None,
        fill_value=float("nan"),  # so that no tile is taken for an empty one and left out
        attributes={ATTRIBUTE: _noted(manifest, finished=False)},
        zarr_format=3,
    )
    return Store(path, array, manifest)


def is_new(path: Path) -> bool:
    """Tell whether a folder holds nothing but what a run that was killed at once may have left."""
    return all(child.match(PARTIAL) for child in path.iterdir())


def open_store(path: Path, *, write: bool) -> tuple[Store, bool]:
    """Open a store.

    Args:
        path: Its folder.
        write: Whether tiles are going to be written.

    Returns:
        The store, and whether it is finished.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is none, or its metadata are damaged.
    """
    zarr, codecs = required("zarr"), required("zarr.codecs")
    foreign = f"path: expected a store of tiled_gram, got {path}"
    if not (path / METADATA).is_file():
        raise ValueError(f"{foreign}, which has no {METADATA}")
    try:
        array = zarr.open_array(store=path, mode="r+" if write else "r", zarr_format=3)
        noted = array.attrs.asdict().get(ATTRIBUTE)
    except OSError:
        raise
    except Exception as error:  # whatever a parser says of damaged text
        raise ValueError(f"{foreign}, whose {METADATA} cannot be read: {error}") from error
    if noted is None:
        raise ValueError(f"{foreign}, an array that something else has written")
    try:
        told = dict(noted["manifest"])
        manifest = Manifest(**{**told, "shape": tuple(told["shape"])})
        sound = manifest.digest == noted["digest"] and isinstance(noted["finished"], bool)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{foreign}, whose {METADATA} is damaged: {error!r}") from error
    wanted = (
        manifest.shape,
        manifest.chunk,
        manifest.dtype,
        (codecs.BytesCodec(endian="little"), codecs.Crc32cCodec()),
    )
    if not sound or (array.shape, array.chunks, str(array.dtype), tuple(array.metadata.codecs)) != wanted:
        raise ValueError(f"{foreign}, whose {METADATA} contradicts itself")
    if manifest.format != FORMAT:
        raise ValueError(f"{foreign} in format {manifest.format}, expected {FORMAT}")
    return Store(path, array, manifest), noted["finished"]


def require_match(found: Manifest, wanted: Manifest, path: Path) -> None:
    """Require that a store is one of this very kernel.

    Args:
        found: What it says.
        wanted: What is asked for.
        path: Where it is, for the message.

    Raises:
        ValueError: If they differ.
    """
    apart = []
    for field in fields(Manifest):
        here, there = getattr(wanted, field.name), getattr(found, field.name)
        if here != there:
            hashed = isinstance(here, str) and len(here) == hashlib.sha256().digest_size * 2
            apart.append(_WORDS[field.name] + ("" if hashed else f" ({there!r} in the store, {here!r} asked for)"))
    if apart:
        raise ValueError(f"path: expected a store of this kernel, got {path}, which differs in {', '.join(apart)}")


def _noted(manifest: Manifest, *, finished: bool) -> dict[str, object]:
    """Write a manifest as JSON can hold it."""
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(manifest).items()}
    return {"manifest": told, "digest": manifest.digest, "finished": finished}
