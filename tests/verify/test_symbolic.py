"""True, unknown and false are three answers: algebra alone says true, numbers alone say false."""

import pytest
import sympy as sp

from ldyn.verify import (
    Invalid,
    Refuted,
    Undecided,
    Verdict,
    decide_equal,
    decide_nonnegative,
    delta,
    derive,
    dimension,
    indices,
    partial,
    total,
    vector,
)
from ldyn.verify import symbolic as symbolic_module

x, y = sp.symbols("x y", real=True)
a = sp.Symbol("a", positive=True)
V = dimension("V")
i, j, k, m = indices("i j k m")
z = vector("z")
S = total(sp.exp(z[m]), m, over=V)
p = vector("p", positive=True)
SOFTMAX = {p: lambda n: sp.exp(z[n]) / S}

# True, and beyond SymPy: each is a classical identity that no simplification rule of the engine reaches.
UNDECIDABLE = {
    "Machin": (4 * sp.atan(sp.Rational(1, 5)) - sp.atan(sp.Rational(1, 239)), sp.pi / 4),
    "arctangents of a and 1/a": (sp.atan(a) + sp.atan(1 / a), sp.pi / 2),
    "dilogarithm inversion": (sp.polylog(2, -a) + sp.polylog(2, -1 / a), -(sp.pi**2) / 6 - sp.log(a) ** 2 / 2),
}


@pytest.mark.parametrize(("first", "second"), UNDECIDABLE.values(), ids=UNDECIDABLE.keys())
def test_what_sympy_cannot_decide_is_unknown_and_never_a_pass(first, second):
    decision = decide_equal(first, second)
    assert decision.verdict is Verdict.UNKNOWN
    assert decision.witness < 1e-20, "the sides are equal; only the proof is missing"
    with pytest.raises(Undecided, match="cannot decide"):
        derive(first).to(second, because="a classical identity")


@pytest.mark.parametrize(("first", "second"), UNDECIDABLE.values(), ids=UNDECIDABLE.keys())
def test_beside_an_undecidable_identity_a_false_one_is_false(first, second):
    wrong = second * (1 + sp.Rational(1, 10**6))
    assert decide_equal(first, wrong).verdict is Verdict.FALSE
    with pytest.raises(Refuted):
        derive(first).to(wrong, because="off by one part in a million")


TRUE_AND_NEAR = {
    "square": ((x + y) ** 2, x**2 + 2 * x * y + y**2, x**2 + x * y + y**2),
    "trigonometry": (sp.sin(x) ** 2, 1 - sp.cos(x) ** 2, 1 - sp.cos(2 * x) ** 2),
    "exponential": (sp.exp(x + y), sp.exp(x) * sp.exp(y), sp.exp(x) + sp.exp(y)),
    "root of a square": (sp.sqrt(x**2), sp.Abs(x), x),
    "logarithm": (sp.log(a**2), 2 * sp.log(a), sp.log(2 * a)),
    "fraction": (1 / (1 + a) + 1 / (1 - x / (x + 1)), 1 / (1 + a) + x + 1, 1 / (1 + a) + x),
    "softmax": (
        partial(p[k], z[j]),
        p[k] * (delta(k, j) - p[j]),
        p[k] * (delta(k, j) + p[j]),
    ),
    "log-partition": (partial(sp.log(S), z[i]), p[i], p[i] / 2),
}


@pytest.mark.parametrize(("first", "second", "near"), TRUE_AND_NEAR.values(), ids=TRUE_AND_NEAR.keys())
def test_identities_are_true_and_their_near_misses_false(first, second, near):
    assert decide_equal(first, second, SOFTMAX).verdict is Verdict.TRUE
    assert decide_equal(second, first, SOFTMAX).verdict is Verdict.TRUE
    for wrong in (near, second * (1 + sp.Rational(1, 10**6)), second / 2, -second):
        assert decide_equal(first, wrong, SOFTMAX).verdict is Verdict.FALSE


def test_a_transposed_index_is_refused():
    weights = vector("W")
    product = total(weights[i, m] * z[m], m, over=V)
    good = total(weights[i, k] * z[k], k, over=V)
    transposed = total(weights[k, i] * z[k], k, over=V)
    assert decide_equal(product, good).verdict is Verdict.TRUE
    assert decide_equal(product, transposed).verdict is Verdict.FALSE
    jacobian = partial(product, z[j])
    assert decide_equal(jacobian, weights[i, j]).verdict is Verdict.TRUE
    assert decide_equal(jacobian, weights[j, i]).verdict is Verdict.FALSE


