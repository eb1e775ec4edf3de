"""Exact Hessians of self-attention: all blocks, the Gauss–Newton and the functional part, in closed form.

The derivatives of softmax are cumulants, so those of attention are moments of the tokens under each row of the
attention matrix: the covariance Cov_i and, in one direction, the third central moment. No array with two pairs of
positions is formed. Derived in the chapter *Attention*; Ormaniec, Dangel and Singh (2024, arXiv:2410.10986) give the
blocks between the weights in Kronecker form, for the squared error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldyn import _checks
from ldyn.hessians import _attention_core as core
from ldyn.hessians._attention_core import Heads, attend
from ldyn.hessians._attention_functional import functional_blocks
from ldyn.hessians._attention_gauss_newton import gauss_newton_blocks, input_jacobian, jacobian, pieces
from ldyn.hessians._attention_input import input_functional_blocks
from ldyn.hessians._blocks import Blocks, LossHessian, require_names
from ldyn.hessians._output import checked_output
from ldyn.hessians.attention_bound import AttentionHessianBound, attention_hessian_bound

__all__ = [
    "AttentionHessianBound",
    "attention",
    "attention_hessian_bound",
    "attention_jacobians",
    "attention_loss_hessian",
    "attention_weights",
    "multihead_attention",
    "multihead_attention_loss_hessian",
    "token_covariances",
]

_NAMES = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O", "X")


def attention(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, *, causal: bool = False) -> Tensor:
    """Evaluate self-attention F = A X W_V, with A = softmax of X W_Q W_Kᵀ Xᵀ / √d_k, row by row.

    Args:
        X: (L, d) tokens.
        W_Q: (d, d_k).
        W_K: (d, d_k).
        W_V: (d, d_v).
        causal: Whether row i sees the tokens up to i only.

    Returns:
        (L, d_v).

    Raises:
        ValueError: If an argument is not a finite matrix that fits the others.
    """
    return _single(X, W_Q, W_K, W_V, causal).outputs


def attention_weights(X: Tensor, W_Q: Tensor, W_K: Tensor, *, causal: bool = False) -> Tensor:
    """Compute the attention matrix A = softmax of X W_Q W_Kᵀ Xᵀ / √d_k, row by row.

    Args:
        X: (L, d) tokens.
        W_Q: (d, d_k).
        W_K: (d, d_k).
        causal: Whether row i sees the tokens up to i only.

    Returns:
        (L, L), rows that sum to 1; exactly 0 where a token is not seen.

    Raises:
        ValueError: If an argument is not a finite matrix that fits the others.
    """
    _checked_weights(X, (W_Q, W_K), causal)
    return core.attention_weights(X, W_Q, W_K, causal=causal)


def token_covariances(A: Tensor, X: Tensor) -> Tensor:
    """Compute the covariance of the tokens under each row of an attention matrix.

    Args:
        A: (L, L) rows of probabilities.
        X: (L, d) tokens.

    Returns:
        (L, d, d): Cov_i = Xᵀ (diag a_i − a_i a_iᵀ) X for each row i.

    Raises:
        ValueError: If the arguments are not finite matrices that fit each other, or a row is not a probability vector.
    """
    tokens = _checks.require_real(X, "X", ndim=2)
    weights = _checks.require_shape(_checks.require_probabilities(A, "A"), "A", (len(tokens), len(tokens)))
    return core.token_covariances(_checks.require_same(weights, "A", tokens, "X"), tokens)


def attention_jacobians(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, *, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the Jacobians of self-attention by its three weights.

    Args:
        X: (L, d) tokens.
        W_Q: (d, d_k).
        W_K: (d, d_k).
        W_V: (d, d_v).
        causal: Whether row i sees the tokens up to i only.

    Returns:
        J_Q and J_K (L·d_v, d·d_k) and J_V (L·d_v, d·d_v); outputs and weights row by row.

    Raises:
        ValueError: If an argument is not a finite matrix that fits the others.
    """
    state = _single(X, W_Q, W_K, W_V, causal)
    parts = pieces(state, core.token_covariances(state.weights, X), "QKV")
    J_Q, J_K, J_V = (jacobian(parts[letter]).flatten(0, 1) for letter in "QKV")
    return J_Q, J_K, J_V


