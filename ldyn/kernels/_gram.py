"""Inner products of per-example gradients in factorised form.

A parameter's gradient for output c of example n is either small and kept as it is (`Direct`), or a sum of outer
products over positions t, Σ_t grads[c, n, t] ⊗ inputs[n, t] (`Outer`), which is never formed if that costs more than
products of the factors. Every function adds to a block of the kernel with index [a, i, b, j]: output and example of
the left side, output and example of the right side.

Letters: C outputs, N examples, T positions, D groups, I inputs and O outputs of a layer for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

WORKSPACE = 2**24
"""How many numbers a temporary may hold before work is done in pieces."""

SLICE = 2**20
"""How many numbers of formed gradients are contracted at a time: what a processor's cache holds."""

WORTH_CUTTING = 96
"""How many rows make it worth computing an upper triangle in four pieces: fewer calls beat fewer products before."""


@dataclass(frozen=True, eq=False)
class Direct:
    """Gradients as they are.

    Attributes:
        grads: (C, N, P).
    """

    grads: Tensor


@dataclass(frozen=True, eq=False)
class Outer:
    """Gradients Σ_t grads[c, n, t, d] ⊗ inputs[n, t, d], for each group d, and of a bias Σ_t grads[c, n, t, d].

    Attributes:
        inputs: (N, T, D, I), or token numbers (N, T), which stand for rows of the identity.
        grads: (C, N, T, D, O).
        bias: whether the bias counts as well.
        flipped: whether the parameter is stored as (I, O), not as (O, I).
    """

    inputs: Tensor
    grads: Tensor
    bias: bool = False
    flipped: bool = False

    @property
    def tokens(self) -> bool:
        """Whether the inputs are token numbers."""
        return self.inputs.ndim == 2


@dataclass(frozen=True, eq=False)
class Mixed:
    """Contributions of one table (O, I) used both as rows picked by tokens and as a matrix: tied embeddings.

    Attributes:
        rows: the tokens' part.
        matrix: the part of y = x Wᵀ.
        traced: whether only the trace over outputs is wanted.
    """

    rows: Outer
    matrix: Outer
    traced: bool = False


Factor = Direct | Outer | Mixed


def traced(factor: Factor) -> Factor:
    """Move the outputs among the features, so that the Gram of the result is the trace over outputs."""
    if isinstance(factor, Mixed):
        return replace(factor, traced=True)
    if isinstance(factor, Direct):
        return Direct(factor.grads.transpose(0, 1).flatten(1).unsqueeze(0))
    grads = factor.grads.permute(1, 2, 3, 0, 4).flatten(3).unsqueeze(0)
    return Outer(factor.inputs, grads, factor.bias, factor.flipped)


def form(factor: Factor) -> tuple[object, ...]:
    """Describe what must agree between factors that are to be merged or multiplied."""
    if isinstance(factor, Direct):
        return (Direct, factor.grads.shape[2])
    if isinstance(factor, Mixed):
        return (Mixed, form(factor.rows), form(factor.matrix))
    return (Outer, factor.tokens, factor.bias, factor.flipped, factor.inputs.shape[2:], factor.grads.shape[3:])


def merged(factors: Sequence[Factor], shape: torch.Size) -> Factor:
    """Merge the contributions of several uses of one parameter of a given shape."""
    kinds: dict[tuple[object, ...], list[Factor]] = {}
    for factor in factors:
        kinds.setdefault(form(factor), []).append(factor)
    parts = [_joined(each) for each in kinds.values()]
    if len(parts) == 1:
        return parts[0]
    picked = [each for each in parts if isinstance(each, Outer) and each.tokens]
    others = [each for each in parts if isinstance(each, Outer) and not each.tokens and not each.flipped]
    if len(picked) == len(others) == 1 and len(parts) == 2:
        return Mixed(picked[0], others[0])
    return Direct(torch.stack([dense(part, shape).grads for part in parts]).sum(0))


