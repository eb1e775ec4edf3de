"""Sums over tokens of products of vectors and matrices: what the blocks of attention's Hessian are made of.

Of the four indices of a block that does not touch the tokens themselves (two of each weight) two belong to vectors and
two to a matrix. Each sum is one product of large matrices, after which the indices are put into their order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Order", "token_sum"]

Order = Literal["umvn", "umnv", "munv"]
"""Which index of a block comes from where: u, v the vectors; m, n the rows and columns of the matrix."""


def token_sum(u: Tensor, v: Tensor, M: Tensor, order: Order, *, symmetric: bool = False) -> Tensor:
    """Compute Σ_i u_i[u] v_i[v] M_i[m, n].

    Args:
        u: (L, ·) a vector for each token; if `v` is the same object, half of the work is saved.
        v: (L, ·) another.
        M: (L, ·, ·) a matrix for each token, or (1, ·, ·) if it is the same for all.
        order: The order of the four indices in the result.
        symmetric: Whether the matrices are symmetric, which saves half of the work.

    Returns:
        Four dimensions, as ordered.
    """
    pairs = u.unsqueeze(2) * v.unsqueeze(1)
    # the factor that holds the last index stands on the right: then runs of it stay together when they are moved
    left, right, have = (M, pairs, "mnuv") if order[3] == "v" else (pairs, M, "uvmn")
    places = [have.index(letter) for letter in order]
    if len(M) == 1:
        one, other = left.sum(0), right.sum(0)
        return one[(...,) + (None,) * 2].permute(places) * other.expand(*one.shape, -1, -1).permute(places)
    mirrored = {"v": symmetric, "n": u is v}
    if order != "umnv" and mirrored[order[3]]:
        return _mirrored(left, right, both=symmetric and u is v)
    product = left.flatten(1).T @ right.flatten(1)
    return product.view(*left.shape[1:], *right.shape[1:]).permute(places).contiguous()


def _mirrored(left: Tensor, right: Tensor, *, both: bool) -> Tensor:
    """Compute Σ_i left_i[a, b] right_i[c, e] for symmetric left_i, and right_i if both are, as [a, c, b, e]."""
    packed, number = _pairs(left)
    if both:
        other, places = _pairs(right)
        product = packed.T @ other
        product = product.gather(1, places.flatten().expand(len(product), -1))
    else:
        product = packed.T @ right.flatten(1)
    size, (rows, columns) = len(number), right.shape[1:]
    index = number.unsqueeze(1) * rows + torch.arange(rows, device=left.device).view(-1, 1)
    return product.view(-1, columns).index_select(0, index.flatten()).view(size, rows, size, columns)


def _pairs(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the upper triangles of symmetric matrices, (L, n (n + 1) / 2), and say where each entry went, (n, n)."""
    size = matrices.shape[1]
    upper = torch.triu_indices(size, size, device=matrices.device)
    number = torch.empty(size, size, dtype=torch.int64, device=matrices.device)
    number[upper[0], upper[1]] = number[upper[1], upper[0]] = torch.arange(upper.shape[1], device=matrices.device)
    return matrices[:, upper[0], upper[1]], number
