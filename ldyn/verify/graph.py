"""The dependency graph of the book's statements, drawn as an SVG that needs no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

_COLUMN, _ROW, _WIDTH, _HEIGHT, _MARGIN = 230, 34, 190, 24, 8


def depths(uses: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return how many steps each statement stands above those that rest on nothing.

    Args:
        uses: For each label the labels it rests on; without circles.

    Returns:
        The length of the longest chain below each label.
    """
    known: dict[str, int] = {}

    def depth(label: str) -> int:
        if label not in known:
            known[label] = max((depth(name) + 1 for name in uses.get(label, ()) if name in uses), default=0)
        return known[label]

    return {label: depth(label) for label in uses}


def places(uses: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Place each statement in a column by depth, near the statements that it rests on.

    Args:
        uses: For each label the labels it rests on.

    Returns:
        Column and row of each label.
    """
    level = depths(uses)
    placed: dict[str, tuple[int, int]] = {}
    for column in range(max(level.values(), default=-1) + 1):
        members = [label for label in uses if level[label] == column]
        order = {label: n for n, label in enumerate(members)}
        members.sort(key=lambda label: (_mean_row(uses[label], placed), order[label]))
        placed.update({label: (column, row) for row, label in enumerate(members)})
    return placed


def _mean_row(labels: Sequence[str], placed: Mapping[str, tuple[int, int]]) -> float:
    found = [placed[label][1] for label in labels if label in placed]
    return sum(found) / len(found) if found else 0.0


def draw(entries: Sequence[Mapping[str, Any]], href: Callable[[str], str], name: Callable[[str], str]) -> str:
    """Draw the graph, an arrow leading from each statement to those that rest on it.

    Args:
        entries: What `ldyn.verify.ledger.rows` returned.
        href: Maps a label to the address of its statement.
        name: Maps a label to the number it is printed with, for example ``"Theorem 2"``.

    Returns:
        An inline SVG whose nodes are links, in a region that scrolls by itself.
    """
    uses = {entry["label"]: list(entry["uses"]) for entry in entries}
    status = {entry["label"]: entry["status"] for entry in entries}
    placed = places(uses)
    columns = max((c for c, _ in placed.values()), default=0) + 1
    height = (max((r for _, r in placed.values()), default=0) + 1) * _ROW + 2 * _MARGIN
    width = (columns - 1) * _COLUMN + _WIDTH + 2 * _MARGIN
    edges = "".join(_edge(placed[used], placed[label]) for label in uses for used in uses[label] if used in placed)
    nodes = "".join(_node(label, placed[label], status[label], href(label), name(label)) for label in uses)
    return (
        '<div class="ldyn-scroll" role="region" aria-label="Dependency graph" tabindex="0">'
        f'<svg class="ldyn-graph" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="group" '
        'aria-label="Which statement rests on which; arrows lead from a statement to those that use it">'
        '<defs><marker id="ldyn-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="currentColor"/></marker></defs>'
        f'<g class="ldyn-edges">{edges}</g><g class="ldyn-nodes">{nodes}</g></svg></div>'
    )


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return _MARGIN + place[0] * _COLUMN, _MARGIN + place[1] * _ROW


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x0, y0), (x1, y1) = _corner(start), _corner(end)
    x0, y0, y1 = x0 + _WIDTH, y0 + _HEIGHT // 2, y1 + _HEIGHT // 2
    bend = (x1 - x0) // 2
    return (
        f'<path d="M{x0} {y0}C{x0 + bend} {y0} {x1 - bend} {y1} {x1} {y1}" fill="none" stroke="currentColor" '
        'marker-end="url(#ldyn-arrow)"/>'
    )


def _node(label: str, place: tuple[int, int], status: str, href: str, name: str) -> str:
    x, y = _corner(place)
    return (
        f'<a href="{escape(href)}" class="ldyn-{status}"><title>{escape(name)}: {escape(label)}</title>'
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="3"/>'
        f'<text x="{x + 8}" y="{y + 16}">{escape(label)}</text></a>'
    )
