"""The loss that a step descends, as a scalar function of the logits, and its gradient G in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ldyn import _checks

__all__ = ["Loss", "Reduction", "energy", "logit_gradient", "scalar_loss"]

Loss = Literal["cross_entropy"] | Callable[[Tensor, Any], Tensor]
"""The cross-entropy, or a function of logits (..., V) and targets to the scalar that the step descends."""

Reduction = Literal["mean", "sum"]
"""Whether the cross-entropy averages over contexts, as PyTorch does unless told otherwise, or adds them up."""


def energy(logits: Tensor, targets: Any, *, loss: Loss = "cross_entropy", reduction: Reduction | None = None) -> Tensor:
    """Compute G = ∇_z L, the column that a step descends, by automatic differentiation.

    It points from the target to the prediction: for one example and the cross-entropy it is π − e_y, and its norm
    is at most √2.

    Args:
        logits: (..., V).
        targets: Labels (...), or target probabilities (..., V); whatever a `loss` of your own takes.
        loss: As in `akg`.
        reduction: As in `akg`, over all contexts (...).

    Returns:
        (..., V) gradient of the scalar loss.

    Raises:
        ValueError: If targets or loss do not fit the logits, or a reduction is given for a loss that is a function.
    """
    return logit_gradient(logits, scalar_loss(targets, loss, reduction))


def logit_gradient(logits: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Differentiate a scalar function of the logits, (..., V) to (..., V)."""
    with torch.inference_mode(False), torch.enable_grad():
        z = _checks.require_real(logits, "logits", min_ndim=1).detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(measure(z), z)
    return gradient


def scalar_loss(
    targets: Any, loss: Loss, reduction: Reduction | None, *, name: str = "targets"
) -> Callable[[Tensor], Tensor]:
    """Close a loss over its targets; the result checks what depends on the logits."""
    if reduction not in (None, "mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {_checks.describe(reduction)}")
    if callable(loss):
        if reduction is not None:
            raise ValueError(f"reduction: expected none for a loss with its own normalisation, got {reduction!r}")
        return lambda logits: _require_scalar(loss(logits, targets))
    if loss != "cross_entropy":
        raise ValueError(f"loss: expected 'cross_entropy' or a function, got {_checks.describe(loss)}")
    return lambda logits: _cross_entropy(logits, targets, reduction or "mean", name)


def _cross_entropy(logits: Tensor, targets: Any, reduction: Reduction, name: str) -> Tensor:
    """Compute the cross-entropy over all contexts, against labels or probabilities."""
    known = _checks.require_tensor(targets, name)
    if known.device != logits.device:
        raise ValueError(f"{name}: expected the device of the logits ({logits.device}), got {known.device}")
    rows = logits.reshape(-1, logits.shape[-1])
    if known.is_floating_point():
        _checks.require_shape(known, f"{name}, as probabilities", logits.shape)
        _checks.require_same(known, f"{name}, as probabilities", logits, "the logits")
        _checks.require_probabilities(known, name)
        return functional.cross_entropy(rows, known.detach().reshape(rows.shape), reduction=reduction)
    _checks.require_shape(known, f"{name}, as labels", logits.shape[:-1])
    if known.dtype == torch.bool or known.is_complex():
        raise ValueError(f"{name}: expected integer labels or probabilities, got {_checks.describe(known)}")
    if _checks.known_truth(((known >= 0) & (known < logits.shape[-1])).all()) is False:
        raise ValueError(
            f"{name}: expected labels from 0 to {logits.shape[-1] - 1}, got {int(known.min())} to {int(known.max())}"
        )
    return functional.cross_entropy(rows, known.reshape(-1).long(), reduction=reduction)


def _require_scalar(value: object) -> Tensor:
    """Require one finite number that depends on the logits."""
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
        raise ValueError(f"loss: expected a function that returns a scalar tensor, got {_checks.describe(value)}")
    if not value.requires_grad:
        raise ValueError("loss: expected a number that depends on the logits, got one cut off from them")
    return _checks.require_finite(value, "loss, its value")
