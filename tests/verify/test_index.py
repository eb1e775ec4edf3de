"""Index notation: `contract` preserves value, captures nothing, and reaches the results that the book needs."""

import itertools
from fractions import Fraction

import pytest
import sympy as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldyn.verify import (
    Invalid,
    Verdict,
    contract,
    decide_equal,
    delta,
    dimension,
    indices,
    partial,
    total,
    unfold,
    vector,
)

V, D = dimension("V"), dimension("d")
i, j, k, m = indices("i j k m")
r, s = indices("r s")
z, x, W, B = vector("z"), vector("x"), vector("W"), vector("B")
RANGE = {i: V, j: V, k: V, m: V, r: D, s: D}
SIZES = ((2, 3), (3, 2), (4, 2))


# --- an evaluator that shares nothing with the engine: exact fractions, every sum written out ---------------------


def component(name, places):
    """A fixed nonzero fraction for each component of each family."""
    number = sum(ord(c) for c in name) + sum(37**n * place for n, place in enumerate(places, 1))
    return Fraction(number * 7919 % 41 - 20 or 1, 7)


def value(expr, at):
    if isinstance(expr, (sp.Integer, sp.Rational)):
        return Fraction(int(expr.p), int(expr.q))
    if isinstance(expr, sp.Symbol):
        return Fraction(at[expr])
    if isinstance(expr, sp.Indexed):
        return component(str(expr.base), [int(value(n, at)) for n in expr.indices])
    if isinstance(expr, sp.KroneckerDelta):
        first, second = (value(arg, at) for arg in expr.args)
        return Fraction(first == second)
    if isinstance(expr, sp.Sum):
        (bound, lower, upper), rest = expr.limits[-1], expr.limits[:-1]
        inner = sp.Sum(expr.function, *rest) if rest else expr.function
        steps = range(int(value(lower, at)), int(value(upper, at)) + 1)
        return sum((value(inner, {**at, bound: n}) for n in steps), Fraction(0))
    if expr.is_Add:
        return sum((value(arg, at) for arg in expr.args), Fraction(0))
    if expr.is_Mul:
        result = Fraction(1)
        for arg in expr.args:
            result *= value(arg, at)
        return result
    if expr.is_Pow and expr.exp.is_Integer:
        return value(expr.base, at) ** int(expr.exp)
    raise TypeError(f"no value for {type(expr)}")


def places():
    """Sizes, and indices within them."""
    for size, other in SIZES:
        for a, b, c in itertools.product(range(1, size + 1), range(1, other + 1), (0, 1)):
            yield {V: size, D: other, i: a, j: (a + b) % size + 1, k: (a + c) % size + 1, m: size, r: b, s: other}


def assert_same_value(first, second):
    for at in places():
        assert value(first, at) == value(second, at), f"{first}  against  {second}  at {at}"


# --- random index expressions ------------------------------------------------------------------------------------

wide, narrow = st.sampled_from([i, j, k, m]), st.sampled_from([r, s])
leaves = st.one_of(
    wide.map(lambda n: z[n]),
    narrow.map(lambda n: x[n]),
    st.tuples(wide, wide).map(lambda n: W[n]),
    st.tuples(wide, narrow).map(lambda n: B[n]),
    st.tuples(wide, wide).map(lambda n: delta(*n)),
    st.tuples(wide, wide).map(lambda n: delta(*n)),
    st.tuples(narrow, narrow).map(lambda n: delta(*n)),
    st.one_of(st.integers(-2, 3).map(sp.Integer), st.just(V)),
)
SUMS = (lambda e, n: total(e, n, over=RANGE[n]), lambda e, n: sp.Sum(e, (n, 1, RANGE[n])))


@st.composite
def grown(draw, smaller):
    """A product, perhaps with a power, a denominator and a second term, summed over up to three indices."""
    result = sp.Mul(*draw(st.lists(st.one_of(smaller, leaves), min_size=2, max_size=3)))
    extra = draw(st.sampled_from(["none", "none", "power", "denominator", "term"]))
    if extra == "power":
        result = draw(leaves) * draw(smaller) ** draw(st.integers(2, 3))
    elif extra == "denominator":
        result = result / (1 + draw(smaller) ** 2)
    elif extra == "term":
        result = result + draw(smaller)
    for bound in draw(st.lists(st.one_of(wide, narrow), max_size=3)):
        result = draw(st.sampled_from(SUMS))(result, bound)
    return result


