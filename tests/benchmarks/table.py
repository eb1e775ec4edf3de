"""The table of measured ratios: every benchmark adds its rows, and the book shows the file."""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

FILE = Path(__file__).parents[2] / "book" / "benchmarks.csv"
ENOUGH = 0.25
HEADER = ("what is measured", "here", "compared with", "there", "ratio", "limit", "met")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what is measured.
        here: this library's figure, with its unit.
        peer: what it is compared with.
        there: that one's figure.
        ratio: the two as a ratio.
        limit: what the ratio, or the figure, must keep to.
        met: whether it does; None where nothing was required.
    """

    what: str
    here: str
    peer: str
    there: str
    ratio: str
    limit: str
    met: bool | None

    def cells(self) -> list[str]:
        """Write the row out."""
        *texts, met = astuple(self)
        return [*texts, {True: "yes", False: "no", None: "–"}[met]]


def at_least(what: str, here: float, peer: str, there: float, limit: float | None) -> Row:
    """State how many times faster than a peer this library is, times in seconds."""
    ratio = there / here
    met = None if limit is None else ratio >= limit
    return Row(
        what, seconds(here), peer, seconds(there), f"{ratio:.3g} × faster", f"≥ {limit:g}" if limit else "–", met
    )


def at_most(what: str, here: float, peer: str, there: float, limit: float | None) -> Row:
    """State how many times a peer's time this library takes, times in seconds."""
    ratio = here / there
    met = None if limit is None else ratio <= limit
    return Row(what, seconds(here), peer, seconds(there), f"{ratio:.2f} ×", f"≤ {limit:g}" if limit else "–", met)


def seconds(value: float) -> str:
    """Write a time with two digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            break
    return f"{value * scale:.2g} {unit}" if value * scale < 100 else f"{value * scale:.0f} {unit}"


def timed(calls: Sequence[Callable[[], object]], *, rounds: int = 5) -> list[float]:
    """Time calls side by side.

    The calls take turns, so that a change in the machine's load falls on all of them. In a turn each is made once
    without a clock, so that none pays for memory and caches that another has left, and then again for at least
    `ENOUGH` seconds, of which the mean counts. The first turn does not count.

    Args:
        calls: What to time.
        rounds: How many turns count.

    Returns:
        The median of each over the turns, in seconds of processor time.
    """
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, kept in zip(calls, times, strict=True):
            call()
            start, made, spent = time.process_time(), 0, 0.0
            while spent < ENOUGH:
                call()
                made, spent = made + 1, time.process_time() - start
            if turn:
                kept.append(spent / made)
    return [statistics.median(kept) for kept in times]


def publish(group: str, rows: Sequence[Row], *, stop: bool = True) -> list[str]:
    """Print the rows of a group, write them into the book's table, and stop if one misses its limit.

    Args:
        group: Its name; its former rows are replaced, other groups stay.
        rows: The new ones.
        stop: Whether to end the program then.

    Returns:
        What missed its limit.
    """
    kept: list[list[str]] = []
    if FILE.is_file():
        with FILE.open(encoding="utf-8", newline="") as file:
            kept = [line for line in list(csv.reader(file))[1:] if line[0] != group]
    fresh = [[group, *row.cells()] for row in rows]
    with FILE.open("w", encoding="utf-8", newline="") as file:
        lines = sorted(kept + fresh, key=lambda line: line[0])
        csv.writer(file, lineterminator="\n").writerows([("benchmark", *HEADER), *lines])
    for line in fresh:
        print("  ".join(line))
    missed = [row.what for row in rows if row.met is False]
    if missed and stop:
        sys.exit(f"limits not kept: {missed}")
    return missed
