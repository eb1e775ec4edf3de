"""Agreement, convergence and coverage: each passes what is true, and is shown to refuse what is not."""

import functools
import math

import numpy as np
import pytest
import torch

from ldyn.verify import Cases, Invalid, Undecided, Vacuous, Verdict, agreement, convergence, coverage


def draw(rng):
    return (torch.tensor(rng.normal(size=4)),)


CASES = Cases(draw, count=20, seed=3)


def closed_form(z):
    p = torch.softmax(z, 0)
    return torch.diag(p) - torch.outer(p, p)


def by_autograd(z):
    return torch.autograd.functional.jacobian(lambda y: torch.softmax(y, 0), z)


class Maths:
    """Something with a method, to be called through two handles."""

    def double(self, x):
        return 2 * x


# --- agreement ---------------------------------------------------------------------------------------------------


def test_two_routes_that_agree_pass():
    found = agreement(closed_form, by_autograd, CASES)
    assert (found.verdict, found.refused, found.cases) == (Verdict.TRUE, False, 20)
    assert found.require() is found


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda z: closed_form(z) * (1 + 1e-6), id="one part in a million"),
        pytest.param(lambda z: closed_form(z) / 2, id="half"),
        pytest.param(lambda z: -closed_form(z), id="sign"),
        pytest.param(lambda z: closed_form(z) + 1e-6 * torch.eye(4), id="one entry"),
        pytest.param(lambda z: torch.diag(torch.softmax(z, 0)), id="dropped term"),
    ],
)
def test_agreement_refuses_by_the_margin(wrong):
    found = agreement(wrong, by_autograd, CASES)
    assert (found.verdict, found.refused) == (Verdict.FALSE, True)


def test_agreement_refuses_a_transposed_index():
    weights = torch.tensor(np.random.default_rng(0).normal(size=(3, 3)))
    cases = [(torch.tensor(np.random.default_rng(n).normal(size=3)),) for n in range(5)]
    good = agreement(lambda x: weights, lambda x: torch.autograd.functional.jacobian(lambda y: weights @ y, x), cases)
    bad = agreement(lambda x: weights.T, lambda x: torch.autograd.functional.jacobian(lambda y: weights @ y, x), cases)
    assert good.verdict is Verdict.TRUE
    assert bad.refused


def test_an_error_between_the_tolerance_and_the_margin_fails_without_being_refused():
    found = agreement(lambda x: x * (1 + 1e-9), lambda x: +x, [(1.0,)])
    assert (found.verdict, found.refused) == (Verdict.FALSE, False)


def test_one_bad_case_among_many_is_found():
    cases = [(float(n),) for n in range(1, 100)]
    found = agreement(lambda x: x if x != 57.0 else x + 1e-4, lambda x: x * 1.0, cases)
    assert found.verdict is Verdict.FALSE


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_agreement_refuses_values_that_are_not_finite(bad, side):
    routes = [lambda x: np.array([x, bad]), lambda x: np.array([x, 1.0])]
    with pytest.raises(Invalid, match="finite"):
        agreement(routes[side], routes[1 - side], [(1.0,)])


def test_agreement_refuses_both_sides_infinite():
    with pytest.raises(Invalid, match="finite"):
        agreement(lambda x: x * math.inf, lambda x: x + math.inf, [(1.0,)])


@pytest.mark.parametrize("value", [1 + 2j, np.array([1j]), torch.tensor([1j])])
def test_agreement_refuses_complex_numbers_instead_of_dropping_a_part(value):
    with pytest.raises(Invalid, match="complex"):
        agreement(lambda x: value, lambda x: x, [(1.0,)])


def test_agreement_refuses_what_is_not_numeric():
    with pytest.raises(Invalid, match="expected numbers"):
        agreement(lambda x: "a", lambda x: x, [(1.0,)])


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((3,), (3, 1)), ((1,), ())])
def test_agreement_refuses_a_shape_mismatch_even_where_numpy_would_broadcast(shapes):
    first, second = shapes
    found = agreement(lambda x: np.full(first, x), lambda x: np.full(second, x), [(1.0,)])
    assert (found.verdict, found.refused) == (Verdict.FALSE, False), "false, but no near miss: not a control"
    assert "shape" in found.result


def test_agreement_refuses_no_cases():
    with pytest.raises(Vacuous, match="at least one case"):
        agreement(closed_form, by_autograd, [])
    with pytest.raises(Vacuous, match="at least one case"):
        agreement(closed_form, by_autograd, Cases(draw, count=0))


@pytest.mark.parametrize("zero", [0.0, np.zeros(3), torch.zeros(0), np.zeros((0, 2))])
def test_agreement_refuses_cases_that_are_all_zero_or_empty(zero):
    with pytest.raises(Vacuous, match="nonzero"):
        agreement(lambda x: zero, lambda x: zero * 1, [(1.0,), (2.0,)])


def test_zero_cases_are_not_counted():
    found = agreement(lambda x: x * 2, lambda x: x + x, [(0.0,), (1.0,), (2.0,)])
    assert found.cases == 2
    assert found.scope == "2 cases"


