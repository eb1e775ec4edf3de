"""Layers of a Transformer block that treat each token alone, as stages: LayerNorm and the feed-forward network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ldyn.hessians import _block_forms as forms
from ldyn.hessians._block_stages import Both, Curvature, Parts, Stage, both_parts
from ldyn.hessians._blocks import Blocks
from ldyn.hessians._output import is_per_token
from ldyn.hessians.ffn import activation_derivatives, ffn, ffn_loss_hessian
from ldyn.hessians.layernorm import layernorm_hessian_contraction, layernorm_jacobian

__all__ = ["FeedForward", "Norm"]


@dataclass(frozen=True, eq=False)
class Norm(Stage):
    """LayerNorm of each token, y = γ ∘ x̂ + β.

    Attributes:
        x: (L, d).
        parameters: "weight" γ and perhaps "bias" β, each (d,).
        eps: What is added to the variance.
        prefix: What comes before the names of the parameters.
    """

    affine: ClassVar[bool] = True

    x: Tensor
    parameters: Mapping[str, Tensor]
    eps: float
    prefix: str

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of γ and β."""
        return {f"{self.prefix}{name}": value.shape for name, value in self.parameters.items()}

    @cached_property
    def normalised(self) -> Tensor:
        """The input with mean 0 and, but for eps, variance 1, (L, d)."""
        return functional.layer_norm(self.x, self.x.shape[-1:], eps=self.eps)

    @property
    def output(self) -> Tensor:
        """The normalised input, scaled and shifted, (L, d)."""
        scaled = self.normalised * self.parameters["weight"]
        return scaled + self.parameters["bias"] if "bias" in self.parameters else scaled

    @cached_property
    def input_jacobian(self) -> Tensor:
        """Its derivative by the input, (L, d, d)."""
        return layernorm_jacobian(self.x, self.parameters["weight"], eps=self.eps)

    def jacobian(self, name: str) -> Tensor:
        """Differentiate by γ, diag(x̂) for each token, or by β, (L · d, d)."""
        diagonal = self.normalised if name == f"{self.prefix}weight" else torch.ones_like(self.x)
        return torch.diag_embed(diagonal).flatten(0, 1)

    def pull(self, columns: Tensor, wanted: AbstractSet[str]) -> dict[str, Tensor]:
        """Sum the columns over tokens, for γ each entry times x̂."""
        tokens = columns.reshape(*self.x.shape, -1)
        rules = {
            f"{self.prefix}weight": lambda: torch.einsum("ld,ldc->dc", self.normalised, tokens),
            f"{self.prefix}bias": lambda: tokens.sum(0),
        }
        return {name: rules[name]() for name in self.shapes if name in wanted}

    def carry(self, loss: Curvature, wanted: AbstractSet[str], with_input: bool) -> Both:
        """Carry a loss over; the second derivatives are those of x̂, and of γ with x̂."""
        jacobians = {name: self.jacobian(name) for name in self.shapes if name in wanted}

        def expand(r: Tensor, S: Tensor) -> Both:
            weighted = {name: forms.times(S, J) for name, J in jacobians.items()}
            names = list(jacobians)
            pairs = [(a, b) for i, a in enumerate(names) for b in names[i:]]
            theta = {(a, b): jacobians[a].mT @ weighted[b] for a, b in pairs}
            flat = {pair: torch.zeros_like(block) for pair, block in theta.items()}
            if not with_input:
                return Parts(theta), Parts(flat)
            backwards = forms.transposed(self.input_jacobian)
            mixed = {name: forms.times(backwards, block) for name, block in weighted.items()}
            bent = {name: torch.zeros_like(block) for name, block in mixed.items()}
            if f"{self.prefix}weight" in bent:
                unscaled = layernorm_jacobian(self.x, eps=self.eps)
                bent[f"{self.prefix}weight"] = (unscaled.mT * r[:, None, :]).flatten(0, 1)
            curved = forms.compose(forms.compose(backwards, S), self.input_jacobian)
            own = layernorm_hessian_contraction(self.x, r, self.parameters["weight"], eps=self.eps)
            return Parts(theta, mixed, forms.symmetric(curved)), Parts(flat, bent, own)

        return both_parts(expand, loss)


