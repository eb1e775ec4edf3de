"""How much a self-attention layer's loss can curve, from norms: the bound that replaces a published one.

The loss is the mean squared error of F = A X W_V, with A = softmax(X W_Q W_Kᵀ Xᵀ / √d_k) row by row. Each block of the
Hessian is bounded by a number, and the 3 × 3 table of these numbers bounds the whole. Derived in the chapter
*How much can attention curve?*
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldyn import _checks
from ldyn.foundations.softmax import HESSIAN_NORM_BOUND, JACOBIAN_NORM_BOUND
from ldyn.hessians._attention_core import attention_weights, token_covariances

__all__ = ["AttentionHessianBound", "attention_hessian_bound"]

THIRD_MOMENT_RANGE = 1 / (6 * math.sqrt(3))
"""Largest third central moment of a variable whose values lie in an interval of length one."""


class AttentionHessianBound(NamedTuple):
    """Bounds on the Hessian of the mean squared error in (W_Q, W_K, W_V); tables are in this order.

    Attributes:
        value: () no eigenvalue is larger in absolute value; the largest eigenvalue of `blocks`.
        lowest: () no eigenvalue is smaller: minus the largest eigenvalue of `functional`.
        blocks: (3, 3) bounds on the spectral norm of each block, both parts together.
        functional: (3, 3) the share of the functional part in them.
        jacobians: (3,) bounds on the spectral norms of the Jacobians of F.
    """

    value: Tensor
    lowest: Tensor
    blocks: Tensor
    functional: Tensor
    jacobians: Tensor


class _Sizes(NamedTuple):
    """What the layer enters the bound with, token by token or at its worst.

    Attributes:
        mean: () bounds ‖AX‖.
        spread: (L,) or (), bounds ‖Cov_i‖.
        skew: (L,) or (), bounds the third token moment under row i.
        tokens: (L, d) X, or () a bound on its norm.
        queries: (L, d_k) X W_Q, or () a bound on its norm.
        errors: (L,) bounds |F_i − Y_i|.
    """

    mean: Tensor
    spread: Tensor
    skew: Tensor
    tokens: Tensor
    queries: Tensor
    errors: Tensor


def attention_hessian_bound(
    X: Tensor,
    W_Q: Tensor,
    W_K: Tensor,
    W_V: Tensor,
    Y: Tensor,
    *,
    causal: bool = False,
    a_priori: bool = False,
) -> AttentionHessianBound:
    """Bound the Hessian of the mean squared error of one attention head in its three weight matrices.

    The loss is ‖F − Y‖²_F / (L · d_v), without a half. By default the bound looks at the attention: it uses the norm of
    the covariance of the tokens under each row of A, and the error of each token. A priori it knows only
    ‖X‖, max |x_i|, the norms of the weights and |Y_i|; it does not grow with L as long as the tokens stay bounded.

    Args:
        X: (L, d) the tokens.
        W_Q: (d, d_k) queries.
        W_K: (d, d_k) keys.
        W_V: (d, d_v) values.
        Y: (L, d_v) the targets.
        causal: Whether row i attends to tokens up to i only. The a-priori bound is the same for both.
        a_priori: Whether to leave the attention and the outputs out of account.

    Returns:
        The bound and the tables that it is made of.

    Raises:
        ValueError: If an argument is no finite floating-point matrix, or shapes, dtypes or devices do not fit.
    """
    _require_fit(X, W_Q, W_K, W_V, Y)
    sizes = _worst_sizes(X, W_Q, W_V, Y) if a_priori else _sizes(X, W_Q, W_K, W_V, Y, causal=causal)
    key, value = _norm(W_K), _norm(W_V)
    root = math.sqrt(W_Q.shape[1])

    def weighted(weights: Tensor, vectors: Tensor) -> Tensor:
        return weights * vectors if vectors.ndim == 0 else _norm(weights[:, None] * vectors)

    jacobians = torch.stack(
        [
            key * value * weighted(sizes.spread, sizes.tokens) / root,
            value * weighted(sizes.spread, sizes.queries) / root,
            sizes.mean,
        ]
    )
    # the third moment sees the two factors dT of a second derivative; its weight is shared between them
    heavy = (sizes.errors * sizes.skew).sqrt() if sizes.tokens.ndim else (sizes.errors.amax() * sizes.skew).sqrt()
    bend = torch.stack([key * weighted(heavy, sizes.tokens), weighted(heavy, sizes.queries)]) / root
    pull = torch.linalg.vector_norm(sizes.errors * sizes.spread) / root
    tokens, queries = _norm(sizes.tokens), _norm(sizes.queries)

    functional = X.new_zeros(3, 3)
    functional[:2, :2] = value * bend.outer(bend)
    functional[0, 1] += pull * value * tokens
    functional[0, 2] = pull * key * tokens
    functional[1, 2] = pull * queries
    scale = 2 / Y.numel()
    functional = scale * (functional.triu() + functional.triu(1).mT)
    blocks = scale * jacobians.outer(jacobians) + functional
    return AttentionHessianBound(
        value=torch.linalg.eigvalsh(blocks)[-1],
        lowest=-torch.linalg.eigvalsh(functional)[-1],
        blocks=blocks,
        functional=functional,
        jacobians=jacobians,
    )


def _require_fit(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, Y: Tensor) -> None:
    """Check the five matrices against each other."""
    tokens = _checks.require_real(X, "X", ndim=2)
    length, width = tokens.shape
    queries = _checks.require_shape(_checks.require_real(W_Q, "W_Q", ndim=2), "W_Q", (width, None))
    _checks.require_shape(_checks.require_real(W_K, "W_K", ndim=2), "W_K", queries.shape)
    values = _checks.require_shape(_checks.require_real(W_V, "W_V", ndim=2), "W_V", (width, None))
    _checks.require_shape(_checks.require_real(Y, "Y", ndim=2), "Y", (length, values.shape[1]))
    for matrix, name in ((W_Q, "W_Q"), (W_K, "W_K"), (W_V, "W_V"), (Y, "Y")):
        _checks.require_same(matrix, name, tokens, "X")


def _sizes(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, Y: Tensor, *, causal: bool) -> _Sizes:
    """Measure the layer as it is."""
    A = attention_weights(X, W_Q, W_K, causal=causal)
    means = A @ X
    spread = torch.linalg.matrix_norm(token_covariances(A, X), 2)
    distances = torch.linalg.vector_norm(X - means[:, None, :], dim=-1)
    # a token of weight zero takes part in no moment
    reach = torch.where(A > 0, distances, torch.zeros_like(distances)).amax(-1)
    diameter = torch.linalg.vector_norm(X[:, None, :] - X, dim=-1).amax()
    anywhere = torch.minimum(HESSIAN_NORM_BOUND * _norm(X) ** 3, THIRD_MOMENT_RANGE * diameter**3)
    return _Sizes(
        mean=_norm(means),
        spread=spread,
        skew=torch.minimum(reach * spread, anywhere),
        tokens=X,
        queries=X @ W_Q,
        errors=torch.linalg.vector_norm(means @ W_V - Y, dim=-1),
    )


def _worst_sizes(X: Tensor, W_Q: Tensor, W_V: Tensor, Y: Tensor) -> _Sizes:
    """Bound the same for every attention pattern, by norms alone."""
    radius, norm = torch.linalg.vector_norm(X, dim=-1).amax(), _norm(X)
    return _Sizes(
        mean=math.sqrt(len(X)) * radius,
        spread=torch.minimum(JACOBIAN_NORM_BOUND * norm**2, radius**2),
        skew=torch.minimum(HESSIAN_NORM_BOUND * norm**3, THIRD_MOMENT_RANGE * (2 * radius) ** 3),
        tokens=norm,
        queries=norm * _norm(W_Q),
        errors=radius * _norm(W_V) + torch.linalg.vector_norm(Y, dim=-1),
    )


def _norm(matrix: Tensor) -> Tensor:
    """Compute the spectral norm; a number is its own."""
    return matrix if matrix.ndim == 0 else torch.linalg.matrix_norm(matrix, 2)
