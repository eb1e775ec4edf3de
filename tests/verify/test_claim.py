"""A claim closes only with complete evidence, and its negative controls must be refused by a margin."""

import json
import math

import numpy as np
import pytest
import sympy as sp
import torch

from ldyn.verify import Cases, Claim, Invalid, Refuted, Undecided, Vacuous, VerificationError, derive
from ldyn.verify.display import badge, badge_label, render_html, render_text

x, y = sp.symbols("x y", real=True)
CASES = Cases(lambda rng: (torch.tensor(rng.normal(size=3)),), count=10)


def square_of_sum(v):
    return (v.sum()) ** 2


def written_out(v):
    return sum(a * b for a in v for b in v)


def off(v):
    return square_of_sum(v) * (1 + 1e-6)


def complete(label="square-of-sum", **options):
    """A claim with one of everything."""
    with Claim(label, **options) as claim:
        claim.proves((x + y) ** 2, x**2 + 2 * x * y + y**2, scope="two terms", what="the square")
        claim.agrees(square_of_sum, written_out, CASES, what="the square in numbers")
        claim.rejects("a dropped 2", x**2 + x * y + y**2)
        claim.rejects("one part in a million", off)
    return claim


def test_a_complete_claim_closes_and_says_what_it_holds():
    record = complete(uses=["other-claim"]).record()
    assert record["status"] == "proved"
    assert record["scopes"] == ["two terms"]
    assert record["uses"] == ["other-claim"]
    assert [item["kind"] for item in record["evidence"]] == ["proves", "agrees"]
    assert [item["kind"] for item in record["controls"]] == ["proves", "agrees"]
    assert json.loads(json.dumps(record)) == record, "the record is plain data"


def test_the_same_claim_gives_the_same_record_twice():
    def everything():
        with Claim("everything") as claim:
            claim.proves(sp.expand((x + y) ** 3), (x + y) ** 3, scope="two terms")
            claim.agrees(square_of_sum, written_out, CASES)
            claim.converges(lambda h, a: a + h, lambda h, a: a * math.exp(h / a), [(0.5,), (0.7,)], order=2)
            claim.bounds(lambda v: abs(np.sin(v)), lambda v: 1.0 + 0 * v, [(0.3,), (0.4,)], sharp=0.99)
            claim.covers(lambda rng, n: rng.random(n) < 0.9, at_least=0.85)
            claim.rejects("a sign", (x - y) ** 3)
        return claim.record()

    first, second = everything(), everything()
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert render_html(first) == render_html(second)


# --- incomplete evidence -----------------------------------------------------------------------------------------


def prove(claim):
    claim.proves((x + y) ** 2, x**2 + 2 * x * y + y**2, scope="two terms")


def agree(claim):
    claim.agrees(square_of_sum, written_out, CASES)


def refuse(claim):
    claim.rejects("one part in a million", off)


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ((), "a proof.*a numeric check.*a negative control"),
        ((agree, refuse), "a proof"),
        ((prove,), "a numeric check; a negative control"),
        ((prove, lambda c: c.rejects("half", x**2)), "a numeric check"),
        ((prove, agree), "a negative control"),
    ],
)
def test_a_claim_does_not_close_while_something_is_missing(steps, missing):
    with pytest.raises(Vacuous, match=missing), Claim("incomplete") as claim:
        for step in steps:
            step(claim)


def test_an_incomplete_claim_has_no_status_and_no_record():
    claim = Claim("incomplete")
    prove(claim)
    for read in (lambda: claim.status, claim.record, claim._repr_mimebundle_):
        with pytest.raises(Vacuous):
            read()
    assert repr(claim) == "Claim('incomplete', open)"


def test_a_claim_without_a_proof_needs_a_reason_that_the_reader_sees():
    with Claim("measured", unproved="the integral has no closed form") as claim:
        agree(claim)
        refuse(claim)
    assert claim.status == "checked"
    for shown in (render_text(claim.record()), render_html(claim.record())):
        assert "the integral has no closed form" in shown
        assert "checked, not proved" in shown
        assert "proved ·" not in shown
    with pytest.raises(Vacuous, match="a proof"), Claim("measured", unproved="  ") as claim:
        agree(claim)
        refuse(claim)


def test_a_proof_beside_a_reason_for_having_none_is_refused():
    with pytest.raises(Invalid, match="unproved"), Claim("both", unproved="too hard") as claim:
        prove(claim)
        agree(claim)
        refuse(claim)


def test_evidence_added_after_closing_is_refused():
    claim = complete()
    before = claim.record()
    for late in (prove, agree, refuse):
        with pytest.raises(Invalid, match="inside the with block"):
            late(claim)
    assert claim.record() == before


def test_an_error_inside_the_block_is_not_swallowed():
    with pytest.raises(ZeroDivisionError), Claim("interrupted"):
        _ = 1 / 0


