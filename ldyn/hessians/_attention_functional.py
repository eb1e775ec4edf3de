"""The functional part Σ r_k ∇²(output k) of attention's Hessian, between its weights.

Heads meet only in the readout, which is linear: two heads' own weights have no second derivative in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from ldyn.hessians._attention_core import Heads
from ldyn.hessians._attention_products import token_sum

__all__ = ["functional_blocks"]


class _Head:
    """The functional blocks of one head's weights; each method computes one, (rows, columns, rows, columns)."""

    def __init__(self, state: Heads, h: int, covariances: Tensor, thirds: Tensor, R: Tensor) -> None:
        self.x, self.q, self.R = state.with_constant(state.X, "Q"), state.queries[h], R
        self.W_K, self.W_V = state.W_K[h], state.W_V[h]
        self.rho = R @ state.W_O[h].T
        self.cov, self.third = state.scale * covariances[h], state.scale**2 * thirds[h]
        self.mean = state.with_constant(state.weights[h] @ state.X, "V")

    def QQ(self) -> Tensor:
        return token_sum(self.x, self.x, self.W_K.T @ self.third @ self.W_K, "umvn", symmetric=True)

    def QK(self) -> Tensor:
        block = token_sum(self.x, self.q, self.W_K.T @ self.third, "umnv")
        # a score is bilinear in its query and its key; C X, row by row, is Cov_i W_V ρ_i
        pairs = self.x.T @ (self.cov @ (self.rho @ self.W_V.T).unsqueeze(-1)).squeeze(-1)
        block.diagonal(dim1=1, dim2=3).add_(pairs.unsqueeze(-1))
        return block

    def KK(self) -> Tensor:
        return token_sum(self.q, self.q, self.third, "munv", symmetric=True)

    def QV(self) -> Tensor:
        return self._padded(token_sum(self.x, self.rho, self.W_K.T @ self.cov, "umnv"))

    def KV(self) -> Tensor:
        return self._padded(token_sum(self.q, self.rho, self.cov, "munv", symmetric=True))

    def VV(self) -> Tensor:
        size = self.mean.shape[1], self.rho.shape[1]
        return self.x.new_zeros(*size, *size)

    def QO(self) -> Tensor:
        return token_sum(self.x, self.R, self.W_K.T @ self.cov @ self.W_V, "umnv")

    def KO(self) -> Tensor:
        return token_sum(self.q, self.R, self.cov @ self.W_V, "munv")

    def VO(self) -> Tensor:
        identity = torch.eye(self.rho.shape[1], dtype=self.R.dtype, device=self.R.device)
        return (self.mean.T @ self.R)[:, None, None, :] * identity[:, :, None]

    def _padded(self, block: Tensor) -> Tensor:
        """Append the row of the value bias, which shifts every output alike and is never bent."""
        extra = self.mean.shape[1] - block.shape[2]
        return torch.cat([block, block.new_zeros(*block.shape[:2], extra, block.shape[3])], dim=2) if extra else block


def functional_blocks(
    state: Heads, covariances: Tensor, thirds: Tensor, R: Tensor, groups: Sequence[str]
) -> dict[tuple[str, str], Tensor]:
    """Compute all blocks between weights, a bias being the last row of its weight.

    Args:
        state: The layer.
        covariances: (H, L, d, d) of the tokens.
        thirds: (H, L, d, d), their third moments in the direction of the loss's gradient.
        R: (L, o) the loss's gradient at the outputs.
        groups: Which of "Q", "K", "V", "O", in this order.

    Returns:
        A matrix (n_a, n_b) for each pair.
    """
    heads = [_Head(state, h, covariances, thirds, R) for h in range(len(state.weights))]
    blocks = {}
    for a, b in combinations_with_replacement(groups, 2):
        if (a, b) == ("O", "O"):
            size = (state.W_O[..., 0].numel() + int("O" in state.biased)) * R.shape[1]
            blocks[a, b] = R.new_zeros(size, size)
        else:
            parts: list[Tensor] = [getattr(head, a + b)() for head in heads]
            blocks[a, b] = _together(parts, readout=b == "O", biased=b == "O" and "O" in state.biased)
    return blocks


def _together(parts: list[Tensor], *, readout: bool, biased: bool) -> Tensor:
    """Put the heads' blocks, (rows, columns, rows, columns) each, where they belong in one matrix of zeros."""
    # a head has columns of its own in every weight but the readout, where it has rows; a bias there adds a row of zeros
    count, (a, b, c, d) = len(parts), parts[0].shape
    if count == 1 and not biased:
        return parts[0].flatten(2).flatten(0, 1)
    shape = (a, count * b, count * c + biased, d) if readout else (a, count * b, c, count * d)
    block = parts[0].new_zeros(shape)
    for h, part in enumerate(parts):
        dim, length = (2, c) if readout else (3, d)
        block.narrow(1, h * b, b).narrow(dim, h * length, length).copy_(part)
    return block.flatten(2).flatten(0, 1)
