"""The Hessian of a loss behind a feed-forward network y = W2 φ(W1 x + b1) + b2, block by block.

For one token let h = W1 x + b1, a = φ(h), U = W2 diag(φ′(h)) and q = W2ᵀ r, with r and S the gradient and the Hessian
of the loss at y. Every Jacobian is then a small matrix times a row vector, E ⊗ uᵀ, with the pair (E, u) being

    W1: (U, x)    b1: (U, 1)    W2: (I, a)    b2: (I, 1)        and    x: U W1 .

So a block of the Gauss–Newton part is a sum over tokens of (Eᵀ S F) ⊗ u vᵀ: one product of matrices. The functional
part is a sum of q_i ∇²φ(h_i) and of the terms in which W2 and the hidden layer move together. It is sparse: the
second factor of a product of hidden units i and i′ is zero unless i = i′. Derived in the chapter
*The feed-forward network*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldyn import _checks
from ldyn.hessians._blocks import Blocks, LossHessian, require_names
from ldyn.hessians._ffn_activations import ActivationDerivatives, activation_derivatives, require_activation
from ldyn.hessians._ffn_products import block_diagonal, full_products, per_token_products, zero_block
from ldyn.hessians._output import checked_output, is_per_token

__all__ = ["VARIABLES", "ActivationDerivatives", "activation_derivatives", "ffn", "ffn_loss_hessian"]

VARIABLES = ("W1", "b1", "W2", "b2", "x")
"""The names of the blocks, in the order in which `ffn_loss_hessian` gives them."""


def ffn(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor, *, activation: str = "gelu") -> Tensor:
    """Apply a feed-forward network to each token: y = W2 φ(W1 x + b1) + b2.

    Args:
        x: (L, d) one row for each token, or (d,) for one.
        W1: (m, d), m hidden units.
        b1: (m,).
        W2: (o, m), o outputs.
        b2: (o,).
        activation: φ: "relu", "gelu", "gelu_tanh" or "silu"; see `activation_derivatives`.

    Returns:
        (L, o), or (o,) for one token.

    Raises:
        ValueError: If a shape does not fit, dtypes or devices differ, a value is not finite, or the activation is
            unknown.
    """
    phi = require_activation(activation)
    _check_network(x, W1, b1, W2, b2)
    return phi(x @ W1.mT + b1).value @ W2.mT + b2


def ffn_loss_hessian(
    x: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    r: Tensor,
    S: Tensor,
    *,
    activation: str = "gelu",
    wrt: Sequence[str] | None = None,
) -> LossHessian:
    """Compute the Hessian of a loss of y = W2 φ(W1 x + b1) + b2 in the weights, the biases and the inputs.

    The cost of a block is L times its size where S is given per token; no Jacobian is formed. Blocks that are zero
    whatever the values, and those that are because the activation has no curvature, are one zero expanded to the
    size: they take no memory and cannot be written to.

    Args:
        x: (L, d) one row for each token, or (d,) for one.
        W1: (m, d).
        b1: (m,).
        W2: (o, m).
        b2: (o,).
        r: (L, o) gradient of the loss at the outputs; (o,) for one token given as (d,).
        S: Hessian of the loss at the outputs, symmetric: (L, o, o) where the loss adds up over tokens, else
            (L, o, L, o); (o, o) for one token given as (d,).
        activation: φ: "relu", "gelu", "gelu_tanh" or "silu"; see `activation_derivatives`.
        wrt: The variables wanted, some of "W1", "b1", "W2", "b2", "x", in the order wanted; None for all.

    Returns:
        The blocks, Gauss–Newton and functional part apart. Variables are flattened row by row, x token by token.
        Normalised as the loss that r and S come from.

    Raises:
        ValueError: If a shape does not fit, dtypes or devices differ, a value is not finite, S is not symmetric, the
            activation or a name is unknown, or a name occurs twice.
    """
    phi = require_activation(activation)
    _check_network(x, W1, b1, W2, b2)
    names = VARIABLES if wrt is None else require_names(wrt, "wrt", VARIABLES)
    shapes = {name: variable.shape for name, variable in zip(VARIABLES, (W1, b1, W2, b2, x), strict=True)}
    if x.ndim == 1:
        r, S = _checks.require_tensor(r, "r", ndim=1)[None], _checks.require_tensor(S, "S", ndim=2)[None]
    rows = x if x.ndim == 2 else x[None]
    r, S = checked_output(r, S, (rows.shape[0], W2.shape[0]), x)
    tokens = _Tokens(rows, W1, W2, r, phi(rows @ W1.mT + b1), bends=activation != "relu")
    jacobians = {name: _jacobian(tokens, name) for name in names}
    products = per_token_products if is_per_token(S) else full_products
    return LossHessian(
        shapes={name: shapes[name] for name in names},
        gauss_newton=Blocks(names, products(jacobians, S)),
        functional=Blocks(names, {(a, b): _functional(tokens, a, b) for i, a in enumerate(names) for b in names[i:]}),
    )


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What the blocks are made of: x (L, d), W1 (m, d), W2 (o, m), r (L, o), φ and its derivatives at h, (L, m)."""

    x: Tensor
    W1: Tensor
    W2: Tensor
    r: Tensor
    phi: ActivationDerivatives
    bends: bool

    @property
    def pull(self) -> Tensor:
        """(L, m) the gradient of the loss by h: q φ′(h) with q = W2ᵀ r."""
        return (self.r @ self.W2) * self.phi.first

    @property
    def bend(self) -> Tensor:
        """(L, m) what the curvature of the activation adds to each unit: q φ″(h)."""
        return (self.r @ self.W2) * self.phi.second

    def size(self, name: str) -> int:
        """Count the entries of a variable."""
        (units, inputs), outputs = self.W1.shape, self.W2.shape[0]
        sizes = {"W1": units * inputs, "b1": units, "W2": outputs * units, "b2": outputs, "x": self.x.numel()}
        return sizes[name]

    def read_by(self, name: str) -> Tensor:
        """(L, s) the row that a parameter is multiplied by: x or a for a weight, 1 for a bias."""
        rows = {"W1": self.x, "W2": self.phi.value}
        return rows.get(name, self.x.new_ones(self.x.shape[0], 1))