expressions = st.recursive(leaves, grown, max_leaves=8)
SEARCH = settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@given(expressions)
@SEARCH
def test_contract_preserves_the_value(expr):
    assert_same_value(expr, contract(expr))


@given(expressions)
@settings(SEARCH, max_examples=60)
def test_contract_has_a_fixed_point_and_keeps_the_free_indices(expr):
    normal = contract(expr)
    assert contract(normal) == normal
    assert not {n for n in normal.free_symbols if isinstance(n, sp.Dummy)}, "a bound variable has escaped"


@given(expressions, st.sampled_from([i, j, k]))
@settings(SEARCH, max_examples=40)
def test_a_derivative_by_a_component_is_the_difference_quotient_of_a_polynomial(expr, place):
    """d/dz_n of e · z_n has the value e + z_n de/dz_n: the product rule holds through sums, deltas and powers."""
    left = unfold(partial(expr * z[place], z[place]))
    right = unfold(expr + z[place] * partial(expr, z[place]))
    assert_same_value(contract(left), right)


@given(expressions, expressions)
@settings(SEARCH, max_examples=40)
def test_no_two_expressions_of_different_value_have_one_normal_form(first, second):
    if contract(first) == contract(second):
        assert_same_value(first, second)


# --- the rules, one by one ---------------------------------------------------------------------------------------

RULES = {
    "a delta picks a component": (total(delta(i, j) * z[j], j, over=V), z[i]),
    "a sum over deltas is one": (total(delta(i, j), i, over=V), sp.Integer(1)),
    "a sum of ones is the dimension": (total(sp.Integer(1), i, over=V), V),
    "the trace of the identity": (total(delta(i, j) * delta(j, i), i, j, over=V), V),
    "a delta squared is itself": (delta(i, j) ** 2 * z[j], delta(i, j) * z[i]),
    "a delta writes one index for the other": (delta(i, j) * z[j], delta(i, j) * z[i]),
    "also inside a sum": (delta(i, j) * total(W[j, k], k, over=V), delta(i, j) * total(W[i, k], k, over=V)),
    "constants leave a sum": (total(z[i] * x[r], i, over=V), x[r] * total(z[i], i, over=V)),
    "names of bound variables do not matter": (total(z[i] ** 2, i, over=V), total(z[k] ** 2, k, over=V)),
    "order of summation does not matter": (
        total(W[i, j] * z[i], i, j, over=V),
        total(total(W[m, k] * z[m], m, over=V), k, over=V),
    ),
    "a product of sums is a double sum": (
        total(z[i], i, over=V) * total(z[j] ** 2, j, over=V),
        total(z[i] * z[j] ** 2, i, j, over=V),
    ),
    "a square of a sum inside a sum": (
        total(z[i] * total(z[j], j, over=V) ** 2, i, over=V),
        total(z[i], i, over=V) ** 3,
    ),
    "a square of a sum that depends on the outer index": (
        total(total(W[i, j], j, over=V) ** 2, i, over=V),
        total(W[i, j] * W[i, k], j, k, i, over=V),
    ),
    "two sums that depend on the outer index": (
        total(total(W[i, j], j, over=V) * total(W[i, j] * z[j], j, over=V), i, over=V),
        total(W[i, j] * W[i, k] * z[k], k, j, i, over=V),
    ),
    "a sum in a denominator inside a sum": (
        total(z[i] / (1 + total(W[i, j] ** 2, j, over=V)), i, over=V),
        total(z[k] / (1 + total(W[k, i] ** 2, i, over=V)), k, over=V),
    ),
    "sums in denominators at two depths": (
        total(1 / (1 + total(W[i, j] ** 2 / (2 + total(B[j, r] ** 2, r, over=D)), j, over=V)), i, over=V),
        total(1 / (1 + total(W[m, k] ** 2 / (2 + total(B[k, s] ** 2, s, over=D)), k, over=V)), m, over=V),
    ),
    "a symmetric double sum": (total(W[i, j] * z[i] * z[j], i, j, over=V), total(W[j, i] * z[j] * z[i], i, j, over=V)),
    "an antisymmetric double sum vanishes": (
        total((W[i, j] - W[j, i]) * z[i] * z[j], i, j, over=V),
        sp.Integer(0),
    ),
    "a variance as a double sum": (
        total((z[i] - z[j]) ** 2, i, j, over=V) / 2,
        V * total(z[i] ** 2, i, over=V) - total(z[i], i, over=V) ** 2,
    ),
    "two dimensions": (
        total(total(B[i, r] * B[j, r] * delta(i, j), r, over=D), j, over=V),
        total(B[i, s] ** 2, s, over=D),
    ),
}


