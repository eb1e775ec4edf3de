"""Derivations whose every step is decided when it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy as sp

from .errors import Invalid, Refuted, Undecided, Verdict
from .index import Where
from .symbolic import decide_equal, decide_nonnegative


@dataclass(frozen=True)
class Step:
    """One line of a derivation: the relation to the line before, the expression, the reason."""

    relation: str
    expression: Any
    because: str


@dataclass(frozen=True)
class Derivation:
    """A chain of checked steps; immutable, so a chain can be continued in two ways."""

    steps: tuple[Step, ...]
    where: Where | None = None
    stacked: bool = False

    @property
    def first(self) -> Any:
        """The expression that the chain starts from."""
        return self.steps[0].expression

    @property
    def last(self) -> Any:
        """The expression that the chain has reached."""
        return self.steps[-1].expression

    @property
    def relation(self) -> str:
        """What the chain proves between its ends: ``"="`` or ``"<="``."""
        return "<=" if any(step.relation == "<=" for step in self.steps) else "="

    def to(self, expression: Any, *, because: str) -> Derivation:
        """Add an equal expression.

        Args:
            expression: The next expression, equal to the last one.
            because: The reason, shown beside the line.

        Returns:
            The longer chain.

        Raises:
            Refuted: If the two differ at some instance.
            Undecided: If SymPy cannot show that they are equal.
            Invalid: If no reason is given.
        """
        _require_reason(because)
        decision = decide_equal(self.last, expression, self.where)
        if decision.verdict is Verdict.FALSE:
            raise Refuted(f"step {len(self.steps)} ({because}): the sides differ, relatively by {decision.witness:.1e}")
        if decision.verdict is Verdict.UNKNOWN:
            raise Undecided(f"step {len(self.steps)} ({because}): SymPy cannot decide that the sides are equal")
        return replace(self, steps=(*self.steps, Step("=", expression, because)))

    def le(self, expression: Any, *, because: str, gap: Any) -> Derivation:
        """Add an expression that is at least as large as the last one.

        Args:
            expression: The next expression.
            because: The reason, shown beside the line.
            gap: The difference, next minus last, in a form that shows its sign (squares, products of positive
                factors); it is the certificate of the step.

        Returns:
            The longer chain.

        Raises:
            Refuted: If `gap` is not the difference, or is negative somewhere.
            Undecided: If either cannot be settled.
            Invalid: If no reason is given.
        """
        _require_reason(because)
        same = decide_equal(expression - self.last, gap, self.where).verdict
        sign = decide_nonnegative(gap, self.where)
        for verdict, what in ((same, "gap is the difference of the sides"), (sign, "gap is nonnegative")):
            if verdict is Verdict.FALSE:
                raise Refuted(f"step {len(self.steps)} ({because}): false that the {what}")
            if verdict is Verdict.UNKNOWN:
                raise Undecided(f"step {len(self.steps)} ({because}): SymPy cannot decide that the {what}")
        return replace(self, steps=(*self.steps, Step("<=", expression, because)))

    def _repr_latex_(self) -> str:
        return f"$${self.latex()}$$"

    def __repr__(self) -> str:
        """Return the chain as plain text, one line a step."""
        lines = [str(self.first)]
        lines += [f"  {step.relation} {step.expression}    ({step.because})" for step in self.steps[1:]]
        return "\n".join(lines)

    def latex(self) -> str:
        """Return the chain as one aligned display.

        Returns:
            LaTeX without delimiters; the first line holds the start and the first step, or the start alone if the
            chain is stacked.
        """
        start, steps = sp.latex(self.first), self.steps[1:]
        apart = self.stacked or not steps
        lines = [f"& {start}"] if apart else []
        indent = r"\quad " if apart else ""
        for step in steps:
            left = "" if lines else start
            sign = r"\le" if step.relation == "<=" else "="
            reason = rf"{{\footnotesize\text{{{step.because}}}}}"
            lines.append(rf"{left} &{indent}{sign} {sp.latex(step.expression)} && {reason}")
        body = " \\\\[4pt]\n".join(lines)
        return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"


def derive(expression: Any, *, where: Where | None = None, stacked: bool = False) -> Derivation:
    """Start a derivation.

    Args:
        expression: A SymPy expression or matrix; index notation is welcome.
        where: Definitions of the names it uses, shown by name and unfolded when a step is checked.
        stacked: Whether the expression stands on a line of its own, above the others: for a chain that would be
            wider than the page.

    Returns:
        A chain of one line, to be continued by `to` and `le`.
    """
    return Derivation((Step("", _sympified(expression), ""),), where, stacked)


def _sympified(expression: Any) -> Any:
    return expression if isinstance(expression, (sp.MatrixBase, sp.NDimArray)) else sp.sympify(expression)


def _require_reason(because: str) -> None:
    if not because.strip():
        raise Invalid("because: expected the reason of the step, got an empty text")
