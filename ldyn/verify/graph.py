"""The dependency graph of the book's statements, drawn as an SVG that needs no script.

Statements stand in columns, by how many steps lie between them and those that rest on nothing. An arrow that
crosses a column passes through a stop of its own there, so that it never runs through another statement; arrows
from one statement share their stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

_COLUMN, _ROW, _STOP, _WIDTH, _HEIGHT, _MARGIN = 225, 34, 14, 185, 24, 8

Uses = Mapping[str, Sequence[str]]
Point = tuple[int, int]
Stop = tuple[str, int]
"""A statement and the column that arrows from it cross."""


def depths(uses: Uses) -> dict[str, int]:
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


def places(uses: Uses) -> tuple[dict[str, Point], dict[Stop, Point]]:
    """Place each statement, and each stop of an arrow, level with the statements that it comes from.

    Args:
        uses: For each label the labels it rests on; without circles.

    Returns:
        The upper left corner of each statement, and the point of each stop, in pixels.
    """
    level = depths(uses)
    before = {label: [name for name in uses[label] if name in uses] for label in uses}
    reach = {name: max((level[label] for label in uses if name in before[label]), default=0) for name in uses}
    nodes: dict[str, Point] = {}
    stops: dict[Stop, Point] = {}

    def height(name: str, column: int) -> int:
        """Return where the arrow from a statement enters a column."""
        return stops[name, column][1] if (name, column) in stops else nodes[name][1] + _HEIGHT // 2

    for column in range(max(level.values(), default=-1) + 1):
        wanted: list[tuple[float, int, str | Stop]] = []
        for number, label in enumerate(uses):
            if level[label] == column:
                heights = [height(name, column - 1) for name in before[label]]
                wanted.append((sum(heights) / len(heights) if heights else 0.0, number, label))
            elif level[label] < column < reach[label]:
                wanted.append((float(height(label, column - 1)), number, (label, column)))
        x, y = _MARGIN + column * _COLUMN, _MARGIN
        for desired, _, item in sorted(wanted, key=lambda entry: entry[:2]):
            if isinstance(item, str):
                y = max(y, int(desired) - _HEIGHT // 2)
                nodes[item] = (x, y)
                y += _ROW
            else:
                y = max(y, int(desired) - _STOP // 2)
                stops[item] = (x, y + _STOP // 2)
                y += _STOP
    return nodes, stops


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
    nodes, stops = places(uses)
    width = max((x for x, _ in nodes.values()), default=0) + _WIDTH + _MARGIN
    height = max((y for _, y in [*nodes.values(), *stops.values()]), default=0) + _HEIGHT + _MARGIN
    edges = "".join(
        _edge(nodes[used], _stops_between(used, nodes[label], stops), nodes[label])
        for label in uses
        for used in uses[label]
        if used in nodes
    )
    boxes = "".join(_node(label, nodes[label], status[label], href(label), name(label)) for label in uses)
    return (
        '<div class="ldyn-scroll" role="region" aria-label="Dependency graph" tabindex="0">'
        f'<svg class="ldyn-graph" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="group" '
        'aria-label="Which statement rests on which; arrows lead from a statement to those that use it">'
        '<defs><marker id="ldyn-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="currentColor"/></marker></defs>'
        f'<g class="ldyn-edges">{edges}</g><g class="ldyn-nodes">{boxes}</g></svg></div>'
    )


def _stops_between(name: str, end: Point, stops: Mapping[Stop, Point]) -> list[Point]:
    """Return the stops of an arrow from a statement, in order, before the column of its end."""
    return sorted(point for (source, _), point in stops.items() if source == name and point[0] < end[0])


def _edge(start: Point, through: Sequence[Point], end: Point) -> str:
    """Draw an arrow: a bend between columns, a straight line across each."""
    x, y = start[0] + _WIDTH, start[1] + _HEIGHT // 2
    path = f"M{x} {y}"
    for target_x, target_y in [*through, (end[0], end[1] + _HEIGHT // 2)]:
        bend = (target_x - x) // 2
        path += f"C{x + bend} {y} {target_x - bend} {target_y} {target_x} {target_y}"
        x, y = target_x, target_y
        if target_x < end[0]:
            x += _WIDTH
            path += f"H{x}"
    return f'<path d="{path}" fill="none" stroke="currentColor" marker-end="url(#ldyn-arrow)"/>'


def _node(label: str, place: Point, status: str, href: str, name: str) -> str:
    x, y = place
    return (
        f'<a href="{escape(href)}" class="ldyn-{status}"><title>{escape(name)}: {escape(label)}</title>'
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="3"/>'
        f'<text x="{x + 8}" y="{y + 16}">{escape(label)}</text></a>'
    )
