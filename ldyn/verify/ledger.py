"""The book's account: which statements there are, what they rest on, and what is missing.

Pure functions of plain records; the site builder calls them, and so can any other tool that reads ``ledger.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from .display import Record, badge_label


@dataclass(frozen=True)
class Block:
    """A theorem-like block of a page.

    Attributes:
        label: Its label.
        kind: Theorem, lemma, proposition or corollary.
        title: Its title as plain text.
        page: The page it stands on.
        position: Its place in the page, to be compared with those of claims.
    """

    label: str
    kind: str
    title: str
    page: str
    position: int


@dataclass(frozen=True)
class Placed:
    """The record of a claim, with the page and the place it was found at."""

    record: Record
    page: str
    position: int


@dataclass(frozen=True)
class Erratum:
    """A row of the errata page: its name, and the claim said to refute the source (empty for a slip of the pen)."""

    name: str
    claim: str


def problems(blocks: Sequence[Block], claims: Sequence[Placed], errata: Sequence[Erratum] = ()) -> list[str]:
    """List everything that must stop a build.

    Args:
        blocks: All theorem-like blocks.
        claims: All claims that were executed.
        errata: All rows of the errata page.

    Returns:
        One sentence for each problem; empty if the book may be published.
    """
    return [
        *_repeated("statement", (b.label for b in blocks)),
        *_repeated("claim", (c.record["label"] for c in claims)),
        *_repeated("erratum", (e.name for e in errata)),
        *_unmatched(blocks, claims),
        *_broken_uses(blocks, claims),
        *_circles({c.record["label"]: c.record["uses"] for c in claims}),
        *_incomplete(claims),
        *_errata_problems(claims, errata),
    ]


def _repeated(what: str, names: Iterable[str]) -> list[str]:
    return [f"{what} {name}: expected one, got {n}" for name, n in Counter(names).items() if n > 1]


def _unmatched(blocks: Sequence[Block], claims: Sequence[Placed]) -> list[str]:
    stated, claimed = {b.label: b for b in blocks}, {c.record["label"]: c for c in claims}
    found = [f"{b.page}: {b.kind} {b.label} has no claim" for b in blocks if b.label not in claimed]
    for label, claim in claimed.items():
        block = stated.get(label)
        if block is None:
            found.append(f"{claim.page}: claim {label} has no statement")
        elif block.page != claim.page:
            found.append(f"{claim.page}: claim {label} is not on the page of its statement, {block.page}")
        elif block.position > claim.position:
            found.append(f"{claim.page}: claim {label} stands above its statement")
    return found


def _broken_uses(blocks: Sequence[Block], claims: Sequence[Placed]) -> list[str]:
    known = {b.label for b in blocks}
    return [
        f"{c.page}: claim {c.record['label']} uses {name}, which is not a statement of the book"
        for c in claims
        for name in c.record["uses"]
        if name not in known
    ]


def _circles(uses: Mapping[str, Sequence[str]]) -> list[str]:
    on_circle = sorted(label for label in uses if label in _reachable(label, uses))
    return [f"claims that rest on themselves: {', '.join(on_circle)}"] if on_circle else []


def _reachable(label: str, uses: Mapping[str, Sequence[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(uses.get(label, ()))
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(uses.get(name, ()))
    return seen


def _incomplete(claims: Sequence[Placed]) -> list[str]:
    """Check the rules of evidence once more on the records, which did not have to come from `Claim`."""
    found = []
    for claim in claims:
        record, kinds = claim.record, {item["kind"] for item in claim.record["evidence"]}
        name = f"{claim.page}: claim {record['label']}"
        if "proves" not in kinds and not record["unproved"]:
            found.append(f"{name} has neither a proof nor a reason for having none")
        if not kinds & {"agrees", "converges", "bounds", "covers"}:
            found.append(f"{name} has no numeric check")
        if not record["controls"]:
            found.append(f"{name} has no negative control")
        if record["status"] != ("proved" if "proves" in kinds else "checked"):
            found.append(f"{name} says {record['status']}, which its evidence does not")
    return found


def _errata_problems(claims: Sequence[Placed], errata: Sequence[Erratum]) -> list[str]:
    refuted = {(control["erratum"], c.record["label"]) for c in claims for control in c.record["controls"]}
    labels, rows = {c.record["label"] for c in claims}, {e.name: e.claim for e in errata}
    found = []
    for erratum in errata:
        if erratum.claim and erratum.claim not in labels:
            found.append(f"erratum {erratum.name} names {erratum.claim}, which is not a claim")
        elif erratum.claim and (erratum.name, erratum.claim) not in refuted:
            found.append(f"erratum {erratum.name}: no control of claim {erratum.claim} refutes it")
    for name, label in sorted(refuted):
        if name and rows.get(name) != label:
            found.append(f"claim {label} refutes erratum {name}, but no row of the errata page says so")
    return found


def rows(blocks: Sequence[Block], claims: Sequence[Placed], number: Callable[[Block], str]) -> list[dict[str, Any]]:
    """Join statements and claims into the entries of the ledger, in the order of the blocks.

    Args:
        blocks: All theorem-like blocks.
        claims: All claims; each block has one.
        number: Maps a block to the number it is printed with.

    Returns:
        One flat entry for each statement, which is what ``ledger.json`` holds.
    """
    by_label = {c.record["label"]: c.record for c in claims}
    entries = []
    for block in blocks:
        place = {key: value for key, value in asdict(block).items() if key != "position"}
        entries.append({**place, "number": number(block), **by_label[block.label]})
    return entries


def summary(entries: Sequence[Mapping[str, Any]]) -> str:
    """Count what the ledger holds.

    Args:
        entries: What `rows` returned.

    Returns:
        One sentence.
    """
    proved = sum(entry["status"] == "proved" for entry in entries)
    checks = sum(len(entry["evidence"]) for entry in entries)
    controls = sum(len(entry["controls"]) for entry in entries)
    return (
        f"{len(entries)} statements: {proved} proved, {len(entries) - proved} checked without a symbolic proof; "
        f"{checks} checks passed and {controls} wrong forms refused."
    )


def table(entries: Sequence[Mapping[str, Any]], link: Callable[[str], str]) -> str:
    """Draw the ledger as an HTML table.

    Args:
        entries: What `rows` returned.
        link: Maps a label to HTML that names and links the statement.

    Returns:
        The table in a region that scrolls by itself.
    """
    body = "".join(_table_row(entry, link) for entry in entries)
    head = "".join(f'<th scope="col">{h}</th>' for h in ("statement", "status", "checks", "refused", "rests on"))
    return (
        '<div class="ldyn-scroll" role="region" aria-label="Ledger of all claims" tabindex="0">'
        f'<table class="ldyn-ledger"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _table_row(entry: Mapping[str, Any], link: Callable[[str], str]) -> str:
    checks = _items(f"{_named(item)}{item['result']} ({item['scope']})" for item in entry["evidence"])
    controls = _items(f"{control['what']}: {control['result']}" for control in entry["controls"])
    uses = _items((link(label) for label in entry["uses"]), escaped=True)
    status = escape(badge_label(dict(entry)))
    if entry["unproved"]:
        status += f'<p class="ldyn-why">{escape(entry["unproved"])}</p>'
    cells = "".join(f"<td>{cell}</td>" for cell in (status, checks, controls, uses))
    kind = "proved" if entry["status"] == "proved" else "checked"
    label = entry["label"]
    return f'<tr id="ledger-{label}" class="ldyn-{kind}"><th scope="row">{link(label)}</th>{cells}</tr>'


def _named(item: Mapping[str, Any]) -> str:
    return f"{item['kind']} {item['what']}: " if item["what"] else f"{item['kind']}: "


def _items(texts: Iterable[str], *, escaped: bool = False) -> str:
    lines = "".join(f"<li>{text if escaped else escape(text)}</li>" for text in texts)
    return f"<ul>{lines}</ul>" if lines else ""