def test_matrices_are_compared_entry_by_entry_and_shapes_must_match():
    good = sp.Matrix([[x + x, 0], [0, 1]])
    assert decide_equal(good, sp.Matrix([[2 * x, 0], [0, 1]])).verdict is Verdict.TRUE
    assert decide_equal(good, sp.Matrix([[2 * x, 0], [0, 1 + y]])).verdict is Verdict.FALSE
    assert decide_equal(good, good + sp.Matrix([[0, 1], [0, 0]])).verdict is Verdict.FALSE
    first, second = UNDECIDABLE["Machin"]
    assert decide_equal(sp.Matrix([x, first]), sp.Matrix([x, second])).verdict is Verdict.UNKNOWN
    assert decide_equal(sp.Matrix([x, first]), sp.Matrix([y, second])).verdict is Verdict.FALSE
    for other in (sp.Matrix([2 * x, 0, 0, 1]), sp.Matrix([[2 * x]]), 2 * x):
        with pytest.raises(Invalid, match="one shape"):
            decide_equal(good, other)


@pytest.mark.parametrize("bad", [sp.nan, sp.oo, -sp.oo, sp.zoo, x + sp.oo])
def test_sides_that_are_not_finite_are_refused(bad):
    for pair in ((bad, x), (x, bad), (bad, bad)):
        with pytest.raises(Invalid, match="finite"):
            decide_equal(*pair)


def test_a_defect_in_the_algebra_is_caught_by_the_numbers(monkeypatch):
    monkeypatch.setattr(symbolic_module, "_is_zero", lambda difference: True)
    with pytest.raises(Invalid, match="algebra says equal, numbers say different"):
        decide_equal(x, 2 * x)


@pytest.mark.parametrize(
    "expr",
    [
        x**2 + y**2,
        (x - y) ** 2,
        x**2 - 2 * x * y + y**2,
        a * x**2,
        sp.exp(x) + sp.Abs(y),
        total((z[i] - x) ** 2, i, over=V),
        total(p[i] * (z[i] - x) ** 2, i, over=V),
        total(p[i] * p[j] * (z[i] - z[j]) ** 2, i, j, over=V) / 2,
    ],
    ids=str,
)
def test_squares_and_positive_factors_are_nonnegative(expr):
    assert decide_nonnegative(expr, SOFTMAX) is Verdict.TRUE
    assert decide_nonnegative(-expr, SOFTMAX) is Verdict.FALSE


def test_a_sign_that_sympy_cannot_settle_is_unknown():
    for expr in (sp.exp(x) - 1 - x, x**4 - x + 1):
        assert decide_nonnegative(expr) is Verdict.UNKNOWN


def test_an_assumption_that_contradicts_the_definition_is_found():
    """`p` was declared positive and is then defined as something negative: the assumption must not carry a proof."""
    negative = {p: lambda n: -sp.exp(z[n])}
    assert decide_nonnegative(p[i], negative) is Verdict.FALSE
    with pytest.raises(Refuted):
        derive(z[i], where=negative).le(z[i] + p[i], because="p is declared positive", gap=p[i])


def test_circular_definitions_are_refused():
    q = vector("q")
    with pytest.raises(Invalid, match="circular"):
        decide_equal(q[i], z[i], {q: lambda n: q[n] + 1})


def test_a_decision_is_the_same_twice():
    first = [decide_equal(partial(p[k], z[j]), p[k] * p[j], SOFTMAX) for _ in range(2)]
    assert first[0] == first[1]


# --- derivations -------------------------------------------------------------------------------------------------


def test_a_chain_is_immutable_and_can_be_continued_in_two_ways():
    start = derive((x + y) ** 2)
    longer = start.to(x**2 + 2 * x * y + y**2, because="expand")
    other = start.to((y + x) ** 2, because="commute")
    assert (len(start.steps), len(longer.steps), len(other.steps)) == (1, 2, 2)
    assert (start.last, longer.first, longer.relation) == (start.first, start.first, "=")
    with pytest.raises(AttributeError):
        start.steps = ()


