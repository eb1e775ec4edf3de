"""Activations with their first two derivatives, in forms that stay accurate far out in the tails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldyn import _checks

__all__ = ["ACTIVATIONS", "ActivationDerivatives", "activation_derivatives", "require_activation"]

TANH_SLOPE = math.sqrt(2 / math.pi)
"""c in the tanh form of GELU, h/2 · (1 + tanh(c (h + k h³)))."""

TANH_CUBIC = 0.044715
"""k in the tanh form of GELU."""


class ActivationDerivatives(NamedTuple):
    """An activation and its first two derivatives, each of the shape of its argument.

    Attributes:
        value: φ(h).
        first: φ′(h).
        second: φ″(h).
    """

    value: Tensor
    first: Tensor
    second: Tensor


def activation_derivatives(h: Tensor, activation: str = "gelu") -> ActivationDerivatives:
    """Evaluate an activation and its first two derivatives, entry by entry.

    At its kink ReLU gets the derivative 0 that PyTorch gives it, and its second derivative is 0 everywhere; what
    that leaves out is the subject of a section of the chapter *The feed-forward network*.

    Args:
        h: (...) the arguments.
        activation: "relu", "gelu" (h Φ(h), with the normal distribution function), "gelu_tanh" (its approximation
            with a hyperbolic tangent, PyTorch's ``approximate="tanh"``) or "silu" (h times the logistic function).

    Returns:
        φ, φ′ and φ″. Their relative accuracy holds also where they are tiny.

    Raises:
        ValueError: If h is no non-empty tensor of finite floating-point numbers, or the activation is unknown.
    """
    return require_activation(activation)(_checks.require_real(h, "h"))


def require_activation(activation: object) -> Callable[[Tensor], ActivationDerivatives]:
    """Look an activation up by its name.

    Args:
        activation: The argument.

    Returns:
        A function of h that gives φ, φ′ and φ″.

    Raises:
        ValueError: If there is none of that name.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        expected = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation: expected one of {expected}, got {_checks.describe(activation)}")
    return ACTIVATIONS[activation]


def _relu(h: Tensor) -> ActivationDerivatives:
    return ActivationDerivatives(h.clamp(min=0), (h > 0).to(h.dtype), torch.zeros_like(h))


def _gelu(h: Tensor) -> ActivationDerivatives:
    # 1 + erf would cancel for negative h; its complement does not.
    below = torch.special.erfc(h * -math.sqrt(0.5)) / 2
    density = torch.exp(-h.square() / 2) / math.sqrt(2 * math.pi)
    return ActivationDerivatives(h * below, below + h * density, density * (2 - h.square()))


def _gelu_tanh(h: Tensor) -> ActivationDerivatives:
    # (1 + tanh u)/2 is the logistic function of w = 2u, which does not cancel; w″ is the second derivative of w.
    square = h.square()
    w = 2 * TANH_SLOPE * h * (1 + TANH_CUBIC * square)
    slope, bend = 2 * TANH_SLOPE * (1 + 3 * TANH_CUBIC * square), 12 * TANH_SLOPE * TANH_CUBIC * h
    s, rest = torch.sigmoid(w), torch.sigmoid(-w)
    second = s * rest * (2 * slope + h * (bend - torch.tanh(w / 2) * slope.square()))
    return ActivationDerivatives(h * s, s + h * s * rest * slope, second)


def _silu(h: Tensor) -> ActivationDerivatives:
    s, rest = torch.sigmoid(h), torch.sigmoid(-h)
    return ActivationDerivatives(h * s, s * (1 + h * rest), s * rest * (2 - h * torch.tanh(h / 2)))


ACTIVATIONS: dict[str, Callable[[Tensor], ActivationDerivatives]] = {
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}
"""The activations, by name."""
