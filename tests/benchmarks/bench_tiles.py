"""A kernel larger than memory: what a process needs at its peak, and what tiles on disk cost beside one piece.

The large kernel has 20,000 examples, 3.2 GB in double precision. It is written to a temporary folder (TMPDIR) and
read twice: by a product with ten columns, and by a check of every tile.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import memory
import table
import torch

from ldyn import data
from ldyn.kernels import tiles
from ldyn.kernels.entk import pntk
from ldyn.models import mlp

COUNT = 20_000
LIMIT = 2000.0  # MiB above a bare interpreter, which takes some ten of the 2048 that are allowed
WORK = """
import torch
from ldyn.kernels.tiles import open_gram, tiled_gram
from ldyn.models import mlp

torch.set_num_threads(1)
x = torch.randn({count}, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
model = mlp((64, 64, 64, 10), activation="relu")
gram = tiled_gram(model, x, path=sys.argv[1], progress=False)
columns = gram.matmul(torch.ones({count}, 10, dtype=torch.float64))
open_gram(sys.argv[1], verify=True)
row = gram.block(slice(5000, 5001), slice(None))
assert torch.isfinite(columns).all() and abs(float(row.sum() / columns[5000, 0]) - 1) < 1e-12
"""


def memory_rows() -> Iterator[table.Row]:
    """Measure the peak of a process that computes, multiplies and checks the large kernel, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        used = memory.growth("", WORK.format(count=COUNT), Path(folder) / "kernel")
    whole = COUNT**2 * 8 / 2**20
    yield table.Row(
        f"peak memory of a process with a kernel of {COUNT:,} examples in tiles, imports included",
        f"{used:.0f} MB",
        "the kernel in one piece, float64",
        f"{whole:.0f} MB",
        f"{used / whole:.2f} ×",
        f"≤ {LIMIT:.0f} MB",
        used <= LIMIT,
    )


def time_rows() -> Iterator[table.Row]:
    """Measure what it costs to compute by tiles and to write them, and to take a finished store up again."""
    x, model = data.digits().images, mlp((64, 256, 256, 10), activation="relu")
    with tempfile.TemporaryDirectory() as folder:
        fresh = (Path(folder) / str(number) for number in itertools.count())
        done = tiles.tiled_gram(model, x, path=next(fresh), tile=512, progress=False).path

        def again() -> tiles.TiledGram:
            return tiles.tiled_gram(model, x, path=done, tile=512, progress=False)

        calls = [
            lambda: tiles.tiled_gram(model, x, path=next(fresh), tile=512, progress=False),
            lambda: pntk(model, x),
            again,
        ]
        torch.testing.assert_close(again().tensor(), pntk(model, x), rtol=1e-11, atol=1e-11)
        tiled, whole, taken_up = table.timed(calls, rounds=2)
    name = f"a kernel of {len(x):,} digits"
    yield table.at_most(f"{name} in tiles of 512, on disk", tiled, "in one piece, in memory", whole, 2)
    yield table.at_most(f"{name}: a finished store checked and opened", taken_up, "computing it", tiled, 0.25)


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    table.publish("kernels in tiles", [*memory_rows(), *time_rows()])


if __name__ == "__main__":
    main()
