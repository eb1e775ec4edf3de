"""What every derivative of attention is made of: weights, and the moments of the tokens under them.

Row i of the attention matrix is a probability vector over the tokens. Its first three central moments, of the tokens
themselves, stand for the derivatives of softmax: no array with two pairs of positions is ever needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Heads", "attend", "attention_weights", "centred_tokens", "token_covariances", "token_third_moments"]

_CHUNK = 2**19
"""Entries of the largest temporary array of centred tokens."""


def attention_weights(X: Tensor, W_Q: Tensor, W_K: Tensor, *, causal: bool = False) -> Tensor:
    """Compute A = softmax of X W_Q W_Kᵀ Xᵀ / √d_k, row by row.

    Args:
        X: (L, d) tokens.
        W_Q: (d, d_k).
        W_K: (d, d_k).
        causal: Whether row i sees the tokens up to i only.

    Returns:
        (L, L), rows that sum to 1; exactly 0 where a token is not seen.
    """
    return _weights(X @ W_Q, X @ W_K, causal)


def _weights(queries: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """Compute the attention matrices (..., L, L) of queries and keys (..., L, d_k)."""
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        # every row sees its own token, so no row is empty
        scores = scores.masked_fill(~seen, -math.inf)
    return torch.softmax(scores, dim=-1)


def centred_tokens(A: Tensor, X: Tensor) -> Tensor:
    """Compute each token's distance from each row's mean, x_j − Σ_l A_il x_l.

    It is measured from the row's most attended token first, so that nothing cancels where the attention is sharp.

    Args:
        A: (N, L) rows that sum to 1.
        X: (L, d).

    Returns:
        (N, L, d).
    """
    shifted = X - X[A.argmax(-1)].unsqueeze(-2)
    return shifted - A.unsqueeze(-2) @ shifted


def _chunks(A: Tensor, X: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Go through the rows of A in pieces, with the centred tokens of each."""
    step = max(1, _CHUNK // X.numel())
    for start in range(0, A.shape[0], step):
        rows = slice(start, start + step)
        yield rows, centred_tokens(A[rows], X)


def token_covariances(A: Tensor, X: Tensor) -> Tensor:
    """Compute the covariance of the tokens under each row of the attention matrix.

    Args:
        A: (..., L, L) rows that sum to 1.
        X: (L, d) tokens.

    Returns:
        (..., L, d, d): Cov_i = Xᵀ (diag a_i − a_i a_iᵀ) X for each row i.
    """
    rows = A.reshape(-1, A.shape[-1])
    parts = [(A_i.unsqueeze(-1) * y).mT @ y for part, y in _chunks(rows, X) for A_i in (rows[part],)]
    return torch.cat(parts).reshape(*A.shape[:-1], X.shape[1], X.shape[1])


def token_third_moments(A: Tensor, X: Tensor, U: Tensor) -> Tensor:
    """Compute the third central moment of the tokens under each row, one slot filled with a given vector.

    Args:
        A: (..., L, L) rows that sum to 1.
        X: (L, d) tokens.
        U: (..., L, d) a vector for each row.

    Returns:
        (..., L, d, d): Σ_j A_ij (y_j · u_i) y_j y_jᵀ with y_j = x_j − Σ_l A_il x_l. It equals Xᵀ B_i X, where B_i is
        the Hessian of Σ_j g_ij A_ij in row i's scores and g_ij = x_j · u_i.
    """
    rows, directions = A.reshape(-1, A.shape[-1]), U.reshape(-1, U.shape[-1], 1)
    parts = [(rows[part].unsqueeze(-1) * (y @ directions[part]) * y).mT @ y for part, y in _chunks(rows, X)]
    return torch.cat(parts).reshape(*A.shape[:-1], X.shape[1], X.shape[1])


@dataclass(frozen=True, eq=False)
class Heads:
    """One layer of attention at given tokens; the H heads lead.

    Attributes:
        X: (L, d) tokens.
        W_Q: (H, d, k).
        W_K: (H, d, k).
        W_V: (H, d, v).
        W_O: (H, v, o) the part of the readout that belongs to each head.
        queries: (H, L, k).
        values: (H, L, v).
        weights: (H, L, L) attention matrices.
        biased: The letters among "QKVO" whose map has a bias.
        outputs: (L, o).
    """

    X: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    queries: Tensor
    values: Tensor
    weights: Tensor
    biased: str
    outputs: Tensor

    @property
    def scale(self) -> float:
        """Return what the scores are multiplied by, 1/√k."""
        return 1 / math.sqrt(self.W_Q.shape[-1])

    def with_constant(self, vectors: Tensor, letter: str) -> Tensor:
        """Append a 1 to each vector (..., n) if the map of that letter has a bias."""
        if letter not in self.biased:
            return vectors
        return torch.cat([vectors, vectors.new_ones(*vectors.shape[:-1], 1)], dim=-1)


def attend(
    X: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    *,
    heads: int,
    causal: bool,
) -> Heads:
    """Evaluate attention and keep what its derivatives need.

    Args:
        X: (L, d) tokens.
        weights: W_Q and W_K (d, H·k), W_V (d, H·v), W_O (H·v, o); heads are consecutive groups of columns.
        biases: Those of the four maps, each a vector or None.
        heads: H.
        causal: Whether row i sees the tokens up to i only.

    Returns:
        All intermediate values.
    """
    W_Q, W_K, W_V = (weight.reshape(len(weight), heads, -1).transpose(0, 1) for weight in weights[:3])
    W_O = weights[3].reshape(heads, -1, weights[3].shape[1])
    queries, keys, values = (
        X @ weight if bias is None else X @ weight + bias.reshape(heads, 1, -1)
        for weight, bias in zip((W_Q, W_K, W_V), biases[:3], strict=True)
    )
    A = _weights(queries, keys, causal)
    outputs = (A @ values @ W_O).sum(0)
    if biases[3] is not None:
        outputs = outputs + biases[3]
    biased = "".join(letter for letter, bias in zip("QKVO", biases, strict=True) if bias is not None)
    return Heads(X, W_Q, W_K, W_V, W_O, queries, values, A, biased, outputs)
