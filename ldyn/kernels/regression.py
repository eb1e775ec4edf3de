"""Gradient descent on a constant kernel, in closed form, and the kernel regression that it ends in.

A model whose tangent kernel K does not change, trained by full-batch gradient descent on a square loss
(c/2) ‖f(X) − y‖², has residuals that shrink by I − ηcK in every step, so that t steps are one matrix power. The
power is taken in the eigenbasis of K, where a million steps cost as much as one. The chapter is kernels/regression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import Inputs, Linearization
from ldyn.kernels._modes import (
    Spectrum,
    all_finite,
    as_problem,
    as_spectrum,
    gains,
    powers,
    predictions,
    read_times,
    spectrum,
)

__all__ = [
    "LinearizedTrajectory",
    "Loss",
    "Spectrum",
    "Trajectory",
    "critical_learning_rate",
    "gradient_descent",
    "gradient_flow",
    "kernel_regression",
    "linearized_descent",
    "spectrum",
]

Loss = Literal["half_mean", "half_sum", "mse"]
"""Normalisations of the square loss over N examples with V outputs each, Σ over all N·V entries:

"half_mean" is Σ(f − y)²/(2N), "half_sum" is Σ(f − y)²/2, and "mse" is Σ(f − y)²/(NV), PyTorch's ``MSELoss``.
"""

_LOSSES = ("half_mean", "half_sum", "mse")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Predictions at the times that were asked for.

    Attributes:
        train: (T, N, V) predictions on the training inputs, (T, N) for targets (N,); without T if one time was given.
        cross: (T, M, V) or (T, M) predictions on the other inputs, likewise; None if there are none.
        converges: whether the predictions have a limit for every target as time goes on.
    """

    train: Tensor
    cross: Tensor | None
    converges: bool


class LinearizedTrajectory(NamedTuple):
    """Predictions of a linearised model, and where its parameters are.

    Attributes:
        train: (T, N, V) predictions on the training inputs; without T if one number of steps was given.
        cross: (T, M, V) predictions on the other inputs, likewise; None if there are none.
        displacement: (T, P) parameters minus those of the model, likewise.
    """

    train: Tensor
    cross: Tensor | None
    displacement: Tensor


def critical_learning_rate(kernel: Tensor | Spectrum, *, loss: Loss = "half_mean", outputs: int | None = None) -> float:
    """Find the learning rate below which gradient descent on a constant kernel converges, for every target.

    It is 2/(c·λ_max) for the loss (c/2)‖f − y‖²: 2N/λ_max for "half_mean", 2/λ_max for "half_sum" and NV/λ_max
    for "mse". Derived in the chapter kernels/regression.

    Args:
        kernel: (N, N, V, V) or (N, N), or its `spectrum`.
        loss: Normalisation, see `Loss`.
        outputs: Number V ≥ 1 of outputs. Only "mse" needs it, and only for a scalar kernel, whose default is 1.

    Returns:
        The critical learning rate; infinite for a kernel that is zero.

    Raises:
        ValueError: If the kernel is no kernel, the loss is unknown, or `outputs` contradicts the kernel's blocks.
    """
    modes = as_spectrum(kernel)
    count = modes.outputs or 1
    if outputs is not None:
        count = _checks.require_integer(outputs, "outputs")
        if modes.outputs not in (None, count):
            raise ValueError(f"outputs: expected {modes.outputs} as in the kernel's blocks, got {outputs!r}")
    largest = float(modes.eigenvalues[-1])
    return 2 / (_curvature(loss, modes.examples, count) * largest) if largest > 0 else math.inf


