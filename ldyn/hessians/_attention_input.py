"""The functional part of attention's Hessian where the tokens themselves are a variable.

A token enters three times: it asks (through its query), it is asked (through its key) and it is read (through its
value). With s = 1/√k the scores of row i move by s (K W_Qᵀ dx_i + dX α_i), where α_i = W_K q_i, and what is read moves
by dX W_V; every term below pairs two of these movements. The last two indices of a block are a token j and its entry b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldyn.hessians._attention_core import Heads, centred_tokens

__all__ = ["input_functional_blocks"]

_CHUNK = 2**20
"""Entries of the largest temporary array of a sum."""


@dataclass(frozen=True, eq=False)
class _Head:
    """What the blocks of one head are made of; s is multiplied in wherever a score moves.

    Attributes:
        x: (L, d or d + 1) tokens, with a 1 where the queries have a bias.
        q: (L, k) queries.
        A: (L, L) attention matrix.
        W_Q: (d, k), as W_K and W_V (d, v) one head's.
        W_K: See W_Q.
        W_V: See W_Q.
        R: (L, o) the loss's gradient at the outputs.
        rho: (L, v) the loss's gradient at what the head reads.
        alpha: (L, d) s W_K q_i: how row i's score of a token answers to that token.
        u: (L, d) W_V ρ_i.
        asks: (d, d) s W_Q W_Kᵀ.
        JX: (L, L, d) the matrices J_i X.
        BX: (L, L, d) the matrices B_i X.
        C: (L, L) the loss's gradient at the scores.
        cov: (L, d, d) the covariances Xᵀ J_i X.
        third: (L, d, d) the third moments Xᵀ B_i X.
        s: 1/√k.
    """

    x: Tensor
    q: Tensor
    A: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    R: Tensor
    rho: Tensor
    alpha: Tensor
    u: Tensor
    asks: Tensor
    JX: Tensor
    BX: Tensor
    C: Tensor
    cov: Tensor
    third: Tensor
    s: float

    @property
    def CX(self) -> Tensor:
        """Return the rows of C X, (L, d)."""
        return (self.cov @ self.u.unsqueeze(-1)).squeeze(-1)


def _head(state: Heads, h: int, cov: Tensor, third: Tensor, R: Tensor) -> _Head:
    """Gather them for one head."""
    A, q, s = state.weights[h], state.queries[h], state.scale
    W_Q, W_K, W_V = state.W_Q[h], state.W_K[h], state.W_V[h]
    rho = R @ state.W_O[h].T
    u = rho @ W_V.T
    centred = centred_tokens(A, state.X)
    JX = A.unsqueeze(-1) * centred
    C = (JX @ u.unsqueeze(-1)).squeeze(-1)
    # B_i = diag c_i − c_i a_iᵀ − a_i c_iᵀ, and c_iᵀ X = Cov_i u_i
    BX = C.unsqueeze(-1) * centred - A.unsqueeze(-1) * (cov @ u.unsqueeze(-1)).mT
    x, alpha = state.with_constant(state.X, "Q"), s * q @ W_K.T
    return _Head(x, q, A, W_Q, W_K, W_V, R, rho, alpha, u, s * W_Q @ W_K.T, JX, BX, C, cov, third, s)


def _summed(vectors: Tensor, answers: Tensor, directions: Tensor) -> Tensor:
    """Compute Σ_i vectors_i[a] answers[i, j, m] directions_i[b], (a, m, L, d)."""
    tokens, width = answers.shape[1], directions.shape[1]
    step = max(1, _CHUNK // (len(answers) * tokens * width))
    parts = []
    for some in torch.split(answers.mT, step, dim=1):
        products = some.unsqueeze(3) * directions[:, None, None, :]
        parts.append((vectors.T @ products.flatten(1)).view(-1, some.shape[1], tokens, width))
    return torch.cat(parts, dim=1)


def _asked(head: _Head, vectors: Tensor, entries: Tensor) -> Tensor:
    """Pair movements of the scores with tokens that are asked again or read, for J_i X and B_i X times a matrix."""
    answers = torch.cat([head.BX, head.JX]) @ entries
    return _summed(torch.cat([vectors, vectors]), answers, head.s * torch.cat([head.alpha, head.u]))


def _same_entry(values: Tensor, rows: int, width: int) -> Tensor:
    """Compute δ_ab values[j, c], (rows, c, L, width)."""
    identity = torch.eye(rows, width, dtype=values.dtype, device=values.device)
    return torch.einsum("jc,ab->acjb", values, identity)


def _with_queries(head: _Head) -> Tensor:
    """Compute the block with W_Q, (d or d + 1, k, L, d)."""
    s, W_K = head.s, head.W_K
    own = torch.einsum("ia,icb->acib", head.x, s * W_K.T @ head.third @ head.asks.T)
    bilinear = torch.einsum("ja,bc->acjb", s * head.C.T @ head.x, W_K)
    return _asked(head, head.x, W_K) + own + bilinear + _same_entry(s * head.CX @ W_K, head.x.shape[1], len(W_K))


def _with_keys(head: _Head) -> Tensor:
    """Compute the block with W_K, (d, k, L, d)."""
    s, width = head.s, len(head.W_K)
    identity = torch.eye(width, dtype=head.q.dtype, device=head.q.device)
    own = torch.einsum("ic,iab->acib", head.q, s * head.third @ head.asks.T)
    bilinear = torch.einsum("ia,bc->acib", s * head.CX, head.W_Q)
    return (
        _asked(head, head.q, identity).transpose(0, 1)
        + own
        + bilinear
        + _same_entry(s * head.C.T @ head.q, width, width)
    )


def _with_values(head: _Head) -> Tensor:
    """Compute the block with W_V, (d, v, L, d)."""
    width = len(head.W_V)
    asked = _summed(head.rho, head.JX, head.alpha).transpose(0, 1)
    own = torch.einsum("iab,ie->aeib", head.cov @ head.asks.T, head.rho)
    return asked + own + _same_entry(head.A.T @ head.rho, width, width)


def _with_readout(head: _Head) -> Tensor:
    """Compute the block with the head's rows of W_O, (v, o, L, d)."""
    asked = _summed(head.R, head.JX @ head.W_V, head.alpha).transpose(0, 1)
    read = torch.einsum("jw,be->ewjb", head.A.T @ head.R, head.W_V)
    own = torch.einsum("jw,jeb->ewjb", head.R, head.W_V.T @ head.cov @ head.asks.T)
    return asked + read + own


