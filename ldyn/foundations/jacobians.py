"""Derivatives of vector functions: Jacobians, the products with them, and what they cost.

A Jacobian is a matrix with one row per output and one column per input, both flattened row by row; `vec` is
that flattening, so that ``vec(A @ X @ B)`` equals ``kronecker(A, B.T) @ vec(X)``. Derived in the chapter
`book/foundations/jacobians.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldyn import _checks

Map = Callable[[Tensor], Tensor]
"""A function of one tensor that returns one tensor; an ``nn.Module`` in evaluation mode is one."""

_OUTPUT = "f(x)"


def vec(matrix: Tensor) -> Tensor:
    """Flattens a matrix row by row.

    Args:
        matrix: (..., m, n).

    Returns:
        (..., m·n), entry ``i·n + j`` being ``matrix[..., i, j]`` (counted from zero).

    Raises:
        ValueError: If the argument is no tensor with at least two dimensions.
    """
    _checks.require_tensor(matrix, "matrix", min_ndim=2)
    return matrix.reshape(*matrix.shape[:-2], matrix.shape[-2] * matrix.shape[-1])


def unvec(vector: Tensor, rows: int, columns: int) -> Tensor:
    """Undoes `vec`.

    Args:
        vector: (..., m·n).
        rows: The number m of rows.
        columns: The number n of columns.

    Returns:
        (..., m, n).

    Raises:
        ValueError: If m or n is no positive integer, or the last dimension does not have m·n entries.
    """
    m, n = _checks.require_integer(rows, "rows"), _checks.require_integer(columns, "columns")
    _checks.require_tensor(vector, "vector", min_ndim=1)
    _checks.require_shape(vector, "vector", ("...", m * n))
    return vector.reshape(*vector.shape[:-1], m, n)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Compute the Kronecker product of two matrices.

    Unlike ``torch.kron`` (in PyTorch 2.13) it accepts transposed views, such as the Bᵀ of
    vec(AXB) = (A ⊗ Bᵀ) vec(X), and treats leading dimensions as batch.

    Args:
        left: (..., p, q).
        right: (..., s, r), of the same dtype and device; batch dimensions are broadcast.

    Returns:
        (..., p·s, q·r), entry ``[i·s + j, k·r + l]`` being ``left[..., i, k] * right[..., j, l]``.

    Raises:
        ValueError: If an argument is no tensor with at least two dimensions, or dtypes or devices differ.
    """
    _checks.require_tensor(left, "left", min_ndim=2)
    _checks.require_tensor(right, "right", min_ndim=2)
    _checks.require_same(right, "right", left, "left")
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    p, s, q, r = product.shape[-4:]
    return product.reshape(*product.shape[:-4], p * s, q * r)


def jacobian(f: Map, x: Tensor, *, mode: Literal["reverse", "forward"] = "reverse") -> Tensor:
    """Compute the Jacobian matrix of a map at a point by automatic differentiation.

    The result can itself be differentiated. Take ``mode="forward"`` where the input is smaller than the
    output; some operations of PyTorch, fused attention among them, have no forward mode.

    Args:
        f: Map from a tensor of x's shape to a tensor of any shape.
        x: The point, any shape, n entries.
        mode: "reverse" does one pass for each output, "forward" one for each input.

    Returns:
        (m, n) for m output entries: row = output, column = input, both in row-major order. Neither
        normalised nor averaged.

    Raises:
        ValueError: If x is no finite non-empty floating-point tensor, f is no map between such tensors or is
            a module whose training mode couples examples or draws random numbers, or the mode is unknown.
    """
    if mode not in {"reverse", "forward"}:
        raise ValueError(f"mode: expected 'reverse' or 'forward', got {_checks.describe(mode)}")
    checked = _checked_map(f, x)
    transform = torch.func.jacrev if mode == "reverse" else torch.func.jacfwd
    derivative: Tensor = transform(lambda point: checked(point).reshape(-1))(x)
    return derivative.reshape(derivative.shape[0], x.numel())


