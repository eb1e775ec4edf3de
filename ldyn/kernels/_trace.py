"""One forward pass, watched: every use of a parameter by an operation whose derivative has a known structure.

`Recorder` sees each call of a PyTorch function while a model runs. Where a rule of `_rules` knows the function, the
call is made with a *shadow* of the parameter (another leaf with the same numbers), and what the derivative needs is
kept. So the graph splits cleanly: what reaches a shadow is structured, and whatever still reaches the parameter
itself, through any operation at all, is found by walking the graph (`uncovered`) and goes the general route. Nothing is
attached to the model.

A rule needs to know which rows of an intermediate tensor belong to which example. `find_layout` does not guess it from
one run: it compares the run with another one over a different number of examples, shape against shape and value
against value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ldyn.kernels._frozen import same_up_to_rounding
from ldyn.kernels._gram import Factor

Terms = Callable[[Tensor, "Layout"], dict[str, Factor]]
"""Output gradients (C, *output.shape) and the layout of the output to contributions of parameters, by name."""


@dataclass(frozen=True)
class Layout:
    """Where the examples are among the leading dimensions of a tensor.

    Attributes:
        dim: the dimension that runs over the examples, or None if all belongs to a single one.
        repeats: how many entries of that dimension an example has.
        outer: whether the example is the slower of the two indices folded into that dimension.
    """

    dim: int | None
    repeats: int = 1
    outer: bool = True

    def split(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """Move the examples to dimension `offset`; the other dimensions keep their order behind it."""
        if self.dim is None:
            return tensor.unsqueeze(offset)
        place = self.dim + offset
        if self.repeats == 1:
            return tensor.movedim(place, offset)
        folded = (-1, self.repeats) if self.outer else (self.repeats, -1)
        unfolded = tensor.reshape(*tensor.shape[:place], *folded, *tensor.shape[place + 1 :])
        return unfolded.movedim(place if self.outer else place + 1, offset)


@dataclass(frozen=True, eq=False)
class Use:
    """One use of one or two parameters by one call.

    Attributes:
        kind: what must agree between two runs for their uses to correspond.
        names: the parameters.
        output: what the call returned, detached.
        leading: how many dimensions of the output may run over examples.
        edge: the output's place in the graph, as it was when the call returned.
        terms: the rule's formula.
    """

    kind: str
    names: tuple[str, ...]
    output: Tensor
    leading: int
    edge: GradientEdge
    terms: Terms


Rule = Callable[["Recorder", Any, tuple[Any, ...], dict[str, Any]], Any]
"""Makes a call on shadows and records it; returns NotImplemented where it does not apply."""


class Recorder(TorchFunctionMode):
    """Record the uses of some parameters while a model runs.

    Attributes:
        uses: what has been recorded, in order.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rules: Mapping[Any, Rule]) -> None:
        """Prepare a recording.

        Args:
            parameters: The leaves to watch, by name.
            rules: What to do for each function.
        """
        super().__init__()
        self.uses: list[Use] = []
        self._rules = rules
        self._names = {id(value): name for name, value in parameters.items()}
        self._shadows = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        self._stands_for = {id(value): name for name, value in self._shadows.items()}
        self._turned: dict[int, tuple[str, Tensor]] = {}
        self._inside: set[Any] = set()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let a rule make the call, or make it unchanged."""
        keywords = kwargs or {}
        rule = self._rules.get(func)
        if rule is not None and torch.is_grad_enabled():
            result = rule(self, func, args, keywords)
            if result is not NotImplemented:
                return result
        return func(*args, **keywords)

    def name(self, value: object) -> str | None:
        """Say which watched parameter a value is."""
        return self._names.get(id(value))

    def turned(self, value: object) -> str | None:
        """Say which watched matrix a value is the transpose of."""
        found = self._turned.get(id(value))
        return found[0] if found else None

    def turn(self, name: str, value: Tensor) -> None:
        """Remember that a value is the transpose of a watched matrix."""
        self._turned[id(value)] = name, value  # the tensor is kept, so that its id is not given to another

    def shadow(self, name: str) -> Tensor:
        """Return the stand-in of a parameter."""
        return self._shadows[name]

    def shadowed(self, value: object) -> str | None:
        """Say which parameter a value stands in for."""
        return self._stands_for.get(id(value))

    def through(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a composite PyTorch function with its inner calls watched."""
        with self:
            return func(*args, **kwargs)

    def record(self, kind: str, names: Sequence[str | None], output: Tensor, leading: int, terms: Terms) -> Tensor:
        """Keep a use.

        Args:
            kind: What must agree between two runs.
            names: The watched parameters; None is left out.
            output: What the call returned.
            leading: How many dimensions of the output may run over examples.
            terms: The formula of the contributions.

        Returns:
            The output.
        """
        if not output.requires_grad:
            return output
        used = tuple(name for name in names if name is not None)
        if output._is_view():  # writing to a view in place would give it a new past, without the node kept here
            output = torch.ops.aten._unsafe_view.default(output, output.shape)
        self.uses.append(Use(kind, used, output.detach(), leading, get_gradient_edge(output), terms))
        return output


