"""The ledger finds everything that must stop a build, and draws what may be published."""

import copy
import json
import xml.etree.ElementTree as ET

import pytest

from ldyn.verify import graph, ledger
from ldyn.verify.ledger import Block, Erratum, Placed


def record(label, uses=(), errata=(), status="proved"):
    kinds = ("proves", "agrees") if status == "proved" else ("agrees",)
    return {
        "label": label,
        "status": status,
        "scopes": ["every V"] if status == "proved" else [],
        "evidence": [{"kind": kind, "what": "", "scope": "s", "result": "r", "cases": 3} for kind in kinds],
        "controls": [{"what": "half", "kind": "agrees", "result": "r", "erratum": name} for name in errata or ("",)],
        "uses": list(uses),
        "unproved": "" if status == "proved" else "no closed form",
    }


def block(label, page="one", position=1):
    return Block(label, "theorem", f"Title of {label}", page, position)


def placed(label, page="one", position=2, **options):
    return Placed(record(label, **options), page, position)


def good():
    blocks = [block("a"), block("b", position=3), block("c", "two")]
    claims = [
        placed("a"),
        placed("b", position=4, uses=["a"], errata=["S0-1"]),
        placed("c", "two", uses=["a", "b"], status="checked"),
    ]
    return blocks, claims, [Erratum("S0-1", "b"), Erratum("S0-2", "")]


def test_a_complete_book_has_no_problem():
    assert ledger.problems(*good()) == []
    assert ledger.problems([], []) == []


def change(record_changes=None, **places):
    """Return a spoiler that replaces parts of the last claim."""

    def spoil(blocks, claims, errata):
        old = claims[-1]
        changed = {**copy.deepcopy(old.record), **(record_changes or {})}
        claims[-1] = Placed(changed, places.get("page", old.page), places.get("position", old.position))

    return spoil


SPOILED = {
    "statement without a claim": (lambda b, c, e: b.append(block("d")), "one: theorem d has no claim"),
    "claim without a statement": (lambda b, c, e: c.append(placed("d")), "one: claim d has no statement"),
    "claim on another page": (change(page="one"), "one: claim c is not on the page of its statement, two"),
    "claim above its statement": (change(position=0), "two: claim c stands above its statement"),
    "two statements with one label": (
        lambda b, c, e: b.append(block("a", position=0)),
        "statement a: expected one, got 2",
    ),
    "two claims with one label": (lambda b, c, e: c.append(placed("a")), "claim a: expected one, got 2"),
    "two errata with one name": (
        lambda b, c, e: e.append(Erratum("S0-2", "")),
        "erratum S0-2: expected one, got 2",
    ),
    "uses that points nowhere": (
        change({"uses": ["missing"]}),
        "two: claim c uses missing, which is not a statement of the book",
    ),
    "a circle": (
        lambda b, c, e: c.__setitem__(0, placed("a", uses=["c"])),
        "claims that rest on themselves: a, b, c",
    ),
    "a circle of one": (change({"uses": ["c"]}), "claims that rest on themselves: c"),
    "no proof and no reason": (change({"unproved": ""}), "two: claim c has neither a proof nor a reason"),
    "no numeric check": (
        change({"evidence": [{"kind": "proves"}], "status": "proved"}),
        "two: claim c has no numeric check",
    ),
    "no evidence": (change({"evidence": []}), "two: claim c has no numeric check"),
    "no control": (change({"controls": []}), "two: claim c has no negative control"),
    "a status typed by hand": (change({"status": "proved"}), "two: claim c says proved, which its evidence does not"),
    "an erratum of no claim": (
        lambda b, c, e: e.append(Erratum("S0-3", "missing")),
        "erratum S0-3 names missing, which is not a claim",
    ),
    "an erratum that its claim does not refute": (
        lambda b, c, e: e.append(Erratum("S0-3", "a")),
        "erratum S0-3: no control of claim a refutes it",
    ),
    "a refuted erratum without a row": (
        lambda b, c, e: e.pop(0),
        "claim b refutes erratum S0-1, but no row of the errata page says so",
    ),
    "a refuted erratum whose row names another claim": (
        lambda b, c, e: e.__setitem__(0, Erratum("S0-1", "a")),
        "claim b refutes erratum S0-1, but no row",
    ),
    "a refuted erratum whose row calls it a slip of the pen": (
        lambda b, c, e: e.__setitem__(0, Erratum("S0-1", "")),
        "claim b refutes erratum S0-1, but no row",
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), SPOILED.values(), ids=SPOILED.keys())
def test_each_problem_is_found_and_named(spoil, expected):
    book = good()
    spoil(*book)
    found = ledger.problems(*book)
    assert any(expected in line for line in found), found


