"""Symmetric matrices that are known by what they do to a vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldyn import _checks

CHUNK = 2**22
"""Numbers held at once in a block of columns."""


class Operator(Protocol):
    """Anything square that multiplies a vector with ``@``: a matrix, a `SymmetricOperator`, one of curvlinops."""

    @property
    def shape(self) -> Any:
        """Two equal sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""

    def __matmul__(self, other: Tensor) -> Tensor:
        """Multiplies a vector (P,)."""


@dataclass(frozen=True, eq=False)
class SymmetricOperator:
    """A symmetric matrix (P, P) given by its products with vectors.

    Multiply with ``operator @ v`` for v of shape (P,), or with the c columns of a matrix (P, c). The difference of two
    operators is an operator.

    Attributes:
        size: P.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        rows: What multiplies c vectors, given and returned as the rows of a tensor (c, P).
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    rows: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (P, P)."""
        return (self.size, self.size)

    def __matmul__(self, other: Tensor) -> Tensor:
        """Multiply a vector, or the columns of a matrix.

        Args:
            other: (P,) or (P, c), finite, of the operator's dtype and device.

        Returns:
            The product, in the shape of `other`.

        Raises:
            ValueError: If `other` does not fit.
        """
        vectors = _checks.require_real(other, "other", min_ndim=1)
        if vectors.ndim > 2 or len(vectors) != self.size:
            raise ValueError(f"other: expected shape ({self.size},) or ({self.size}, c), got {_checks.describe(other)}")
        if vectors.dtype != self.dtype or vectors.device != self.device:
            got = f"{vectors.dtype} on {vectors.device}"
            raise ValueError(f"other: expected {self.dtype} on {self.device}, got {got}")
        stacked = vectors.detach().reshape(self.size, -1).T
        return self.rows(stacked).T.reshape(vectors.shape)

    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator:
        """Subtract an operator of the same size, dtype and device.

        Args:
            other: What to subtract.

        Returns:
            The difference, whose products cost one of each.

        Raises:
            ValueError: If the two do not fit.
        """
        mine, its = ((part.size, part.dtype, part.device) for part in (self, other))
        if mine != its:
            raise ValueError(f"other: expected size, dtype and device {mine}, got {its}")
        return SymmetricOperator(*mine, lambda vectors: self.rows(vectors) - other.rows(vectors))

    def dense(self) -> Tensor:
        """Write the matrix out: P products, several at a time.

        Returns:
            (P, P), exactly symmetric.
        """
        block = max(1, min(64, CHUNK // self.size))
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        matrix = torch.cat([self.rows(part) for part in torch.split(identity, block)])
        return (matrix + matrix.T) / 2


def as_operator(value: object, name: str = "operator") -> SymmetricOperator:
    """Accept a symmetric matrix or anything that multiplies a vector.

    Args:
        value: A symmetric tensor (P, P), a `SymmetricOperator`, or an `Operator`, whose symmetry is not checked.
        name: What the caller calls it, for messages.

    Returns:
        The operator.

    Raises:
        ValueError: If it is none of these, not square, empty, not symmetric, or not in single or double precision.
    """
    if isinstance(value, SymmetricOperator):
        return value
    missing = [word for word in ("shape", "dtype", "device", "__matmul__") if not hasattr(value, word)]
    if missing:
        raise ValueError(f"{name}: expected a matrix or an operator with {missing[0]!r}, got {_checks.describe(value)}")
    operator: Any = value
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ValueError(f"{name}: expected a square shape (P, P), got {shape}")
    if operator.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: expected float32 or float64, got {operator.dtype}")
    if isinstance(value, Tensor):
        matrix = require_symmetric(value, name).detach()
        return SymmetricOperator(len(matrix), matrix.dtype, matrix.device, lambda vectors: vectors @ matrix)
    return SymmetricOperator(shape[0], operator.dtype, operator.device, lambda vectors: _one_by_one(operator, vectors))


def require_symmetric(value: Tensor, name: str) -> Tensor:
    """Require a finite symmetric matrix.

    Args:
        value: (P, P).
        name: Its name, for messages.

    Returns:
        The matrix.

    Raises:
        ValueError: If an entry is NaN or infinite, or differs from its mirror image by more than rounding.
    """
    matrix = _checks.require_real(value, name, ndim=2)
    gap, scale = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
    if gap > math.sqrt(torch.finfo(matrix.dtype).eps) * scale:
        raise ValueError(f"{name}: expected a symmetric matrix, got entries that differ by {gap:.3g} from their mirror")
    return matrix


def _one_by_one(operator: Operator, vectors: Tensor) -> Tensor:
    """Multiply row after row, as every operator can."""
    return torch.stack([(operator @ vector.contiguous()).detach() for vector in vectors])
