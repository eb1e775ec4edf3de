"""Inequalities: the search finds what random cases miss, and a bound that is too small does not survive it."""

import math

import numpy as np
import pytest
import torch

from ldyn.verify import Cases, Invalid, Undecided, Vacuous, Verdict, inequality

MATRIX = np.diag([1.0, 0.3, 0.2, 0.1, 0.1, 0.1])


def rayleigh(x):
    return x @ MATRIX @ x


def largest_eigenvalue(x):
    return 1.0 * (x @ x)


def one_percent_too_small(x):
    return 0.99 * (x @ x)


def draw(rng):
    return (rng.normal(size=6),)


DIRECTIONS = Cases(draw, count=60, seed=0)


def test_a_sharp_bound_passes_and_the_search_reaches_it():
    found = inequality(rayleigh, largest_eigenvalue, DIRECTIONS, sharp=0.999)
    assert found.verdict is Verdict.TRUE
    assert found.scope == "60 cases and a search"


def test_the_search_finds_a_violation_of_one_percent_that_random_cases_do_not():
    by_chance = inequality(rayleigh, one_percent_too_small, DIRECTIONS, search=False)
    assert by_chance.verdict is Verdict.TRUE, "the random cases alone must be blind to it"
    assert by_chance.result < "largest ratio 0.95"
    found = inequality(rayleigh, one_percent_too_small, DIRECTIONS)
    assert (found.verdict, found.refused) == (Verdict.FALSE, True)


def test_the_search_finds_a_violation_at_a_smaller_scale():
    """cosh x - 1 <= x² is false only for large x, sin x <= 0.99 x only for small x: both need a rescaled case."""
    cases = [(np.array([1.0, 1.2]),), (np.array([0.9, 1.1]),)]
    for value, bound in (
        (lambda x: np.cosh(x).max() - 1, lambda x: (x @ x) * 1.0),
        (lambda x: abs(np.sin(x[0])), lambda x: 0.99 * abs(x[0])),
    ):
        assert inequality(value, bound, cases, search=False).verdict is Verdict.TRUE
        assert inequality(value, bound, cases).refused


def test_the_search_tries_other_scales_where_nothing_leads_there():
    """The ratio is flat but for a small ball around zero, so that only a rescaled case can come upon it."""
    cases = [(np.array([1.0, 1.2, -0.9, 1.1]),)]
    found = inequality(lambda x: 1.1 if np.linalg.norm(x) < 0.02 else 0.5, lambda x: 1.0 + 0 * x[0], cases)
    assert found.refused


def test_the_search_moves_tensors_and_numbers_and_keeps_their_kind():
    seen = set()

    def value(x, t, n, name):
        seen.add((type(x), x.dtype, type(t), type(n), type(name)))
        return t * x.abs().sum()

    case = (torch.tensor([0.5, 0.2], dtype=torch.float32), 0.3, 3, "fixed")
    inequality(value, lambda x, t, n, name: 2 + abs(t) * x.abs().sum(), [case])
    assert seen == {(torch.Tensor, torch.float32, float, int, str)}
    assert torch.equal(case[0], torch.tensor([0.5, 0.2]))


def test_a_case_without_floating_point_entries_is_not_searched_but_checked():
    assert inequality(lambda n: n, lambda n: n + 1, [(1,), (2,)]).verdict is Verdict.TRUE
    assert inequality(lambda n: n + 2, lambda n: n + 1, [(1,), (2,)]).refused


def test_project_keeps_the_search_where_the_statement_applies():
    """p (1 - p) <= 1/4 holds on [0, 1]; p <= 1 only there, and the search leaves the interval if it may."""
    cases = Cases(lambda rng: (rng.uniform(0.2, 0.6),), count=10)

    def clipped(case):
        return (float(np.clip(case[0], 0.0, 1.0)),)

    inside = inequality(lambda p: p, lambda p: 1.0 + 0 * p, cases, project=clipped, sharp=0.99)
    assert inside.verdict is Verdict.TRUE
    assert inequality(lambda p: p, lambda p: 1.0 + 0 * p, cases).refused


