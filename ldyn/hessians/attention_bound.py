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
from ldyn.hessians._attention_core import attention_weights, centred_tokens, token_covariances

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
    """The eight numbers with which a layer enters its bound; s_i bounds ‖Cov_i‖, κ_i the third moment of row i.

    Attributes:
        mean: () ‖AX‖.
        tokens: () ‖X‖.
        queries: () ‖Q‖, with Q = X W_Q.
        spread_tokens: () ‖diag(s) X‖.
        spread_queries: () ‖diag(s) Q‖.
        skew_tokens: () ‖diag(√(κ_i |e_i|)) X‖, with e_i the error of token i.
        skew_queries: () ‖diag(√(κ_i |e_i|)) Q‖.
        spread_errors: () ‖diag(s) E‖_F.
    """

    mean: Tensor
    tokens: Tensor
    queries: Tensor
    spread_tokens: Tensor
    spread_queries: Tensor
    skew_tokens: Tensor
    skew_queries: Tensor
    spread_errors: Tensor


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
        ValueError: If a matrix is not finite and floating-point or does not fit X in shape, dtype or device, or an
            option is neither True nor False.
    """
    _require_fit(X, W_Q, W_K, W_V, Y)
    for name, choice in (("causal", causal), ("a_priori", a_priori)):
        if not isinstance(choice, bool):
            raise ValueError(f"{name}: expected True or False, got {_checks.describe(choice)}")
    size = _worst_sizes(X, W_Q, W_V, Y) if a_priori else _sizes(X, W_Q, W_K, W_V, Y, causal=causal)
    key, value = _norm(W_K), _norm(W_V)
    root = math.sqrt(W_Q.shape[1])

    jacobians = torch.stack([key * value * size.spread_tokens / root, value * size.spread_queries / root, size.mean])
    bend = torch.stack([key * size.skew_tokens, size.skew_queries]) / root
    functional = X.new_zeros(3, 3)
    functional[:2, :2] = value * bend.outer(bend)
    functional[0, 1] += value * size.spread_errors * size.tokens / root
    functional[0, 2] = key * size.spread_errors * size.tokens / root
    functional[1, 2] = size.spread_errors * size.queries / root
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
    A, Q = attention_weights(X, W_Q, W_K, causal=causal), X @ W_Q
    means = A @ X
    distances = torch.linalg.vector_norm(centred_tokens(A, X), dim=-1)
    # a token of weight zero takes part in no moment
    reach = torch.where(A > 0, distances, torch.zeros_like(distances)).amax(-1)
    diameter = torch.linalg.vector_norm(X[:, None, :] - X, dim=-1).amax()
    spread = torch.linalg.matrix_norm(token_covariances(A, X), 2)
    skew = torch.minimum(reach * spread, _largest_skew(_norm(X), diameter))
    errors = torch.linalg.vector_norm(means @ W_V - Y, dim=-1)
    heavy = (skew * errors).sqrt()
    return _Sizes(
        mean=_norm(means),
        tokens=_norm(X),
        queries=_norm(Q),
        spread_tokens=_norm(spread[:, None] * X),
        spread_queries=_norm(spread[:, None] * Q),
        skew_tokens=_norm(heavy[:, None] * X),
        skew_queries=_norm(heavy[:, None] * Q),
        spread_errors=torch.linalg.vector_norm(spread * errors),
    )


def _worst_sizes(X: Tensor, W_Q: Tensor, W_V: Tensor, Y: Tensor) -> _Sizes:
    """Bound the same for every attention pattern, by norms alone."""
    radius, tokens = torch.linalg.vector_norm(X, dim=-1).amax(), _norm(X)
    queries = tokens * _norm(W_Q)
    spread = torch.minimum(JACOBIAN_NORM_BOUND * tokens**2, radius**2)
    errors = radius * _norm(W_V) + torch.linalg.vector_norm(Y, dim=-1)
    heavy = (_largest_skew(tokens, 2 * radius) * errors.amax()).sqrt()
    return _Sizes(
        mean=math.sqrt(len(X)) * radius,
        tokens=tokens,
        queries=queries,
        spread_tokens=spread * tokens,
        spread_queries=spread * queries,
        skew_tokens=heavy * tokens,
        skew_queries=heavy * queries,
        spread_errors=spread * torch.linalg.vector_norm(errors),
    )


def _largest_skew(norm: Tensor, diameter: Tensor) -> Tensor:
    """Bound the third moment of the tokens under any weights."""
    return torch.minimum(HESSIAN_NORM_BOUND * norm**3, THIRD_MOMENT_RANGE * diameter**3)


def _norm(matrix: Tensor) -> Tensor:
    """Compute the spectral norm."""
    norm: Tensor = torch.linalg.matrix_norm(matrix, 2)
    return norm
