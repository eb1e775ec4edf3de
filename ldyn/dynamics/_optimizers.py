"""What the next step of a PyTorch optimiser will do, read from its state without touching it.

The step of every optimiser here has the form Δθ = −s ∘ g + c: the new gradient g times a *scale* s for each
parameter, and a part c that is *carried*, which momentum and weight decay contribute whatever the new example is.
For SGD s is the learning rate, for Adam the learning rate over the root of the running second moment, which the new
gradient itself takes part in: that map from gradients to steps is not linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OptimizerStep", "optimizer_step"]

Gradients = Mapping[str, Tensor | None]
"""The gradient of each parameter by its name; None where the loss does not depend on it."""


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """The next step of an optimiser, Δθ = −scale ∘ gradient + carried, by the name of each parameter that moves.

    Attributes:
        scale: s, of the parameter's shape or a number for all of it: the diagonal preconditioner, learning rate
            included.
        carried: c, of the parameter's shape: what momentum and weight decay add.
        change: Δθ, of the parameter's shape.
    """

    scale: dict[str, Tensor]
    carried: dict[str, Tensor]
    change: dict[str, Tensor]


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients) -> OptimizerStep:
    """Predicts the change of the parameters that ``optimizer.step()`` would make with these gradients.

    Knows `torch.optim.SGD` (momentum, dampening, Nesterov), `Adam` and `AdamW` (AMSGrad included), each with
    weight decay, parameter groups and ``maximize``. Neither the optimiser nor the model is touched, and gradients
    that the parameters hold in ``.grad`` play no part. Derived in the chapter *One step of learning*.

    Args:
        model: The module whose parameters the optimiser holds; others that it holds are left out.
        optimizer: The optimiser, with the state of the steps it has taken.
        gradients: Gradient of each parameter by its name in ``model.named_parameters()``; a parameter that is
            missing, has None, or is frozen, does not move, as in PyTorch.

    Returns:
        Scale, carried part and change.

    Raises:
        ValueError: If the optimiser is of another class, holds no parameter of the model, or a gradient does not
            fit its parameter.
    """
    rule = _rule(optimizer)
    names = {id(value): name for name, value in model.named_parameters()}
    scale: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    change: dict[str, Tensor] = {}
    known = False
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter))
                known = known or name is not None
                gradient = None if name is None else gradients.get(name)
                if name is None or gradient is None or not parameter.requires_grad:
                    continue
                if gradient.shape != parameter.shape or gradient.dtype != parameter.dtype:
                    raise ValueError(
                        f"gradients[{name!r}]: expected shape {tuple(parameter.shape)} and {parameter.dtype},"
                        f" got shape {tuple(gradient.shape)} and {gradient.dtype}"
                    )
                state = optimizer.state.get(parameter, {})
                scale[name], carried[name] = rule(group, state, parameter.detach(), gradient.detach())
                change[name] = torch.addcmul(carried[name], scale[name], gradient.detach(), value=-1)
    if not known:
        raise ValueError("optimizer: expected one that holds parameters of the model, got one that holds none")
    return OptimizerStep(scale, carried, change)


_Rule = Callable[[dict[str, Any], dict[str, Any], Tensor, Tensor], tuple[Tensor, Tensor]]


def _rule(optimizer: object) -> _Rule:
    """Choose the rule of the optimiser's class; a subclass may do anything and is refused."""
    rules: dict[type, _Rule] = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam, torch.optim.AdamW: _adamw}
    rule = rules.get(type(optimizer))
    if rule is None:
        raise ValueError(f"optimizer: expected torch.optim.SGD, Adam or AdamW, got {type(optimizer).__name__}")
    return rule


def _sgd(group: dict[str, Any], state: dict[str, Any], value: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Split a step of SGD: v = m b + (1 − d) g with the buffer b, then −lr v, or −lr (g + m v) for Nesterov."""
    rate, momentum, buffer = float(group["lr"]), group["momentum"], state.get("momentum_buffer")
    # the first step fills the buffer with the gradient itself, undamped
    fresh, kept = (1 - group["dampening"], momentum) if momentum and buffer is not None else (1.0, 0.0)
    if momentum and group["nesterov"]:
        fresh, kept = 1 + momentum * fresh, momentum * kept
    carried = torch.zeros_like(value) if buffer is None else buffer * (-rate * kept)
    return _with_decay(group, value, value.new_tensor(rate * fresh), carried)


def _adamw(group: dict[str, Any], state: dict[str, Any], value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Split a step of AdamW: decay acts on the parameters directly; not every version says so in the group."""
    return _adam({**group, "decoupled_weight_decay": True}, state, value, gradient)


def _adam(group: dict[str, Any], state: dict[str, Any], value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Split a step of Adam: −lr m̂ / (√v̂ + ε) with m and v running means of the gradient and of its square."""
    # in place wherever it can be: on a language model, allocating a tensor takes longer than the arithmetic
    rate, (beta1, beta2) = group["lr"], (float(beta) for beta in group["betas"])
    decay, decoupled = group["weight_decay"], group.get("decoupled_weight_decay", False)
    steps = float(state.get("step", 0.0)) + 1
    entering = gradient
    if decay and not decoupled:  # for ascent the square wants −g + λθ, up to its sign
        entering = torch.add(gradient, value, alpha=-decay if group["maximize"] else decay)
    if "exp_avg_sq" in state:
        scale = (state["exp_avg_sq"] * beta2).addcmul_(entering, entering, value=1 - beta2)
    else:
        scale = entering.square().mul_(1 - beta2)
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        scale = torch.maximum(scale, state["max_exp_avg_sq"], out=scale)
    scale.div_(1 - beta2**steps).sqrt_().add_(group["eps"]).reciprocal_().mul_(rate / (1 - beta1**steps))
    carried = scale * state["exp_avg"] if "exp_avg" in state else torch.zeros_like(value)
    carried.mul_(-beta1)
    scale.mul_(1 - beta1)
    if not decoupled:
        return _with_decay(group, value, scale, carried)
    carried.add_(value, alpha=float(1 - rate * decay) - 1)  # a rate in float32 is rounded as PyTorch rounds it
    return (scale.neg_() if group["maximize"] else scale), carried


def _with_decay(group: dict[str, Any], value: Tensor, scale: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Add the decay that enters with the gradient, and turn the gradient's sign round for ascent."""
    if group["weight_decay"]:
        carried.addcmul_(scale, value, value=-group["weight_decay"])
    return (scale.neg_() if group["maximize"] else scale), carried
