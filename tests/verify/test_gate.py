"""A small book that builds, and one failing variant for each way in which the gate must stop the build."""

import html
import json
import os
import re
import textwrap
from pathlib import Path

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

from ldyn.verify import Claim
from ldyn.verify.display import render_html
from ldyn.verify.sphinx_gate import VerificationGate

CONF = """
project = "A small book"
extensions = ["myst_nb", "sphinx_proof", "ldyn.verify.sphinx_gate"]
html_theme = "basic"
numfig = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
nb_execution_mode = "force"
nb_execution_show_tb = False
"""

INDEX = """
# A small book

```{toctree}
first
second
accounts
```
"""

ACCOUNTS = """
# Accounts

```{verify-ledger} summary
```
```{verify-ledger} table
```
```{verify-ledger} graph
```

:::{erratum} S0-1
:where: Line 3
:claim: beta-two

**It says** half. **True is** the whole.
:::

:::{erratum} S0-2
:where: Line 9

A misprint.
:::
"""


def evidence(label, *, uses=(), erratum=""):
    """Return the record of a real claim."""
    with Claim(label, uses=uses, unproved="an example") as claim:
        claim.agrees(lambda v: v + v, lambda v: 2 * v, [(1.0,), (2.0,)], what="doubling")
        claim.rejects("half of it", lambda v: v, erratum=erratum)
    return claim.record()


def statement(label, kind="theorem", extra=""):
    return f"\n```{{prf:{kind}}} About {label}\n:label: {label}\n{extra}\nTwice is $v + v$.\n```\n"


def shown(record):
    """Return the claim's output as a page holds it once the notebook has run."""
    return f"\n```{{raw}} html\n{render_html(record)}\n```\n"


def cell(code):
    return "\n```{code-cell} ipython3\n" + textwrap.dedent(code).strip() + "\n```\n"


NOTEBOOK = (
    "---\njupytext: {text_representation: {extension: .md, format_name: myst}}\n"
    "kernelspec: {display_name: Python 3, language: python, name: python3}\n---\n"
)

RUN = """
from ldyn.verify import Claim
with Claim("alpha-one", unproved="an example") as claim:
    claim.agrees(lambda v: v + v, lambda v: 2 * v, [(1.0,), (2.0,)], what="doubling")
    claim.rejects("half of it", lambda v: v)
"""


def good_book():
    return {
        "index.md": INDEX,
        "first.md": "# First\n" + statement("alpha-one") + shown(evidence("alpha-one")),
        "second.md": "# Second\n"
        + statement("beta-two", "lemma")
        + shown(evidence("beta-two", uses=["alpha-one"], erratum="S0-1"))
        + statement("gamma-three", "proposition")
        + shown(evidence("gamma-three", uses=["beta-two", "alpha-one"]))
        + "\n```{prf:definition} Needs no claim\n:label: doubling\n\nA definition.\n```\n",
        "accounts.md": ACCOUNTS,
    }


def build(folder: Path, pages: dict[str, str]) -> tuple[Path, str]:
    """Build a book and return its folder and the warnings; the gate's error passes through."""
    source, out = folder / "book", folder / "html"
    source.mkdir(exist_ok=True)
    for name, text in {"conf.py": CONF, **pages}.items():
        (source / name).write_text(text, encoding="utf-8")
    return out, rebuild(folder)


def rebuild(folder: Path) -> str:
    source, out = folder / "book", folder / "html"
    with open(os.devnull, "w") as status, open(folder / "warnings", "w") as warnings:
        with docutils_namespace(), patch_docutils(source):
            Sphinx(source, source, out, folder / "doctrees", "html", status=status, warning=warnings).build()
    return (folder / "warnings").read_text()


# --- the good book -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out, warnings = build(tmp_path_factory.mktemp("good"), good_book())
    assert warnings == ""
    return out


def page(site, name):
    return (site / f"{name}.html").read_text(encoding="utf-8")


def test_each_statement_carries_its_badge_and_the_claims_own_output_is_gone(site):
    for name, labels in (("first", ["alpha-one"]), ("second", ["beta-two", "gamma-three"])):
        text = page(site, name)
        assert "data-claim" not in text and "ldyn-claim" not in text
        assert text.count('<details class="ldyn-badge') == len(labels)
        for label in labels:
            block = text[text.index(f'id="{label}"') :]
            assert block.index("ldyn-badge") < block.index("Twice is"), "the badge stands inside the statement"
    assert "Not proved: an example" in page(site, "first")


def test_the_badge_links_what_the_claim_rests_on_and_the_ledger(site):
    text = page(site, "second")
    assert 'Rests on <a href="first.html#alpha-one">Theorem 1</a> About alpha-one.' in text
    assert '<a href="#beta-two">Lemma' in text
    assert 'href="accounts.html#ledger-beta-two"' in text


