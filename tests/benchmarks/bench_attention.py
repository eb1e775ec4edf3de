"""The speed and memory of attention's closed-form Hessian, beside automatic differentiation and beside plain writing.

The yardstick of writing is ``torch.full`` of all nine blocks of both parts; a second row counts only the twelve that
have memory of their own, the other six being views of them. Freed memory is kept, so that neither side is timed while
the system hands over fresh pages, which costs ten times the writing and would make the ratios small without merit.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from functools import partial

import memory
import table
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from ldyn.hessians._blocks import LossHessian
from ldyn.hessians.attention import attention, attention_loss_hessian
from ldyn.hessians.losses import squared_error

F64 = torch.float64
WIDTH = 32
COLUMNS = 64
PARTS = ("gauss_newton", "functional")
# numbers of options in malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def case(length: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Draw tokens and weights, all of one width, and targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, WIDTH)] + 3 * [(WIDTH, WIDTH)] + [(length, WIDTH)]
    X, *weights, Y = (torch.randn(shape, dtype=F64, generator=generator) for shape in shapes)
    return (X, *(weight / WIDTH**0.5 for weight in weights)), Y


def closed(arguments: tuple[Tensor, ...], Y: Tensor) -> LossHessian:
    """Compute all blocks, both parts, of the mean squared error: the loss's own derivatives are part of the work."""
    curvature = squared_error(attention(*arguments), Y)
    return attention_loss_hessian(*arguments, curvature.gradient, curvature.hessian)


def automatic(arguments: tuple[Tensor, ...], Y: Tensor, chunk: int | None = None) -> Tensor:
    """Compute the sum of both parts by ``torch.func.hessian``, or in the same way some columns at a time."""
    X, *weights = arguments
    lengths = [weight.numel() for weight in weights]

    def loss(w: Tensor) -> Tensor:
        W_Q, W_K, W_V = (part.view(WIDTH, -1) for part in w.split(lengths))
        A = torch.softmax((X @ W_Q) @ (X @ W_K).T / WIDTH**0.5, dim=-1)
        return (A @ (X @ W_V) - Y).square().mean()

    w = torch.cat([weight.flatten() for weight in weights])
    if chunk is None:
        return hessian(loss)(w)
    columns = vmap(lambda v: jvp(grad(loss), (w,), (v,))[1], chunk_size=chunk)
    return columns(torch.eye(len(w), dtype=F64))


def agree(found: LossHessian, expected: Tensor) -> None:
    """Stop if the two routes differ: a fast wrong answer is worth nothing."""
    error = float((found.matrix() - expected).abs().max() / expected.abs().max())
    if not error < 1e-11:
        sys.exit(f"the routes differ by {error:.1e}")


def stored(found: LossHessian) -> list[Tensor]:
    """List the blocks that have memory of their own; the others are views of them."""
    names = found.names
    return [getattr(found, part)[a, b] for part in PARTS for k, a in enumerate(names) for b in names[k:]]


def reuse_memory() -> None:
    """Ask the C library, where it is glibc, to keep what is freed and to take large blocks from there too."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(MMAP_THRESHOLD, 2**30)


def short_rows() -> Iterator[table.Row]:
    """Measure a short sequence."""
    name = f"all blocks of attention's Hessian, both parts, d = {WIDTH}, L = 32"
    arguments, Y = case(32)
    agree(closed(arguments, Y), automatic(arguments, Y))
    calls = [partial(closed, arguments, Y), partial(automatic, arguments, Y)]
    here, there = table.timed(calls, rounds=3)
    yield table.at_least(name, here, "torch.func.hessian", there, 3)
    curvature = squared_error(attention(*arguments), Y)
    ours = partial(attention_loss_hessian, *arguments, curvature.gradient, curvature.hessian)
    nine = [tuple(getattr(ours(), part)[pair].shape) for part in PARTS for pair in ours().gauss_newton]
    twelve = [tuple(block.shape) for block in stored(ours())]
    here, every, own = table.timed([ours, partial(written, nine), partial(written, twelve)], rounds=9)
    yield table.at_most("the same, the loss's derivatives given", here, "writing nine blocks of both parts", every, 5)
    yield table.at_most(
        "the same, the loss's derivatives given", here, "writing those that are no views of others", own, None
    )


def written(sizes: list[tuple[int, ...]]) -> list[Tensor]:
    """Write every number of new blocks once."""
    return [torch.full(size, 1.5, dtype=F64) for size in sizes]


def long_rows() -> Iterator[table.Row]:
    """Measure a long sequence; the other side takes many seconds and is called once."""
    arguments, Y = case(256)
    (here,) = table.timed([partial(closed, arguments, Y)], rounds=3)
    start = time.process_time()
    expected = automatic(arguments, Y, COLUMNS)
    plain = time.process_time() - start
    agree(closed(arguments, Y), expected)
    name = f"all blocks of attention's Hessian, both parts, d = {WIDTH}, L = 256"
    yield table.at_least(name, here, f"torch.func.hessian, {COLUMNS} columns at a time", plain, 40)


SETUP = """
import torch
from ldyn.hessians.attention import attention, attention_loss_hessian
from ldyn.hessians.losses import squared_error

torch.set_num_threads(1)
length, width = int(sys.argv[1]), int(sys.argv[2])

def run(length, width):
    X, Y = torch.randn(2, length, width, dtype=torch.float64)
    weights = torch.randn(3, width, width, dtype=torch.float64) / width**0.5
    curvature = squared_error(attention(X, *weights), Y)
    return attention_loss_hessian(X, *weights, curvature.gradient, curvature.hessian)

run(2, 2)
"""


def memory_rows() -> Iterator[table.Row]:
    """Measure the peak beside the size of what is returned: six blocks of each part, the others being views."""
    returned = 12 * WIDTH**4 * 8 / 2**20
    for length in (32, 256):
        peak = memory.growth(SETUP, "found = run(length, width)", length, WIDTH)
        what = f"peak memory of all blocks of attention's Hessian, d = {WIDTH}, L = {length}"
        ratio = peak / returned
        yield table.Row(
            what, f"{peak:.0f} MB", "what it returns", f"{returned:.0f} MB", f"{ratio:.2f} ×", "≤ 3", ratio <= 3
        )


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    reuse_memory()
    table.publish("attention", [*memory_rows(), *short_rows(), *long_rows()])


if __name__ == "__main__":
    main()
