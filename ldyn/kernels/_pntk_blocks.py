"""Blocks of a tangent kernel and the numbers that stand for them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldyn import _checks

CHUNK = 1 << 22
"""How many entries of a kernel are copied at once."""


class PseudoNTKs(NamedTuple):
    """The three numbers in use for a block K (V, V), each of the shape of the blocks' leading dimensions."""

    first: Tensor
    """K_11, the kernel of the first output."""

    sum: Tensor
    """1ᵀK1 / V, the kernel of Σ_a f_a / √V."""

    trace: Tensor
    """tr K / V, the multiple of the identity nearest to K in Frobenius norm."""


class PNTKError(NamedTuple):
    """How far blocks K are from multiples of the identity κI, all blocks taken together."""

    absolute: float
    """‖K − κ ⊗ I‖_F."""

    norm: float
    """‖K‖_F."""

    relative: float
    """Their ratio; for K = 0 it is 0 if κ is 0 too, and infinite otherwise."""


def pseudo_ntks(blocks: Tensor) -> PseudoNTKs:
    """Reduce each block of a tangent kernel to a number, in the three ways that are called pseudo-NTK.

    Derived in the chapter *The pseudo-NTK: one number for a block*. Where the blocks are not needed for anything
    else, `ldyn.kernels.entk.pntk` computes each of the three without forming them.

    Args:
        blocks: (..., V, V), for instance from `ldyn.kernels.entk.entk`. A block need not be symmetric.

    Returns:
        Three tensors (...), copies that do not keep the blocks in memory, in their dtype and on their device.

    Raises:
        ValueError: If the blocks are not square, empty, not floating or not finite.
    """
    kernel = _square(blocks)
    return PseudoNTKs(
        kernel[..., 0, 0].clone(),
        kernel.sum((-2, -1)) / kernel.shape[-1],
        kernel.diagonal(dim1=-2, dim2=-1).mean(-1),
    )


def pntk_error(blocks: Tensor, numbers: Tensor) -> PNTKError:
    """Measure ‖K − κ ⊗ I‖_F / ‖K‖_F over all blocks together.

    The differences are formed before they are squared, so that small errors keep their digits, a slice of the first
    dimension at a time, so that no second copy of the kernel exists. Sums are in double precision. A
    data set of one pair gives the error of one block. Defined in the chapter *The pseudo-NTK: one number for a
    block*.

    Args:
        blocks: K, (..., V, V).
        numbers: κ, (...), one for each block, in the dtype and on the device of the blocks.

    Returns:
        The error, the norm and their ratio, as numbers.

    Raises:
        ValueError: If the blocks are not square, empty, not floating or not finite, or the numbers do not fit them.
    """
    kernel = _square(blocks).detach()
    kappa = _checks.require_same(_checks.require_real(numbers, "numbers"), "numbers", kernel, "blocks").detach()
    _checks.require_shape(kappa, "numbers", tuple(kernel.shape[:-2]))
    if kernel.ndim == 2:
        kernel, kappa = kernel[None], kappa[None]
    step = max(1, CHUNK * len(kernel) // kernel.numel())
    absolute = norm = 0.0
    for start in range(0, len(kernel), step):
        piece = kernel[start : start + step]
        norm = math.hypot(norm, _length(piece))
        rest = piece.to(torch.float64, copy=True)
        rest.diagonal(dim1=-2, dim2=-1).sub_(kappa[start : start + step, ..., None])
        absolute = math.hypot(absolute, _length(rest))
    if norm == 0:
        return PNTKError(absolute, norm, math.inf if absolute else 0.0)
    return PNTKError(absolute, norm, absolute / norm)


def _length(values: Tensor) -> float:
    """Return the root of the sum of squares, in double precision."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _square(blocks: Tensor) -> Tensor:
    """Require blocks (..., V, V)."""
    return _checks.require_shape(_checks.require_real(blocks, "blocks", min_ndim=2), "blocks", ("...", "V", "V"))