def test_ledger_page_and_ledger_json_agree_with_the_claims(site):
    entries = json.loads((site / "ledger.json").read_text(encoding="utf-8"))
    assert [entry["label"] for entry in entries] == ["alpha-one", "beta-two", "gamma-three"]
    assert [entry["kind"] for entry in entries] == ["theorem", "lemma", "proposition"]
    assert [entry["page"] for entry in entries] == ["first", "second", "second"]
    assert entries[1]["uses"] == ["alpha-one"] and entries[1]["title"] == "About beta-two"
    expected = evidence("beta-two", uses=["alpha-one"], erratum="S0-1")
    assert {key: entries[1][key] for key in expected} == expected
    text = page(site, "accounts")
    assert re.findall(r'<tr id="ledger-([^"]+)"', text) == ["alpha-one", "beta-two", "gamma-three"]
    assert "3 statements: 0 proved, 3 checked" in text
    assert text.count("<rect") == 3 and text.count("marker-end") == 3


def test_every_link_between_statements_and_ledger_leads_to_a_place(site):
    ids = {name: set(re.findall(r'id="([^"]+)"', page(site, name))) for name in ("first", "second", "accounts")}
    for name in ids:
        for target in re.findall(r'href="([^"]*#(?:ledger-)?(?:alpha|beta|gamma)[^"]*)"', page(site, name)):
            file, _, anchor = html.unescape(target).partition("#")
            assert anchor in ids[file.removesuffix(".html") or name], target


def test_errata_rows_link_to_the_claim_that_refutes_them(site):
    text = page(site, "accounts")
    assert 'id="erratum-s0-1"' in text
    assert re.search(r'Refuted in <a[^>]*href="second.html#beta-two"', text)
    assert "slip of the pen" in text


# --- one variant for each way to trip the gate -------------------------------------------------------------------


def with_first(text):
    return {**good_book(), "first.md": "# First\n" + text}


def tampered(**changes):
    return shown({**evidence("alpha-one"), **changes})


ALPHA, ALPHA_CLAIM = statement("alpha-one"), shown(evidence("alpha-one"))
FAILING = {
    "a statement without a claim": (
        with_first(ALPHA + ALPHA_CLAIM + statement("delta-four", "corollary")),
        "first: corollary delta-four has no claim",
    ),
    "a statement without a label": (
        with_first(ALPHA + ALPHA_CLAIM + "\n```{prf:theorem} Nameless\n\nText.\n```\n"),
        "has no claim",
    ),
    "an unnumbered statement without a claim": (
        with_first(ALPHA + ALPHA_CLAIM + statement("delta-four", extra=":nonumber:\n")),
        "first: theorem delta-four has no claim",
    ),
    "a claim without a statement": (
        with_first(ALPHA + ALPHA_CLAIM + shown(evidence("delta-four"))),
        "first: claim delta-four has no statement",
    ),
    "a claim for what is no theorem": (
        with_first(ALPHA + ALPHA_CLAIM + statement("delta-four", "definition") + shown(evidence("delta-four"))),
        "first: claim delta-four has no statement",
    ),
    "a claim that uses what does not exist": (
        with_first(ALPHA + shown(evidence("alpha-one", uses=["nowhere"]))),
        "first: claim alpha-one uses nowhere, which is not a statement of the book",
    ),
    "a claim on another page": (
        with_first(ALPHA) | {"second.md": good_book()["second.md"] + ALPHA_CLAIM},
        "second: claim alpha-one is not on the page of its statement, first",
    ),
    "a claim above its statement": (
        with_first(ALPHA_CLAIM + ALPHA),
        "first: claim alpha-one stands above its statement",
    ),
    "two claims with one label": (
        with_first(ALPHA + ALPHA_CLAIM + ALPHA_CLAIM),
        "claim alpha-one: expected one, got 2",
    ),
    "two statements with one label": (
        with_first(ALPHA + ALPHA_CLAIM + ALPHA),
        "statement alpha-one: expected one, got 2",
    ),
    "claims that rest on each other": (
        with_first(ALPHA + shown(evidence("alpha-one", uses=["gamma-three"]))),
        "claims that rest on themselves: alpha-one, beta-two, gamma-three",
    ),
    "an erratum whose claim does not refute it": (
        good_book() | {"accounts.md": ACCOUNTS.replace(":claim: beta-two", ":claim: alpha-one")},
        "erratum S0-1: no control of claim alpha-one refutes it",
    ),
    "an erratum of an unknown claim": (
        good_book() | {"accounts.md": ACCOUNTS.replace(":claim: beta-two", ":claim: nowhere")},
        "erratum S0-1 names nowhere, which is not a claim",
    ),
    "a control that names an erratum without a row": (
        with_first(ALPHA + shown(evidence("alpha-one", erratum="S0-9"))),
        "claim alpha-one refutes erratum S0-9, but no row of the errata page says so",
    ),
    "two errata with one name": (
        good_book() | {"accounts.md": ACCOUNTS.replace("S0-2", "S0-1")},
        "erratum S0-1: expected one, got 2",
    ),
    "a record whose controls were taken out": (
        with_first(ALPHA + tampered(controls=[])),
        "first: claim alpha-one has no negative control",
    ),
    "a record whose evidence was taken out": (
        with_first(ALPHA + tampered(evidence=[])),
        "first: claim alpha-one has no numeric check",
    ),
    "a record whose reason was taken out": (
        with_first(ALPHA + tampered(unproved="")),
        "first: claim alpha-one has neither a proof nor a reason",
    ),
    "a record whose status was typed by hand": (
        with_first(ALPHA + tampered(status="proved")),
        "first: claim alpha-one says proved",
    ),
}