def test_agreement_is_relative_to_the_size_of_the_values():
    assert agreement(lambda x: x + 1e-6, lambda x: +x, [(1e9,)]).verdict is Verdict.TRUE
    assert agreement(lambda x: 2 * x, lambda x: +x, [(1e-30,)]).verdict is Verdict.FALSE


# --- one computation under two names -----------------------------------------------------------------------------


def _scaler(factor):
    return lambda x: factor * x


_maths = Maths()

SAME = {
    "one object": (closed_form, closed_form),
    "two equal lambdas": (lambda z: 2 * z, lambda z: 2 * z),
    "two equal closures": (_scaler(2.5), _scaler(float("2.5"))),
    "a function and a lambda of equal code": (lambda z: torch.softmax(z, 0), lambda y: torch.softmax(y, 0)),
    "two equal partials": (functools.partial(torch.softmax, dim=0), functools.partial(torch.softmax, dim=0)),
    "partials of equal lambdas": (functools.partial(lambda a, z: a * z, 2), functools.partial(lambda a, z: a * z, 2)),
    "two bound methods of one object": (_maths.double, _maths.double),
    "equal nested functions": (lambda z: sum(v * 2 for v in z), lambda z: sum(v * 2 for v in z)),
}
DIFFERENT = {
    "another constant": (lambda z: 2 * z, lambda z: 3 * z),
    "another closure": (_scaler(2.0), _scaler(3.0)),
    "another default": (lambda z, a=2: a * z, lambda z, a=3: a * z),
    "another keyword default": (lambda z, *, a=2: a * z, lambda z, *, a=3: a * z),
    "another global": (lambda z: torch.exp(z), lambda z: torch.sin(z)),
    "another constant inside": (lambda z: sum(v * 2 for v in z), lambda z: sum(v * 3 for v in z)),
    "another name inside": (lambda z: max(torch.exp(v) for v in z), lambda z: max(torch.sin(v) for v in z)),
    "another partial": (functools.partial(torch.mul, 2), functools.partial(torch.mul, 3)),
}


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME.keys())
def test_every_comparison_refuses_one_computation_under_two_names(pair):
    for check in (
        lambda: agreement(*pair, CASES),
        lambda: convergence(*pair, CASES, order=1),
    ):
        with pytest.raises(Vacuous, match="independent routes"):
            check()


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_different_computations_are_not_taken_for_one(pair):
    found = agreement(*pair, CASES)
    assert found.verdict is Verdict.FALSE


def test_a_route_must_be_callable():
    with pytest.raises(Invalid, match="first route: expected a callable, got Tensor"):
        agreement(torch.ones(2), by_autograd, CASES)
    with pytest.raises(Invalid, match="second route"):
        agreement(by_autograd, 3.0, CASES)


# --- convergence -------------------------------------------------------------------------------------------------


def quadratic(h, x):
    return math.cos(x) - h * math.sin(x) - h**2 / 2 * math.cos(x)


def cosine(h, x):
    return math.cos(x + h)


POINTS = [(0.3,), (0.7,), (1.1,)]


def test_the_order_of_a_taylor_remainder_passes():
    found = convergence(quadratic, cosine, POINTS, order=3)
    assert found.verdict is Verdict.TRUE
    assert found.result == "slope 3.0 against order 3"


def test_a_claimed_order_one_too_high_is_refused():
    found = convergence(quadratic, cosine, POINTS, order=4)
    assert (found.verdict, found.refused) == (Verdict.FALSE, True)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda h, x: math.cos(x) - h * math.sin(x) - h**2 * math.cos(x), id="dropped half"),
        pytest.param(lambda h, x: math.cos(x) + h * math.sin(x) - h**2 / 2 * math.cos(x), id="sign"),
        pytest.param(
            lambda h, x: math.cos(x) - h * math.sin(x) - h**2 / 2 * (1 + 1e-3) * math.cos(x), id="one in a thousand"
        ),
    ],
)
def test_a_wrong_coefficient_lowers_the_order(wrong):
    found = convergence(wrong, cosine, POINTS, order=3)
    assert (found.verdict, found.refused) == (Verdict.FALSE, True)


def test_a_slope_between_the_tolerance_and_the_margin_is_unknown():
    found = convergence(lambda h, x: x + h**2.7, lambda h, x: x, [(1e-6,)], order=3)
    assert (found.verdict, found.refused) == (Verdict.UNKNOWN, False)
    with pytest.raises(Undecided):
        found.require()


def test_the_worst_case_decides():
    def mixed(h, x):
        return x + (h**2 if x == 2.0 else h**3)

    assert convergence(mixed, lambda h, x: x, [(1.0,), (2.0,), (3.0,)], order=3).refused


def test_the_rounding_floor_does_not_lower_the_slope():
    """Down to h = 1e-6 the remainder of order 3 is far below rounding: those steps must be left out."""
    steps = tuple(10.0 ** -np.arange(0.5, 6.01, 0.25))
    found = convergence(quadratic, cosine, POINTS, order=3, steps=steps)
    assert found.verdict is Verdict.TRUE