def find_layout(use: Use, alone: Use) -> Layout | None:
    """Find the examples in a recorded output by comparison with a run of the first example alone.

    Args:
        use: A use in a run over N > 1 examples.
        alone: The same use in a run over the first of them.

    Returns:
        The only layout under which the values agree, or None if there is none or more than one.
    """
    shape, single = use.output.shape, alone.output.shape
    if len(shape) != len(single) or shape[use.leading :] != single[use.leading :]:
        return None
    places = [place for place in range(use.leading) if shape[place] != single[place]]
    if len(places) != 1 or single[places[0]] == 0:
        return None
    dim, repeats = places[0], single[places[0]]
    candidates = [Layout(dim, repeats)] if repeats == 1 else [Layout(dim, repeats), Layout(dim, repeats, outer=False)]
    fitting = [
        each
        for each in candidates
        if shape[dim] % repeats == 0 and same_up_to_rounding(each.split(use.output)[:1], each.split(alone.output))
    ]
    return fitting[0] if len(fitting) == 1 else None


def corresponding(uses: Sequence[Use], others: Sequence[Use]) -> bool:
    """Say whether two runs made the same calls on the same parameters."""
    return [(use.kind, use.names) for use in uses] == [(use.kind, use.names) for use in others]


_PLAIN = frozenset(
    name + "Backward"
    for name in (
        *("Add", "Addmm", "Clone", "Mean", "Mm", "Mul", "Relu", "Reshape", "Sub", "Sum", "T", "Tanh", "Transpose"),
        *("UnsafeView", "View"),
    )
) | {"torch::autograd::AccumulateGrad"}
"""Backward formulas that are products and copies: a batch of them is a larger one, and cannot go wrong in a new way."""


def is_plain(output: Tensor) -> bool:
    """Say whether the graph of a tensor holds nothing but products, copies and simple functions of each entry."""
    return all(node.name().rstrip("0123456789") in _PLAIN for node in _consumers(output))


def uncovered(output: Tensor, recorder: Recorder) -> set[str]:
    """Name the watched parameters on which a tensor depends in a way that no recorded use accounts for.

    Args:
        output: The result of the recorded run.
        recorder: The recording.

    Returns:
        Names of parameters that the graph reaches themselves, or whose shadow it reaches past their uses.
    """
    consumers = _consumers(output)
    covering: dict[str, set[Node]] = {}
    for use in recorder.uses:
        for name in use.names:
            covering.setdefault(name, set()).add(use.edge.node)
    found: set[str] = set()
    for node in consumers:
        leaf = getattr(node, "variable", None)
        itself, shadowed = recorder.name(leaf), recorder.shadowed(leaf)
        if itself is not None:
            found.add(itself)
        elif shadowed is not None and _escapes(node, covering.get(shadowed, set()), consumers):
            found.add(shadowed)
    return found


def _consumers(output: Tensor) -> dict[Node, list[Node]]:
    """Walk the graph of a tensor; map each node to those that read from it."""
    consumers: dict[Node, list[Node]] = {}
    waiting: list[Node] = []
    if output.grad_fn is not None:
        consumers[output.grad_fn] = []
        waiting.append(output.grad_fn)
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is not None:
                if following not in consumers:
                    consumers[following] = []
                    waiting.append(following)
                consumers[following].append(node)
    return consumers


def _escapes(leaf: Node, covering: set[Node], consumers: dict[Node, list[Node]]) -> bool:
    """Say whether the output can be reached from a leaf without passing one of the nodes that cover it."""
    waiting, seen = [leaf], {leaf}
    while waiting:
        node = waiting.pop()
        if node in covering:
            continue
        if not consumers[node]:
            return True
        fresh = [each for each in consumers[node] if each not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return False
