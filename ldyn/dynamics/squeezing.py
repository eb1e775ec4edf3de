"""What a negative gradient does to a softmax: where the probability goes when one label is pushed down.

A step that lowers the log-probability of label y moves free logits along G = p − e_y, the gradient of −log p_y, by a
step size s: z′ = z + s G. A kernel K = κI (a softmax head on fixed features has κ = ‖φ‖², and 1 more for a bias)
gives the same move with s = η κ times the weight of the loss. Then

    p′_j = p_j exp(s (G_j − τ)),    τ(s) = (1/s) log E_p exp(s G),

so that a label j ≠ y rises exactly if p_j > τ(s). Everything here follows for every p and every s ≥ 0, no expansion
in s is made, and every quantity keeps its relative accuracy down to s = 0 and to probabilities of 1e-30. Derived in
the chapter *Squeezing*.
"""

from __future__ import annotations

import math
from typing import NamedTuple, overload

import torch
from torch import Tensor

from ldyn import _checks

__all__ = ["critical_peak", "negative_flow", "negative_path", "negative_step", "squeezing_threshold"]

_EXP_SERIES = tuple(1 / math.factorial(n + 2) for n in range(13))
_LOG_SERIES = tuple((-1.0) ** n / (n + 1) for n in range(7))


class _Push(NamedTuple):
    """A checked problem: p and G, each (..., V), the step size and the largest G, each (..., 1), and a dtype."""

    p: Tensor
    G: Tensor
    s: Tensor
    top: Tensor
    dtype: torch.dtype


def negative_step(p: Tensor, y: Tensor | int, s: Tensor | float) -> Tensor:
    """Take one negative-gradient step of size s on label y: softmax(z + s (p − e_y)), from probabilities alone.

    Differentiable in p and s. Float16 and bfloat16 are computed in float32. A sum of `p` that is off by rounding is
    divided out.

    Args:
        p: (..., V) probabilities before the step, V ≥ 2. Zeros are allowed and stay.
        y: (...) integer label pushed down, or one integer for all.
        s: (...) step size ≥ 0, of the dtype of `p`, or one number; η κ times the weight of the loss.

    Returns:
        (..., V) probabilities after the step; the batch dimensions of the three arguments are broadcast.

    Raises:
        ValueError: If p is off the simplex or has fewer than two labels, y is no integer from 0 to V − 1, s is
            negative, not finite or of another dtype, or the batch dimensions do not fit.
    """
    push = _require_push(p, y, s)
    weights = _weights(push)
    return (weights / weights.sum(-1, keepdim=True)).to(push.dtype)


def squeezing_threshold(p: Tensor, y: Tensor | int, s: Tensor | float) -> Tensor:
    """Compute τ(s) = (1/s) log E_p exp(s (p − e_y)): after a step of size s, label j ≠ y has risen if p_j > τ(s).

    The threshold grows with s, from ‖p‖² − p_y, its value at s = 0, to the largest p_j with j ≠ y. The logarithm of
    the change itself is s (p_j − τ) for j ≠ y, and s (p_y − 1 − τ) for y, without the cancellation of p′ − p.
    Differentiable in p and s, at s = 0 too. Float16 and bfloat16 are computed in float32.

    Args:
        p: (..., V) as in `negative_step`.
        y: (...) as in `negative_step`.
        s: (...) as in `negative_step`.

    Returns:
        (...) thresholds, between −1 and 1.

    Raises:
        ValueError: As in `negative_step`.
    """
    push = _require_push(p, y, s)
    slope = _mean_slope(push)
    excess = push.s * slope  # E_p exp(sG) − 1
    near = (push.s * push.top <= 1) & (excess >= -0.5)
    by_excess = slope * _log1p_quotient(excess.clamp(min=-0.5))
    apart = torch.where(near, torch.ones_like(push.s), push.s)
    by_peak = push.top + _weights(push).sum(-1, True).log() / apart
    return torch.where(near, by_excess, by_peak).squeeze(-1).to(push.dtype)


