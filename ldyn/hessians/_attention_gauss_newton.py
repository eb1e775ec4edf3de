"""The Gauss–Newton part Jᵀ S J of attention's Hessian, and the Jacobian J itself.

Row by row, the Jacobian by a weight matrix is a vector times a matrix: a token (or a mean of tokens) and what the
output answers, or, for the keys, a query and what the output answers. Jᵀ S J keeps this form where the loss couples no
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from ldyn import _checks
from ldyn.hessians._attention_core import Heads, centred_tokens
from ldyn.hessians._attention_products import Order, token_sum
from ldyn.hessians._output import dense, is_per_token

__all__ = ["Piece", "gauss_newton_blocks", "input_jacobian", "jacobian", "pieces"]

Table = dict[tuple[str, str], Tensor]
_CHUNK = 2**20
"""Entries of the largest temporary array where the tokens are a variable."""
_ORDERS: dict[tuple[bool, bool], Order] = {
    (True, True): "umvn",
    (True, False): "umnv",
    (False, False): "munv",
}
"""The order of a block's indices, by whether each variable's vector answers to rows."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The Jacobian of the outputs by some columns of a weight matrix, token by token.

    Entry [w; a, c] is ``vector[a] · matrix[w, c]``, or ``vector[c] · matrix[w, a]`` where the matrix answers to rows.

    Attributes:
        vector: (L, ·).
        matrix: (L, o, ·).
        rows: Whether the vector's index is the one of the weight's rows.
        fixed: Whether the matrix is the same for all tokens.
    """

    vector: Tensor
    matrix: Tensor
    rows: bool
    fixed: bool = False

    def dense(self) -> Tensor:
        """Write it out, (L, o, rows, columns)."""
        pattern = "ia,iwc->iwac" if self.rows else "ic,iwa->iwac"
        return torch.einsum(pattern, self.vector, self.matrix)


def pieces(state: Heads, covariances: Tensor, groups: Sequence[str]) -> dict[str, list[Piece]]:
    """Describe the Jacobian by each weight matrix, with its bias as a last row.

    Args:
        state: The layer.
        covariances: (H, L, d, d) of the tokens.
        groups: Which of "Q", "K", "V", "O".

    Returns:
        Pieces for consecutive groups of columns: one for each head, or one for all.
    """
    found: dict[str, list[Piece]] = {}
    tokens = state.X.shape[0]
    # how the output of each row answers to a shift of all keys' mean, (H, L, o, d)
    answers = state.scale * ((state.W_V @ state.W_O).mT.unsqueeze(1) @ covariances)
    for group in groups:
        if group == "Q":
            matrix = (answers @ state.W_K.unsqueeze(1)).permute(1, 2, 0, 3).flatten(2)
            found[group] = [Piece(state.with_constant(state.X, "Q"), matrix, rows=True)]
        elif group == "K":
            found[group] = [Piece(q, N, rows=False) for q, N in zip(state.queries, answers, strict=True)]
        elif group == "V":
            means = state.with_constant(state.weights @ state.X, "V")
            constant = state.W_O.mT.unsqueeze(1).expand(-1, tokens, -1, -1)
            found[group] = [Piece(m, W, rows=True, fixed=True) for m, W in zip(means, constant, strict=True)]
        elif group == "O":
            read = state.with_constant((state.weights @ state.values).transpose(0, 1).flatten(1), "O")
            identity = torch.eye(state.W_O.shape[-1], dtype=read.dtype, device=read.device)
            found[group] = [Piece(read, identity.expand(tokens, -1, -1), rows=True, fixed=True)]
    return found


def jacobian(parts: Sequence[Piece]) -> Tensor:
    """Write out the Jacobian by one weight matrix, (L, o, n)."""
    return torch.cat([part.dense() for part in parts], dim=-1).flatten(2)


def input_jacobian(state: Heads, covariances: Tensor) -> Tensor:
    """Write out the Jacobian by the tokens, (L, o, L, d)."""
    tokens, width = state.X.shape
    outputs = state.W_O.shape[-1]
    total = state.X.new_zeros(tokens, outputs, tokens, width)
    index = torch.arange(tokens, device=total.device)
    for h, A in enumerate(state.weights):
        read = state.W_V[h] @ state.W_O[h]
        alpha = state.queries[h] @ state.W_K[h].T
        answers = state.scale * A.unsqueeze(-1) * (centred_tokens(A, state.X) @ read)
        total = total + torch.einsum("ijw,ib->iwjb", answers, alpha) + torch.einsum("ij,bw->iwjb", A, read)
        own = state.scale * read.T @ covariances[h] @ (state.W_K[h] @ state.W_Q[h].T)
        total[index, :, index] = total[index, :, index] + own
    return total


def gauss_newton_blocks(parts: dict[str, list[Piece]], J_X: Tensor | None, S: Tensor) -> Table:
    """Compute all blocks Jᵀ S J.

    Args:
        parts: The Jacobian by each weight matrix.
        J_X: (L, o, L, d) the Jacobian by the tokens, or None.
        S: (L, o, o) or (L, o, L, o).

    Returns:
        A matrix (n_a, n_b) for each pair in the order of the names in `parts`, then "X".
    """
    if not is_per_token(S):
        return _dense_blocks(parts, J_X, S)
    same = bool(_checks.known_truth((S == S[:1]).all()))
    # S times each piece's answers, formed once
    after = {a: [S[:1] @ p.matrix[:1] if same and p.fixed else S @ p.matrix for p in parts[a]] for a in parts}
    blocks: Table = {}
    for a, b in combinations_with_replacement(parts, 2):
        if parts[b][0].rows and not parts[a][0].rows:
            blocks[a, b] = _block(parts[b], parts[a], after[a]).mT
        else:
            blocks[a, b] = _block(parts[a], parts[b], after[b])
    if J_X is not None:
        moved = S @ J_X.flatten(2)
        for a in parts:
            blocks[a, "X"] = torch.cat([_with_tokens(p, moved) for p in parts[a]], dim=1).flatten(0, 1)
        blocks["X", "X"] = _symmetric_product(J_X.flatten(2).flatten(0, 1), moved.flatten(0, 1))
    return blocks


def _block(left: Sequence[Piece], right: Sequence[Piece], after: Sequence[Tensor]) -> Tensor:
    """Compute the block of two weights, (n_a, n_b); S times the matrices of the right one is given."""
    order = _ORDERS[left[0].rows, right[0].rows]
    columns = []
    for q, moved in zip(right, after, strict=True):
        rows = []
        for p in left:
            # one matrix is enough if it is the same for all tokens
            matrix = p.matrix[: len(moved)] if p.fixed else p.matrix
            rows.append(token_sum(p.vector, q.vector, matrix.mT @ moved, order, symmetric=p is q))
        columns.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
    block = columns[0] if len(columns) == 1 else torch.cat(columns, dim=3)
    return block.flatten(2).flatten(0, 1)


def _with_tokens(part: Piece, moved: Tensor) -> Tensor:
    """Compute a piece's block with the tokens, (rows, columns, L·d), from S J_X (L, o, L·d)."""
    tokens, _, size = moved.shape
    products = []
    for matrix in torch.split(part.matrix, max(1, _CHUNK // (tokens * size)), dim=2):
        answers = (matrix.mT @ moved).flatten(1)
        products.append((part.vector.T @ answers).view(-1, matrix.shape[2], size))
    block = torch.cat(products, dim=1)
    return block if part.rows else block.transpose(0, 1)


def _symmetric_product(J: Tensor, moved: Tensor) -> Tensor:
    """Compute Jᵀ S J from J and S J, (m, n) each: half of it, in strips, and the rest by symmetry."""
    total = J.new_empty(J.shape[1], J.shape[1])
    step = max(64, J.shape[1] // 4)
    for start in range(0, J.shape[1], step):
        stop = start + step
        total[start:stop, start:] = J[:, start:stop].T @ moved[:, start:]
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _dense_blocks(parts: dict[str, list[Piece]], J_X: Tensor | None, S: Tensor) -> Table:
    """Compute the blocks from Jacobians written out, for a loss that couples tokens."""
    jacobians = {name: jacobian(part).flatten(0, 1) for name, part in parts.items()}
    if J_X is not None:
        jacobians["X"] = J_X.flatten(0, 1).flatten(1)
    weight, names = dense(S), list(jacobians)
    blocks: Table = {}
    for b, J in jacobians.items():
        moved = weight @ J
        blocks |= {(a, b): jacobians[a].T @ moved for a in names[: names.index(b) + 1]}
    return blocks