def _tokens_with_tokens(heads: Sequence[_Head]) -> Tensor:
    """Compute the block of the tokens with themselves, (L·d, L·d): a matrix and its mirror image."""
    A, C, alpha, u, asks = (torch.stack([getattr(head, name) for head in heads]) for name in _STACKED)
    tokens, width = alpha.shape[1:]
    # token i asks, token j is asked or read: (i, b, j) beside c
    moved = torch.stack([asked @ head.asks.T for head in heads for asked in (head.BX, head.JX)], dim=-1)
    directions = torch.stack([alpha, u], dim=1).flatten(0, 1).transpose(0, 1)
    total = (moved.permute(0, 2, 1, 3).flatten(1, 2) @ directions).view(tokens, width, tokens, width)
    bilinear = (C.flatten(1).T @ asks.flatten(1)).view(tokens, tokens, width, width)
    total = total + bilinear.transpose(1, 2)
    # two tokens are asked or read, through B_i and J_i: their parts off the diagonal, then those on it
    one = A.unsqueeze(-1) * alpha.unsqueeze(2)
    other = C.unsqueeze(-1) * alpha.unsqueeze(2) + A.unsqueeze(-1) * u.unsqueeze(2)
    total = total - (one.flatten(2).flatten(0, 1).T @ other.flatten(2).flatten(0, 1)).view(total.shape)
    bent, mixed = alpha.unsqueeze(3) * alpha.unsqueeze(2), alpha.unsqueeze(3) * u.unsqueeze(2)
    same = torch.einsum("hij,hibc->jbc", C / 2, bent) + torch.einsum("hij,hibc->jbc", A, mixed)
    # and a token that asks twice
    same = same + torch.stack([head.asks @ head.third @ head.asks.T for head in heads]).sum(0) / 2
    total.diagonal(dim1=0, dim2=2).add_(same.permute(1, 2, 0))
    half = total.view(tokens * width, tokens * width)
    return half + half.T


_STACKED = ("A", "C", "alpha", "u", "asks")
_WITH = {"Q": _with_queries, "K": _with_keys, "V": _with_values, "O": _with_readout}


def input_functional_blocks(
    state: Heads, covariances: Tensor, thirds: Tensor, R: Tensor, groups: Sequence[str]
) -> dict[tuple[str, str], Tensor]:
    """Compute the blocks of every weight with the tokens, and that of the tokens with themselves.

    Args:
        state: The layer.
        covariances: (H, L, d, d) of the tokens.
        thirds: (H, L, d, d), their third moments in the direction of the loss's gradient.
        R: (L, o) the loss's gradient at the outputs.
        groups: Which of "Q", "K", "V", "O" to pair with the tokens.

    Returns:
        (n_a, L·d) for each of them, under (a, "X"), a bias being the last row of its weight; and (L·d, L·d) under
        ("X", "X").
    """
    heads = [_head(state, h, covariances[h], thirds[h], R) for h in range(len(state.weights))]
    size = state.X.numel()
    blocks = {}
    for group in groups:
        parts = [_WITH[group](head) for head in heads]
        block = torch.cat(parts, dim=0 if group == "O" else 1)
        if group in "VO" and group in state.biased:
            # these biases shift the outputs and are never bent
            block = torch.cat([block, torch.zeros_like(block[:1])])
        blocks[group, "X"] = block.reshape(-1, size)
    blocks["X", "X"] = _tokens_with_tokens(heads)
    return blocks