def test_no_step_above_the_rounding_floor_is_vacuous():
    with pytest.raises(Vacuous, match="rounding floor"):
        convergence(lambda h, x: x + h * 0, lambda h, x: x, POINTS, order=2)
    with pytest.raises(Vacuous, match="rounding floor"):
        convergence(lambda h, x: x + h**2, lambda h, x: x, POINTS, order=2, magnitude=1e20)
    with pytest.raises(Vacuous, match="at least one case"):
        convergence(quadratic, cosine, [], order=3)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_convergence_refuses_values_that_are_not_finite(bad, side):
    routes = [lambda h, x: bad if h < 1e-2 else x + h, lambda h, x: x]
    with pytest.raises(Invalid, match="finite"):
        convergence(routes[side], routes[1 - side], POINTS, order=1)


@pytest.mark.parametrize("steps", [(), (0.1, 0.01), (0.1, 0.2, 0.3, 0.4), (0.3, 0.2, 0.1, 0.0), (0.3, 0.3, 0.2, 0.1)])
def test_unusable_steps_are_refused(steps):
    with pytest.raises(Invalid, match="steps"):
        convergence(quadratic, cosine, POINTS, order=3, steps=steps)


# --- coverage ----------------------------------------------------------------------------------------------------


def hits(probability):
    return lambda rng, n: rng.random(n) < probability


def test_a_true_coverage_passes():
    assert coverage(hits(0.97), at_least=0.95).verdict is Verdict.TRUE


def test_a_coverage_two_percent_short_is_refused():
    found = coverage(hits(0.93), at_least=0.95)
    assert (found.verdict, found.refused) == (Verdict.FALSE, True)


@pytest.mark.parametrize(("probability", "trials"), [(0.95, 20_000), (0.97, 100), (0.93, 100)])
def test_a_coverage_that_the_trials_cannot_settle_is_not_a_pass(probability, trials):
    found = coverage(hits(probability), at_least=0.95, trials=trials)
    assert (found.verdict, found.refused) == (Verdict.UNKNOWN, False)
    with pytest.raises(Undecided):
        found.require()


def test_certain_and_impossible_events_have_finite_limits():
    assert coverage(hits(2.0), at_least=0.99).verdict is Verdict.TRUE
    assert coverage(hits(2.0), at_least=0.99, trials=10).verdict is Verdict.UNKNOWN
    assert coverage(hits(-1.0), at_least=0.01).verdict is Verdict.FALSE


def test_the_limits_of_coverage_are_those_of_the_binomial():
    """At the printed lower limit, k or more hits have probability 0.1 %: the definition of the limit."""
    from scipy.stats import beta, binom

    k, n = int((np.random.default_rng(0).random(1000) < 0.9).sum()), 1000
    lower = beta.ppf(0.001, k, n - k + 1)
    assert binom.sf(k - 1, n, lower) == pytest.approx(1e-3, rel=1e-6)
    found = coverage(hits(0.9), at_least=0.5, trials=n)
    assert f"{math.floor(lower * 1e4) / 1e4:.4f}" in found.result


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_probability_outside_its_range_is_refused(level):
    with pytest.raises(Invalid, match="at_least"):
        coverage(hits(0.9), at_least=level)


def test_no_trials_are_vacuous():
    with pytest.raises(Vacuous, match="trials"):
        coverage(hits(0.9), at_least=0.5, trials=0)


@pytest.mark.parametrize(
    "event",
    [
        lambda rng, n: rng.random(n),
        lambda rng, n: rng.random(n - 1) < 2,
        lambda rng, n: True,
        lambda rng, n: rng.random((n, 1)) < 2,
    ],
)
def test_an_event_must_give_one_boolean_for_each_trial(event):
    with pytest.raises(Invalid, match="booleans"):
        coverage(event, at_least=0.5, trials=100)


def test_torch_booleans_are_welcome():
    found = coverage(lambda rng, n: torch.tensor(rng.random(n)) < 0.9, at_least=0.8, trials=5000)
    assert found.verdict is Verdict.TRUE


# --- determinism -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        lambda: agreement(closed_form, by_autograd, CASES),
        lambda: convergence(quadratic, cosine, POINTS, order=3),
        lambda: coverage(hits(0.97), at_least=0.95),
    ],
)
def test_a_second_run_finds_the_same(check):
    assert check() == check()


def test_cases_come_from_their_own_seed_and_leave_the_global_generators_alone():
    before = torch.get_rng_state()
    first, second = list(Cases(draw, 3, seed=5)), list(Cases(draw, 3, seed=5))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], next(iter(Cases(draw, 1, seed=6)))[0])
    coverage(hits(0.97), at_least=0.95)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_route_that_changes_its_arguments_is_refused():
    def doubles_in_place(x):
        return x.mul_(2.0)

    cases = [(torch.ones(3, dtype=torch.float64),)]
    with pytest.raises(Invalid, match="first route: expected a route that leaves its arguments alone"):
        agreement(doubles_in_place, lambda x: x + x, cases)
    with pytest.raises(Invalid, match="exact"):
        convergence(lambda h, x: x, lambda h, x: x.add_(h), cases, order=1)
