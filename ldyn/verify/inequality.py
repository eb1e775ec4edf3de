"""Checking an inequality: random cases first, then a search that tries to break it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .cases import Array, Case, called, flatten, listed, require_two_routes
from .errors import Invalid, Vacuous, Verdict
from .finding import Finding, truncated

REFUSAL_RATIO = 1.001
_CLEAR_RATIO = 1.005
ROUNDING = 1e-9
_STARTS = 3
_EVALUATIONS = 300
_EVALUATIONS_PER_ENTRY = 100


def inequality(
    value: Callable[..., Any],
    bound: Callable[..., Any],
    cases: Iterable[Case],
    *,
    atol: float = 1e-13,
    sharp: float | None = None,
    project: Callable[[Case], Case] | None = None,
    search: bool = True,
    what: str = "",
) -> Finding:
    """Check value ≤ bound on random cases, then look for a violation from the tightest ones.

    The search maximises (value − atol) / bound over every floating-point entry of a case, first along scalings of
    its arrays, then with Nelder–Mead and Powell.

    Args:
        value: The quantity that is bounded; arrays are compared entry by entry.
        bound: The claimed upper bound, nonnegative.
        cases: Arguments for both.
        atol: Rounding level of `value`; bounds within ten times of it are not effective cases.
        sharp: If given, the largest ratio found must reach it, or the finding is unknown.
        project: Maps a moved case back to where the statement applies.
        search: Whether to search at all; only for arguments without floating-point entries.
        what: The statement, in a few words.

    Returns:
        The finding, with the largest ratio found. It is refused by the margin if a ratio reaches 1.001.

    Raises:
        Vacuous: If both routes are one, or no case is effective.
        Invalid: If a route gives NaN or infinity on a case, or the bound is negative there or in the search.
    """
    require_two_routes(value, bound)

    def ratio(case: Case) -> float:
        return _ratio(called(value, "value", case), called(bound, "bound", case), atol)

    tried = [(ratio(case), case) for case in listed(cases)]
    effective = [(r, case) for r, case in tried if r > -math.inf]
    if not effective:
        raise Vacuous(f"cases: expected a case whose bound exceeds {10 * atol:.0e}, got none")
    effective.sort(key=lambda pair: -pair[0])
    largest = effective[0][0]
    if search and largest < _CLEAR_RATIO:
        starts = [case for _, case in effective[:_STARTS]]
        largest = max([largest] + [_climb(ratio, case, project) for case in starts])
    return _judge(largest, len(effective), sharp, what, search)


def _judge(largest: float, effective: int, sharp: float | None, what: str, search: bool) -> Finding:
    scope = f"{effective} cases" + (" and a search" if search else "")
    if largest > 1 + ROUNDING:
        result = "bound exceeded" if largest == math.inf else f"bound exceeded by a factor of {truncated(largest)}"
        return Finding("bounds", Verdict.FALSE, largest >= REFUSAL_RATIO, what, scope, result, effective)
    result = f"largest ratio {truncated(min(largest, 1.0))}"
    if sharp is not None and largest < sharp:
        result += f", sharpness {sharp:g} not reached"
        return Finding("bounds", Verdict.UNKNOWN, False, what, scope, result, effective)
    return Finding("bounds", Verdict.TRUE, False, what, scope, result, effective)


def _ratio(value: Array, bound: Array, atol: float) -> float:
    """Return the largest ratio over entries, minus infinity where every bound is within rounding of zero."""
    value, bound = np.broadcast_arrays(value, bound)
    if np.any(bound < -10 * atol):
        raise _NegativeBoundError(f"bound: expected nonnegative values, got {float(bound.min()):.1e}")
    excess = value - atol
    if np.any((bound <= 10 * atol) & (excess > 10 * atol)):
        return math.inf
    counted = bound > 10 * atol
    return float(np.max(excess[counted] / bound[counted])) if np.any(counted) else -math.inf


class _NegativeBoundError(Invalid):
    """The bound is negative somewhere: it is wrong there, or `project` must keep the search away."""


class _BrokenError(Exception):
    """The search has found a clear violation and may stop."""


def _climb(ratio: Callable[[Case], float], start: Case, project: Callable[[Case], Case] | None) -> float:
    """Return the largest ratio found by moving the floating-point entries of a case."""
    from scipy.optimize import minimize

    vector, rebuild = flatten(start)
    if vector.size == 0:
        return ratio(start)
    best, at = ratio(start), vector

    def objective(moved: Array) -> float:
        nonlocal best, at
        case = rebuild(np.asarray(moved, dtype=np.float64))
        try:
            found = ratio(project(case) if project else case)
        except _NegativeBoundError:
            raise
        except (ValueError, ArithmeticError):
            return math.inf  # outside the domain of the statement: not a place to look
        if found > best:
            best, at = found, np.array(moved, dtype=np.float64)
        if best >= _CLEAR_RATIO:
            raise _BrokenError
        return -found

    budget = _EVALUATIONS + _EVALUATIONS_PER_ENTRY * vector.size
    fine = {"xatol": 1e-10, "fatol": 1e-12}
    try:
        for case in _rescaled(start):
            objective(flatten(case)[0])
        for method, options in (("Nelder-Mead", fine), ("Powell", {}), ("Nelder-Mead", fine)):
            minimize(objective, at, method=method, options={"maxfev": budget, **options})
    except _BrokenError:
        pass
    return best


def _rescaled(case: Case) -> list[Case]:
    """Return the case with each floating-point argument scaled by powers of ten between 1e-4 and 1e2."""
    result = []
    for position in range(len(case)):
        for power in np.arange(-4.0, 2.01, 0.5):
            one, rebuild = flatten((case[position],))
            if one.size:
                result.append((*case[:position], rebuild(one * 10.0**power)[0], *case[position + 1 :]))
    return result
