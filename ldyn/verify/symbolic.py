"""Deciding a symbolic statement: true, false or unknown, and never one for another.

True comes only from algebra. False comes only from numbers: an instance at which the two sides differ. Everything
else is unknown. A true verdict is cross-examined at random instances as well, so that a defect in the algebra
cannot pass silently.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import sympy as sp

from .errors import Invalid, Verdict
from .index import Where, contract, is_indexed, name_sums, unfold

WITNESS_MARGIN = 1e-6
_INSTANCES = 6
_DIGITS = 30


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
    if any(_assumed_nonnegative(c) for c in candidates):
        return Verdict.TRUE
    values = [v for v in _instances(opened, opened) if v is not None]
    if any(value.real < -WITNESS_MARGIN * max(1.0, scale) for value, scale in values):
        return Verdict.FALSE
    return Verdict.UNKNOWN


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
    found = [pair for pair in _instances(first - second, sp.Tuple(first, second)) if pair is not None]
    witness = max((abs(value) / scale for value, scale in found), default=0.0)
    if proved and witness > 1e-12:
        raise Invalid(f"algebra says equal, numbers say different by {witness:.1e}: {first} and {second}")
    if proved:
        return Decision(Verdict.TRUE, witness)
    return Decision(Verdict.FALSE if witness > WITNESS_MARGIN else Verdict.UNKNOWN, witness)


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


def _instances(value: sp.Expr, scale: sp.Basic) -> list[tuple[complex, float] | None]:
    """Evaluate at random points for several sizes of the symbolic dimensions."""
    return [_instance(value, scale, seed) for seed in range(_INSTANCES)]


def _instance(value: sp.Expr, scale: sp.Basic, seed: int) -> tuple[complex, float] | None:
    rng = random.Random(seed)
    table = _instance_table(sp.Tuple(value, scale), rng, size=2 + seed % 3)
    parts = list(scale) if isinstance(scale, sp.Tuple) else [scale]
    number = _evaluate(value, table)
    sizes = [_evaluate(part, table) for part in parts]
    if number is None or any(s is None for s in sizes):
        return None
    return number, max([abs(s) for s in sizes if s is not None] + [1e-9])


def _evaluate(expr: sp.Expr, table: list[dict[sp.Basic, sp.Expr]]) -> complex | None:
    sizes, components = table
    result = expr.xreplace(sizes).doit()
    result = result.replace(lambda e: isinstance(e, sp.Indexed), lambda e: _component(e, components))
    try:
        number = complex(result.xreplace(components).evalf(_DIGITS))
    except (TypeError, ValueError):
        return None
    return number if number == number else None


def _component(node: sp.Indexed, components: dict[sp.Basic, sp.Expr]) -> sp.Expr:
    if node not in components:
        seed = sum(ord(c) * 31**n for n, c in enumerate(sp.srepr(node))) + components[sp.Symbol("seed")]
        components[node] = _draw(node, random.Random(int(seed)))
    return components[node]


def _instance_table(expr: sp.Basic, rng: random.Random, size: int) -> list[dict[sp.Basic, sp.Expr]]:
    """Choose values: dimensions (upper limits of sums) first, then indices within them, then everything else."""
    uppers = {limit[2] for node in expr.atoms(sp.Sum) for limit in node.limits}
    sizes: dict[sp.Basic, sp.Expr] = {
        u: sp.Integer(size + n) for n, u in enumerate(sorted(uppers, key=str)) if u.is_Symbol
    }
    used = {i for node in expr.atoms(sp.Indexed) for i in node.indices} | {
        i for node in expr.atoms(sp.KroneckerDelta) for i in node.args
    }
    others: dict[sp.Basic, sp.Expr] = {sp.Symbol("seed"): sp.Integer(rng.randrange(10**6))}
    for symbol in sorted(expr.free_symbols, key=str):
        if not isinstance(symbol, sp.Symbol) or symbol in sizes:
            continue
        if symbol in used:
            sizes[symbol] = sp.Integer(rng.randint(1, size))
        else:
            others[symbol] = _draw(symbol, rng)
    return [sizes, others]


def _draw(symbol: sp.Expr, rng: random.Random) -> sp.Expr:
    """Draw a rational value that respects the assumptions on a symbol."""
    if symbol.is_integer:
        return (
            sp.Integer(rng.randint(1, 5))
            if symbol.is_positive or symbol.is_nonnegative
            else sp.Integer(rng.randint(-4, 4))
        )
    value = sp.Rational(rng.randint(1, 400), 211)
    if symbol.is_positive or symbol.is_nonnegative:
        return value
    if symbol.is_negative or symbol.is_nonpositive:
        return -value
    return value if rng.random() < 0.5 else -value


def _shape(side: Any) -> tuple[int, ...]:
    return tuple(side.shape) if isinstance(side, (sp.MatrixBase, sp.NDimArray)) else ()


def _entries(side: Any) -> list[sp.Expr]:
    if isinstance(side, sp.MatrixBase):
        return list(side)
    if isinstance(side, sp.NDimArray):
        return list(sp.flatten(side))
    return [sp.sympify(side)]
