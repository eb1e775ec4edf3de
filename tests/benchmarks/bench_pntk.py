"""The pseudo-NTK of a whole data set: all 1,797 digits, a 64-1024-1024-10 network, float64.

The plain route is what one would write with ``torch.func``: the gradients of the normalised sum of logits under
``vmap``, contracted. All of them together would be 16 GB, so it keeps those of as many rows as 5 GB take, meets every
pair once, and copies its mirror image. The gradients of the rows serve as columns too; those of later examples are
formed again for each set of rows, a few at a time. Forming gradients costs about as much time as the products, so more
rows would make it faster, by less than a half however many. It takes minutes and is timed once, with a smaller run
before the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import memory
import table
import torch
from bench_entk import agree, per_example
from torch import Tensor, nn
from torch.func import grad

from ldyn.data import digits
from ldyn.kernels.entk import entk
from ldyn.kernels.pntk import pntk
from ldyn.models import mlp

SIZES = (64, 1024, 1024, 10)
ROWS, COLUMNS = 600, 120
WHAT = f"of all 1,797 digits, {'-'.join(map(str, SIZES))} network, float64"
PLAIN = "torch.func: vmap(grad) by chunks, contracted, each pair once"
FULL = "ldyn: all blocks of the tangent kernel"


def normalised(z: Tensor) -> Tensor:
    """Return the sum of the outputs over √V."""
    return z.sum() * z.shape[-1] ** -0.5


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return every example's gradient of the normalised sum, (N, P_l) for each parameter."""
    return per_example(model, x, grad, normalised)


def by_chunks(model: nn.Module, x: Tensor, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Compute the pseudo-NTK (N, N) of the normalised sum by contracting gradients, chunk by chunk."""
    kernel = x.new_full((len(x), len(x)), torch.nan)
    with torch.no_grad():
        for start in range(0, len(x), rows):
            stop = min(start + rows, len(x))
            kept = gradients(model, x[start:stop])
            for begin in range(start, stop, columns):  # among the rows kept: those before have met these columns
                left = [part[begin - start :] for part in kept]
                meet(kernel, left, [part[:columns] for part in left], begin, begin)
            for begin in range(stop, len(x), columns):
                meet(kernel, kept, gradients(model, x[begin : begin + columns]), start, begin)
            del kept, left  # before the next rows are formed
    return kernel


def meet(kernel: Tensor, left: list[Tensor], right: list[Tensor], row: int, column: int) -> None:
    """Fill in the inner products of two sets of gradients, and their mirror image."""
    block = sum(one @ two.T for one, two in zip(left, right, strict=True))
    height, width = block.shape
    kernel[row : row + height, column : column + width] = block
    kernel[column : column + width, row : row + height] = block.T


def once(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Time a call that takes long, and keep its result."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def speed_rows() -> Iterator[table.Row]:
    """Measure the three kernels side by side, and the sum against the plain route."""
    model, x = mlp(SIZES, activation="relu"), digits().images
    sums, traces = (partial(pntk, model, x, kind=kind) for kind in ("sum", "trace"))
    full = partial(entk, model, x)
    blocks = full()
    agree(traces(), torch.einsum("ijaa->ij", blocks) / SIZES[-1])
    agree(sums(), blocks.sum((2, 3)) / SIZES[-1])
    del blocks
    by_chunks(model, x[:64], 32, 8)
    expected, plain = once(partial(by_chunks, model, x))
    agree(sums(), expected)
    few, traced = table.timed([sums, traces], rounds=5)
    _, every = once(full)
    yield table.at_least(f"pseudo-NTK (sum) {WHAT}", few, PLAIN, plain, 100)
    yield table.at_least("the same", few, FULL, every, SIZES[-1])
    yield table.at_least(f"pseudo-NTK (trace) {WHAT}", traced, FULL, every, None)


SETUP = f"""
import torch
from ldyn.data import digits
from ldyn.kernels.entk import entk, pntk
from ldyn.models import mlp

torch.set_num_threads(1)
model, x = mlp({SIZES}, activation="relu"), digits().images
entk(mlp((64, 8, 10)), x[:2])
"""


def memory_rows() -> Iterator[table.Row]:
    """Measure what the peak memory grows with."""
    full = memory.growth(SETUP, "entk(model, x)")
    for kind, limit in (("sum", SIZES[-1]), ("trace", None)):
        used = memory.growth(SETUP, f"pntk(model, x, kind={kind!r})")
        ratio = full / used
        yield table.Row(
            f"peak memory, pseudo-NTK ({kind}) {WHAT}",
            f"{used:.0f} MB",
            FULL,
            f"{full:.0f} MB",
            f"{ratio:.3g} × smaller",
            f"≥ {limit}" if limit else "–",
            ratio >= limit if limit else None,
        )


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    missed = table.publish("pseudo-NTK", [*speed_rows(), *memory_rows()], stop=False)
    if missed:
        sys.exit(f"limits not kept: {missed}")


if __name__ == "__main__":
    main()
