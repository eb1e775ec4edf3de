"""What one step on one example does to the prediction on another: Δ log π(x_o) = −η A K G, and what is left over.

A = I − 1πᵀ is the Jacobian of log-softmax at the observed example, K = J_o J_uᵀ the tangent kernel of the logits, and
G = ∇_z L the gradient of the loss in the logits of the updated example, which points from the target to the
prediction. `akg` forms all three. `predicted_change` gives their product from one reverse-mode and one forward-mode
product with the Jacobian, so that nothing of size V² is ever held, for any loss, batch and optimiser. The change is
first order in the step; `exact_change` says what log-softmax adds, and the bounds what the network's curvature may.
Derived in the chapter *One step of learning*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldyn import _checks
from ldyn._linearize import Inputs, copied_parameters, forward, gradients, pushforward
from ldyn.dynamics._change import (
    ExactChange,
    RemainderInterval,
    centred,
    exact_change,
    remainder_bound,
    remainder_interval,
)
from ldyn.dynamics._losses import Loss, Reduction, energy, logit_gradient, scalar_loss
from ldyn.dynamics._optimizers import Gradients, OptimizerStep, optimizer_step
from ldyn.foundations.softmax import log_softmax_jacobian
from ldyn.kernels.entk import entk

__all__ = [
    "AKG",
    "ExactChange",
    "LogitChange",
    "OptimizerStep",
    "RemainderInterval",
    "akg",
    "centred_kernel",
    "energy",
    "exact_change",
    "optimizer_step",
    "predicted_change",
    "predicted_logits",
    "remainder_bound",
    "remainder_interval",
]

Optimizer = torch.optim.Optimizer | Callable[[Gradients], Mapping[str, Tensor]]
"""An optimiser, or a function from the gradients to the changes of the parameters, both by name."""


@dataclass(frozen=True, eq=False)
class AKG:
    """The three factors of one step's first-order effect.

    Attributes:
        A: (No, V, V) Jacobian I − 1πᵀ of log-softmax at each observed example.
        K: (No, Nu, V, V) tangent kernel J_o J_uᵀ; rows belong to the observed example's logits.
        G: (Nu, V) gradient of the loss in the logits of each updated example; a mean loss brings its 1/Nu.
    """

    A: Tensor
    K: Tensor
    G: Tensor

    def contributions(self, lr: float) -> Tensor:
        """Split the predicted change by the updated example that causes it.

        Args:
            lr: η, the learning rate.

        Returns:
            (No, Nu, V) with entries −η A_o K_ou G_u, in nats.

        Raises:
            ValueError: If the learning rate is no finite number.
        """
        rate = _checks.require_number(lr, "lr")
        logits = torch.einsum("oujk,uk->ouj", self.K, self.G)
        return -rate * torch.einsum("oij,ouj->oui", self.A, logits)

    def predict(self, lr: float) -> Tensor:
        """Predicts the change of the log-probabilities to first order in the learning rate.

        Args:
            lr: η, the learning rate.

        Returns:
            (No, V) with entries −η A_o Σ_u K_ou G_u, in nats.

        Raises:
            ValueError: If the learning rate is no finite number.
        """
        return self.contributions(lr).sum(1)


class LogitChange(NamedTuple):
    """Logits of observed examples and what a step adds to them to first order, each (..., V)."""

    logits: Tensor
    change: Tensor


def akg(
    model: nn.Module,
    x_o: Inputs,
    x_u: Inputs,
    y_u: Any,
    *,
    loss: Loss = "cross_entropy",
    reduction: Reduction | None = None,
) -> AKG:
    """Compute A, K and G for a gradient step on (x_u, y_u), seen from x_o.

    Holds No·Nu·V² numbers; for large V, or where only the product is wanted, take `predicted_change`.

    Args:
        model: Module in evaluation mode with logits (N, V) as output. Tied parameters count once; frozen ones
            count too.
        x_o: The No observed examples: one tensor, or a mapping of keyword arguments.
        x_u: The Nu examples of the step.
        y_u: Their labels (Nu,), or target probabilities (Nu, V); whatever a `loss` of your own takes.
        loss: "cross_entropy", or a function of logits (Nu, V) and `y_u` to the scalar that the step descends.
        reduction: For the cross-entropy, "mean" over the Nu examples (the default) or "sum"; a function has its
            own normalisation.

    Returns:
        The factors; ``.predict(lr)`` multiplies them.

    Raises:
        ValueError: If the model is random, couples examples or has other outputs than (N, V), an input does not
            fit, targets or loss do not fit the logits, or a reduction is given for a loss that is a function.
    """
    parameters = copied_parameters(model)
    observed = forward(model, x_o, parameters=parameters, name="x_o")
    updated = forward(model, x_u, parameters=parameters, name="x_u")
    for value in (observed, updated):
        _checks.require_tensor(value, "model, its output (for more dimensions use predicted_change)", ndim=2)
    G = logit_gradient(updated, scalar_loss(y_u, loss, reduction, name="y_u"))
    return AKG(log_softmax_jacobian(observed), entk(model, x_o, x_u), G)


def predicted_logits(
    model: nn.Module,
    x_o: Inputs,
    x_u: Inputs,
    y_u: Any,
    *,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    loss: Loss = "cross_entropy",
    reduction: Reduction | None = None,
) -> LogitChange:
    """Predicts the change of the logits at x_o after one step on (x_u, y_u), to first order in the step.

    One forward and one backward pass over `x_u`, and one forward-mode pass over `x_o`, about twice the cost of a
    training step; no Jacobian and no kernel is formed. Attention at `x_o` runs on its plain kernel.

    Args:
        model: Module in evaluation mode whose output is logits (..., V), has them as ``.logits``, or is a tuple
            that starts with them.
        x_o: The observed examples: one tensor, or a mapping of keyword arguments.
        x_u: The examples of the step.
        y_u: Labels, one for each context of the logits at `x_u`, or target probabilities of the logits' shape;
            whatever a `loss` of your own takes.
        lr: η of a plain gradient step on all parameters, frozen ones included, as in `akg`.
        optimizer: In place of `lr`: SGD, Adam or AdamW of `torch.optim`, whose next step is read from its state
            (see `optimizer_step`), or a function from the gradients to the changes of the parameters, by name.
        loss: "cross_entropy", or a function of logits (..., V) and `y_u` to the scalar that the step descends.
        reduction: For the cross-entropy, "mean" over contexts (the default) or "sum"; a function has its own
            normalisation.

    Returns:
        Logits and their change J_o Δθ, each (..., V) in the shape of the output at `x_o`.

    Raises:
        ValueError: As in `akg`, or unless exactly one of `lr` and `optimizer` is given, or the optimiser does not
            fit the model.
    """
    if (lr is None) == (optimizer is None):
        raise ValueError(f"lr: expected either lr or optimizer, got {'neither' if lr is None else 'both'}")
    rate = None if lr is None else _checks.require_number(lr, "lr")
    parameters = copied_parameters(model)
    slopes = gradients(model, x_u, scalar_loss(y_u, loss, reduction, name="y_u"), parameters=parameters, name="x_u")
    if rate is not None:
        uphill = {name: slope for name, slope in slopes.items() if slope is not None}
        logits, slope = pushforward(model, x_o, uphill, parameters=parameters, name="x_o")
        return LogitChange(logits, -rate * slope)
    if isinstance(optimizer, torch.optim.Optimizer):
        step = optimizer_step(model, optimizer, slopes).change
    else:
        step = _checked_step(model, optimizer(slopes) if callable(optimizer) else optimizer)
    return LogitChange(*pushforward(model, x_o, step, parameters=parameters, name="x_o"))


def predicted_change(
    model: nn.Module,
    x_o: Inputs,
    x_u: Inputs,
    y_u: Any,
    *,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    loss: Loss = "cross_entropy",
    reduction: Reduction | None = None,
) -> Tensor:
    """Predicts the change of the log-probabilities at x_o after one step on (x_u, y_u): A J_o Δθ.

    For a plain step this is −η A K G. Its cost is that of `predicted_logits`, and memory does not grow with V².

    Args:
        model: As in `predicted_logits`.
        x_o: As in `predicted_logits`.
        x_u: As in `predicted_logits`.
        y_u: As in `predicted_logits`.
        lr: As in `predicted_logits`.
        optimizer: As in `predicted_logits`.
        loss: As in `predicted_logits`.
        reduction: As in `predicted_logits`.

    Returns:
        (..., V) in nats, in the shape of the output at `x_o`.

    Raises:
        ValueError: As in `predicted_logits`.
    """
    logits, change = predicted_logits(model, x_o, x_u, y_u, lr=lr, optimizer=optimizer, loss=loss, reduction=reduction)
    return centred(logits, change)


def centred_kernel(kernel: Tensor) -> Tensor:
    """Remove from a kernel what no prediction can feel: Π K Π with Π = I − 11ᵀ/V.

    A 1 = 0, and G sums to zero for every loss that depends on the logits through their softmax alone; so adding
    1aᵀ + b1ᵀ to K changes every norm of K and no A K G. Norms are to be compared after centring.

    Args:
        kernel: (..., V, V).

    Returns:
        (..., V, V) with rows and columns that sum to zero.

    Raises:
        ValueError: If it is no finite floating-point tensor whose last two sizes agree.
    """
    _checks.require_shape(_checks.require_real(kernel, "kernel", min_ndim=2), "kernel", ("...", "V", "V"))
    rows = kernel - kernel.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def _checked_step(model: nn.Module, step: object) -> dict[str, Tensor]:
    """Check the changes of parameters that a function of the caller's returned."""
    if not isinstance(step, Mapping):
        raise ValueError(f"optimizer: expected changes of parameters by name, got {_checks.describe(step)}")
    own = dict(model.named_parameters())
    for name, value in step.items():
        if name not in own:
            raise ValueError(f"optimizer: expected names of the model's parameters, got {name!r}")
        _checks.require_real(value, f"optimizer, change of {name!r}")
        _checks.require_shape(value, f"optimizer, change of {name!r}", own[name].shape)
        _checks.require_same(value, f"optimizer, change of {name!r}", own[name], "the parameter")
    return dict(step)