def jvp(f: Map, x: Tensor, v: Tensor) -> Tensor:
    """Multiplies the Jacobian at a point by a direction, without forming the Jacobian.

    Args:
        f: Map from a tensor of x's shape to a tensor of any shape.
        x: The point, any shape.
        v: The direction, of x's shape: how the input moves.

    Returns:
        How the output moves to first order, of the shape of f(x): unflattened J·vec(v).

    Raises:
        ValueError: If x or v is no finite non-empty floating-point tensor, v differs from x in shape, dtype
            or device, or f is no admissible map (see `jacobian`).
    """
    checked = _checked_map(f, x)
    _checks.require_shape(_checks.require_real(v, "v"), "v", tuple(x.shape))
    _checks.require_same(v, "v", x, "x")
    tangent: Tensor = torch.func.jvp(checked, (x,), (v,))[1]
    return tangent


def vjp(f: Map, x: Tensor, u: Tensor) -> Tensor:
    """Multiplies the transposed Jacobian at a point by a vector of output weights.

    Args:
        f: Map from a tensor of x's shape to a tensor of any shape.
        x: The point, any shape.
        u: The weights, of the shape of f(x).

    Returns:
        The gradient of the weighted sum of outputs, of x's shape: unflattened Jᵀ·vec(u).

    Raises:
        ValueError: If x or u is no finite non-empty floating-point tensor, u differs from f(x) in shape,
            dtype or device, or f is no admissible map (see `jacobian`).
    """
    checked = _checked_map(f, x)
    _checks.require_real(u, "u")
    value, pull_back = torch.func.vjp(checked, x)[:2]
    _checks.require_shape(u, "u", tuple(value.shape))
    _checks.require_same(u, "u", value, _OUTPUT)
    weighted: Tensor = pull_back(u)[0]
    return weighted