@pytest.mark.parametrize("reason", ["", "  "])
def test_a_step_needs_a_reason(reason):
    with pytest.raises(Invalid, match="because"):
        derive(x + x).to(2 * x, because=reason)
    with pytest.raises(Invalid, match="because"):
        derive(x).le(x + y**2, because=reason, gap=y**2)


def test_a_false_step_says_which_and_by_how_much():
    chain = derive(x + x).to(2 * x, because="collect")
    with pytest.raises(Refuted, match=r"step 2 \(slip\): the sides differ, relatively by"):
        chain.to(3 * x, because="slip")


def test_an_inequality_with_its_gap():
    chain = derive(2 * x * y).le(x**2 + y**2, because="a square is not negative", gap=(x - y) ** 2)
    assert chain.relation == "<="
    assert chain.to(y**2 + x**2, because="commute").relation == "<="


def test_a_wrong_gap_is_refused_even_if_it_is_nonnegative():
    with pytest.raises(Refuted, match="gap is the difference"):
        derive(2 * x * y).le(x**2 + y**2, because="not the gap", gap=(x + y) ** 2)
    with pytest.raises(Refuted, match="gap is the difference"):
        derive(2 * x * y).le(x**2 + y**2, because="half the gap", gap=(x - y) ** 2 / 2)


def test_an_inequality_in_the_wrong_direction_is_refused():
    with pytest.raises(Refuted, match="gap is nonnegative"):
        derive(x**2 + y**2).le(2 * x * y, because="the wrong way", gap=-((x - y) ** 2))


def test_a_gap_whose_sign_sympy_cannot_settle_is_not_a_pass():
    with pytest.raises(Undecided, match="gap is nonnegative"):
        derive(1 + x).le(sp.exp(x), because="convexity", gap=sp.exp(x) - 1 - x)


def test_a_gap_that_sympy_cannot_identify_is_not_a_pass():
    first, second = UNDECIDABLE["Machin"]
    with pytest.raises(Undecided, match="gap is the difference"):
        derive(sp.Integer(0)).le(first, because="Machin", gap=second)


def test_a_chain_renders_as_one_aligned_display_with_its_reasons():
    chain = derive(partial(p[k], z[j]), where=SOFTMAX).to(p[k] * delta(k, j) - p[k] * p[j], because="quotient rule")
    chain = chain.to(p[k] * (delta(k, j) - p[j]), because="collect")
    text = chain._repr_latex_()
    assert text.startswith("$$\\begin{aligned}") and text.endswith("\\end{aligned}$$")
    assert text.count("&=") == 2 and text.count("\\\\[4pt]") == 1
    assert r"\text{quotient rule}" in text and r"\text{collect}" in text
    assert r"\frac{\partial {p}_{k}}{\partial {z}_{j}}" in text, "the derivative is displayed, not carried out"
    assert "exp" not in text and "e^{" not in text, "defined names are shown by name"
    assert "(quotient rule)" in repr(chain)
    assert r"\le" in derive(x).le(x + y**2, because="square", gap=y**2).latex()


def test_a_stacked_chain_starts_on_a_line_of_its_own():
    chain = (
        derive(x * y, stacked=True).to(y * x, because="commute").le(x * y + 1, because="one more", gap=sp.Integer(1))
    )
    first, second, third = chain.latex().removeprefix("\\begin{aligned}\n").split(" \\\\[4pt]\n")
    assert first == "& x y"
    assert second == r" &\quad = x y && {\footnotesize\text{commute}}"
    assert third.startswith(r" &\quad \le x y + 1 &&")
    assert derive(x, stacked=True).latex() == derive(x).latex()


def test_second_derivatives_and_composite_expressions_render():
    assert r"\frac{\partial^{2} {p}_{k}}{\partial {z}_{i}\,\partial {z}_{j}}" in sp.latex(partial(p[k], z[i], z[j]))
    assert r"\frac{\partial}{\partial {z}_{i}}\left(" in sp.latex(partial(sp.log(S), z[i]))
    assert derive(x).latex() == "\\begin{aligned}\n& x\n\\end{aligned}"


def test_a_derivative_needs_a_variable():
    with pytest.raises(Invalid, match="partial"):
        partial(p[k])