# --- checks that fail raise at once ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (lambda c: c.proves((x + y) ** 2, x**2 + y**2, scope="all"), Refuted),
        (lambda c: c.proves(x * (1 + sp.Rational(1, 10**6)), x, scope="all"), Refuted),
        (
            lambda c: c.proves(4 * sp.atan(sp.Rational(1, 5)), sp.pi / 4 + sp.atan(sp.Rational(1, 239)), scope="-"),
            Undecided,
        ),
        (lambda c: c.proves(sp.Matrix([[x, y], [0, 1]]), sp.Matrix([[x, 0], [y, 1]]), scope="V = 2"), Refuted),
        (lambda c: c.proves(sp.Matrix([x, y]), sp.Matrix([[x, y]]), scope="V = 2"), Invalid),
        (lambda c: c.proves(x, scope="no reference"), Invalid),
        (lambda c: c.proves(x, x, scope=" "), Invalid),
        (lambda c: c.proves(derive(x), scope="a chain without a step"), Invalid),
        (lambda c: c.proves(derive(x).to(+x, because="itself"), x, scope="a chain and a reference"), Invalid),
        (lambda c: c.agrees(off, written_out, CASES), Refuted),
        (lambda c: c.agrees(written_out, written_out, CASES), Vacuous),
        (lambda c: c.agrees(square_of_sum, written_out, []), Vacuous),
        (lambda c: c.agrees(lambda v: v * math.nan, written_out, CASES), Invalid),
        (lambda c: c.converges(lambda h, a: a + h, lambda h, a: a * math.exp(h / a), [(0.5,)], order=3), Refuted),
        (lambda c: c.converges(lambda h, a: a + h**2.7, lambda h, a: a, [(1e-6,)], order=3), Undecided),
        (lambda c: c.bounds(lambda v: v @ v, lambda v: 0.99 * (v @ v), CASES), Refuted),
        (lambda c: c.bounds(lambda v: v @ v, lambda v: 2 * (v @ v), CASES, sharp=0.9), Undecided),
        (lambda c: c.covers(lambda rng, n: rng.random(n) < 0.93, at_least=0.95), Refuted),
        (lambda c: c.covers(lambda rng, n: rng.random(n) < 0.95, at_least=0.95), Undecided),
    ],
)
def test_a_check_that_is_not_passed_raises_and_leaves_no_evidence(step, error):
    claim = Claim("failing")
    with pytest.raises(error):
        step(claim)
    agree(claim)
    refuse(claim)
    with pytest.raises(Vacuous, match="a proof"):
        claim.record()


def test_all_errors_are_of_one_family_and_only_unusable_input_is_a_value_error():
    assert all(issubclass(e, VerificationError) for e in (Refuted, Undecided, Vacuous, Invalid))
    assert issubclass(Invalid, ValueError)
    assert not any(issubclass(e, ValueError) for e in (Refuted, Undecided, Vacuous))


# --- negative controls -------------------------------------------------------------------------------------------


def opened():
    claim = Claim("controls")
    prove(claim)
    agree(claim)
    return claim


@pytest.mark.parametrize(
    "control",
    [
        pytest.param(lambda v: square_of_sum(v) * 1.0, id="the claimed form again"),
        pytest.param(lambda v: square_of_sum(v) * (1 + 1e-9), id="outside the tolerance, inside the margin"),
        pytest.param(lambda v: square_of_sum(v).reshape(1), id="another shape"),
    ],
)
def test_a_numeric_control_that_is_not_refused_by_the_margin_is_an_error(control):
    with pytest.raises(VerificationError):
        opened().rejects("a control that passes", control)


@pytest.mark.parametrize(
    "control",
    [
        pytest.param(y**2 + 2 * x * y + x**2, id="the claimed form again"),
        pytest.param((x + y) ** 2 * (sp.atan(2) + sp.atan(sp.Rational(1, 2))) * 2 / sp.pi, id="undecidable"),
        pytest.param((x + y) ** 2 * (1 + sp.Rational(1, 10**12)), id="too small a margin"),
    ],
)
def test_a_symbolic_control_that_is_not_refused_by_the_margin_is_an_error(control):
    with pytest.raises(Vacuous, match="accepts the wrong form"):
        opened().rejects("a control that passes", control)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_control_that_gives_no_number_is_an_error(broken):
    with pytest.raises(Invalid, match="finite"):
        opened().rejects("not a number", lambda v: square_of_sum(v) * broken)
    with pytest.raises(Invalid, match="finite"):
        opened().rejects("not a number", sp.nan)


def test_a_control_that_raises_is_an_error():
    with pytest.raises(Invalid, match=r"well-formed near miss.*KeyError"):
        opened().rejects("raises", lambda v: {}["missing"])
    with pytest.raises(Invalid, match="well-formed near miss"):
        opened().rejects("too many arguments", lambda u, v: u)


def test_a_control_that_is_the_reference_is_an_error():
    with pytest.raises(Vacuous, match="independent routes"):
        opened().rejects("the reference", written_out)


