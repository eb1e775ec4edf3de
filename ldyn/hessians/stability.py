"""How large a step may be: critical learning rates, guarantees of descent, and what one more sample changes.

Near a minimum a loss is a quadratic, and on a quadratic every direction of curvature λ is a mode of its own: an
optimiser acts on it as a 2 × 2 matrix with trace T and determinant D, and the mode dies out if and only if the point
(T, D) lies in the triangle |D| < 1, |T| < 1 + D. All thresholds here are that triangle, read for the update rules as
PyTorch writes them. Derived in the chapter hessians/stability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ldyn import _checks
from ldyn.hessians._stability_preconditioner import adam_preconditioner, preconditioned

__all__ = [
    "BestStep",
    "Optimizer",
    "adam_preconditioner",
    "best_learning_rate",
    "critical_learning_rate",
    "curvature_from_losses",
    "descent_bound",
    "gauss_newton_bound",
    "increment_bound",
    "mode_factor",
    "preconditioned",
    "quadratic_descent",
]

Optimizer = Literal["gd", "momentum", "nesterov", "adam"]
"""Update rules, with gradient g, learning rate η and buffer v, as in ``torch.optim``:

"gd" is w − ηg; "momentum" is v ← βv + (1 − dampening) g, w − ηv; "nesterov" is v ← βv + g, w − η(g + βv); "adam" is
v ← βv + (1 − β) g, w − η v/(√s + ε) with the second moments s frozen, and without its bias correction, which fades.
"""

Scalar = TypeVar("Scalar", float, Tensor)
"""A number, or a tensor of them: the result is of the same kind."""

_ADAM_BETA = 0.9


class BestStep(NamedTuple):
    """The learning rate with the best worst case on a quadratic.

    Attributes:
        lr: 2/(λ_min + λ_max).
        rate: (κ − 1)/(κ + 1) with κ = λ_max/λ_min: the factor of the distance to the minimum in the worst mode.
    """

    lr: float
    rate: float


def critical_learning_rate(
    sharpness: Scalar, *, optimizer: Optimizer = "gd", beta: float | None = None, dampening: float = 0.0
) -> Scalar:
    """Find the learning rate below which the mode of the largest curvature dies out.

    It is 2/λ for gradient descent, (2 + 2β)/((1 − dampening) λ) for PyTorch's momentum, (2 + 2β)/((1 + 2β) λ) for
    Nesterov's, and (2 + 2β)/((1 − β) λ) for Adam, where λ is the largest eigenvalue of the *preconditioned* Hessian
    P⁻¹H, P the diagonal matrix of Adam's denominators (see `preconditioned`). Learning rate and curvature enter by
    their product, so that ``critical_learning_rate(lr, ...)`` is the largest curvature that is stable at a given
    learning rate. Derived in the chapter hessians/stability; Cohen et al. (2021, 2022).

    Args:
        sharpness: λ > 0, a number or a tensor (...).
        optimizer: Update rule, see `Optimizer`.
        beta: Its momentum, or Adam's β₁, in [0, 1): needed by "momentum" and "nesterov", 0.9 by default for "adam".
        dampening: PyTorch's dampening in [0, 1), for "momentum" only.

    Returns:
        The critical learning rate, of the kind and shape of `sharpness`.

    Raises:
        ValueError: If an argument is out of range, or the optimizer is unknown or does not take it.
    """
    positive = _positive(sharpness, "sharpness")
    beta = _momentum(optimizer, beta, dampening)
    limits = {
        "gd": 2.0,
        "momentum": (2 + 2 * beta) / (1 - dampening),
        "nesterov": (2 + 2 * beta) / (1 + 2 * beta),
        "adam": (2 + 2 * beta) / (1 - beta),
    }
    return limits[optimizer] / positive


def mode_factor(
    curvature: Scalar, *, lr: float, optimizer: Optimizer = "gd", beta: float | None = None, dampening: float = 0.0
) -> Tensor:
    """Compute by what factor a step multiplies a mode of a quadratic in the long run.

    It is the spectral radius of the update's 2 × 2 matrix: below 1 the mode dies out, above 1 it grows. For a negative
    curvature it is above 1 whatever the learning rate and the momentum. See the chapter hessians/stability.

    Args:
        curvature: λ of either sign, a number or a tensor (...); for "adam" of the preconditioned Hessian.
        lr: Learning rate η > 0.
        optimizer: As in `critical_learning_rate`.
        beta: As in `critical_learning_rate`.
        dampening: As in `critical_learning_rate`.

    Returns:
        (...) the factor, ≥ 0; float64 for a number.

    Raises:
        ValueError: As in `critical_learning_rate`, or if `lr` is not positive.
    """
    if isinstance(curvature, Tensor):
        modes = _checks.require_real(curvature, "curvature")
    else:
        modes = torch.tensor(_checks.require_number(curvature, "curvature"), dtype=torch.float64)
    rate, beta = _checks.require_positive(lr, "lr"), _momentum(optimizer, beta, dampening)
    a = rate * modes
    if optimizer == "nesterov":
        trace, determinant = (1 + beta) * (1 - a), beta * (1 - a)
    else:
        share = {"gd": 1.0, "momentum": 1 - dampening, "adam": 1 - beta}[optimizer]
        trace, determinant = 1 + beta - share * a, torch.full_like(a, beta)
    discriminant = trace.square() - 4 * determinant
    real = (trace.abs() + discriminant.clamp(min=0).sqrt()) / 2
    return torch.where(discriminant >= 0, real, determinant.clamp(min=0).sqrt())


def best_learning_rate(smallest: float, largest: float) -> BestStep:
    """Find the constant learning rate of gradient descent whose worst mode of a quadratic shrinks fastest.

    Derived in the chapter hessians/stability; Polyak (1964).

    Args:
        smallest: Smallest curvature λ_min > 0.
        largest: Largest curvature λ_max ≥ λ_min.

    Returns:
        The learning rate and the factor per step.

    Raises:
        ValueError: If a curvature is not positive, or the smallest exceeds the largest.
    """
    low, high = _checks.require_positive(smallest, "smallest"), _checks.require_positive(largest, "largest")
    if low > high:
        raise ValueError(f"smallest: expected at most largest = {high!r}, got {low!r}")
    return BestStep(2 / (low + high), (high - low) / (high + low))


def quadratic_descent(
    hessian: Tensor, start: Tensor, *, lr: float, steps: int | Sequence[int], momentum: float = 0.0
) -> Tensor:
    """Jump to where gradient descent on a quadratic stands after some steps, without walking there.

    The loss is ½ wᵀHw, with its stationary point at zero: pass displacements from it. Without momentum the result is
    (I − ηH)ᵗ w₀; momentum is PyTorch's, with an empty buffer at the start. See the chapter hessians/stability.

    Args:
        hessian: (d, d) H, symmetric, of any signature.
        start: (..., d) w₀.
        lr: Learning rate η > 0.
        steps: Number of steps ≥ 0, or a sequence of T such numbers.
        momentum: β in [0, 1).

    Returns:
        (..., d), or (T, ..., d) for several numbers of steps.

    Raises:
        ValueError: If the shapes do not fit, H is not symmetric, or a number is out of range.
    """
    matrix = _checks.require_shape(_checks.require_real(hessian, "hessian", ndim=2), "hessian", ("d", "d"))
    first = _checks.require_real(start, "start", min_ndim=1)
    _checks.require_same(_checks.require_shape(first, "start", ("...", len(matrix))), "start", matrix, "hessian")
    gap = (matrix - matrix.mT).detach().abs().amax()
    if _checks.known_truth(gap <= 100 * torch.finfo(matrix.dtype).eps * matrix.detach().abs().amax()) is False:
        raise ValueError(f"hessian: expected a symmetric matrix, got one off its transpose by {float(gap):.3g}")
    rate, beta = _checks.require_positive(lr, "lr"), _in_unit_interval(momentum, "momentum")
    counts = list(steps) if isinstance(steps, Sequence) else [steps]
    times = [_checks.require_integer(count, "steps", minimum=0) for count in counts]
    if not times:
        raise ValueError("steps: expected a number of steps or several, got an empty sequence")
    curvature, modes = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if beta == 0:
        factors = [(1 - rate * curvature) ** time for time in times]
    else:
        rows = [1 - rate * curvature, torch.full_like(curvature, -rate * beta), curvature]
        update = torch.stack([*rows, torch.full_like(curvature, beta)], -1).view(-1, 2, 2)
        factors = [torch.linalg.matrix_power(update, time)[:, 0, 0] for time in times]
    along = first @ modes
    result = torch.stack([(factor * along) @ modes.mT for factor in factors])
    return result if isinstance(steps, Sequence) else result[0]


def descent_bound(loss: Scalar, gradient_norm: Scalar, *, lr: float, smoothness: float, noise: float = 0.0) -> Scalar:
    """Bound the loss after one step of gradient descent, in expectation if the gradient is noisy.

    If no curvature along the step exceeds M, the loss at w − η(g + ξ) is at most
    L − η‖g‖² + ½η²M(‖g‖² + E‖ξ‖²) on average over a noise ξ of mean zero. Derived in the chapter hessians/stability.

    Args:
        loss: L before the step, a number or a tensor (...).
        gradient_norm: ‖g‖ ≥ 0, of the same kind, (...).
        lr: Learning rate η > 0.
        smoothness: M ≥ 0, on the whole segment from before the step to after it.
        noise: E‖ξ‖² ≥ 0; for a batch of B independent examples, the trace of their gradients' covariance over B.

    Returns:
        The bound, of the same kind.

    Raises:
        ValueError: If an argument is out of range, or a tensor is not finite.
    """
    rate, most = _checks.require_positive(lr, "lr"), _checks.require_nonnegative(smoothness, "smoothness")
    spread = _checks.require_nonnegative(noise, "noise")
    before = _number(loss, "loss")
    squared = _number(gradient_norm, "gradient_norm", least=0.0) ** 2
    return before - rate * squared + rate**2 * most / 2 * (squared + spread)


def curvature_from_losses(losses: Tensor, *, lr: float, overshoots: bool = False) -> Tensor:
    """Read the curvature of a quadratic mode from the losses of gradient descent.

    With decrements D_t = L_{t+1} − L_t, the ratio D_{t+1}/D_t is (1 − ηλ)² on one mode, so λ is one of
    (1 ∓ √ratio)/η. The losses cannot tell which: λ and 2/η − λ have the same. With several modes the ratio is a
    weighted mean of theirs, and the result an average curvature. See the chapter hessians/stability.

    Args:
        losses: (..., T) losses of successive steps, T ≥ 3; the minimum need not be known.
        lr: Learning rate η > 0, the same for all steps.
        overshoots: Whether the mode changes sides at every step (ηλ > 1): successive gradients point in opposite
            directions. Chooses the root.

    Returns:
        (..., T − 2) curvature; NaN where two successive decrements are zero or of opposite signs, which a single
        mode never produces.

    Raises:
        ValueError: If there are fewer than three losses, or one is not finite, or `lr` is not positive.
    """
    values = _checks.require_real(losses, "losses", min_ndim=1)
    if values.shape[-1] < 3:
        raise ValueError(f"losses: expected at least three successive losses, got {_checks.describe(values)}")
    rate = _checks.require_positive(lr, "lr")
    decrements = values.diff(dim=-1)
    earlier, later = decrements[..., :-1], decrements[..., 1:]
    explained = (earlier != 0) & (earlier.sign() * later.sign() >= 0)
    ratio = torch.where(explained, later / torch.where(earlier == 0, 1.0, earlier), torch.nan)
    root = ratio.sqrt()
    return (1 + root if overshoots else 1 - root) / rate


def increment_bound(count: int, distance: Scalar, *, loss_bound: float, smoothness: float) -> Scalar:
    """Bound by how much one more sample can change the mean loss at a distance from a reference point.

    For losses ℓ_i ≥ 0 of smoothness M, at most Λ at any reference point w*, the means over k and k + 1 samples at a
    point at distance r from w* differ by at most (√Λ + √(M/2) r)²/(k + 1). Nothing is asked of the gradients at w*;
    the bound is attained. Derived in the chapter hessians/stability.

    Args:
        count: k ≥ 1, samples before the new one.
        distance: r ≥ 0, a number or a tensor (...).
        loss_bound: Λ ≥ 0, the largest loss of a sample at the reference point.
        smoothness: M ≥ 0, bound of the samples' curvature in the ball around w* of radius max(r, √(2Λ/M)).

    Returns:
        The bound, of the kind and shape of `distance`.

    Raises:
        ValueError: If an argument is out of range.
    """
    samples = _checks.require_integer(count, "count")
    most, largest = (
        _checks.require_nonnegative(smoothness, "smoothness"),
        _checks.require_nonnegative(loss_bound, "loss_bound"),
    )
    reach = _number(distance, "distance", least=0.0)
    return (math.sqrt(largest) + math.sqrt(most / 2) * reach) ** 2 / (samples + 1)


def gauss_newton_bound(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Bound the Gauss–Newton part of the cross-entropy's Hessian for a ReLU network without biases.

    It is ½ Σ_p ‖x_p‖² Π_{s>p} ‖W_s‖² with x_p the input of layer p and the product over the layers above it; one
    layer (softmax regression) has no functional part, and this bounds the Hessian. See the chapter hessians/stability.

    Args:
        weights: W_1, …, W_n, each (outputs, inputs), from the input to the logits; ReLU stands between them.
        x: (..., inputs) examples.

    Returns:
        (...) the bound for each example.

    Raises:
        ValueError: If there are no weights, or shapes, dtypes or devices do not fit.
    """
    if not weights:
        raise ValueError("weights: expected at least one matrix, got none")
    state = _checks.require_real(x, "x", min_ndim=1)
    sizes: list[Tensor] = []
    norms: list[Tensor] = []
    for place, weight in enumerate(weights):
        matrix = _checks.require_real(weight, f"weights[{place}]", ndim=2)
        _checks.require_same(matrix, f"weights[{place}]", x, "x")
        _checks.require_shape(matrix, f"weights[{place}]", (None, state.shape[-1]))
        sizes.append(state.square().sum(-1))
        norms.append(torch.linalg.matrix_norm(matrix, 2).square())
        state = (state @ matrix.mT).relu()
    bound = torch.zeros_like(sizes[0])
    above = torch.ones_like(norms[0])
    for size, norm in zip(reversed(sizes), reversed(norms), strict=True):
        bound = bound + size * above
        above = above * norm
    return bound / 2


