"""Index notation for a symbolic dimension: sums, Kronecker contraction, derivatives by components.

A vector of symbolic size V is an `IndexedBase`; a sum over its components is a SymPy `Sum` whose bound variable
is private, so that no substitution can capture it. `contract` brings any expression made of these to a normal
form: sums are linear, constants leave them, a Kronecker delta eats the sum over its index, nested sums have
canonical bound variables. Two expressions that are equal for every V by these rules have the same normal form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import sympy as sp
from sympy.printing.latex import LatexPrinter

from .errors import Invalid

Where = Mapping[Any, Any]
_MAX_PASSES = 12


def dimension(name: str) -> sp.Symbol:
    """Return a symbolic dimension, a positive integer.

    Args:
        name: How it is displayed, for example ``"V"``.

    Returns:
        The symbol.
    """
    return sp.Symbol(name, integer=True, positive=True)


def indices(names: str) -> tuple[sp.Symbol, ...]:
    """Return index symbols, each running from 1 to a dimension.

    Args:
        names: The names, separated by blanks.

    Returns:
        One symbol for each name.
    """
    return tuple(sp.Symbol(name, integer=True, positive=True) for name in names.split())


def vector(name: str, *, positive: bool = False) -> sp.IndexedBase:
    """Return a family of real components, ``z[i]`` of a vector or ``W[i, j]`` of a matrix.

    Args:
        name: How it is displayed.
        positive: Whether every component is positive.

    Returns:
        The indexed base.
    """
    return sp.IndexedBase(name, real=True, positive=True) if positive else sp.IndexedBase(name, real=True)


def total(summand: sp.Expr, *over_indices: sp.Symbol, over: sp.Expr) -> sp.Expr:
    """Return the sum of an expression over indices that run from 1 to `over`.

    Args:
        summand: The expression summed.
        *over_indices: The indices summed over, each an index symbol; they are not free in the result.
        over: The common upper limit.

    Returns:
        A nested SymPy `Sum` with private bound variables.
    """
    result = sp.sympify(summand)
    for index in reversed(over_indices):
        bound = sp.Dummy(index.name, integer=True, positive=True)
        result = sp.Sum(result.xreplace({index: bound}), (bound, 1, over))
    return result


def delta(first: sp.Expr, second: sp.Expr) -> sp.Expr:
    """Return the Kronecker delta of two indices.

    Args:
        first: An index.
        second: Another.

    Returns:
        One where the indices agree, else zero.
    """
    return sp.KroneckerDelta(first, second)


class partial(sp.Expr):
    """A partial derivative that is displayed as one and evaluated only when a step is checked."""

    def __new__(cls, expr: Any, *variables: Any) -> partial:
        """Build the unevaluated derivative of `expr` by `variables`, one order for each that is named."""
        if not variables:
            raise Invalid("partial: expected at least one variable to differentiate by, got none")
        node: partial = sp.Expr.__new__(cls, sp.sympify(expr), *map(sp.sympify, variables))
        return node

    def doit(self, **hints: Any) -> sp.Expr:
        """Carry the differentiation out.

        Args:
            **hints: Accepted for SymPy's protocol; unused.

        Returns:
            The derivative.
        """
        return sp.diff(self.args[0], *self.args[1:])

    def _latex(self, printer: LatexPrinter, **_: Any) -> str:
        expr, variables = self.args[0], self.args[1:]
        order = "" if len(variables) == 1 else f"^{{{len(variables)}}}"
        below = r"\,".join(rf"\partial {printer._print(v)}" for v in variables)
        body = printer._print(expr)
        if isinstance(expr, (sp.Indexed, sp.Symbol)):
            return rf"\frac{{\partial{order} {body}}}{{{below}}}"
        return rf"\frac{{\partial{order}}}{{{below}}}\left({body}\right)"


def unfold(expr: sp.Expr, where: Where | None = None) -> sp.Expr:
    """Replace defined names by their definitions and carry out the displayed derivatives.

    Args:
        expr: A scalar expression.
        where: Definitions. A key is a symbol, mapped to an expression, or an `IndexedBase`, mapped to a function
            of the indices.

    Returns:
        The expression without defined names and without `partial`.

    Raises:
        Invalid: If the definitions are circular.
    """
    result = sp.sympify(expr)
    definitions = dict(where or {})
    for _ in range(_MAX_PASSES):
        before = result
        result = result.replace(
            lambda e: isinstance(e, sp.Indexed) and e.base in definitions,
            lambda e: sp.sympify(definitions[e.base](*e.indices)),
        )
        result = result.xreplace({k: sp.sympify(v) for k, v in definitions.items() if isinstance(k, sp.Symbol)})
        if result == before:
            return _private(result).replace(lambda e: isinstance(e, partial), lambda e: e.doit())
    raise Invalid("where: expected definitions that end, got a circular one")


def _private(expr: sp.Expr) -> sp.Expr:
    """Give every sum bound variables of its own: a named one would capture the index that one differentiates by."""

    def rename(node: sp.Sum) -> sp.Sum:
        return node.xreplace({old: sp.Dummy(old.name, integer=True, positive=True) for old, *_ in node.limits})

    return expr.replace(lambda e: isinstance(e, sp.Sum), rename)


def is_indexed(expr: sp.Expr) -> bool:
    """Tell whether an expression needs the rules of this module.

    Args:
        expr: Any expression.

    Returns:
        True if it holds a sum, a Kronecker delta or a component.
    """
    return bool(expr.has(sp.Sum, sp.KroneckerDelta, sp.Indexed))


def contract(expr: sp.Expr) -> sp.Expr:
    """Bring an expression with sums and Kronecker deltas to its normal form.

    Indices are taken to lie within the range of the sums that meet them.

    Args:
        expr: An expression in index notation.

    Returns:
        An equal expression in normal form.

    Raises:
        Invalid: If no normal form is reached, which would be a defect of the rules.
    """
    result = sp.sympify(expr)
    for _ in range(_MAX_PASSES):
        before = result
        result = _contract_once(sp.expand(result))
        if result == before:
            return result
    raise Invalid(f"contract: expected a normal form within {_MAX_PASSES} passes, got none for {expr}")


def _contract_once(expr: sp.Expr) -> sp.Expr:
    """Apply every rule once, innermost sums first."""
    if not is_indexed(expr) or expr.is_Atom or isinstance(expr, (sp.Indexed, sp.KroneckerDelta)):
        return expr
    if isinstance(expr, sp.Sum):
        return _contract_sum(expr)
    rebuilt = expr.func(*(_contract_once(arg) for arg in expr.args))
    if isinstance(rebuilt, sp.Pow) and isinstance(rebuilt.base, sp.KroneckerDelta) and rebuilt.exp.is_positive:
        return rebuilt.base
    return _apply_deltas(rebuilt) if isinstance(rebuilt, sp.Mul) else rebuilt


def _apply_deltas(product: sp.Expr) -> sp.Expr:
    """Use each delta of a product to write one of its two indices everywhere else: δ_ij f(j) = δ_ij f(i)."""
    factors = list(sp.Mul.make_args(product))
    for position, factor in enumerate(factors):
        if not isinstance(factor, sp.KroneckerDelta):
            continue
        keep, drop = sorted(factor.args, key=lambda index: (not index.is_number, index.sort_key()))
        if drop.is_Symbol and drop not in keep.free_symbols:
            rest = [f.subs(drop, keep) for n, f in enumerate(factors) if n != position and f != factor]
            return sp.Mul(factor, *([_apply_deltas(sp.Mul(*rest))] if rest else []))
    return product


def _contract_sum(node: sp.Sum) -> sp.Expr:
    """Sum term by term: constants leave, a delta eats the sum, the rest stays with a canonical bound variable."""
    inner = node.function
    bounds = {bound for bound, *_ in node.limits}
    for bound, lower, upper in node.limits:
        if lower != 1:
            raise Invalid(f"contract: expected sums that start at 1, got a lower limit of {lower}")
        inside = {symbol for sub in inner.atoms(sp.Sum) for limit in sub.limits for symbol in limit[2].free_symbols}
        if bounds & upper.free_symbols or bound in inside:
            raise Invalid(f"contract: expected an upper limit free of summation indices, got a sum over {bound}")
        summand = sp.expand(_contract_once(sp.expand(inner)))
        inner = sp.Add(*(_sum_term(term, bound, upper) for term in sp.Add.make_args(summand)))
    return inner


def _sum_term(term: sp.Expr, bound: sp.Symbol, upper: sp.Expr) -> sp.Expr:
    """Sum one product over `bound` from 1 to `upper`."""
    factors = [f for factor in sp.Mul.make_args(term) for f in _opened_power(factor)]
    constant = [f for f in factors if bound not in f.free_symbols]
    varying = [f for f in factors if bound in f.free_symbols]
    for position, factor in enumerate(varying):
        if isinstance(factor, sp.KroneckerDelta) and bound in factor.args:
            other = factor.args[1] if factor.args[0] == bound else factor.args[0]
            if bound in other.free_symbols:
                raise Invalid(f"contract: expected deltas of two indices, got {factor} summed over {bound}")
            rest = sp.Mul(*varying[:position], *varying[position + 1 :])
            return sp.Mul(*constant, rest.subs(bound, other))
    if not varying:
        return sp.Mul(upper, *constant)
    return sp.Mul(*constant, _canonical_sum(varying, [(bound, upper)]))


def _opened_power(factor: sp.Expr) -> list[sp.Expr]:
    """Write a small positive power of a sum as a product, so that each copy has its own bound variable."""
    if isinstance(factor, sp.Pow) and isinstance(factor.base, sp.Sum) and factor.exp.is_Integer and factor.exp > 0:
        return [factor.base] * int(factor.exp)
    return [factor]


def _canonical_sum(factors: list[sp.Expr], limits: list[tuple[sp.Symbol, sp.Expr]]) -> sp.Expr:
    """Join sums that are factors of the summand into one sum, and name its bound variables canonically."""
    flat: list[sp.Expr] = []
    for factor in factors:
        if isinstance(factor, sp.Sum):
            fresh = {old: sp.Dummy(integer=True, positive=True) for old, _, _ in factor.limits}
            limits = limits + [(fresh[old], upper) for old, _, upper in factor.limits]
            flat.extend(sp.Mul.make_args(factor.function.xreplace(fresh)))
        else:
            flat.append(factor)
    body, height = sp.Mul(*flat), _height(flat)
    names = [sp.Symbol(f"_s{height}_{n}", integer=True, positive=True) for n in range(len(limits))]
    candidates = []
    for order in permutations(limits):
        renamed = body.xreplace({bound: name for (bound, _), name in zip(order, names, strict=True)})
        candidates.append(sp.Sum(renamed, *((n, 1, upper) for n, (_, upper) in zip(names, order, strict=True))))
    return min(candidates, key=sp.srepr)


def _height(factors: list[sp.Expr]) -> int:
    """Return the nesting depth of sums, which keeps the bound variables of different depths apart."""

    def depth(expr: sp.Expr) -> int:
        below = max((depth(arg) for arg in expr.args), default=0)
        return below + 1 if isinstance(expr, sp.Sum) else below

    return max((depth(f) for f in factors), default=0)


def name_sums(expr: sp.Expr) -> sp.Expr:
    """Replace each sum by a symbol, once the normal form has made equal sums identical.

    Args:
        expr: An expression in normal form.

    Returns:
        The expression with every outermost sum replaced by a real symbol, a positive one if the summand is positive.
    """
    table: dict[sp.Expr, sp.Symbol] = {}

    def name(node: sp.Expr) -> sp.Symbol:
        if node not in table:
            positive = node.function.is_positive
            number = len(table)
            table[node] = sp.Symbol(f"S{number}", positive=True) if positive else sp.Symbol(f"S{number}", real=True)
        return table[node]

    return _replace_outermost(expr, lambda e: isinstance(e, sp.Sum), name)


def _replace_outermost(
    expr: sp.Expr, matches: Callable[[sp.Expr], bool], replace: Callable[[sp.Expr], sp.Expr]
) -> sp.Expr:
    """Replace matching nodes from the top, never looking inside one that matched."""
    if matches(expr):
        return replace(expr)
    if not expr.args:
        return expr
    return expr.func(*(_replace_outermost(arg, matches, replace) for arg in expr.args))
