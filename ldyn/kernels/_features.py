"""What is kept of a chunk of examples, and the kernel's block of two such chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldyn._linearize import require_attached
from ldyn.kernels._frozen import Batch, Frozen, Reduction, jacobian, length, pattern, pull, same_up_to_rounding, take
from ldyn.kernels._gram import WORKSPACE, Direct, Factor, Outer, add_gram, form, merged, traced
from ldyn.kernels._rules import RULES
from ldyn.kernels._trace import Layout, Recorder, Use, corresponding, find_layout, is_plain, uncovered

Run = tuple[Tensor, Recorder]
"""Outputs (N, C) and what was recorded on the way."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What the chunks of one kernel have in common.

    Attributes:
        frozen: the model.
        reduction: linear map of its outputs (N, V) to those (N, C) whose kernel is wanted.
        method: "auto", "structured" or "jacobian".
        traced: whether the blocks (C, C) are wanted, or their trace.
    """

    frozen: Frozen
    reduction: Reduction
    method: str
    traced: bool

    @property
    def watched(self) -> dict[str, Tensor]:
        """The parameters that count, by name."""
        return {name: self.frozen.parameters[name] for name in self.frozen.selected}

    def run(self, batch: Batch) -> Run:
        """Run the model once and record the uses of parameters."""
        with Recorder(self.watched, RULES) as recorder:
            outputs = self.reduction(require_attached(self.frozen.outputs(batch)))
        return outputs, recorder

    def kept(self, outputs: Tensor, recorder: Recorder) -> int:
        """Count the numbers that are kept for the examples of a run."""
        if self.method == "jacobian":
            return outputs.numel() * sum(value.numel() for value in self.watched.values())
        return outputs.shape[1] * sum(use.output.numel() for use in recorder.uses)


class Features:
    """The gradients of a chunk of examples, in factorised form where there is one.

    Attributes:
        general: names of the parameters whose gradients are formed by plain differentiation.
        factors: contributions of the other parameters by name; none where the outputs do not depend on it, or
            where it is the bias that a weight's factor includes.
    """

    def __init__(self, settings: Settings, batch: Batch, alone: Run | None = None) -> None:
        """Run the model, and sweep back once.

        Args:
            settings: What is wanted.
            batch: N examples.
            alone: A run of the first of them alone, if there has been one.

        Raises:
            ValueError: If the examples of the batch are coupled.
        """
        self._settings, self._batch = settings, batch
        self._formed: dict[tuple[str, ...], Factor] = {}
        self.factors: dict[str, Factor] = {}
        outputs, recorder = settings.run(batch)
        uses = recorder.uses
        if length(batch) == 1:
            layouts: list[Layout | None] = [Layout(None)] * len(uses)
        else:
            layouts = _layouts(outputs, uses, *(alone or settings.run(take(batch, [0]))))
        self._width = 1 if settings.traced else outputs.shape[1]
        self.general = _general(settings, uncovered(outputs, recorder), uses, layouts)
        if len(self.general) < len(settings.watched):
            self._sweep(outputs, uses, layouts)

    def gram(self, other: Features) -> Tensor:
        """Compute the kernel's block.

        Args:
            other: Another chunk, of N2 examples.

        Returns:
            (C, N, C, N2) with index [a, i, b, j]; exactly symmetric for a chunk with itself.
        """
        first = self._settings.frozen.first
        block = first.new_zeros(self._width, length(self._batch), self._width, length(other._batch))
        general = self.general | other.general
        forms = {name: form(factor) for name, factor in self.factors.items()}
        if forms != {name: form(factor) for name, factor in other.factors.items()}:
            general = frozenset(self._settings.watched)
        for name, factor in self.factors.items():
            if name not in general:
                add_gram(block, factor, other.factors[name])
        names = tuple(name for name in self._settings.watched if name in general)
        if names:
            add_gram(block, self._plain(names), other._plain(names))
        if other is self:  # symmetric to the last bit, not up to rounding
            square = block.view(block.shape[0] * block.shape[1], -1).triu_()
            square += square.triu(1).T
        return block

    def _plain(self, names: tuple[str, ...]) -> Factor:
        """Differentiate by some parameters without any knowledge of the model."""
        if names not in self._formed:
            plain = Direct(jacobian(self._settings.frozen, self._batch, names, self._settings.reduction))
            self._formed[names] = traced(plain) if self._settings.traced else plain
        return self._formed[names]

    def _sweep(self, outputs: Tensor, uses: Sequence[Use], layouts: Sequence[Layout | None]) -> None:
        """Pull the outputs back to every use of a structured parameter and collect the contributions."""
        wanted = [
            (use, layout)
            for use, layout in zip(uses, layouts, strict=True)
            if layout is not None and not self.general.issuperset(use.names)
        ]
        if not wanted:
            return
        numbers = sum(use.output.numel() for use, _ in wanted)
        edges, at_once = [use.edge for use, _ in wanted], max(1, 8 * WORKSPACE // max(1, numbers))
        grads = pull(outputs, edges, at_once=at_once, confirmed=False)
        if not is_plain(outputs) and _misplaced(outputs, wanted, grads):
            grads = pull(outputs, edges, at_once=1)
            self.general |= _misplaced(outputs, wanted, grads)
        found: dict[str, list[Factor]] = {}
        for (use, layout), grad in zip(wanted, grads, strict=True):
            if grad is not None:
                for name, factor in use.terms(grad, layout).items():
                    found.setdefault(name, []).append(factor)
        watched, partners = self._settings.watched, _partners(uses)
        joined = {name: merged(parts, watched[name].shape) for name, parts in found.items() if name not in self.general}
        for weight, bias in partners.items():
            outer = joined.get(weight)
            if isinstance(outer, Outer) and joined.pop(bias, None) is not None:
                joined[weight] = replace(outer, bias=True)
        self.factors = {
            name: traced(joined[name]) if self._settings.traced else joined[name] for name in watched if name in joined
        }


def _misplaced(
    outputs: Tensor, uses: Sequence[tuple[Use, Layout | None]], grads: Sequence[Tensor | None]
) -> frozenset[str]:
    """Name the parameters of uses whose gradients do not belong to the examples that the layout says."""
    # A model may reorder its examples on the way, by length say, and leave the first one where it was; and a batched
    # sweep may be wrong. So each example gets a weight of its own, and a plain sweep from the last output must give the
    # gradients multiplied by the weight of the example that they are laid out for.
    weights = torch.zeros_like(outputs)
    weights[:, -1] = pattern(len(outputs), outputs)
    edges = [use.edge for use, _ in uses]
    weighted = torch.autograd.grad(outputs, edges, weights, retain_graph=True, allow_unused=True)
    found: set[str] = set()
    for (use, layout), grad, other in zip(uses, grads, weighted, strict=True):
        if layout is not None and grad is not None and other is not None:
            expected = layout.split(grad[-1])
            expected = expected * weights[:, -1].reshape(-1, *[1] * (expected.ndim - 1))
            if not same_up_to_rounding(layout.split(other), expected):
                found.update(use.names)
    return frozenset(found)


def _partners(uses: Sequence[Use]) -> dict[str, str]:
    """Map each weight to the bias that is used wherever the weight is, and nowhere else."""
    seen: dict[str, set[tuple[str, ...]]] = {}
    for use in uses:
        for name in use.names:
            seen.setdefault(name, set()).add((use.kind, *use.names))
    pairs = [names for use in uses if len(names := use.names) == 2 and use.kind in ("affine", "convolution")]
    return {weight: bias for weight, bias in pairs if len(seen[weight] | seen[bias]) == 1}


def _layouts(outputs: Tensor, uses: Sequence[Use], alone: Tensor, recorder: Recorder) -> list[Layout | None]:
    """Find the examples in what the uses returned, by comparison with a run of the first example alone."""
    if not same_up_to_rounding(outputs[:1], alone):
        raise ValueError(
            "model: expected outputs of an example that do not depend on the other examples, got others for the "
            "first example alone than among all"
        )
    if not corresponding(uses, recorder.uses):
        return [None] * len(uses)
    return [find_layout(use, other) for use, other in zip(uses, recorder.uses, strict=True)]


def _general(
    settings: Settings, names: set[str], uses: Sequence[Use], layouts: Sequence[Layout | None]
) -> frozenset[str]:
    """Name the parameters that no rule covers in full."""
    sizes = {name: value.numel() for name, value in settings.watched.items()}
    if settings.method == "jacobian":
        return frozenset(sizes)
    names = names | {name for use, layout in zip(uses, layouts, strict=True) if layout is None for name in use.names}
    # a weight and its bias are treated alike, since their contributions are multiplied together
    for one, other in _partners(uses).items():
        names |= {one, other} if {one, other} & names else set()
    half = 2 * sum(sizes[name] for name in names) > sum(sizes.values())
    return frozenset(sizes if settings.method == "auto" and half else names)