def test_an_ending_circle_does_not_accuse_those_that_only_lead_to_it():
    blocks, claims, errata = good()
    claims[0] = placed("a", uses=["b"])
    found = ledger.problems(blocks, claims, errata)
    assert found == ["claims that rest on themselves: a, b"]


def test_rows_join_statements_and_claims_in_reading_order():
    blocks, claims, _ = good()
    rows = ledger.rows(blocks, list(reversed(claims)), lambda b: f"1.{b.position}")
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    assert [row["number"] for row in rows] == ["1.1", "1.3", "1.1"]
    assert rows[1]["title"] == "Title of b" and rows[1]["uses"] == ["a"]
    assert "position" not in rows[0]
    assert json.loads(json.dumps(rows)) == rows


def test_the_summary_counts():
    blocks, claims, _ = good()
    text = ledger.summary(ledger.rows(blocks, claims, lambda b: ""))
    assert text == (
        "3 statements: 2 proved, 1 checked without a symbolic proof; 5 checks passed and 3 wrong forms refused."
    )
    assert ledger.summary([]).startswith("0 statements")


def test_the_table_has_a_row_for_each_statement_and_is_well_formed():
    blocks, claims, _ = good()
    claims[0].record["evidence"][0]["what"] = "<b>not markup</b>"
    text = ledger.table(ledger.rows(blocks, claims, lambda b: ""), lambda label: f'<a href="#{label}">{label}</a>')
    tree = ET.fromstring(text)
    rows = tree.findall(".//tbody/tr")
    assert [row.get("id") for row in rows] == ["ledger-a", "ledger-b", "ledger-c"]
    assert [row.get("class") for row in rows] == ["ldyn-proved", "ldyn-proved", "ldyn-checked"]
    assert "no closed form" in text and "<b>" not in text
    assert ET.fromstring(ledger.table([], str)).findall(".//tbody/tr") == []


# --- the graph ---------------------------------------------------------------------------------------------------

USES = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": [], "f": ["e", "d"], "g": ["elsewhere"]}


def test_depth_is_the_longest_chain_below():
    assert graph.depths(USES) == {"a": 0, "b": 1, "c": 1, "d": 2, "e": 0, "f": 3, "g": 0}
    assert graph.depths({}) == {}


def test_every_statement_has_its_own_place_to_the_right_of_what_it_rests_on():
    places, stops = graph.places(USES)
    assert set(places) == set(USES)
    assert len(set(places.values())) == len(USES)
    for label, used in USES.items():
        for name in set(used) & set(USES):
            assert places[name][0] < places[label][0]
    assert graph.places({}) == ({}, {})
    assert len(set(places.values()) | set(stops.values())) == len(places) + len(stops)


def entries(uses):
    return [{"label": label, "uses": used, "status": "proved"} for label, used in uses.items()]


def test_the_drawing_has_a_node_for_each_statement_and_an_arrow_for_each_use():
    text = graph.draw(entries(USES), lambda label: f"page.html?a=1&b=2#{label}", lambda label: f"Theorem <{label}>")
    tree = ET.fromstring(text)
    assert len(tree.findall(".//a")) == len(USES)
    assert len([p for p in tree.findall(".//path") if p.get("marker-end")]) == 6
    assert tree.find(".//title").text == "Theorem <a>: a"
    svg = tree.find("svg")
    for rectangle in tree.findall(".//rect"):
        assert 0 <= int(rectangle.get("x")) <= int(svg.get("width")) - int(rectangle.get("width"))
        assert 0 <= int(rectangle.get("y")) <= int(svg.get("height")) - int(rectangle.get("height"))


def test_an_empty_graph_is_drawn():
    tree = ET.fromstring(graph.draw([], str, str))
    assert tree.findall(".//a") == []
    assert int(tree.find("svg").get("height")) > 0


def test_the_drawing_is_the_same_twice():
    assert graph.draw(entries(USES), str, str) == graph.draw(entries(USES), str, str)
