"""Deciding a symbolic statement: true, false or unknown, and never one for another.

True comes only from algebra. False comes only from numbers: an instance at which the two sides differ. Everything
else is unknown. A true verdict is cross-examined at random instances as well, so that a defect in the algebra
cannot pass silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp

from .errors import Invalid, Verdict
from .index import Where, contract, is_indexed, name_sums, unfold
from .instances import evaluate

WITNESS_MARGIN = 1e-9
_INSTANCES = 6
_SIGN_INSTANCES = 60


@dataclass(frozen=True)
class Decision:
    """The verdict on an identity, and the largest relative difference seen at numeric instances."""

    verdict: Verdict
    witness: float


def decide_equal(first: Any, second: Any, where: Where | None = None) -> Decision:
    """Decide whether two expressions, or two matrices entry by entry, are identically equal.

    Args:
        first: An expression or a matrix.
        second: Another of the same shape.
        where: Definitions, as for `unfold`.

    Returns:
        The verdict with its numeric witness.

    Raises:
        Invalid: If the shapes differ, a side is not finite, or algebra and numbers contradict each other.
    """
    pairs = list(zip(_entries(first), _entries(second), strict=False))
    if _shape(first) != _shape(second):
        raise Invalid(f"expected two sides of one shape, got {_shape(first)} and {_shape(second)}")
    decisions = [_decide_scalar(unfold(a, where), unfold(b, where)) for a, b in pairs]
    witness = max(d.witness for d in decisions)
    verdicts = {d.verdict for d in decisions}
    for verdict in (Verdict.FALSE, Verdict.UNKNOWN):
        if verdict in verdicts:
            return Decision(verdict, witness)
    return Decision(Verdict.TRUE, witness)


def decide_nonnegative(expr: Any, where: Where | None = None) -> Verdict:
    """Decide whether an expression is nonnegative for all values that its assumptions allow.

    Args:
        expr: A scalar expression, best given as a sum of squares and products of nonnegative factors.
        where: Definitions, as for `unfold`; tried first without them, so that an assumption on a name is used.

    Returns:
        The verdict; `Verdict.TRUE` only if SymPy derives it from the assumptions.
    """
    shown = sp.sympify(expr)
    opened = unfold(shown, where)
    candidates = [shown, opened, sp.factor(opened)] if not is_indexed(opened) else [shown, opened]
    instances = (evaluate([opened], seed) for seed in range(_SIGN_INSTANCES))
    if any(found is not None and found[0].real < -WITNESS_MARGIN for found in instances):
        return Verdict.FALSE  # numbers first: an assumption on a name may contradict its definition
    return Verdict.TRUE if any(_assumed_nonnegative(c) for c in candidates) else Verdict.UNKNOWN


def _assumed_nonnegative(expr: sp.Expr) -> bool:
    if isinstance(expr, sp.Sum):
        return _assumed_nonnegative(expr.function)
    if isinstance(expr, sp.Add) and not expr.is_nonnegative:
        return all(_assumed_nonnegative(arg) for arg in expr.args)
    if isinstance(expr, sp.Mul) and not expr.is_nonnegative:
        return all(_assumed_nonnegative(arg) for arg in expr.args)
    if isinstance(expr, sp.Pow) and expr.base.is_real and expr.exp.is_even:
        return True
    return bool(expr.is_nonnegative)


def _decide_scalar(first: sp.Expr, second: sp.Expr) -> Decision:
    for side in (first, second):
        if side.has(sp.nan, sp.zoo, sp.oo, -sp.oo):
            raise Invalid(f"expected finite expressions, got {side}")
    proved = _is_zero(first - second)
    instances = (evaluate([first - second, first, second], seed) for seed in range(_INSTANCES))
    witness = max((_relative(*found) for found in instances if found is not None), default=0.0)
    if proved and witness > 1e-12:
        raise Invalid(f"algebra says equal, numbers say different by {witness:.1e}: {first} and {second}")
    if proved:
        return Decision(Verdict.TRUE, witness)
    return Decision(Verdict.FALSE if witness > WITNESS_MARGIN else Verdict.UNKNOWN, witness)


def _relative(difference: complex, first: complex, second: complex) -> float:
    return abs(difference) / max(abs(first), abs(second), 1e-9)


def _is_zero(difference: sp.Expr) -> bool:
    """Try cheap routes to zero first; True is a proof, False is only 'not shown'."""
    normal = difference
    if is_indexed(difference):
        normal = name_sums(contract(difference))
        normal = sp.expand_log(sp.expand(normal), force=False)
        # sums inside logarithms or denominators may have become equal only now
        if is_indexed(normal):
            normal = _atoms_to_symbols(normal)
    for attempt in (lambda e: e, sp.expand, lambda e: sp.numer(sp.together(e)).expand(), sp.simplify):
        normal = attempt(normal)
        if normal == 0:
            return True
    return False


def _atoms_to_symbols(expr: sp.Expr) -> sp.Expr:
    """Name the remaining components and deltas, which SymPy's simplifiers handle slowly."""
    atoms = sorted(expr.atoms(sp.Indexed, sp.KroneckerDelta), key=sp.srepr)
    names = {a: sp.Symbol(f"a{n}", real=True, positive=a.is_positive or None) for n, a in enumerate(atoms)}
    return expr.xreplace(names)


def _shape(side: Any) -> tuple[int, ...]:
    return tuple(side.shape) if isinstance(side, (sp.MatrixBase, sp.NDimArray)) else ()


def _entries(side: Any) -> list[sp.Expr]:
    if isinstance(side, sp.MatrixBase):
        return list(side)
    if isinstance(side, sp.NDimArray):
        return list(sp.flatten(side))
    return [sp.sympify(side)]