def test_a_control_needs_a_check_of_its_kind():
    claim = Claim("controls")
    with pytest.raises(Vacuous, match="earlier check"):
        claim.rejects("nothing to refuse it", off)
    agree(claim)
    with pytest.raises(Vacuous, match="earlier check"):
        claim.rejects("nothing symbolic to refuse it", x**2)
    with pytest.raises(Invalid, match="what"):
        claim.rejects("  ", off)


def test_a_control_goes_to_the_last_check_of_its_kind_or_to_the_one_that_is_named():
    claim = Claim("controls")
    first = claim.agrees(square_of_sum, written_out, CASES, what="first")
    claim.agrees(lambda v: 2 * square_of_sum(v), lambda v: 2 * written_out(v), CASES, what="second")
    claim.rejects("the first form fails the second check", lambda v: square_of_sum(v) * 1.0)
    with pytest.raises(Vacuous):
        claim.rejects("but not the first check", lambda v: square_of_sum(v) * 1.0, against=first)
    claim.rejects("twice the form fails the first check", lambda v: 2 * square_of_sum(v), against=first)


def test_a_check_of_another_claim_cannot_refuse():
    other = opened()
    foreign = other.agrees(lambda v: v.sum(), lambda v: v.mean() * 3, CASES)
    with pytest.raises(Invalid, match="against"):
        opened().rejects("refused elsewhere", off, against=foreign)


@pytest.mark.parametrize(
    ("check", "passes", "refused"),
    [
        (
            lambda c: c.converges(lambda h, a: math.exp(a) * (1 + h), lambda h, a: math.exp(a + h), [(0.5,)], order=2),
            lambda h, a: math.exp(a) * (1 + h + 0.3 * h**1.8),
            lambda h, a: math.exp(a) * (1 + 2 * h),
        ),
        (
            lambda c: c.bounds(lambda v: abs(np.sin(v)), lambda v: 1.0 + 0 * v, [(0.3,), (0.4,)]),
            lambda v: 0.9999 + 0 * v,
            lambda v: 0.99 + 0 * v,
        ),
        (
            lambda c: c.covers(lambda rng, n: rng.random(n) < 0.97, at_least=0.95),
            lambda rng, n: rng.random(n) < 0.95,
            lambda rng, n: rng.random(n) < 0.93,
        ),
    ],
    ids=["converges", "bounds", "covers"],
)
def test_each_numeric_kind_has_its_margin(check, passes, refused):
    claim = Claim("margins")
    check(claim)
    with pytest.raises(Vacuous, match="margin"):
        claim.rejects("by no margin", passes)
    claim.rejects("by the margin", refused)


def test_a_control_of_an_inequality_chain_replaces_its_last_expression():
    chain = derive(2 * x * y).le(x**2 + y**2, because="square", gap=(x - y) ** 2)
    claim = Claim("ordered")
    claim.proves(chain, scope="real x, y")
    claim.rejects("a dropped factor of two", (x**2 + y**2) / 2)
    with pytest.raises(Vacuous):
        claim.rejects("a weaker bound is true", 2 * x**2 + 2 * y**2)


def test_an_erratum_travels_with_its_control():
    claim = opened()
    claim.rejects("the source's form", off, erratum="S0-1")
    assert claim.record()["controls"][-1]["erratum"] == "S0-1"


# --- labels and display ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["", "Two Words", "under_score", "-dash", "dash-", "ünïcode", None, 3])
def test_malformed_labels_are_refused(label):
    with pytest.raises(Invalid, match="label"):
        Claim(label)
    with pytest.raises(Invalid, match="label"):
        Claim("fine", uses=[label])


def test_a_claim_cannot_use_itself_or_a_bare_text():
    with pytest.raises(Invalid, match="uses"):
        Claim("fine", uses=["fine"])
    with pytest.raises(Invalid):
        Claim("fine", uses="other")


def test_the_display_is_escaped_and_holds_the_record():
    with Claim("escaped") as claim:
        claim.proves(x + x, 2 * x, scope="x < 1 & <b>y</b>", what='a "quoted" & <i>text</i>')
        claim.agrees(square_of_sum, written_out, CASES)
        claim.rejects("<script>alert(1)</script>", off)
    shown = render_html(claim.record())
    assert "<script" not in shown and "<b>" not in shown and "<i>" not in shown
    assert shown.count("<details") == 1 and shown.startswith('<div class="ldyn-claim" data-claim="')
    bundle = claim._repr_mimebundle_()
    assert bundle["text/html"] == shown
    assert bundle["text/plain"] == repr(claim)
    assert "refuses" in repr(claim)


def test_the_badge_is_short_when_closed_and_complete_when_open():
    record = complete(uses=["other-claim"]).record()
    assert badge_label(record) == "proved · two terms"
    text = badge(record, lambda label: f"<a>{label}</a>", foot="<p>foot</p>")
    assert text.startswith('<details class="ldyn-badge ldyn-proved">')
    assert text.count('class="ldyn-check"') == 2 and text.count('class="ldyn-control"') == 2
    assert "<a>other-claim</a>" in text and "<p>foot</p>" in text
