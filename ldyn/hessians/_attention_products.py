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

_CHUNK = 2**17
"""Entries of a temporary product that still fits the processor's cache."""


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
    if order[0] == "u" and len(u) <= u.shape[1]:
        return _without_moving(u, v, M, order)
    product = left.flatten(1).T @ right.flatten(1)
    return product.view(*left.shape[1:], *right.shape[1:]).permute(places).contiguous()


def _without_moving(u: Tensor, v: Tensor, M: Tensor, order: Order) -> Tensor:
    """Compute the sum with the indices in place, u first: quicker where there are few tokens."""
    rows, columns = M.shape[1:]
    sizes = (rows, len(v[0]), columns) if order == "umvn" else (rows, columns, len(v[0]))
    block = M.new_empty(u.shape[1], *sizes)
    step = max(1, _CHUNK // (len(u) * sizes[1] * sizes[2]))
    for start in range(0, rows, step):
        part = M[:, start : start + step]
        if order == "umvn":
            products = part.unsqueeze(2) * v[:, None, :, None]
        else:
            products = part.unsqueeze(3) * v[:, None, None, :]
        block[:, start : start + step].view(len(block), -1).addmm_(u.T, products.flatten(1), beta=0)
    return block


def _mirrored(left: Tensor, right: Tensor, *, both: bool) -> Tensor:
    """Compute Σ_i left_i[a, b] right_i[c, e] for symmetric left_i, and right_i if both are, as [a, c, b, e]."""
    size, (rows, columns) = left.shape[1], right.shape[1:]
    upper, number = _triangle(size, left.device)
    product = left.flatten(1).index_select(1, upper).T
    if both:
        upper, places = _triangle(rows, left.device)
        product = product @ right.flatten(1).index_select(1, upper)
        product = product.gather(1, places.flatten().expand(len(product), -1))
    else:
        product = product @ right.flatten(1)
    index = number.unsqueeze(1) * rows + torch.arange(rows, device=left.device).view(-1, 1)
    return product.view(-1, columns).index_select(0, index.flatten()).view(size, rows, size, columns)


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Say where each entry of an upper triangle stands, and, (n, n), which of them stands (or is mirrored) where."""
    rows, columns = torch.triu_indices(size, size, device=device)
    one = torch.arange(size, device=device)
    first, second = torch.minimum(one, one.unsqueeze(1)), torch.maximum(one, one.unsqueeze(1))
    return rows * size + columns, first * (2 * size - 1 - first) // 2 + second