def gradient_descent(
    kernel: Tensor | Spectrum,
    targets: Tensor,
    *,
    steps: int | Sequence[int] | Tensor,
    lr: float,
    initial: Tensor | None = None,
    cross: Tensor | None = None,
    initial_cross: Tensor | None = None,
    loss: Loss = "half_mean",
) -> Trajectory:
    """Predict where full-batch gradient descent on a constant kernel stands after t steps, without taking them.

    With K = K(X, X), r = y − f₀(X) and the loss (c/2)‖f − y‖² the predictions are f_t(X) = y − (I − ηcK)ᵗ r and
    f_t(x) = f₀(x) + K(x, X) K⁺ [I − (I − ηcK)ᵗ] r. Both are exact, also beyond the critical learning rate.
    Derived in the chapter kernels/regression.

    Args:
        kernel: (N, N, V, V) or (N, N) kernel on the training inputs, or its `spectrum`.
        targets: (N, V); a scalar kernel also takes (N,).
        steps: Numbers t ≥ 0 of steps: one, or a sequence (T,) in any order.
        lr: Learning rate η > 0.
        initial: f₀(X), of the shape of `targets`; None for zero.
        cross: (M, N, V, V) or (M, N) kernel between the other inputs and the training inputs, as
            ``entk(model, x_other, x_train)``; None if there are no other inputs.
        initial_cross: f₀ on the other inputs, (M, V) or (M,); None for zero.
        loss: Normalisation, see `Loss`.

    Returns:
        The predictions in the kernel's dtype, and whether they converge (η below `critical_learning_rate`).

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, a number is out of range, or so many steps at a
            learning rate beyond the critical one lead to a number that the dtype cannot hold.
    """
    modes = as_spectrum(kernel)
    times, single = read_times(steps, "steps", whole=True)
    problem = as_problem(modes, targets, initial, cross, initial_cross)
    scaled = _checks.require_positive(lr, "lr") * _curvature(loss, modes.examples, problem.outputs)
    kept, learned = powers(scaled * modes.eigenvalues, times.to(modes.eigenvalues.device))
    critical = 2 / float(scaled * modes.eigenvalues[-1]) if modes.eigenvalues[-1] > 0 else math.inf
    train, other = predictions(problem, modes, kept, gains(modes, learned, scaled, times))
    if not all_finite(train, other):
        raise ValueError(
            f"lr: expected less than the critical learning rate {lr * critical:.6g} for so many steps, got {lr!r}:"
            f" the predictions after {int(times.max())} steps exceed the range of {modes.dtype}"
        )
    return _trajectory(train, other, single, critical > 1)


def gradient_flow(
    kernel: Tensor | Spectrum,
    targets: Tensor,
    *,
    times: float | Sequence[float] | Tensor,
    initial: Tensor | None = None,
    cross: Tensor | None = None,
    initial_cross: Tensor | None = None,
    loss: Loss = "half_mean",
) -> Trajectory:
    """Predict where gradient flow on a constant kernel stands at time t: the limit of many small steps, t = steps·η.

    As `gradient_descent` with exp(−ctK) in place of (I − ηcK)ᵗ. Derived in the chapter kernels/regression.

    Args:
        kernel: (N, N, V, V) or (N, N) kernel on the training inputs, or its `spectrum`.
        targets: (N, V); a scalar kernel also takes (N,).
        times: Times t ≥ 0, in units of learning rate times steps: one, or a sequence (T,) in any order.
        initial: f₀(X), of the shape of `targets`; None for zero.
        cross: (M, N, V, V) or (M, N) kernel between the other inputs and the training inputs; None for none.
        initial_cross: f₀ on the other inputs, (M, V) or (M,); None for zero.
        loss: Normalisation, see `Loss`.

    Returns:
        The predictions in the kernel's dtype; a flow always converges.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or a number is out of range.
    """
    modes = as_spectrum(kernel)
    moments, single = read_times(times, "times", whole=False)
    problem = as_problem(modes, targets, initial, cross, initial_cross)
    rate = _curvature(loss, modes.examples, problem.outputs)
    exponent = -moments.to(modes.eigenvalues.device)[:, None] * (rate * modes.eigenvalues)
    train, other = predictions(problem, modes, exponent.exp(), gains(modes, -exponent.expm1(), rate, moments))
    return _trajectory(train, other, single, True)