def attention_loss_hessian(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, R: Tensor, S: Tensor, *, causal: bool = False
) -> LossHessian:
    """Compute the Hessian of a loss of self-attention in its three weights.

    The result can be differentiated; under ``torch.no_grad()`` it carries no graph.

    Args:
        X: (L, d) tokens.
        W_Q: (d, d_k).
        W_K: (d, d_k).
        W_V: (d, d_v).
        R: (L, d_v) the loss's gradient at the outputs.
        S: The loss's Hessian there: (L, d_v, d_v), one matrix for each token, or (L, d_v, L, d_v).
        causal: Whether row i sees the tokens up to i only.

    Returns:
        Blocks between "W_Q", "W_K" and "W_V", weights row by row; normalised as the loss is.

    Raises:
        ValueError: If an argument is not finite or does not fit the others, or S is not symmetric.
    """
    state = _single(X, W_Q, W_K, W_V, causal)
    R, S = checked_output(R, S, (state.outputs.shape[0], state.outputs.shape[1]), X, names=("R", "S"))
    return _hessian(state, R, S, {"W_Q": W_Q.shape, "W_K": W_K.shape, "W_V": W_V.shape})


def multihead_attention(
    X: Tensor,
    W_Q: Tensor,
    W_K: Tensor,
    W_V: Tensor,
    W_O: Tensor,
    *,
    heads: int,
    b_Q: Tensor | None = None,
    b_K: Tensor | None = None,
    b_V: Tensor | None = None,
    b_O: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Evaluate multi-head self-attention with its output projection.

    Head h uses the h-th group of consecutive columns of W_Q, W_K and W_V and rows of W_O. ``nn.MultiheadAttention``
    keeps the transposes of these matrices.

    Args:
        X: (L, d) tokens.
        W_Q: (d, H·k).
        W_K: (d, H·k).
        W_V: (d, H·v).
        W_O: (H·v, o).
        heads: H.
        b_Q: (H·k,) or None, as the other biases.
        b_K: (H·k,); it shifts each row of scores by a constant, so the outputs do not depend on it.
        b_V: (H·v,).
        b_O: (o,).
        causal: Whether row i sees the tokens up to i only.

    Returns:
        (L, o).

    Raises:
        ValueError: If an argument is not finite or does not fit the others.
    """
    return _many(X, (W_Q, W_K, W_V, W_O), (b_Q, b_K, b_V, b_O), heads, causal).outputs


def multihead_attention_loss_hessian(
    X: Tensor,
    W_Q: Tensor,
    W_K: Tensor,
    W_V: Tensor,
    W_O: Tensor,
    R: Tensor,
    S: Tensor,
    *,
    heads: int,
    b_Q: Tensor | None = None,
    b_K: Tensor | None = None,
    b_V: Tensor | None = None,
    b_O: Tensor | None = None,
    causal: bool = False,
    wrt: Sequence[str] | None = None,
) -> LossHessian:
    """Compute the Hessian of a loss of multi-head self-attention.

    The result can be differentiated; under ``torch.no_grad()`` it carries no graph.

    Args:
        X: (L, d) tokens.
        W_Q: (d, H·k).
        W_K: (d, H·k).
        W_V: (d, H·v).
        W_O: (H·v, o).
        R: (L, o) the loss's gradient at the outputs.
        S: The loss's Hessian there: (L, o, o), one matrix for each token, or (L, o, L, o).
        heads: H; head h uses the h-th group of consecutive columns of W_Q, W_K and W_V and rows of W_O.
        b_Q: (H·k,) or None, as the other biases.
        b_K: (H·k,); all its blocks are 0.
        b_V: (H·v,).
        b_O: (o,).
        causal: Whether row i sees the tokens up to i only.
        wrt: Names of the variables, in the order wanted: weights, biases that are given, and "X" for the tokens.
            By default all weights and biases.

    Returns:
        Blocks between these variables, each row by row; normalised as the loss is.

    Raises:
        ValueError: If an argument is not finite or does not fit the others, S is not symmetric, or `wrt` names
            something unknown, or something twice.
    """
    weights, biases = (W_Q, W_K, W_V, W_O), (b_Q, b_K, b_V, b_O)
    state = _many(X, weights, biases, heads, causal)
    R, S = checked_output(R, S, (state.outputs.shape[0], state.outputs.shape[1]), X, names=("R", "S"))
    given = (W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, b_O, X)
    shapes = {name: value.shape for name, value in zip(_NAMES, given, strict=True) if value is not None}
    chosen = [name for name in shapes if name != "X"] if wrt is None else require_names(wrt, "wrt", tuple(shapes))
    return _hessian(state, R, S, {name: shapes[name] for name in chosen})


def _hessian(state: Heads, R: Tensor, S: Tensor, shapes: dict[str, torch.Size]) -> LossHessian:
    """Compute the blocks between the variables asked for."""
    # weights and their biases are computed together; the key bias has no effect at all
    groups = [letter for letter in "QKVO" if {f"W_{letter}", f"b_{letter}"} & set(shapes) - {"b_K"}]
    covariances = core.token_covariances(state.weights, state.X)
    directions = R @ (state.W_V @ state.W_O).mT
    thirds = core.token_third_moments(state.weights, state.X, directions)
    J_X = input_jacobian(state, covariances) if "X" in shapes else None
    outer = gauss_newton_blocks(pieces(state, covariances, groups), J_X, S)
    bent = functional_blocks(state, covariances, thirds, R, groups)
    if J_X is not None:
        bent |= input_functional_blocks(state, covariances, thirds, R, groups)
    return LossHessian(shapes, _named(outer, shapes, R), _named(bent, shapes, R))


def _named(table: dict[tuple[str, str], Tensor], shapes: dict[str, torch.Size], like: Tensor) -> Blocks:
    """Cut the blocks of weights with a bias as last row into those of the variables."""

    def rows(block: Tensor, name: str) -> Tensor:
        if name == "X":
            return block
        if name.startswith("b"):
            return block[len(block) - shapes[name].numel() :]
        return block[: shapes[name].numel()]

    names = tuple(shapes)
    blocks = {}
    for k, a in enumerate(names):
        for b in names[k:]:
            if "b_K" in (a, b):
                blocks[a, b] = like.new_zeros(shapes[a].numel(), shapes[b].numel())
                continue
            pair = a[-1], b[-1]
            block = table[pair] if pair in table else table[pair[::-1]].mT
            blocks[a, b] = rows(rows(block, a).mT, b).mT
    return Blocks(names, blocks)


def _single(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, causal: bool) -> Heads:
    """Check the arguments of one head without a readout and evaluate it."""
    _checked_weights(X, (W_Q, W_K, W_V), causal)
    identity = torch.eye(W_V.shape[1], dtype=X.dtype, device=X.device)
    return attend(X, (W_Q, W_K, W_V, identity), (None, None, None, None), heads=1, causal=causal)


def _many(
    X: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    heads: int,
    causal: bool,
) -> Heads:
    """Check the arguments of several heads and evaluate them."""
    _checked_weights(X, weights[:3], causal)
    W_O = _checks.require_real(weights[3], "W_O", ndim=2)
    _checks.require_same(_checks.require_shape(W_O, "W_O", (weights[2].shape[1], "o")), "W_O", X, "X")
    count = _checks.require_integer(heads, "heads")
    for name, weight in zip(("W_Q", "W_V"), (weights[0], weights[2]), strict=True):
        if weight.shape[1] % count:
            raise ValueError(f"heads: expected a divisor of the {weight.shape[1]} columns of {name}, got {count}")
    for letter, weight, bias in zip("QKVO", weights, biases, strict=True):
        if bias is not None:
            name = f"b_{letter}"
            _checks.require_shape(_checks.require_real(bias, name), name, (weight.shape[1],))
            _checks.require_same(bias, name, X, "X")
    return attend(X, weights, biases, heads=count, causal=causal)


def _checked_weights(X: Tensor, weights: Sequence[Tensor], causal: bool) -> None:
    """Check the tokens and the weights that they meet."""
    width = _checks.require_real(X, "X", ndim=2).shape[1]
    for name, weight in zip(("W_Q", "W_K", "W_V"), weights, strict=False):
        _checks.require_shape(_checks.require_real(weight, name, ndim=2), name, (width, "n"))
        _checks.require_same(weight, name, X, "X")
    _checks.require_shape(weights[1], "W_K", weights[0].shape)
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected True or False, got {_checks.describe(causal)}")