@pytest.mark.parametrize(("pages", "problem"), FAILING.values(), ids=FAILING.keys())
def test_the_gate_stops_the_build(tmp_path, pages, problem):
    with pytest.raises(VerificationGate) as stopped:
        build(tmp_path, pages)
    assert problem in str(stopped.value)
    assert not (tmp_path / "html" / "ledger.json").exists(), "nothing is published"


@pytest.mark.parametrize("with_ledger", [True, False])
def test_a_second_build_of_a_failing_book_fails_again(tmp_path, with_ledger):
    pages = with_first(ALPHA)
    if not with_ledger:
        pages["accounts.md"] = re.sub(r"```\{verify-ledger\} \w+\n```\n", "", ACCOUNTS)
    with pytest.raises(VerificationGate):
        build(tmp_path, pages)
    with pytest.raises(VerificationGate, match="alpha-one has no claim"):
        rebuild(tmp_path)


def test_a_repaired_book_builds_and_a_page_taken_away_is_forgotten(tmp_path):
    with pytest.raises(VerificationGate):
        build(tmp_path, with_first(ALPHA))
    out, _ = build(tmp_path, good_book())
    assert len(json.loads((out / "ledger.json").read_text())) == 3
    (tmp_path / "book" / "first.md").unlink()
    with pytest.raises(VerificationGate, match="uses alpha-one, which is not a statement of the book"):
        build(tmp_path, {"index.md": INDEX.replace("first\n", "")})


def test_an_edit_of_one_page_brings_the_ledger_up_to_date(tmp_path):
    out, _ = build(tmp_path, good_book())
    more = good_book()["second.md"] + statement("delta-four", "corollary") + shown(evidence("delta-four"))
    build(tmp_path, {"second.md": more})
    assert "ledger-delta-four" in page(out, "accounts")
    assert len(json.loads((out / "ledger.json").read_text())) == 4


# --- with a kernel -----------------------------------------------------------------------------------------------


def test_an_executed_claim_is_found_among_the_outputs_of_its_cell(tmp_path):
    noisy = RUN + "print('still here')\n"
    out, warnings = build(tmp_path, good_book() | {"first.md": NOTEBOOK + "# First\n" + ALPHA + cell(noisy)})
    assert warnings == ""
    text = page(out, "first")
    assert text.count("ldyn-badge ldyn-checked") == 1 and "data-claim" not in text
    assert "still here" in text, "only the claim's own output is taken away"
    entry = json.loads((out / "ledger.json").read_text())[0]
    assert {key: entry[key] for key in evidence("alpha-one")} == evidence("alpha-one"), "a kernel finds the same"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(RUN.replace("v + v", "v + v * (1 + 1e-6)"), id="a claim that is false"),
        pytest.param(RUN.replace('claim.rejects("half of it", lambda v: v)', "pass"), id="a claim without a control"),
    ],
)
def test_a_claim_cell_that_raises_leaves_its_statement_without_a_claim(tmp_path, code):
    pages = good_book() | {"first.md": NOTEBOOK + "# First\n" + ALPHA + cell(code)}
    with pytest.raises(VerificationGate, match="first: theorem alpha-one has no claim"):
        build(tmp_path, pages)


def test_an_error_after_the_claim_is_a_warning_of_the_build(tmp_path):
    """The claim itself has passed; the book's build turns warnings into errors."""
    late = RUN + "claim.rejects('too late', lambda v: v / 2)\n"
    _, warnings = build(tmp_path, good_book() | {"first.md": NOTEBOOK + "# First\n" + ALPHA + cell(late)})
    assert "Executing notebook failed" in warnings