def finite_difference_jacobian(f: Map, x: Tensor, *, step: float | None = None) -> Tensor:
    """Approximates the Jacobian matrix by central differences, without automatic differentiation.

    For a map with three continuous derivatives the error is of order step² plus, from rounding, machine
    epsilon divided by the step.

    Args:
        f: Map from a tensor of x's shape to a tensor of any shape.
        x: The point, any shape, n entries. 2n values of f are computed.
        step: The distance moved in each coordinate; by default the cube root of machine epsilon, times
            ``max(1, |x_j|)``.

    Returns:
        (m, n), laid out as by `jacobian`, not attached to any graph.

    Raises:
        ValueError: If x is no finite non-empty floating-point tensor, f is no admissible map (see
            `jacobian`), or the step is not positive or too small to move an entry of x.
    """
    checked = _checked_map(f, x)
    point = x.detach().reshape(-1)
    if step is None:
        steps = torch.finfo(x.dtype).eps ** (1 / 3) * point.abs().clamp(min=1)
    else:
        steps = torch.full_like(point, _checks.require_positive(step, "step"))
    if _checks.known_truth(((point + steps > point) & (point - steps < point)).all()) is False:
        raise ValueError(f"step: expected a number large enough to move x in {x.dtype}, got {step!r}")
    columns = []
    with torch.no_grad():
        for shift in torch.diag(steps):
            ahead, behind = point + shift, point - shift
            difference = checked(ahead.reshape(x.shape)) - checked(behind.reshape(x.shape))
            columns.append(difference.reshape(-1) / (ahead - behind).sum())
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Linearisation:
    """The best affine approximation of a map near a point, to be called like the map.

    Attributes:
        point: Where the map was linearised.
        value: The map's value there.
        jacobian: (m, n), its Jacobian matrix there.
    """

    point: Tensor
    value: Tensor
    jacobian: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate value + J·vec(x − point).

        Args:
            x: (..., *shape of the point); batch dimensions lead.

        Returns:
            (..., *shape of the value).

        Raises:
            ValueError: If x is no finite non-empty floating-point tensor, does not end in the shape of the
                point, or differs from it in dtype or device.
        """
        _checks.require_real(x, "x")
        _checks.require_shape(x, "x", ("...", *self.point.shape))
        _checks.require_same(x, "x", self.point, "the point")
        batch = x.shape[: x.ndim - self.point.ndim]
        moved = (x - self.point).reshape(*batch, self.point.numel()) @ self.jacobian.T
        return self.value + moved.reshape(*batch, *self.value.shape)


def linearise(f: Map, x: Tensor, *, mode: Literal["reverse", "forward"] = "reverse") -> Linearisation:
    """Build the best affine approximation of a map near a point.

    Args:
        f: Map from a tensor of x's shape to a tensor of any shape.
        x: The point, any shape.
        mode: How the Jacobian is computed, as for `jacobian`.

    Returns:
        The approximation, which holds its own copy of the point.

    Raises:
        ValueError: As `jacobian` does.
    """
    derivative = jacobian(f, x, mode=mode)
    return Linearisation(point=x.clone(), value=_checked_map(f, x)(x), jacobian=derivative)


def area_factor(matrix: Tensor) -> Tensor:
    """Compute the factor by which a square matrix multiplies every area (n = 2) or volume.

    Args:
        matrix: (..., n, n), for instance a Jacobian.

    Returns:
        (...), the absolute value of the determinant.

    Raises:
        ValueError: If the argument is no finite non-empty floating-point tensor of square matrices. A matrix
            that is not square has no determinant; see the chapter for what replaces it.
    """
    _checks.require_real(matrix, "matrix", min_ndim=2)
    _checks.require_shape(matrix, "matrix", ("...", "n", "n"))
    determinant: Tensor = torch.linalg.det(matrix)
    return determinant.abs()


class ChainCosts(NamedTuple):
    """Multiplications needed by a chain of dense Jacobians; see `chain_costs`."""

    one_pass: int
    forward: int
    reverse: int


def chain_costs(widths: list[int] | tuple[int, ...]) -> ChainCosts:
    """Count the multiplications of forward and reverse mode through a chain of dense Jacobians.

    Layer l has a Jacobian of size widths[l] × widths[l − 1]. Only multiplications by entries of these
    matrices are counted: not their computation, not additions.

    Args:
        widths: n_0, …, n_L: the sizes of the input, of each intermediate value and of the output; L ≥ 1.

    Returns:
        `one_pass`, the cost of one Jacobian–vector or vector–Jacobian product, Σ n_l n_{l−1}; `forward`,
        that of the whole Jacobian by one pass per input, n_0 times it; `reverse`, by one pass per output,
        n_L times it.

    Raises:
        ValueError: If there are fewer than two widths or one is no positive integer.
    """
    if not isinstance(widths, (list, tuple)):
        raise ValueError(f"widths: expected a list or tuple of integers, got {_checks.describe(widths)}")
    sizes = [_checks.require_integer(width, f"widths[{number}]") for number, width in enumerate(widths)]
    if len(sizes) < 2:
        raise ValueError(f"widths: expected at least two widths, got {len(sizes)}")
    one_pass = sum(math.prod(pair) for pair in pairwise(sizes))
    return ChainCosts(one_pass=one_pass, forward=sizes[0] * one_pass, reverse=sizes[-1] * one_pass)


def _checked_map(f: Map, x: Tensor) -> Map:
    """Check the point and the map, and return the map with a check of its output."""
    _checks.require_real(x, "x")
    if not callable(f):
        raise ValueError(f"f: expected a function of one tensor, got {_checks.describe(f)}")
    if isinstance(f, nn.Module):
        _checks.require_eval_mode(f, "f")

    def checked(point: Tensor) -> Tensor:
        return _checks.require_real(f(point), _OUTPUT)

    return checked