def _momentum(optimizer: str, beta: float | None, dampening: float) -> float:
    """Check an optimiser with its momentum, and return the momentum."""
    if optimizer not in ("gd", "momentum", "nesterov", "adam"):
        raise ValueError(f"optimizer: expected 'gd', 'momentum', 'nesterov' or 'adam', got {optimizer!r}")
    if _in_unit_interval(dampening, "dampening") and optimizer != "momentum":
        raise ValueError(f"dampening: expected 0 for {optimizer!r}, got {dampening!r}")
    if optimizer == "gd":
        if beta not in (None, 0):
            raise ValueError(f"beta: expected none for 'gd', got {beta!r}")
        return 0.0
    if beta is None and optimizer != "adam":
        raise ValueError(f"beta: expected a number in [0, 1) for {optimizer!r}, got None")
    return _in_unit_interval(_ADAM_BETA if beta is None else beta, "beta")


def _in_unit_interval(value: object, name: str) -> float:
    """Require a number in [0, 1)."""
    number = _checks.require_number(value, name)
    if not 0 <= number < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {number!r}")
    return number


def _positive(value: Scalar, name: str) -> Scalar:
    """Require a positive number, or a tensor of them."""
    found = _number(value, name, least=0.0)
    zero = _checks.known_truth((found.detach() == 0).any()) if isinstance(found, Tensor) else found == 0
    if zero:
        raise ValueError(f"{name}: expected values > 0, got 0")
    return found


def _number(value: Scalar, name: str, *, least: float = -math.inf) -> Scalar:
    """Require a finite number, or a tensor of them, not below a limit."""
    if isinstance(value, Tensor):
        tensor = _checks.require_real(value, name)
        if _checks.known_truth((tensor.detach() >= least).all()) is False:
            raise ValueError(f"{name}: expected values >= {least:g}, got {float(tensor.detach().min()):.6g}")
        return tensor
    number = _checks.require_number(value, name)
    if number < least:
        raise ValueError(f"{name}: expected a number >= {least:g}, got {number!r}")
    return number