def _jacobian(tokens: _Tokens, name: str) -> tuple[Tensor, Tensor | None]:
    """Factor the Jacobian of each token by one variable: E (L, o, p) and u (L, s), or no u for the inputs."""
    if name in ("W2", "b2"):
        identity = torch.eye(tokens.r.shape[1], dtype=tokens.x.dtype, device=tokens.x.device)
        return identity.expand(tokens.r.shape[0], -1, -1), tokens.read_by(name)
    U = tokens.W2 * tokens.phi.first[:, None, :]
    return (U @ tokens.W1, None) if name == "x" else (U, tokens.read_by(name))


def _functional(tokens: _Tokens, a: str, b: str) -> Tensor:
    """Compute the functional part of one block, (n_a, n_b)."""
    if VARIABLES.index(a) > VARIABLES.index(b):
        return _functional(tokens, b, a).mT
    hidden = ("W1", "b1")
    if a in hidden and b == "W2":
        return _hidden_with_output(tokens, a)
    if a in hidden and b in hidden and tokens.bends:
        weighted = tokens.bend.mT[:, :, None] * tokens.read_by(b)  # (m, L, t)
        return block_diagonal(tokens.read_by(a).mT @ weighted)
    if b == "x" and (a in ("W1", "W2") or (tokens.bends and a != "b2")):
        return _with_inputs(tokens, a)
    return zero_block(tokens.x, tokens.size(a), tokens.size(b))


def _hidden_with_output(tokens: _Tokens, a: str) -> Tensor:
    """Σ_l diag(φ′) ⊗ u in the rows and r in the columns: W1 or b1 with W2, which meet in one hidden unit only."""
    weighted = tokens.r.mT[:, None, :] * tokens.phi.first.mT  # (o, m, L)
    met = weighted @ tokens.read_by(a)  # (o, m, s)
    return block_diagonal(met[:, :, None, :]).reshape(tokens.size("W2"), tokens.size(a)).mT


def _with_inputs(tokens: _Tokens, a: str) -> Tensor:
    """Compute the functional block of a variable with the inputs; different tokens meet in no second derivative."""
    columns = tokens.size("x")
    if a == "x":
        return block_diagonal((tokens.W1.mT * tokens.bend[:, None, :]) @ tokens.W1)
    if a == "W2":
        slopes = tokens.phi.first.mT[:, :, None] * tokens.W1[:, None, :]  # (m, L, d)
        return (tokens.r.mT[:, None, :, None] * slopes).reshape(-1, columns)
    bent = tokens.bend.mT[:, :, None] * tokens.W1[:, None, :]  # (m, L, d)
    if a == "b1":
        return bent.reshape(-1, columns)
    # W1 meets x twice: in the curvature of the unit, and because the one multiplies the other.
    units, inputs = tokens.W1.shape
    multiplied = tokens.pull.mT[:, :, None].expand(-1, -1, inputs)
    if not tokens.bends:
        return torch.diag_embed(multiplied, dim1=1, dim2=3).reshape(units * inputs, columns)
    block = tokens.x.mT[:, :, None] * bent[:, None]  # (m, d, L, d)
    block.diagonal(dim1=1, dim2=3).add_(multiplied)
    return block.reshape(units * inputs, columns)


def _check_network(x: object, W1: object, b1: object, W2: object, b2: object) -> None:
    """Require inputs, weights and biases that fit each other."""
    tokens = _checks.require_real(x, "x", min_ndim=1)
    if tokens.ndim > 2:
        raise ValueError(f"x: expected a tensor of shape (L, d) or (d,), got {_checks.describe(tokens)}")
    first = _checks.require_shape(_checks.require_real(W1, "W1"), "W1", ("m", tokens.shape[-1]))
    second = _checks.require_shape(_checks.require_real(W2, "W2"), "W2", ("o", first.shape[0]))
    biases = ((b1, "b1", first.shape[0]), (b2, "b2", second.shape[0]))
    for value, name, size in biases:
        _checks.require_same(_checks.require_shape(_checks.require_real(value, name), name, (size,)), name, tokens, "x")
    for value, name in ((first, "W1"), (second, "W2")):
        _checks.require_same(value, name, tokens, "x")
