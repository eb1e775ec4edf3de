"""The change of log-probabilities when logits move: exactly, and how far from the linear prediction at most."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ldyn import _checks
from ldyn.foundations.kl import categorical_kl

__all__ = ["ExactChange", "RemainderInterval", "centred", "exact_change", "remainder_bound", "remainder_interval"]


class ExactChange(NamedTuple):
    """The exact change of log-probabilities when the logits move by Δ; total = linear − kl.

    Attributes:
        linear: (..., V) A Δ, the change of each logit less their mean under the old probabilities.
        kl: (...) KL(π‖π′) in nats, the same for every class.
        total: (..., V) log π′ − log π.
    """

    linear: Tensor
    kl: Tensor
    total: Tensor


class RemainderInterval(NamedTuple):
    """Bounds on log π′ − log π − A d from both sides, each (..., V), in nats."""

    lower: Tensor
    upper: Tensor


def exact_change(logits: Tensor, new_logits: Tensor) -> ExactChange:
    """Split the change of log-probabilities into its linear part and one divergence: A Δ − KL(π‖π′) 1.

    Exact for every model and every step, small or not: log-softmax is linear in the logits up to a number that all
    classes share. Put in logits + `predicted_logits` for the new logits, and only the network is linearised.

    Args:
        logits: (..., V) before.
        new_logits: (..., V) after.

    Returns:
        Both parts and the total.

    Raises:
        ValueError: If an argument is no finite non-empty floating-point tensor with a last dimension, or the two
            differ in shape, dtype or device.
    """
    kl = categorical_kl(logits, new_logits)
    linear = centred(logits, new_logits - logits)
    return ExactChange(linear, kl, linear - kl.unsqueeze(-1))


def remainder_bound(step_norm: float, jacobian_norm: float, curvature: float) -> float:
    """Bounds the largest entry of log π′ − log π − A J_o Δθ by ½ s² (√2 M + ½ L²).

    Both constants belong to the *observed* example, on the segment from θ to θ + Δθ and in the direction
    v = Δθ/‖Δθ‖; the norms over all directions are larger and do as well. A plain step on one example with
    cross-entropy has s = η ‖J_uᵀ G‖ ≤ √2 η ‖J_u‖.

    Args:
        step_norm: s = ‖Δθ‖.
        jacobian_norm: L, the largest ‖J_o v‖ on the segment.
        curvature: M, the largest ‖∇²z(x_o)[v, v]‖ on the segment.

    Returns:
        The bound, in nats.

    Raises:
        ValueError: If an argument is no finite number, or negative.
    """
    s = _checks.require_nonnegative(step_norm, "step_norm")
    L = _checks.require_nonnegative(jacobian_norm, "jacobian_norm")
    M = _checks.require_nonnegative(curvature, "curvature")
    return s**2 * (math.sqrt(2) * M + L**2 / 2) / 2


def remainder_interval(logits: Tensor, change: Tensor, *, deviation: Tensor | float) -> RemainderInterval:
    """Bounds log π′ − log π − A d from both sides, where d is the linearised change of the logits.

    If the new logits are z + d + r with ‖r‖ ≤ δ and q = softmax(z + d), the remainder of class k lies in
    −KL(π‖q) ± δ ‖e_k − q‖, up to −δ²/4 below. A network whose logits are linear in its parameters has δ = 0 and the
    remainder −KL(π‖q) itself. Usually far sharper than `remainder_bound`.

    Args:
        logits: (..., V) z.
        change: (..., V) d.
        deviation: δ ≥ 0, a number or (...); ½ M s² in the terms of `remainder_bound`.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: If logits and change are no fitting pair of finite floating-point tensors, or the deviation is
            negative, not finite, or of another shape.
    """
    _checks.require_real(logits, "logits", min_ndim=1)
    _checks.require_shape(_checks.require_real(change, "change"), "change", logits.shape)
    _checks.require_same(change, "change", logits, "logits")
    kl = categorical_kl(logits, logits + change).unsqueeze(-1)
    if isinstance(deviation, Tensor):
        _checks.require_finite(_checks.require_same(deviation, "deviation", logits, "logits"), "deviation")
        if deviation.ndim:
            _checks.require_shape(deviation, "deviation", logits.shape[:-1])
        if _checks.known_truth((deviation.detach() >= 0).all()) is False:
            raise ValueError(f"deviation: expected numbers >= 0, got {float(deviation.detach().min()):.6g}")
        radius = deviation.unsqueeze(-1)
    else:
        radius = logits.new_tensor(_checks.require_nonnegative(deviation, "deviation"))
    q = (logits + change).softmax(-1)
    # ‖e_k − q‖² = ‖q‖² − 2 q_k + 1, summed so that no term cancels where q_k is close to one
    others = (q**2).sum(-1, keepdim=True) - q**2
    reach = radius * (others.clamp(min=0) + (1 - q) ** 2).sqrt()
    return RemainderInterval(-kl - reach - radius**2 / 4, -kl + reach)


def centred(logits: Tensor, change: Tensor) -> Tensor:
    """Multiplies by A = I − 1πᵀ: the change less its mean, taken from the likeliest class so that nothing cancels."""
    relative = change - change.gather(-1, logits.argmax(-1, keepdim=True))
    return relative - (logits.softmax(-1) * relative).sum(-1, keepdim=True)
