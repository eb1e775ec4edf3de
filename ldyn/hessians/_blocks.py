"""A Hessian as a table of blocks, addressed by the names of the variables, its two parts kept apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldyn import _checks

__all__ = ["Blocks", "LossHessian", "Part", "require_names"]

Part = Literal["total", "gauss_newton", "functional"]
"""Which part of the Hessian: the sum, J^T S J, or the rest, which comes from the bending of the model itself."""


def require_names(value: object, name: str, known: Sequence[str]) -> tuple[str, ...]:
    """Require names of variables, each once.

    Args:
        value: The argument.
        name: Its name, for the message.
        known: The names there are.

    Returns:
        The names, in the order given.

    Raises:
        ValueError: If it is no sequence of names, is empty, or has a name that is unknown or stands twice.
    """
    chosen = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
        got = list(chosen) or _checks.describe(value)
        raise ValueError(f"{name}: expected distinct names among {', '.join(known)}, got {got}")
    return chosen


class Blocks(Mapping[tuple[str, str], Tensor]):
    """The blocks of a symmetric matrix; each is stored once, and its mirror image is a view of it.

    ``blocks["W_Q", "W_K"]`` has a row for each entry of W_Q and a column for each entry of W_K, both row by row
    (``reshape(-1)``); ``blocks["W_K", "W_Q"]`` is its transpose and shares its memory.
    """

    def __init__(self, names: Sequence[str], stored: Mapping[tuple[str, str], Tensor]) -> None:
        """Keep the blocks (a, b) in which a does not come after b.

        Args:
            names: The variables, in order.
            stored: A matrix (n_a, n_b) for each such pair.

        Raises:
            ValueError: If a pair is missing, or one too many.
        """
        order = tuple(names)
        expected = {(a, b) for i, a in enumerate(order) for b in order[i:]}
        if set(stored) != expected:
            raise ValueError(f"stored: expected one block for each of {len(expected)} pairs, got {len(stored)}")
        self._names = order
        self._stored = dict(stored)

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        """Look a block up, (n_a, n_b)."""
        if pair in self._stored:
            return self._stored[pair]
        if isinstance(pair, tuple) and pair[::-1] in self._stored:
            return self._stored[pair[::-1]].mT
        raise KeyError(f"no block {pair!r}: the variables are {', '.join(self._names)}")

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Go through all pairs, row by row."""
        return ((a, b) for a in self._names for b in self._names)

    def __len__(self) -> int:
        """Count all pairs."""
        return len(self._names) ** 2

    def __repr__(self) -> str:
        """Name the variables."""
        return f"Blocks({', '.join(self._names)})"


@dataclass(frozen=True, eq=False)
class LossHessian:
    """The Hessian of a scalar loss in several variables, as blocks.

    With J the Jacobian of the outputs, S the Hessian and r the gradient of the loss at the outputs, the Gauss–Newton
    part is J^T S J and the functional part the sum of r_k ∇²(output k). ``H["W_Q", "W_K"]`` is their sum.

    Attributes:
        shapes: The shape of each variable, in the order of the rows of `matrix`.
        gauss_newton: Blocks (n_a, n_b) of the Gauss–Newton part.
        functional: Blocks (n_a, n_b) of the functional part.
    """

    shapes: Mapping[str, torch.Size]
    gauss_newton: Blocks
    functional: Blocks

    @property
    def names(self) -> tuple[str, ...]:
        """The variables, in order."""
        return tuple(self.shapes)

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        """Add the two parts of a block, (n_a, n_b)."""
        return self.gauss_newton[pair] + self.functional[pair]

    def matrix(self, names: Sequence[str] | None = None, *, part: Part = "total") -> Tensor:
        """Put blocks together to one symmetric matrix.

        Args:
            names: The variables whose blocks to take, in the order wanted; None for all.
            part: "total", "gauss_newton" or "functional".

        Returns:
            (P, P), where P adds up the sizes of the variables.

        Raises:
            ValueError: If a name or the part is unknown, or a name occurs twice.
        """
        chosen = self.names if names is None else require_names(names, "names", self.names)
        if part not in ("total", "gauss_newton", "functional"):
            raise ValueError(f"part: expected 'total', 'gauss_newton' or 'functional', got {_checks.describe(part)}")
        source: LossHessian | Blocks = self if part == "total" else getattr(self, part)
        return torch.cat([torch.cat([source[a, b] for b in chosen], dim=1) for a in chosen], dim=0)