@overload
def critical_peak(p_y: Tensor) -> Tensor: ...


@overload
def critical_peak(p_y: float) -> float: ...


def critical_peak(p_y: Tensor | float) -> Tensor | float:
    """Compute q_c = ¼ [1 − 2 p_y + √(1 + 12 p_y (1 − p_y))], the peak from which only the peak can rise.

    If a label other than y has probability at least q_c(p_y), then it alone rises, whatever the step size and the
    other probabilities (V ≥ 3). With three labels that is also necessary. q_c(0) = ½, and q_c ≤ 1/√3. From p_y = ½ on
    q_c ≥ 1 − p_y, so that no label can reach it unless all others but y have no probability at all.

    Args:
        p_y: Probability of the label pushed down, between 0 and 1: a number, or a tensor (...).

    Returns:
        q_c, of the kind and shape of `p_y`.

    Raises:
        ValueError: If p_y is no floating-point tensor and no number, or not between 0 and 1.
    """
    if not isinstance(p_y, Tensor):
        number = _checks.require_number(p_y, "p_y")
        return float(critical_peak(torch.tensor(number, dtype=torch.float64)))
    low = _checks.require_real(p_y, "p_y")
    if _checks.known_truth(((low.detach() >= 0) & (low.detach() <= 1)).all()) is False:
        got = f"{float(low.detach().min()):.6g} to {float(low.detach().max()):.6g}"
        raise ValueError(f"p_y: expected probabilities between 0 and 1, got {got}")
    product, middle = low * (1 - low), 1 - 2 * low
    root = (1 + 12 * product).sqrt()
    # two forms of one root of a quadratic, each free of cancellation on its side of one half
    return torch.where(low <= 0.5, (middle + root) / 4, 4 * product / (root - middle.clamp(max=0)))


def negative_flow(p: Tensor, y: Tensor | int) -> Tensor:
    """Compute the velocity dp/ds of an infinitesimal negative step: p_j (G_j − m), m = ‖p‖² − p_y.

    The positive step that raises y has the opposite velocity. Differentiable in p.

    Args:
        p: (..., V) as in `negative_step`.
        y: (...) as in `negative_step`.

    Returns:
        (..., V), summing to zero over the labels.

    Raises:
        ValueError: As in `negative_step`.
    """
    push = _require_push(p, y, 0.0)
    return (push.p * (push.G - (push.p * push.G).sum(-1, True))).to(push.dtype)


def negative_path(p: Tensor, y: Tensor | int, s: Tensor | float, *, steps: int) -> Tensor:
    """Repeat a negative step, each with the gradient at the probabilities that it finds.

    Args:
        p: (..., V) as in `negative_step`.
        y: (...) as in `negative_step`.
        s: (...) size of each step, as in `negative_step`.
        steps: How many, ≥ 0.

    Returns:
        (steps + 1, ..., V) probabilities, the first being those before the first step.

    Raises:
        ValueError: As in `negative_step`, or if steps is no integer ≥ 0.
    """
    count = _checks.require_integer(steps, "steps", minimum=0)
    push = _require_push(p, y, s)
    path = [push.p + torch.zeros_like(push.s)]
    for _ in range(count):
        path.append(negative_step(path[-1], y, push.s.squeeze(-1)))
    return torch.stack(path).to(push.dtype)


