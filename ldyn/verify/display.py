"""How the record of a claim is shown: as text, and as the badge of its statement."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from typing import Any

Record = dict[str, Any]
_VERBS = {
    "proves": "proof",
    "agrees": "two routes agree",
    "converges": "order of the remainder",
    "bounds": "inequality",
    "covers": "coverage",
}


def badge_label(record: Record) -> str:
    """Return the few words that the badge shows when it is closed.

    Args:
        record: The record of a claim.

    Returns:
        For example ``"proved · every V"``.
    """
    if record["status"] == "proved":
        return "proved · " + ", ".join(record["scopes"])
    return "checked, not proved"


def render_text(record: Record) -> str:
    """Return the record as plain text.

    Args:
        record: The record of a claim.

    Returns:
        A line for the claim and one for each check and control.
    """
    lines = [f"{record['label']}: {badge_label(record)}"]
    if record["unproved"]:
        lines.append(f"  not proved: {record['unproved']}")
    for item in record["evidence"]:
        what = f"{item['what']}: " if item["what"] else ""
        lines.append(f"  {item['kind']:<9} {what}{item['result']} ({item['scope']})")
    for control in record["controls"]:
        lines.append(f"  refuses   {control['what']}: {control['result']}")
    if record["uses"]:
        lines.append(f"  uses      {', '.join(record['uses'])}")
    return "\n".join(lines)


def render_html(record: Record) -> str:
    """Return the badge for a notebook; the record itself travels in an attribute.

    Args:
        record: The record of a claim.

    Returns:
        HTML that the site builder recognises and moves to the statement.
    """
    data = escape(json.dumps(record, ensure_ascii=False, sort_keys=True), quote=True)
    shown = badge(record, lambda label: f"<code>{escape(label)}</code>")
    return f'<div class="ldyn-claim" data-claim="{data}">{shown}</div>'


def badge(record: Record, link: Callable[[str], str], *, foot: str = "") -> str:
    """Return the badge: closed, a few words; open, the table of evidence.

    Args:
        record: The record of a claim.
        link: Maps a label to HTML that names the statement.
        foot: HTML added at the end.

    Returns:
        A `details` element.
    """
    rows = "".join(
        _row(_VERBS[item["kind"]], item["what"], item["scope"], item["result"], "ldyn-check")
        for item in record["evidence"]
    ) + "".join(
        _row("refused", control["what"], _VERBS[control["kind"]], control["result"], "ldyn-control")
        for control in record["controls"]
    )
    parts = [
        '<table><thead><tr><th scope="col">check</th><th scope="col">of what</th><th scope="col">scope</th>'
        f'<th scope="col">result</th></tr></thead><tbody>{rows}</tbody></table>'
    ]
    if record["unproved"]:
        parts.insert(0, f'<p class="ldyn-why">Not proved: {escape(record["unproved"])}</p>')
    if record["uses"]:
        parts.append(f'<p class="ldyn-uses">Rests on {", ".join(map(link, record["uses"]))}.</p>')
    body = "".join(parts) + foot
    kind = "proved" if record["status"] == "proved" else "checked"
    return (
        f'<details class="ldyn-badge ldyn-{kind}"><summary><span class="ldyn-badge-label">'
        f'{escape(badge_label(record))}</span></summary><div class="ldyn-evidence">{body}</div></details>'
    )


def _row(kind: str, what: str, scope: str, result: str, css: str) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in (what, scope, result))
    return f'<tr class="{css}"><th scope="row">{escape(kind)}</th>{cells}</tr>'
