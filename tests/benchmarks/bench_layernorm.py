"""Closed forms of LayerNorm's derivatives beside automatic differentiation and beside writing the result.

The yardstick for the tensor of second derivatives is ``torch.full`` of the same shape: a new tensor, every
number written once. At d = 256 nearly all of that is the system handing over memory. The last row bounds the growth of
a product with the width: no matrix is formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import table
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp
from torch.nn import functional

from ldyn.hessians import layernorm as ln

F64 = torch.float64
HESSIAN = "torch.func.hessian of the same"
PRODUCT = "jvp(grad(...)) of the same"


def plain(x: Tensor) -> Tensor:
    """Normalise by PyTorch's own function."""
    return functional.layer_norm(x, x.shape[-1:])


def along(x: Tensor, r: Tensor) -> Tensor:
    """Weigh the outputs."""
    return plain(x) @ r


def product(x: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """Multiply the Hessian of the weighted outputs by a vector, forward over reverse."""
    return jvp(grad(lambda point: along(point, r)), (x,), (v,))[1]


def agree(one: Tensor, other: Tensor) -> None:
    """Stop unless two routes give the same numbers to eleven digits."""
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11 * float(other.abs().max()))


def draw(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a row, upstream weights and a direction."""
    x, r, v = torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=F64)
    return x, r, v


def tensor_rows() -> Iterator[table.Row]:
    """Measure the whole tensor of second derivatives."""
    for size, limit, rounds in ((64, 40, 5), (256, 10, 3)):
        x, _, _ = draw(size)
        agree(ln.layernorm_hessian(x), hessian(plain)(x))
        calls = [
            partial(ln.layernorm_hessian, x),
            partial(hessian(plain), x),
            partial(torch.full, (size, size, size), 1.5, dtype=F64),
        ]
        ours, theirs, written = table.timed(calls, rounds=rounds)
        yield table.at_least(f"all second derivatives of LayerNorm, d = {size}", ours, HESSIAN, theirs, limit)
        write_limit = 2.5 if size == 256 else None
        yield table.at_most(f"the same, d = {size}", ours, "writing as many numbers (torch.full)", written, write_limit)


def product_rows() -> Iterator[table.Row]:
    """Measure products with vectors, and how they grow with the width."""
    width = 256
    x, r, v = draw(width)
    agree(ln.layernorm_hessian_vector_product(x, r, v), product(x, r, v))
    agree(ln.layernorm_hessian_contraction(x, r), hessian(along)(x, r))
    calls = [partial(ln.layernorm_hessian_vector_product, x, r, v), partial(product, x, r, v)]
    ours, theirs = table.timed(calls, rounds=5)
    yield table.at_least(f"Hessian–vector product of LayerNorm, d = {width}", ours, PRODUCT, theirs, 15)
    calls = [partial(ln.layernorm_hessian_contraction, x, r), partial(hessian(along), x, r)]
    ours, theirs = table.timed(calls, rounds=3)
    yield table.at_least(f"Hessian of weighted outputs of LayerNorm, d = {width}", ours, HESSIAN, theirs, 15)
    arguments = [draw(size) for size in (width, 16 * width)]
    narrow, broad = table.timed([partial(ln.layernorm_hessian_vector_product, *row) for row in arguments], rounds=5)
    yield table.at_most(f"the same at d = {16 * width}", broad, f"d = {width}", narrow, 16)


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    table.publish("LayerNorm", [*tensor_rows(), *product_rows()])


if __name__ == "__main__":
    main()