@pytest.mark.parametrize(("first", "second"), RULES.values(), ids=RULES.keys())
def test_rules(first, second):
    assert_same_value(first, second)
    assert_same_value(first, contract(first))
    assert contract(first - second) == 0


NEAR_RULES = {
    "a delta picks the other component": (total(delta(i, j) * z[j], j, over=V), z[j]),
    "a sum of ones is not one": (total(sp.Integer(1), i, over=V), sp.Integer(1)),
    "a sum over both indices of a delta is not one": (total(delta(i, j), i, j, over=V), sp.Integer(1)),
    "a square of a sum is not a sum of squares": (total(z[i], i, over=V) ** 2, total(z[i] ** 2, i, over=V)),
    "a matrix is not symmetric": (total(W[i, j] * z[j], j, over=V), total(W[j, i] * z[j], j, over=V)),
    "one dimension is not the other": (total(delta(i, i), i, over=V), total(delta(r, r), r, over=D)),
}


@pytest.mark.parametrize(("first", "second"), NEAR_RULES.values(), ids=NEAR_RULES.keys())
def test_near_rules_are_refused(first, second):
    assert contract(first - second) != 0
    assert decide_equal(first, second).verdict is Verdict.FALSE


# --- capture -----------------------------------------------------------------------------------------------------


def test_a_bound_variable_named_like_a_free_index_captures_nothing():
    inner = total(z[i], i, over=V)
    product = z[i] * inner
    assert decide_equal(total(product, i, over=V), inner**2).verdict is Verdict.TRUE
    assert decide_equal(product, z[i] ** 2).verdict is Verdict.FALSE
    assert decide_equal(delta(i, j) * total(W[j, i], i, over=V), delta(i, j) * total(W[i, k], k, over=V)).verdict is (
        Verdict.TRUE
    )


@pytest.mark.parametrize("sum_of", [lambda e, n: total(e, n, over=V), lambda e, n: sp.Sum(e, (n, 1, V))])
def test_a_derivative_by_a_component_whose_index_has_the_name_of_a_bound_variable(sum_of):
    """SymPy itself answers 2 Σ z_j to d(Σ_j z_j²)/dz_j; the bound variable has to be renamed first."""
    squares = sum_of(z[j] ** 2, j)
    assert decide_equal(partial(squares, z[j]), 2 * z[j]).verdict is Verdict.TRUE
    assert decide_equal(partial(squares, z[j]), 2 * total(z[k], k, over=V)).verdict is Verdict.FALSE
    double = sum_of(sum_of(W[i, j] * z[i] * z[j], i), j)
    gradient = total((W[i, j] + W[j, i]) * z[i], i, over=V)
    assert decide_equal(partial(double, z[j]), gradient).verdict is Verdict.TRUE
    assert decide_equal(partial(double, z[j]), 2 * total(W[i, j] * z[i], i, over=V)).verdict is Verdict.FALSE


def test_definitions_with_named_bound_variables_are_not_captured():
    p = vector("p")
    where = {p: lambda n: sp.exp(z[n]) / sp.Sum(sp.exp(z[k]), (k, 1, V))}
    for index in (i, k):
        form = p[index] * (delta(index, k) - p[k])
        assert decide_equal(partial(p[index], z[k]), form, where).verdict is Verdict.TRUE
    assert decide_equal(sp.Sum(p[k], (k, 1, V)), sp.Integer(1), where).verdict is Verdict.TRUE


def test_a_sum_inside_a_sum_over_the_same_name_shadows_it():
    nested = sp.Sum(z[i] * sp.Sum(z[i], (i, 1, V)), (i, 1, V))
    assert_same_value(nested, contract(nested))
    assert decide_equal(nested, total(z[k], k, over=V) ** 2).verdict is Verdict.TRUE


# --- what lies outside the rules is refused, not guessed ---------------------------------------------------------


def test_sums_that_do_not_start_at_one_are_refused():
    with pytest.raises(Invalid, match="start at 1"):
        contract(sp.Sum(z[i], (i, 0, V)))