def _require_push(p: Tensor, y: Tensor | int, s: Tensor | float) -> _Push:
    """Check the three arguments and bring them to shapes that broadcast."""
    given = _checks.require_probabilities(p, "p")
    if given.shape[-1] < 2:
        raise ValueError(f"p: expected at least 2 labels in the last dimension, got {_checks.describe(given)}")
    label, size = _require_labels(y, given), _require_size(s, given)
    _require_broadcast(label, "y", given.shape[:-1])
    wide = given.to(torch.promote_types(given.dtype, torch.float32))
    wide = wide / wide.sum(-1, True)
    own = torch.arange(given.shape[-1], device=given.device) == label.unsqueeze(-1)
    others = torch.where(own, 0.0, wide)
    # 1 − p_y as the sum of the others: it keeps its digits where p_y is within rounding of one
    G = torch.where(own, -others.sum(-1, True), wide)
    _require_broadcast(size, "s", G.shape[:-1])
    return _Push(wide.expand_as(G), G, size.to(wide.dtype).unsqueeze(-1), others.amax(-1, True), given.dtype)


def _require_labels(y: object, p: Tensor) -> Tensor:
    """Require integer labels from 0 to V − 1; return them as int64 on the device of p."""
    classes = p.shape[-1]
    if not isinstance(y, Tensor):
        label = _checks.require_integer(y, "y", minimum=0)
        if label >= classes:
            raise ValueError(f"y: expected a label from 0 to {classes - 1}, got {label}")
        return torch.tensor(label, device=p.device)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"y: expected integer labels, got {_checks.describe(y)}")
    if y.device != p.device:
        raise ValueError(f"y: expected the device of p ({p.device}), got {y.device}")
    labels = _checks.require_nonempty(y, "y")
    if _checks.known_truth(((labels >= 0) & (labels < classes)).all()) is False:
        raise ValueError(f"y: expected labels from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    return labels.long()


def _require_size(s: object, p: Tensor) -> Tensor:
    """Require step sizes that are finite and not negative; return them as a tensor like p."""
    if not isinstance(s, Tensor):
        return p.new_tensor(_checks.require_nonnegative(s, "s"), dtype=torch.promote_types(p.dtype, torch.float32))
    size = _checks.require_same(_checks.require_real(s, "s"), "s", p, "p")
    if _checks.known_truth((size.detach() >= 0).all()) is False:
        raise ValueError(f"s: expected step sizes >= 0, got {float(size.detach().min()):.6g}")
    return size


def _require_broadcast(value: Tensor, name: str, batch: torch.Size) -> None:
    """Require a shape that broadcasts with the batch dimensions."""
    pairs = zip(reversed(value.shape), reversed(batch), strict=False)
    if any(size != other and 1 not in (size, other) for size, other in pairs):
        raise ValueError(f"{name}: expected a shape that broadcasts with {tuple(batch)}, got {_checks.describe(value)}")


def _weights(push: _Push) -> Tensor:
    """Compute p′ up to its sum, scaled so that the largest factor is one: p exp(s (G − max G))."""
    return push.p * (push.s * (push.G - push.top)).exp()


def _mean_slope(push: _Push) -> Tensor:
    """Compute E_p (exp(sG) − 1)/s for s max G ≤ 1, with ‖p‖² − p_y apart, so that neither loses digits to the other."""
    exponent = (push.s * push.G).clamp(max=1)
    small = exponent.abs() < 0.3
    inner, outer = torch.where(small, exponent, 0.0), torch.where(small, 1.0, exponent)
    rest = push.s * push.G**2 * _polynomial(inner, _EXP_SERIES)
    # |G| ≤ 1, so that s exceeds a quarter wherever the exponent is not small
    parts = torch.where(small, push.G, outer.expm1() / push.s.clamp(min=0.25)), torch.where(small, rest, 0.0)
    return (push.p * parts[0]).sum(-1, True) + (push.p * parts[1]).sum(-1, True)


def _log1p_quotient(x: Tensor) -> Tensor:
    """Compute log(1 + x)/x with its limit, and the limits of its derivatives, at zero."""
    small = x.abs() < 1e-3
    inner, outer = torch.where(small, x, 0.0), torch.where(small, 1.0, x)
    return torch.where(small, _polynomial(inner, _LOG_SERIES), outer.log1p() / outer)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Evaluate a polynomial by Horner's rule, the constant first."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
