"""The curvature of a loss at the outputs of a model: what the Hessians of this part start from.

A loss over the L tokens of one sequence enters every formula through its gradient r and its Hessian S at the outputs.
The losses here add or average over tokens, so S couples the outputs of one token only and is kept as L small matrices.
Defined in the chapter *Attention*.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ldyn import _checks
from ldyn.foundations.softmax import softmax_jacobian

__all__ = ["LossCurvature", "cross_entropy", "squared_error"]

Reduction = Literal["mean", "sum"]
"""Whether a loss averages or adds up."""


class LossCurvature(NamedTuple):
    """A loss at given outputs, to second order.

    Attributes:
        value: () the loss.
        gradient: (L, o) r, its gradient at the outputs.
        hessian: (L, o, o) S, its Hessian at the outputs of each token; outputs of two tokens do not interact.
    """

    value: Tensor
    gradient: Tensor
    hessian: Tensor


def squared_error(outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> LossCurvature:
    """Expand the squared error: its mean over all L · o entries, or its sum, without a half in either.

    Args:
        outputs: (L, o).
        targets: (L, o).
        reduction: "mean" divides the sum of squares by L · o.

    Returns:
        The value, r = 2 (outputs − targets) / n and S = 2 I / n, with n = L · o or 1.

    Raises:
        ValueError: If the arguments are not finite matrices that fit each other, or the reduction is unknown.
    """
    f = _checks.require_real(outputs, "outputs", ndim=2)
    y = _checks.require_real(targets, "targets", ndim=2)
    _checks.require_shape(y, "targets", f.shape)
    _checks.require_same(y, "targets", f, "outputs")
    scale = 2 / _count(f.numel(), reduction)
    identity = torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(f.shape[0], -1, -1)
    return LossCurvature((f - y).square().sum() * scale / 2, scale * (f - y), scale * identity)


def cross_entropy(logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean") -> LossCurvature:
    """Expand the cross-entropy of each token's label: its mean over the L tokens, or its sum.

    Args:
        logits: (L, V).
        labels: (L,) integers from 0 to V − 1.
        reduction: "mean" divides by L.

    Returns:
        The value, r = (softmax(logits) − one-hot labels) / n and S = (diag p − p pᵀ) / n, with n = L or 1.

    Raises:
        ValueError: If the logits are no finite matrix, the labels do not fit, or the reduction is unknown.
    """
    z = _checks.require_real(logits, "logits", ndim=2)
    y = _checks.require_shape(_checks.require_tensor(labels, "labels"), "labels", z.shape[:1])
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels: expected integers, got {_checks.describe(y)}")
    if y.device != z.device:
        raise ValueError(f"labels: expected the device of the logits ({z.device}), got {y.device}")
    if _checks.known_truth(((y >= 0) & (y < z.shape[1])).all()) is False:
        raise ValueError(f"labels: expected 0 to {z.shape[1] - 1}, got {int(y.min())} to {int(y.max())}")
    count = _count(z.shape[0], reduction)
    one_hot = functional.one_hot(y.long(), z.shape[1]).to(z.dtype)
    value = functional.cross_entropy(z, y.long(), reduction="sum") / count
    return LossCurvature(value, (z.softmax(-1) - one_hot) / count, softmax_jacobian(z) / count)


def _count(number: int, reduction: str) -> int:
    """Say what the sum over the loss's terms is divided by."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {_checks.describe(reduction)}")
    return number if reduction == "mean" else 1
