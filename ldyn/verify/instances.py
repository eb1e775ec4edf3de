"""Numeric instances of symbolic expressions: a size for every dimension, a value for every symbol and component.

Sums are carried out term by term in 30-digit arithmetic, by a route that shares nothing with the algebra of
`ldyn.verify.index`; this is what lets numbers cross-examine a proof.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mpmath
import sympy as sp

_DIGITS = 30
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sp.exp: mpmath.exp,
    sp.log: mpmath.log,
    sp.Abs: abs,
    sp.Max: max,
    sp.Min: min,
    sp.tanh: mpmath.tanh,
    sp.sin: mpmath.sin,
    sp.cos: mpmath.cos,
}


def evaluate(expressions: list[sp.Expr], seed: int) -> list[complex] | None:
    """Evaluate expressions at one random instance that they share.

    Args:
        expressions: Scalar expressions, with or without sums and components.
        seed: Chooses the instance; dimensions have size 2, 3 or 4 in turn.

    Returns:
        One value for each expression, or None if one is not defined there.
    """
    rng = random.Random(seed)
    values = _values(sp.Tuple(*expressions), rng, size=2 + seed % 3)
    with mpmath.workdps(_DIGITS):
        try:
            numbers = [complex(_number(expr, values, rng)) for expr in expressions]
        except (TypeError, ValueError, ZeroDivisionError, OverflowError):
            return None
    return numbers if all(n == n and abs(n) < float("inf") for n in numbers) else None


def _values(expr: sp.Basic, rng: random.Random, size: int) -> dict[Any, Any]:
    """Choose values for the free symbols: dimensions (upper limits of sums), indices within them, and the others."""
    sizes = {limit[2] for node in expr.atoms(sp.Sum) for limit in node.limits}
    used = {i for node in expr.atoms(sp.Indexed) for i in node.indices}
    used |= {i for node in expr.atoms(sp.KroneckerDelta) for i in node.args}
    values: dict[Any, Any] = {}
    for symbol in sorted((s for s in expr.free_symbols if isinstance(s, sp.Symbol)), key=sp.srepr):
        if symbol in sizes:
            values[symbol] = size + sum(1 for s in values if s in sizes)
        else:
            values[symbol] = rng.randint(1, size) if symbol in used else _draw(symbol, rng)
    return values


def _draw(symbol: sp.Expr, rng: random.Random) -> Any:
    """Draw a value that respects the assumptions on a symbol or component."""
    positive, negative = symbol.is_nonnegative, symbol.is_nonpositive
    if symbol.is_integer:
        return rng.randint(1, 5) if positive else -rng.randint(1, 5) if negative else rng.randint(-4, 4)
    value = mpmath.mpf(rng.randint(1, 400)) / 211
    return -value if negative or (not positive and rng.random() < 0.5) else value


def _number(expr: Any, values: dict[Any, Any], rng: random.Random) -> Any:
    """Evaluate one expression, term by term."""

    def inner(arg: Any) -> Any:
        return _number(arg, values, rng)

    if isinstance(expr, sp.Symbol):
        return values[expr]
    if isinstance(expr, sp.Integer):
        return int(expr)
    if not expr.args or expr.is_number:
        return mpmath.mpmathify(expr.evalf(_DIGITS))
    if isinstance(expr, sp.Indexed):
        return _component(expr, tuple(inner(index) for index in expr.indices), values, rng)
    if isinstance(expr, sp.Sum):
        return _sum(expr.function, list(expr.limits), values, rng)
    if isinstance(expr, sp.KroneckerDelta):
        first, second = map(inner, expr.args)
        return int(first == second)
    if expr.is_Add:
        return mpmath.fsum(map(inner, expr.args))
    if expr.is_Mul:
        return mpmath.fprod(map(inner, expr.args))
    if expr.is_Pow:
        return mpmath.power(*map(inner, expr.args))
    if expr.func in _FUNCTIONS:
        return _FUNCTIONS[expr.func](*map(inner, expr.args))
    if expr.has(sp.Indexed, sp.Sum, sp.KroneckerDelta):
        return mpmath.mpmathify(expr.func(*(sp.sympify(inner(arg)) for arg in expr.args)).evalf(_DIGITS))
    atoms = {a: sp.sympify(values[a]) for a in expr.free_symbols if a in values}
    return mpmath.mpmathify(expr.xreplace(atoms).doit().evalf(_DIGITS))


def _component(node: sp.Indexed, place: tuple[int, ...], values: dict[Any, Any], rng: random.Random) -> Any:
    key = (str(node.base), *place)
    if key not in values:
        values[key] = _draw(node, rng)
    return values[key]


def _sum(summand: sp.Expr, limits: list[sp.Tuple], values: dict[Any, Any], rng: random.Random) -> Any:
    """Add the summand over its limits, the last limit being the outermost."""
    if not limits:
        return _number(summand, values, rng)
    bound, lower, upper = limits[-1]
    first, last = (int(_number(limit, values, rng)) for limit in (lower, upper))
    hidden = values.get(bound)
    terms = []
    for n in range(first, last + 1):
        values[bound] = n
        terms.append(_sum(summand, limits[:-1], values, rng))
    if hidden is not None:
        values[bound] = hidden
    return mpmath.fsum(terms)
