"""Matrices over tokens and features that may keep the tokens apart.

A map from (L, n) to (L, o) that treats each token alone has a Jacobian of L small matrices, kept as (L, o, n); one that
mixes tokens has a Jacobian (L, o, L, n). Curvatures come in the same two forms. Columns are matrices (L · o, C), whose
rows go through the tokens and, for each, through its features.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add", "compose", "dense", "diagonal", "identity_added", "matrix", "symmetric", "times", "transposed"]


def is_apart(form: Tensor) -> bool:
    """Say whether the tokens are kept apart, (L, o, n)."""
    return form.ndim == 3


def matrix(form: Tensor) -> Tensor:
    """Read a form (L, o, M, n) as one matrix, (L · o, M · n)."""
    return form.reshape(form.shape[0] * form.shape[1], -1)


def dense(form: Tensor) -> Tensor:
    """Write a form out as (L, o, L, n), with zeros between different tokens if it keeps them apart."""
    if not is_apart(form):
        return form
    tokens, rows, columns = form.shape
    full = form.new_zeros(tokens, rows, tokens, columns)
    diagonal(full).copy_(form)
    return full


def times(form: Tensor, columns: Tensor) -> Tensor:
    """Multiply a form (L, o, n) or (L, o, L, n) by columns (L · n, C); (L · o, C)."""
    if is_apart(form):
        return (form @ columns.reshape(form.shape[0], form.shape[2], -1)).reshape(-1, columns.shape[-1])
    return matrix(form) @ columns


def transposed(form: Tensor) -> Tensor:
    """Transpose a form; (L, n, o) or (L, n, L, o)."""
    return form.mT if is_apart(form) else form.permute(2, 3, 0, 1)


def compose(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two forms, (L, o, ·, n) by (L, n, ·, k); apart only if both are."""
    if is_apart(left) and is_apart(right):
        return left @ right
    if is_apart(right):
        return torch.einsum("iajb,jbc->iajc", left, right)
    return times(left, matrix(right)).reshape(*left.shape[:2], *right.shape[2:])


def add(left: Tensor, right: Tensor) -> Tensor:
    """Add two forms of one shape; apart only if both are."""
    if is_apart(left) == is_apart(right):
        return left + right
    apart, mixing = (left, right) if is_apart(left) else (right, left)
    total = mixing.clone()
    diagonal(total).add_(apart)
    return total


def identity_added(form: Tensor) -> Tensor:
    """Add the identity to a form whose tokens have as many rows as columns."""
    total = form.clone()
    tokens = total if is_apart(form) else diagonal(total)
    tokens.diagonal(dim1=1, dim2=2).add_(1)
    return total


def symmetric(form: Tensor) -> Tensor:
    """Average a curvature with its mirror image, which takes away what rounding put between them."""
    return (form + transposed(form)) / 2


def diagonal(form: Tensor) -> Tensor:
    """View the blocks of a token with itself in (L, o, L, n), as (L, o, n)."""
    return form.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