def _joined(factors: Sequence[Factor]) -> Factor:
    """Merge contributions of one form."""
    direct = [factor for factor in factors if isinstance(factor, Direct)]
    if direct:
        return direct[0] if len(direct) == 1 else Direct(torch.stack([factor.grads for factor in direct]).sum(0))
    outer = [factor for factor in factors if isinstance(factor, Outer)]
    if len(outer) == 1:
        return outer[0]
    # each use adds its own positions to the same sum
    inputs, grads = torch.cat([each.inputs for each in outer], 1), torch.cat([each.grads for each in outer], 2)
    return replace(outer[0], inputs=inputs, grads=grads)


def dense(factor: Factor, shape: torch.Size) -> Direct:
    """Form the gradients of a parameter of a given shape."""
    if isinstance(factor, Direct):
        return factor
    if isinstance(factor, Mixed):
        return Direct(dense(factor.rows, shape).grads + dense(factor.matrix, shape).grads)
    grads, inputs = factor.grads, factor.inputs
    count = len(inputs)
    if factor.tokens:
        rows = grads.new_zeros(len(grads), count, *(shape if factor.flipped else shape[::-1]))
        place = inputs[None, :, :, None].expand(len(grads), -1, -1, grads.shape[-1])
        formed = rows.scatter_add_(2, place, grads.squeeze(3))
        return Direct((formed if factor.flipped else formed.transpose(2, 3)).flatten(2))
    formed = torch.einsum("cntdo,ntdi->cndio" if factor.flipped else "cntdo,ntdi->cndoi", grads, inputs)
    return Direct(formed.flatten(2))


def add_gram(block: Tensor, left: Factor, right: Factor) -> None:
    """Add the inner products of two sides' gradients to a block of the kernel.

    Args:
        block: (C, N1, C, N2), contiguous; changed.
        left: Contributions to a parameter from N1 examples.
        right: Contributions of the same form from N2 examples. Where it is `left` itself, what stands below the
            diagonal of the block, read as a matrix, is left undefined.
    """
    if isinstance(left, Direct) and isinstance(right, Direct):
        _add_product(_matrix(block), left.grads.flatten(0, 1), right.grads.flatten(0, 1), same=left is right)
    elif isinstance(left, Outer) and isinstance(right, Outer):
        if left.inputs.shape[1] == right.inputs.shape[1] == left.grads.shape[3] == 1:
            _add_without_positions(block, left, right)
        elif _pairs_are_cheaper(left, right):
            _add_by_pairs(block, left, right)
        else:
            _add_by_gradients(block, left, right)
    elif isinstance(left, Mixed) and isinstance(right, Mixed):
        for one, two in ((left.rows, right.rows), (left.matrix, right.matrix)):
            side = traced(one) if left.traced else one
            add_gram(block, side, side if one is two else traced(two) if left.traced else two)
        _add_across(block, left.rows, right.matrix, trace=left.traced)
        _add_across(block.permute(2, 3, 0, 1), right.rows, left.matrix, trace=left.traced)


