"""What a Transformer block is put together from: stages in a chain, and stages beside a residual connection.

A stage maps (L, d) to (L, o) and has named parameters. At a point it knows its value and its first derivatives, and it
carries a loss that is known to second order at its output over to its parameters and its input. A chain of stages is a
stage again, and so is a stage with its input added: the chain rule is written down here and nowhere else. Derived in
the chapter *The Transformer block*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ldyn.hessians import _block_forms as forms

__all__ = ["Chain", "Curvature", "Parts", "Residual", "Stage", "both_parts"]


class Curvature(NamedTuple):
    """A loss as a function of one interface of a network, to second order.

    Attributes:
        gradient: (L, d).
        gauss_newton: The Gauss–Newton part of the Hessian: (L, d, d) if tokens do not interact, else (L, d, L, d).
        functional: The functional part, in either form; None where it is zero, as at the outputs.
    """

    gradient: Tensor
    gauss_newton: Tensor
    functional: Tensor | None


@dataclass(frozen=True, eq=False)
class Parts:
    """One part of a loss's Hessian in the parameters and the input of a stage.

    Attributes:
        theta: (n_a, n_b) for parameters a and b, where a does not come after b in the stage.
        mixed: (L · d, n_a), rows for the input and columns for the parameter; only if the input was asked for.
        input: The block of the input, (L, d, d) or (L, d, L, d); None if it was not asked for.
    """

    theta: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    mixed: dict[str, Tensor] = field(default_factory=dict)
    input: Tensor | None = None


Both = tuple[Parts, Parts]
"""The Gauss–Newton part, and the functional one."""


class Stage(Protocol):
    """A map from (L, d) to (L, o) with parameters, at a point."""

    affine: ClassVar[bool] = False
    """Whether its parameters enter linearly: its second derivatives by two of them are zero."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of its parameters, in the order in which they act."""
        ...

    @property
    def output(self) -> Tensor:
        """Its value, (L, o)."""
        ...

    @property
    def input_jacobian(self) -> Tensor:
        """Its derivative by the input, (L, o, d) or (L, o, L, d)."""
        ...

    def jacobian(self, name: str) -> Tensor:
        """Differentiate by a parameter, (L · o, n)."""
        ...

    def pull(self, columns: Tensor, wanted: AbstractSet[str]) -> dict[str, Tensor]:
        """Multiply columns (L · o, C) by the transposed Jacobian of each wanted parameter, (n, C)."""
        ...

    def carry(self, loss: Curvature, wanted: AbstractSet[str], with_input: bool) -> Both:
        """Carry a loss at the output over to the wanted parameters and, if asked, to the input."""
        ...

    def carry_along(self, loss: Curvature, wanted: AbstractSet[str], directions: Tensor) -> Both:
        """Carry a loss over with the input moved along columns (L · d, k) only: mixed blocks (k, n), its own (k, k)."""
        first, second = (_along(part, directions) for part in self.carry(loss, wanted, True))
        return first, second


def _along(part: Parts, directions: Tensor) -> Parts:
    """Restrict the input of a part to some directions."""
    mixed = {name: directions.mT @ block for name, block in part.mixed.items()}
    if part.input is None:
        return part
    return Parts(part.theta, mixed, directions.mT @ forms.times(part.input, directions))


def both_parts(expand: Callable[[Tensor, Tensor], Both], loss: Curvature) -> Both:
    """Carry both parts of a curvature over, by a rule for a gradient r and one Hessian S.

    Each part of S is carried over as Jᵀ S J and stays the part that it was; what r adds is functional.

    Args:
        expand: Maps r (L, o) and S to Jᵀ S J and to the sum of r_k ∇²(output k).
        loss: The loss at the stage's output.

    Returns:
        The two parts.
    """
    gauss_newton, bent = expand(loss.gradient, loss.gauss_newton)
    if loss.functional is None:
        return gauss_newton, bent
    carried, _ = expand(torch.zeros_like(loss.gradient), loss.functional)
    theta = {pair: block + bent.theta[pair] for pair, block in carried.theta.items()}
    mixed = {name: block + bent.mixed[name] for name, block in carried.mixed.items()}
    whole = None
    if carried.input is not None and bent.input is not None:
        whole = forms.symmetric(forms.add(carried.input, bent.input))
    return gauss_newton, Parts(theta, mixed, whole)


