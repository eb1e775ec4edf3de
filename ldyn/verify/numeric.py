"""Numeric checks: agreement of two routes, order of a remainder, coverage of a probability."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .cases import Array, Case, called, listed, require_two_routes
from .errors import Invalid, Vacuous, Verdict
from .finding import Finding, at_least, at_most, truncated

AGREE_MARGIN = 1e3
ORDER_TOLERANCE = 0.15
ORDER_MARGIN = 0.5
COVERAGE_CONFIDENCE = 0.999
_MIN_POINTS = 4


def agreement(
    claimed: Callable[..., Any],
    reference: Callable[..., Any],
    cases: Iterable[Case],
    *,
    rtol: float = 1e-10,
    what: str = "",
) -> Finding:
    """Compare two independent routes on every case.

    Args:
        claimed: The closed form.
        reference: Another route to the same quantity.
        cases: Arguments for both.
        rtol: Largest allowed error: the largest entry of the difference over the largest entry of either side.
        what: The statement, in a few words.

    Returns:
        The finding; it is refused by the margin if the error is at least 1000 times `rtol`.

    Raises:
        Vacuous: If both routes are one, or every case gives zero on both sides.
        Invalid: If a route gives NaN or infinity.
    """
    require_two_routes(claimed, reference)
    worst, effective = 0.0, 0
    for case in listed(cases):
        first, second = called(claimed, "first route", case), called(reference, "second route", case)
        if first.shape != second.shape:
            result = f"shapes {first.shape} and {second.shape} differ"
            return Finding("agrees", Verdict.FALSE, False, what, "1 case", result, 1)
        scale = max(_largest(first), _largest(second))
        if scale > 0:
            effective += 1
            worst = max(worst, _largest(first - second) / scale)
    if not effective:
        raise Vacuous("cases: expected at least one case with a nonzero value, got none")
    holds = worst <= rtol
    result = f"relative error at most {at_most(worst)}" if holds else f"relative error at least {at_least(worst)}"
    verdict = Verdict.TRUE if holds else Verdict.FALSE
    return Finding("agrees", verdict, worst >= AGREE_MARGIN * rtol, what, _count(effective), result, effective)


def convergence(
    approximation: Callable[..., Any],
    exact: Callable[..., Any],
    cases: Iterable[Case],
    *,
    order: float,
    steps: Sequence[float] = tuple(10.0 ** -np.arange(0.5, 4.01, 0.25)),
    magnitude: float = 0.0,
    what: str = "",
) -> Finding:
    """Measure the order of a remainder as the slope of its logarithm in the logarithm of the step.

    Steps whose remainder is within 1000 roundings of the computed values are left out: there a slope is noise.

    Args:
        approximation: Maps a step h and a case to the approximation.
        exact: Maps the same to the exact value.
        cases: Arguments that follow h.
        order: The claimed order p: the distance of approximation and exact value is O(h^p).
        steps: The steps h, from large to small.
        magnitude: Size of the largest intermediate value, if it exceeds that of the result.
        what: The statement, in a few words.

    Returns:
        The finding; the smallest slope over the cases must reach `order` up to 0.15, and it is refused by the
        margin if the slope is lower by 0.5.

    Raises:
        Vacuous: If both routes are one, or no case has four usable steps.
        Invalid: If the steps do not decrease, or a route gives NaN or infinity.
    """
    require_two_routes(approximation, exact)
    grid = [float(h) for h in steps]
    if len(grid) < _MIN_POINTS or any(b >= a for a, b in pairwise(grid)) or grid[-1] <= 0:
        raise Invalid(f"steps: expected at least {_MIN_POINTS} decreasing positive steps, got {grid}")
    slopes = []
    for case in listed(cases):
        usable = _usable_points(approximation, exact, case, grid, magnitude)
        if len(usable) >= _MIN_POINTS:
            tail = np.log(np.array(usable[-5:]))
            slopes.append(float(np.polyfit(tail[:, 0], tail[:, 1], 1)[0]))
    if not slopes:
        raise Vacuous("cases: expected a case with four steps above the rounding floor, got none")
    slope = min(slopes)
    holds, refused = slope >= order - ORDER_TOLERANCE, slope <= order - ORDER_MARGIN
    verdict = Verdict.TRUE if holds else Verdict.FALSE if refused else Verdict.UNKNOWN
    result = f"slope {slope:.1f} against order {order:g}"
    return Finding("converges", verdict, refused, what, _count(len(slopes)), result, len(slopes))


def _usable_points(
    approximation: Callable[..., Any],
    exact: Callable[..., Any],
    case: Case,
    grid: list[float],
    magnitude: float,
) -> list[tuple[float, float]]:
    """Return (step, remainder) down to the first step that reaches the rounding floor."""
    points: list[tuple[float, float]] = []
    for h in grid:
        first, second = called(approximation, "approximation", case, h), called(exact, "exact", case, h)
        floor = 1e3 * np.finfo(np.float64).eps * max(_largest(second), magnitude)
        error = _largest(first - second)
        if error <= floor:
            break
        points.append((h, error))
    return points


def coverage(
    event: Callable[[np.random.Generator, int], Any],
    *,
    at_least: float,
    trials: int = 20_000,
    seed: int = 0,
    what: str = "",
) -> Finding:
    """Check that an event has at least a given probability, by its exact binomial limits.

    Args:
        event: Maps a generator and a number n to n booleans, one for each independent trial.
        at_least: The claimed probability, 1 − δ.
        trials: How many trials.
        seed: Seed of the generator.
        what: The statement, in a few words.

    Returns:
        The finding. True if the one-sided 99.9 % Clopper–Pearson lower limit reaches the claim, false if the upper
        limit stays below it, else unknown: more trials are needed.

    Raises:
        Invalid: If the probability is not between 0 and 1 or the event returns something else than n booleans.
        Vacuous: If there are no trials.
    """
    from scipy.stats import beta

    if not 0 < at_least < 1:
        raise Invalid(f"at_least: expected a probability strictly between 0 and 1, got {at_least}")
    if trials < 1:
        raise Vacuous(f"trials: expected at least one, got {trials}")
    outcome = event(np.random.default_rng(seed), trials)
    hits = np.asarray(outcome.detach().cpu().numpy() if hasattr(outcome, "detach") else outcome)
    if hits.shape != (trials,) or hits.dtype != np.bool_:
        raise Invalid(f"event: expected {trials} booleans, got shape {hits.shape} of {hits.dtype}")
    k = int(hits.sum())
    lower = 0.0 if k == 0 else float(beta.ppf(1 - COVERAGE_CONFIDENCE, k, trials - k + 1))
    upper = 1.0 if k == trials else float(beta.ppf(COVERAGE_CONFIDENCE, k + 1, trials - k))
    verdict = Verdict.TRUE if lower >= at_least else Verdict.FALSE if upper < at_least else Verdict.UNKNOWN
    limits = f"99.9 % limits {truncated(lower, 4)} to {upper:.4f}"
    result = f"coverage {truncated(k / trials, 4)} ({limits}) against {at_least:g}"
    return Finding("covers", verdict, verdict is Verdict.FALSE, what, f"{trials} trials", result, trials)


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array))) if array.size else 0.0


def _count(cases: int) -> str:
    return "1 case" if cases == 1 else f"{cases} cases"