@pytest.mark.parametrize(
    "triangular",
    [
        sp.Sum(sp.Sum(W[i, j], (j, 1, i)), (i, 1, V)),
        sp.Sum(W[i, j], (j, 1, i), (i, 1, V)),
        sp.Sum(sp.Sum(delta(j, k), (j, 1, i)), (i, 1, V)),
        sp.Sum(z[i] / sp.Sum(z[j], (j, 1, i)), (i, 1, V)),
    ],
    ids=str,
)
def test_sums_whose_limit_is_another_index_are_refused(triangular):
    with pytest.raises(Invalid, match="upper limit"):
        contract(triangular)


def test_a_delta_that_holds_the_bound_variable_twice_is_refused():
    with pytest.raises(Invalid, match="two indices"):
        contract(total(delta(i, V + 1 - i) * z[i], i, over=V))


# --- the results that the book rests on --------------------------------------------------------------------------

EPS = sp.Symbol("epsilon", positive=True)
MEAN = total(x[s], s, over=D) / D
SIGMA = sp.sqrt(total(x[s] ** 2, s, over=D) / D - MEAN**2 + EPS)
a, b, c = indices("a b c")


def normalised(n):
    return (x[n] - MEAN) / SIGMA


def centred(n, o):
    return delta(n, o) - 1 / D


def layernorm_jacobian(coefficient=1):
    return (centred(a, b) - coefficient * normalised(a) * normalised(b) / D) / SIGMA


def layernorm_hessian(coefficient=3):
    h = normalised
    pairs = centred(a, b) * h(c) + centred(a, c) * h(b) + centred(b, c) * h(a)
    return -(pairs - coefficient * h(a) * h(b) * h(c) / D) / (D * SIGMA**2)


def test_layernorm_jacobian_for_every_d():
    jacobian = partial(normalised(a), x[b])
    assert decide_equal(jacobian, layernorm_jacobian()).verdict is Verdict.TRUE
    assert decide_equal(jacobian, layernorm_jacobian(2)).verdict is Verdict.FALSE
    assert decide_equal(jacobian, layernorm_jacobian(1 + sp.Rational(1, 10**6))).verdict is Verdict.FALSE


def test_layernorm_hessian_for_every_d_and_the_near_miss():
    hessian = partial(normalised(a), x[b], x[c])
    assert decide_equal(hessian, layernorm_hessian()).verdict is Verdict.TRUE
    near = decide_equal(hessian, layernorm_hessian(2))
    assert near.verdict is Verdict.FALSE
    assert near.witness > 1e-3


Z = total(sp.exp(z[m]), m, over=V)


def softmax(n):
    return sp.exp(z[n]) / Z


def fluctuation(n, o):
    return delta(n, o) - softmax(o)


def covariance(n, o):
    return softmax(n) * fluctuation(n, o)


def second(n, o, q):
    return softmax(n) * (fluctuation(n, o) * fluctuation(n, q) - covariance(o, q))


def test_softmax_up_to_third_order_for_every_v():
    n = indices("n")[0]
    assert decide_equal(partial(softmax(k), z[i]), covariance(k, i)).verdict is Verdict.TRUE
    assert decide_equal(partial(softmax(k), z[i], z[j]), second(k, i, j)).verdict is Verdict.TRUE
    crossed = sum(fluctuation(k, u) * covariance(v, w) for u, v, w in ((i, j, n), (j, i, n), (n, i, j)))
    third = softmax(k) * (fluctuation(k, i) * fluctuation(k, j) * fluctuation(k, n) - crossed - second(i, j, n))
    assert decide_equal(partial(softmax(k), z[i], z[j], z[n]), third).verdict is Verdict.TRUE
    assert decide_equal(partial(softmax(k), z[i], z[j], z[n]), third + second(i, j, n)).verdict is Verdict.FALSE


def test_softmax_in_an_explicit_dimension_agrees_with_the_symbolic_one():
    explicit = sp.symbols("y1:4", real=True)
    parts = [sp.exp(y) / sum(map(sp.exp, explicit)) for y in explicit]
    for n, o in itertools.product(range(3), repeat=2):
        symbolic = unfold(covariance(k, i)).subs({k: n + 1, i: o + 1, V: 3}).doit()
        numbered = symbolic.subs({z[q + 1]: y for q, y in enumerate(explicit)})
        assert decide_equal(sp.diff(parts[n], explicit[o]), numbered).verdict is Verdict.TRUE