def _add_across(block: Tensor, rows: Outer, matrix: Outer, *, trace: bool) -> None:
    """Add Σ_ts (grads of row n_t · inputs s) · (entry n_t of grads s), the products of a table's two kinds of use."""
    picked, inputs = rows.grads.squeeze(3), matrix.inputs.squeeze(2)
    tokens, count = rows.inputs.reshape(-1), len(rows.inputs)
    positions = picked.shape[2]
    step = max(1, WORKSPACE // (2 * picked.shape[:3].numel() * inputs.shape[1]))
    for start in range(0, len(inputs), step):
        part = slice(start, start + step)
        first = torch.einsum("aith,jsh->aijts", picked, inputs[part])
        entries = matrix.grads[:, part, :, 0].index_select(-1, tokens)
        second = entries.view(*entries.shape[:3], count, positions)
        if trace:
            block[0, :, 0, part] += torch.einsum("aijts,ajsit->ij", first, second)
        else:
            block[..., part] += torch.einsum("aijts,bjsit->aibj", first, second)


def _matrix(block: Tensor) -> Tensor:
    """View a block as a matrix with rows (a, i) and columns (b, j)."""
    return block.view(block.shape[0] * block.shape[1], -1)


def _ranges(size: int, rows: int = 1) -> list[tuple[int, int]]:
    """Cut a range of blocks of so many rows into four, for products of which only the upper triangle is wanted."""
    pieces = 4 if size * rows >= WORTH_CUTTING else 1
    cuts = [size * k // pieces for k in range(pieces + 1)]
    return [(start, stop) for start, stop in pairwise(cuts) if start < stop]


def _add_product(total: Tensor, one: Tensor, two: Tensor, *, same: bool) -> None:
    """Add one · twoᵀ, its upper triangle alone if the two are the same."""
    if not same:
        total.addmm_(one, two.T)
        return
    for start, stop in _ranges(len(one)):
        total[start:stop, start:].addmm_(one[start:stop], one[start:].T)


def _add_without_positions(block: Tensor, left: Outer, right: Outer) -> None:
    """Add (inputs' Gram + 1) ∘ (grads' Gram)."""
    if right is left and len(left.grads) == 1 and not left.tokens:
        _add_upper_triangle(block[0, :, 0], left)
        return
    if left.tokens:
        inner = (left.inputs == right.inputs.T).to(block.dtype)
    else:
        inner = left.inputs.flatten(1) @ right.inputs.flatten(1).T
    if left.bias:
        inner = inner + 1
    one, two = left.grads.flatten(2), right.grads.flatten(2)
    selected, others = _one_hot(one), _one_hot(two)
    if selected is not None and others is not None and torch.equal(selected[0], others[0]):
        place, (value, other) = selected[0], (selected[1], others[1])
        same = place[:, None] == place
        if bool((same.sum(0) == 1).all()):
            block.diagonal(dim1=0, dim2=2).add_(inner[..., None] * (value.T[:, None] * other.T[None, :]))
            return
    if right is not left:
        outer = one.flatten(0, 1) @ two.flatten(0, 1).T
        block.addcmul_(outer.view_as(block), inner[None, :, None, :])
        return
    for start, stop in _ranges(len(one), len(inner)):
        outer = one[start:stop].flatten(0, 1) @ one[start:].flatten(0, 1).T
        part = outer.view(stop - start, len(inner), -1, len(inner))
        block[start:stop, :, start:].addcmul_(part, inner[None, :, None, :])


def _add_upper_triangle(block: Tensor, side: Outer) -> None:
    """Add the products of examples with themselves and later ones to (N, N), for the gradients of a single output."""
    inputs, grads = side.inputs.flatten(1), side.grads[0].flatten(1)
    for start, stop in _ranges(len(inputs)):
        inner = inputs[start:stop] @ inputs[start:].T
        if side.bias:
            inner += 1
        block[start:stop, start:].addcmul_(grads[start:stop] @ grads[start:].T, inner)


def _one_hot(grads: Tensor) -> tuple[Tensor, Tensor] | None:
    """Read (C, N, O) gradients that select one unit for each output, the same for every example: (C,), (C, N)."""
    if grads.shape[0] > grads.shape[2] or int(torch.count_nonzero(grads[0, 0])) > 1:
        return None
    if int(torch.count_nonzero(grads)) > grads.shape[0] * grads.shape[1]:
        return None
    place = grads[:, 0].abs().argmax(-1)
    value = grads.take_along_dim(place[:, None, None], dim=2).squeeze(2)
    if int(torch.count_nonzero(value)) != int(torch.count_nonzero(grads)):
        return None
    return place, value


def _pairs_are_cheaper(left: Outer, right: Outer) -> bool:
    """Compare the multiplications of the two routes for a layer with positions."""
    outputs, n1, t1, groups, size = left.grads.shape
    n2, t2 = right.inputs.shape[:2]
    if groups > 1:
        return False
    inputs = 1 if left.tokens else left.inputs.shape[-1]
    width = _distinct(left, right) if left.tokens else inputs
    pairs = n1 * n2 * (t1 * t2 * inputs + outputs * t1 * t2 * size + outputs**2 * t1 * size)
    formed = outputs * (n1 * t1 + n2 * t2) * inputs * size + n1 * n2 * outputs**2 * width * size
    return pairs < formed


def _distinct(left: Outer, right: Outer) -> int:
    """Count the tokens that occur on either side."""
    return len(torch.unique(torch.cat([left.inputs.flatten(), right.inputs.flatten()])))


def _add_by_pairs(block: Tensor, left: Outer, right: Outer) -> None:
    """Add Σ_ts (inputs' Gram + 1)[t, s] · (grads' Gram)[t, s], with the sum over s taken before that over o."""
    outputs, n1, t1, _, size = left.grads.shape
    n2, t2 = right.inputs.shape[:2]
    one = left.grads.reshape(outputs, n1, t1 * size).transpose(0, 1)
    two = right.grads.squeeze(3).transpose(0, 1)
    step = max(1, min(WORKSPACE // (n1 * t1 * (t2 + outputs * size)), -(-n2 // 4) if right is left else n2))
    for start in range(0, n2, step):
        stop, above = min(start + step, n2), start if right is left else 0
        inner = _inputs_gram(left.inputs[above:], right.inputs[start:stop], block.dtype)
        if left.bias:
            inner = inner + 1
        width, height = stop - start, n1 - above
        # for each example j of the right and output b: Σ_s inner[j, (i, t), s] grads[b, j, s, o]
        spread = torch.matmul(inner[:, None], two[start:stop])
        spread = spread.view(width * outputs, height, t1 * size).transpose(0, 1)
        total = torch.bmm(one[above:], spread.transpose(1, 2)).view(height, outputs, width, outputs)
        total = total.permute(1, 0, 3, 2)
        block[:, above:, :, start:stop] += total
        if right is left:
            block[:, start:stop, :, stop:] += total[:, width:].permute(2, 3, 0, 1)


def _inputs_gram(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply inputs of all positions: (N2, N1·T1, T2)."""
    if left.ndim == 2:
        return (right[:, None, :] == left.reshape(1, -1, 1)).to(dtype)
    return torch.matmul(left.reshape(-1, left.shape[-1]), right.flatten(2).transpose(1, 2))


def _add_by_gradients(block: Tensor, left: Outer, right: Outer) -> None:
    """Form each example's gradient, a slice of output units at a time, and contract."""
    if left.tokens:
        one, two = _compact(left, right)
        add_gram(block, one, one if right is left else two)
        return
    outputs, _, _, groups, size = left.grads.shape
    step = max(1, SLICE // (outputs * max(len(left.inputs), len(right.inputs)) * groups * left.inputs.shape[-1]))
    for start in range(0, size, step):
        units = slice(start, start + step)
        rows = _gradients(left, units)
        columns = rows if right is left else _gradients(right, units)
        _add_product(_matrix(block), rows, columns, same=right is left)
    if left.bias:
        rows, columns = (side.grads.sum(2).flatten(0, 1).flatten(1) for side in (left, right))
        _add_product(_matrix(block), rows, columns, same=False)


def _compact(left: Outer, right: Outer) -> tuple[Factor, Factor]:
    """Form the gradients of those rows of a table that occur on either side."""
    tokens, place = torch.unique(torch.cat([left.inputs.flatten(), right.inputs.flatten()]), return_inverse=True)
    shape = torch.Size((len(tokens), left.grads.shape[-1]))
    places = place.split([left.inputs.numel(), right.inputs.numel()])
    one, two = (
        dense(Outer(part.view_as(side.inputs), side.grads, flipped=True), shape)
        for part, side in zip(places, (left, right), strict=True)
    )
    return one, two


def _gradients(side: Outer, units: slice) -> Tensor:
    """Form (C·N, D·O·I) gradients for a slice of the output units of each group."""
    rows, columns = side.grads[..., units].permute(0, 1, 3, 4, 2), side.inputs.transpose(1, 2)
    outputs, count, groups, size, _ = rows.shape
    formed = rows.new_empty(outputs, count, groups, size, columns.shape[-1])
    for each, out in zip(rows, formed, strict=True):  # one output at a time, lest the inputs be copied for each
        torch.matmul(each, columns, out=out)
    return formed.view(outputs * count, -1)
