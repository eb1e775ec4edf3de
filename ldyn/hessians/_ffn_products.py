"""Sums over tokens of Kronecker products, each as few matrix products, written once into the block they make.

A Jacobian here is kept in its two factors: E (L, o, p) and u (L, s) stand for the (o, p·s) matrices E_l ⊗ u_lᵀ, one for
each token. Without u they stand for the Jacobian by the tokens' own inputs: E_l is that of the outputs of token l by
the p inputs of token l, and those of the others are zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["block_diagonal", "full_products", "per_token_products", "zero_block"]

Factors = tuple[Tensor, Tensor | None]
"""E (L, o, p) and u (L, s), or None for the inputs."""

CHUNK = 1 << 19
"""Numbers that an intermediate result may hold: 4 MiB in double precision, about what a processor's cache takes."""


def per_token_products(jacobians: Mapping[str, Factors], S: Tensor) -> dict[tuple[str, str], Tensor]:
    """Compute J_aᵀ S J_b for all pairs where S couples the outputs of one token only.

    Args:
        jacobians: The factors of each J, in order.
        S: (L, o, o).

    Returns:
        (n_a, n_b) for each a and each b that does not come before it.
    """
    blocks: dict[tuple[str, str], Tensor] = {}
    names = list(jacobians)
    for j, b in enumerate(names):
        E_b, v = jacobians[b]
        weighted = S @ E_b
        for a in names[: j + 1]:
            E_a, u = jacobians[a]
            core = E_a.mT @ weighted
            if u is not None and v is not None:
                blocks[a, b] = kronecker_sum(core, u, v)
            elif u is not None:
                blocks[a, b] = _with_inputs(core, u)
            elif v is not None:
                blocks[a, b] = _with_inputs(core.mT, v).mT
            else:
                blocks[a, b] = block_diagonal(core)
    return blocks


def full_products(jacobians: Mapping[str, Factors], S: Tensor) -> dict[tuple[str, str], Tensor]:
    """Compute J_aᵀ S J_b for all pairs where S couples the outputs of all tokens.

    Args:
        jacobians: The factors of each J, in order.
        S: (L, o, L, o).

    Returns:
        (n_a, n_b) for each a and each b that does not come before it.
    """
    blocks: dict[tuple[str, str], Tensor] = {}
    names = list(jacobians)
    for j, b in enumerate(names):
        # S is symmetric, so J_bᵀ S is the transpose of what the other factors are multiplied by.
        weighted = _transposed_times(jacobians[b], S.flatten(2)).mT.reshape(*S.shape[:2], -1)
        for a in names[: j + 1]:
            blocks[a, b] = _transposed_times(jacobians[a], weighted)
    return blocks


def kronecker_sum(core: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Compute Σ_l core_l ⊗ u_l v_lᵀ.

    Args:
        core: (L, p, q).
        u: (L, s).
        v: (L, t).

    Returns:
        (p·s, q·t).
    """
    (tokens, p, q), s, t = core.shape, u.shape[1], v.shape[1]
    outer = (u[:, :, None] * v[:, None, :]).reshape(tokens, s * t)
    rows = max(1, CHUNK // (q * s * t))
    if rows >= p:
        return _kronecker_rows(core, outer, (s, t)).reshape(p * s, q * t)
    result = core.new_empty(p, s, q, t)
    for start in range(0, p, rows):
        result[start : start + rows] = _kronecker_rows(core[:, start : start + rows], outer, (s, t))
    return result.reshape(p * s, q * t)


def block_diagonal(blocks: Tensor) -> Tensor:
    """Put matrices along the diagonal of a larger one.

    Args:
        blocks: (..., n, s, t).

    Returns:
        (..., n·s, n·t), zero outside the blocks.
    """
    n, s, t = blocks.shape[-3:]
    spread = torch.diag_embed(blocks.movedim(-3, -1), dim1=-4, dim2=-2)
    return spread.reshape(*blocks.shape[:-3], n * s, n * t)


def zero_block(like: Tensor, rows: int, columns: int) -> Tensor:
    """Make a block of zeros that takes no memory.

    Args:
        like: A tensor whose dtype and device the block has.
        rows: The number of rows.
        columns: The number of columns.

    Returns:
        (rows, columns), one zero seen many times.
    """
    return like.new_zeros(()).expand(rows, columns)


def _kronecker_rows(core: Tensor, outer: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Sum over tokens and put the indices in order: core (L, p, q), outer (L, s·t), result (p, s, q, t)."""
    tokens, p, q = core.shape
    product = core.reshape(tokens, p * q).mT @ outer
    return product.reshape(p, q, *sizes).transpose(1, 2)


def _with_inputs(core: Tensor, u: Tensor) -> Tensor:
    """Multiply out the block of a parameter with the inputs: core (L, p, d), u (L, s), result (p·s, L·d)."""
    tokens, p, d = core.shape
    product = core.transpose(0, 1)[:, None] * u.mT[:, :, None]
    return product.reshape(p * u.shape[1], tokens * d)


def _transposed_times(factors: Factors, matrix: Tensor) -> Tensor:
    """Multiply Jᵀ, given in factors, by a matrix (L, o, Q), one token after the other; the result is (n, Q)."""
    E, u = factors
    (tokens, _, p), columns = E.shape, matrix.shape[2]
    if u is None:
        return (E.mT @ matrix).reshape(tokens * p, columns)
    s = u.shape[1]
    rows = max(1, CHUNK // (tokens * columns))
    result = matrix.new_empty(p, s, columns)
    for start in range(0, p, rows):
        part = E[:, :, start : start + rows].mT @ matrix  # (L, rows, Q)
        summed = u.mT @ part.reshape(tokens, -1)  # (s, rows · Q)
        result[start : start + rows] = summed.reshape(s, -1, columns).transpose(0, 1)
    return result.reshape(p * s, columns)