@dataclass(frozen=True, eq=False)
class Chain(Stage):
    """Stages one after another.

    Attributes:
        stages: The first to act comes first.
    """

    stages: Sequence[Stage]

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of all parameters, in the order in which they act."""
        return {name: shape for stage in self.stages for name, shape in stage.shapes.items()}

    @property
    def output(self) -> Tensor:
        """The value of the last stage, (L, o)."""
        return self.stages[-1].output

    @cached_property
    def input_jacobian(self) -> Tensor:
        """The product of the stages' Jacobians."""
        product = self.stages[0].input_jacobian
        for stage in self.stages[1:]:
            product = forms.compose(stage.input_jacobian, product)
        return product

    def jacobian(self, name: str) -> Tensor:
        """Differentiate by a parameter of one of the stages, (L · o, n)."""
        place = next(index for index, stage in enumerate(self.stages) if name in stage.shapes)
        columns = self.stages[place].jacobian(name)
        for stage in self.stages[place + 1 :]:
            columns = forms.times(stage.input_jacobian, columns)
        return columns

    def pull(self, columns: Tensor, wanted: AbstractSet[str]) -> dict[str, Tensor]:
        """Multiply columns by the transposed Jacobians."""
        *early, last = self.stages
        pulled = last.pull(columns, wanted)
        before = Chain(early)
        names = [name for name in before.shapes if name in wanted]
        if not names:
            return pulled
        # whichever is narrower goes through the last stage: the columns backwards, or the Jacobians forwards
        if sum(before.shapes[name].numel() for name in names) <= columns.shape[1]:
            return pulled | {name: self.jacobian(name).mT @ columns for name in names}
        return pulled | before.pull(forms.times(forms.transposed(last.input_jacobian), columns), wanted)

    def carry(self, loss: Curvature, wanted: AbstractSet[str], with_input: bool) -> Both:
        """Go backwards from stage to stage; what has been passed meets each stage through its Jacobians alone."""
        total = (Parts(), Parts())
        for place, stage in reversed(list(enumerate(self.stages))):
            before = Chain(self.stages[:place])
            early = [name for name in before.shapes if name in wanted]
            if early and not with_input and place == 1 and self.stages[0].affine:
                directions = torch.cat([before.jacobian(name) for name in early], dim=1)
                if directions.shape[1] < directions.shape[0]:
                    sizes = [before.shapes[name].numel() for name in early]
                    own = _renamed(stage.carry_along(loss, wanted, directions), early, sizes)
                    return self._joined(Chain(self.stages[:2]), own, total, wanted, False)
            needed = with_input or bool(early)
            own = stage.carry(loss, wanted, needed)
            total = self._joined(stage, own, total, wanted, needed)
            if not needed:
                break
            loss = _before(stage, loss, own)
        return total

    @staticmethod
    def _joined(stage: Stage, own: Both, later: Both, wanted: AbstractSet[str], needed: bool) -> Both:
        """Join both parts of a stage with those of the stages after it."""
        first, second = (_behind(stage, *parts, wanted, needed) for parts in zip(own, later, strict=True))
        return first, second

    def interfaces(self, loss: Curvature) -> Iterator[Curvature]:
        """Go backwards through the interfaces, from the output of the last stage to the input of the first."""
        yield loss
        for stage in reversed(self.stages):
            loss = _before(stage, loss, stage.carry(loss, frozenset(), True))
            yield loss