def test_a_value_error_of_a_route_marks_the_end_of_its_domain():
    def value(x):
        if x > 1:
            raise ValueError("x: expected at most 1")
        return x

    found = inequality(value, lambda x: 1.0 + 0 * x, [(0.5,), (0.7,)])
    assert found.verdict is Verdict.TRUE


def test_sharpness_that_is_not_reached_is_not_a_pass():
    found = inequality(rayleigh, lambda x: 2 * largest_eigenvalue(x), DIRECTIONS, sharp=0.9)
    assert (found.verdict, found.refused) == (Verdict.UNKNOWN, False)
    assert "sharpness 0.9 not reached" in found.result
    with pytest.raises(Undecided):
        found.require()


def test_an_infinite_ratio_is_refused():
    found = inequality(lambda x: x, lambda x: 0.0 * x, [(1.0,)])
    assert (found.verdict, found.refused, found.result) == (Verdict.FALSE, True, "bound exceeded")
    mixed = inequality(lambda x: np.array([0.0, x]), lambda x: np.array([1.0, 0.0]), [(1.0,)])
    assert mixed.refused, "one entry with a zero bound is enough"


def test_a_negative_bound_is_refused():
    with pytest.raises(Invalid, match="nonnegative"):
        inequality(lambda x: -2.0, lambda x: -1.0 + 0 * x, [(1.0,)])


def test_a_bound_that_turns_negative_in_the_search_is_refused_and_not_taken_for_the_end_of_the_domain():
    with pytest.raises(Invalid, match="nonnegative"):
        inequality(lambda x: 0.1 * x**2, lambda x: 1.0 - x, [(0.1,), (0.2,)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_are_refused(bad, side):
    routes = [lambda x: bad, lambda x: x]
    with pytest.raises(Invalid, match="finite"):
        inequality(routes[side], routes[1 - side], [(1.0,)])


@pytest.mark.parametrize(
    "cases",
    [[], [(0.0,)], [(1e-14,), (1e-13,)]],
    ids=["no case", "zero bound", "bounds within rounding"],
)
def test_no_effective_case_is_vacuous(cases):
    with pytest.raises(Vacuous):
        inequality(lambda x: 0.5 * x, lambda x: +x, cases)


def test_only_effective_cases_are_counted():
    found = inequality(lambda x: 0.5 * x, lambda x: +x, [(0.0,), (1.0,), (2.0,)], search=False)
    assert found.cases == 2


def test_the_same_callable_on_both_sides_is_refused():
    with pytest.raises(Vacuous, match="independent routes"):
        inequality(rayleigh, rayleigh, DIRECTIONS)
    with pytest.raises(Vacuous, match="independent routes"):
        inequality(lambda x: x @ x, lambda y: y @ y, DIRECTIONS)


def test_rounding_is_neither_a_violation_nor_a_refusal():
    found = inequality(lambda x: x * (1 + 1e-12), lambda x: +x, [(1.0,), (3.0,)], search=False)
    assert found.verdict is Verdict.TRUE
    beyond = inequality(lambda x: x * (1 + 1e-5), lambda x: +x, [(1.0,), (3.0,)])
    assert (beyond.verdict, beyond.refused) == (Verdict.FALSE, False)


def test_a_ratio_below_one_never_prints_as_one():
    found = inequality(lambda x: 0.99999 * x, lambda x: +x, [(1.0,)], search=False)
    assert found.result == "largest ratio 0.999"


def test_arrays_are_compared_entry_by_entry():
    good = inequality(lambda x: np.abs(np.sin(x)), np.abs, DIRECTIONS)
    assert good.verdict is Verdict.TRUE
    bad = inequality(lambda x: np.abs(x) * [1, 1, 1.1, 1, 1, 1], np.abs, DIRECTIONS)
    assert bad.refused


def test_a_second_search_finds_the_same():
    runs = [inequality(rayleigh, lambda x: 1.5 * (x @ x), DIRECTIONS) for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_search_leaves_the_cases_as_they_were():
    case = (np.array([0.3, 0.1, 0.2, 0.4, 0.5, 0.6]),)
    before = case[0].copy()
    inequality(rayleigh, largest_eigenvalue, [case])
    assert (case[0] == before).all()