@dataclass(frozen=True, eq=False)
class FeedForward(Stage):
    """W2 φ(W1 x + b1) + b2 for each token.

    Attributes:
        x: (L, d).
        parameters: "W1", "W2", and perhaps "b1" and "b2".
        activation: φ.
        prefix: What comes before the names of the parameters.
    """

    x: Tensor
    parameters: Mapping[str, Tensor]
    activation: str
    prefix: str

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of weights and biases."""
        return {f"{self.prefix}{name}": value.shape for name, value in self.parameters.items()}

    @cached_property
    def arguments(self) -> dict[str, Tensor]:
        """The weights, and the biases or zeros in their place."""
        W1, W2 = self.parameters["W1"], self.parameters["W2"]
        zeros = {"b1": W1.new_zeros(W1.shape[0]), "b2": W2.new_zeros(W2.shape[0])}
        return {**zeros, **self.parameters}

    @cached_property
    def output(self) -> Tensor:
        """Its value, (L, o)."""
        return ffn(self.x, **self.arguments, activation=self.activation)

    @cached_property
    def hidden(self) -> tuple[Tensor, Tensor]:
        """The hidden units (L, m), and the derivative of the outputs by what goes into them, (L, o, m)."""
        W1, b1, W2 = (self.arguments[name] for name in ("W1", "b1", "W2"))
        phi = activation_derivatives(self.x @ W1.mT + b1, self.activation)
        return phi.value, W2 * phi.first[:, None, :]

    @cached_property
    def input_jacobian(self) -> Tensor:
        """Its derivative by the input, (L, o, d)."""
        return self.hidden[1] @ self.parameters["W1"]

    def jacobian(self, name: str) -> Tensor:
        """Differentiate by a weight or a bias, (L · o, n)."""
        (units, slopes), outputs = self.hidden, self.output.shape[1]
        identity = torch.eye(outputs, dtype=self.x.dtype, device=self.x.device)
        rules = {
            "W1": lambda: slopes[..., None] * self.x[:, None, None, :],
            "b1": lambda: slopes,
            "W2": lambda: identity[..., None] * units[:, None, None, :],
            "b2": lambda: identity.expand(len(self.x), -1, -1),
        }
        return rules[name.removeprefix(self.prefix)]().reshape(len(self.x) * outputs, -1)

    def pull(self, columns: Tensor, wanted: AbstractSet[str]) -> dict[str, Tensor]:
        """Multiply columns by the transposed Jacobians."""
        return {name: self.jacobian(name).mT @ columns for name in self.shapes if name in wanted}

    def carry(self, loss: Curvature, wanted: AbstractSet[str], with_input: bool) -> Both:
        """Carry a loss over."""
        names = [name for name in self.parameters if f"{self.prefix}{name}" in wanted]
        asked = [*names, *(["x"] if with_input else [])]
        if not asked:
            return Parts(), Parts()

        def expand(r: Tensor, S: Tensor) -> Both:
            table = ffn_loss_hessian(self.x, **self.arguments, r=r, S=S, activation=self.activation, wrt=asked)
            gauss_newton, functional = (
                _parts(blocks, names, self.prefix, self.x.shape, with_input, is_per_token(S))
                for blocks in (table.gauss_newton, table.functional)
            )
            return gauss_newton, functional

        return both_parts(expand, loss)


def _parts(
    blocks: Blocks, names: Sequence[str], prefix: str, shape: torch.Size, with_input: bool, apart: bool
) -> Parts:
    """Read one part of a layer's Hessian, in which the input, of that shape, is the variable "x"."""
    theta = {(f"{prefix}{a}", f"{prefix}{b}"): blocks[a, b] for i, a in enumerate(names) for b in names[i:]}
    if not with_input:
        return Parts(theta)
    own = blocks["x", "x"].reshape(*shape, *shape)
    mixed = {f"{prefix}{name}": blocks["x", name] for name in names}
    return Parts(theta, mixed, forms.diagonal(own) if apart else own)