def kernel_regression(
    kernel: Tensor | Spectrum,
    targets: Tensor,
    *,
    initial: Tensor | None = None,
    cross: Tensor | None = None,
    initial_cross: Tensor | None = None,
) -> Trajectory:
    """Predict the limit of gradient descent below the critical learning rate: kernel regression with K⁺.

    The limits are f(X) = f₀(X) + K K⁺ r and f(x) = f₀(x) + K(x, X) K⁺ r, r = y − f₀(X), with the pseudo-inverse.
    They interpolate the targets only as far as r lies in the range of K; conflicting labels of equal inputs are
    averaged. The loss's normalisation does not matter. Derived in the chapter kernels/regression.

    Args:
        kernel: (N, N, V, V) or (N, N) kernel on the training inputs, or its `spectrum`, whose rank decides which
            eigenvalues are inverted.
        targets: (N, V); a scalar kernel also takes (N,).
        initial: f₀(X), of the shape of `targets`; None for zero.
        cross: (M, N, V, V) or (M, N) kernel between the other inputs and the training inputs; None for none.
        initial_cross: f₀ on the other inputs, (M, V) or (M,); None for zero.

    Returns:
        The predictions in the kernel's dtype, without a dimension for time.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    modes = as_spectrum(kernel)
    problem = as_problem(modes, targets, initial, cross, initial_cross)
    size = len(modes.eigenvalues)
    seen = torch.arange(size, device=modes.eigenvalues.device) >= size - modes.rank
    gain = torch.where(seen, 1 / modes.eigenvalues, 0.0)[None]
    train, other = predictions(problem, modes, (~seen).to(gain)[None], gain)
    return _trajectory(train, other, True, True)


def linearized_descent(
    model: nn.Module,
    x: Inputs,
    targets: Tensor,
    *,
    steps: int | Sequence[int] | Tensor,
    lr: float,
    x_cross: Inputs | None = None,
    loss: Loss = "half_mean",
) -> LinearizedTrajectory:
    """Train the linearised model f₀(x) + J(x) Δθ by gradient descent in its parameters, step by step.

    It forms no kernel and takes every step, and so is an independent route to `gradient_descent` with the model's
    tangent kernel: each step costs one product with J and one with its transpose. Derived in the chapter
    kernels/regression.

    Args:
        model: A module with outputs (N, V); linearised at its present parameters, which stay as they are.
        x: The N training inputs, a tensor or a mapping of keyword arguments.
        targets: (N, V).
        steps: Numbers t ≥ 0 of steps: one, or a sequence (T,) in any order.
        lr: Learning rate η > 0.
        x_cross: Other inputs, M of them; None for none.
        loss: Normalisation, see `Loss`.

    Returns:
        The predictions and the displacement of the parameters.

    Raises:
        ValueError: If the model or an input is refused, the targets do not fit the outputs, a number is out of
            range, or the steps diverge beyond the range of the dtype.
    """
    line = Linearization(model, x)
    other = None if x_cross is None else Linearization(model, x_cross)
    wanted = _checks.require_shape(_checks.require_real(targets, "targets"), "targets", line.logits.shape)
    _checks.require_same(wanted, "targets", line.logits, "the model's outputs")
    times, single = read_times(steps, "steps", whole=True)
    scaled = _checks.require_positive(lr, "lr") * _curvature(loss, *line.logits.shape)
    asked = times.to(torch.int64).tolist()
    here = line.logits.new_zeros(line.size)
    taken = {0: here}
    residual = line.logits - wanted
    for step in range(1, max(asked) + 1):
        here = here - scaled * line.vjp(residual)
        residual = line.logits + line.jvp(here) - wanted
        if step in asked:
            taken[step] = here
    if not torch.isfinite(residual).all():
        raise ValueError(f"lr: expected a learning rate at which the steps stay finite, got {lr!r}, which diverges")
    moved = torch.stack([taken[step] for step in asked])
    train = torch.stack([line.logits + line.jvp(row) for row in moved])
    cross = None if other is None else torch.stack([other.logits + other.jvp(row) for row in moved])
    if single:
        return LinearizedTrajectory(train[0], None if cross is None else cross[0], moved[0])
    return LinearizedTrajectory(train, cross, moved)


def _curvature(loss: str, examples: int, outputs: int) -> float:
    """Return c in the loss (c/2)‖f − y‖²."""
    if loss not in _LOSSES:
        raise ValueError(f"loss: expected one of {list(_LOSSES)}, got {_checks.describe(loss)}")
    return {"half_mean": 1 / examples, "half_sum": 1.0, "mse": 2 / (examples * outputs)}[loss]


def _trajectory(train: Tensor, cross: Tensor | None, single: bool, converges: bool) -> Trajectory:
    """Drop the dimension of time if one time was asked for."""
    if not single:
        return Trajectory(train, cross, converges)
    return Trajectory(train[0], None if cross is None else cross[0], converges)