def _renamed(both: Both, names: Sequence[str], sizes: Sequence[int]) -> Both:
    """Take what stands for directions of a stage's input as the parameters that move it so."""
    renamed = []
    for part in both:
        theta = dict(part.theta)
        for name, block in part.mixed.items():
            theta |= {(early, name): rows for early, rows in zip(names, torch.split(block, list(sizes)), strict=True)}
        if part.input is not None:
            rows = torch.split(part.input, list(sizes))
            for i, a in enumerate(names):
                theta |= dict(zip([(a, b) for b in names[i:]], torch.split(rows[i], list(sizes), 1)[i:], strict=True))
        renamed.append(Parts(theta))
    return renamed[0], renamed[1]


def _before(stage: Stage, loss: Curvature, own: Both) -> Curvature:
    """Put the loss at a stage's input together."""
    gradient = forms.times(forms.transposed(stage.input_jacobian), loss.gradient.reshape(-1, 1))
    gauss_newton, functional = own[0].input, own[1].input
    if gauss_newton is None:
        raise RuntimeError("a stage was not asked for the block of its input")
    return Curvature(gradient.reshape(loss.gradient.shape[0], -1), gauss_newton, functional)


def _behind(stage: Stage, own: Parts, later: Parts, wanted: AbstractSet[str], with_input: bool) -> Parts:
    """Join a stage's own part and that of the stages after it, whose mixed blocks have rows for its output."""
    if not later.mixed:
        return own
    sizes = [block.shape[1] for block in later.mixed.values()]
    columns = torch.cat(list(later.mixed.values()), dim=1)
    theta = own.theta | later.theta
    for name, rows in stage.pull(columns, wanted).items():
        theta |= {(name, other): block for other, block in zip(later.mixed, torch.split(rows, sizes, 1), strict=True)}
    if not with_input:
        return Parts(theta)
    carried = forms.times(forms.transposed(stage.input_jacobian), columns)
    return Parts(theta, own.mixed | dict(zip(later.mixed, torch.split(carried, sizes, 1), strict=True)), own.input)


@dataclass(frozen=True, eq=False)
class Residual(Stage):
    """A stage whose input is added to its output.

    Attributes:
        branch: The stage beside the connection.
        x: (L, d) its input.
    """

    branch: Stage
    x: Tensor

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of the branch's parameters."""
        return self.branch.shapes

    @cached_property
    def output(self) -> Tensor:
        """The input plus the branch's value, (L, d)."""
        return self.x + self.branch.output

    @cached_property
    def input_jacobian(self) -> Tensor:
        """The identity plus the branch's Jacobian."""
        return forms.identity_added(self.branch.input_jacobian)

    def jacobian(self, name: str) -> Tensor:
        """Differentiate by a parameter, which only the branch has, (L · d, n)."""
        return self.branch.jacobian(name)

    def pull(self, columns: Tensor, wanted: AbstractSet[str]) -> dict[str, Tensor]:
        """Multiply columns by the transposed Jacobians of the branch."""
        return self.branch.pull(columns, wanted)

    def carry(self, loss: Curvature, wanted: AbstractSet[str], with_input: bool) -> Both:
        """Add to the branch's own Hessian what the connection adds: with J + I for J, S J + Jᵀ S + S for the input."""
        own = self.branch.carry(loss, wanted, with_input)
        if not with_input:
            return own
        jacobians = {name: self.branch.jacobian(name) for name in self.branch.shapes if name in wanted}
        hessians = (loss.gauss_newton, loss.functional)
        joined = [self._joined(parts, S, jacobians) for parts, S in zip(own, hessians, strict=True)]
        return joined[0], joined[1]

    def _joined(self, own: Parts, S: Tensor | None, jacobians: Mapping[str, Tensor]) -> Parts:
        """Add the connection's contributions to one part."""
        if S is None or own.input is None:
            return own
        mixed = {name: block + forms.times(S, jacobians[name]) for name, block in own.mixed.items()}
        through = forms.compose(S, self.branch.input_jacobian)
        crossed = forms.add(through, forms.transposed(through))
        return Parts(own.theta, mixed, forms.symmetric(forms.add(forms.add(S, crossed), own.input)))
