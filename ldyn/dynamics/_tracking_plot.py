"""Pictures of a tracker's table; the public name is in `tracking`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, cast

from ldyn import _checks, plots
from ldyn.dynamics._records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS: Final[Mapping[str, str]] = {
    "log_prob": "log-probability of the response (nats)",
    "top": "log-probability of the top tokens (nats)",
    "top_mass": "probability of the top token",
    "measured": "change in one step (nats)",
    "prediction": "measured change (nats)",
}
_COLOURS: Final = ("blue", "vermillion", "green", "orange", "purple", "sky", "grey")
_MARKERS: Final = "osD^vP*X"


class _Style(NamedTuple):
    """How one group is drawn; no two of the first dozens agree, and none differ by colour alone."""

    color: str
    linestyle: str
    marker: str


def plot_records(
    records: Sequence[Record],
    *,
    y: Literal["log_prob", "top", "top_mass", "measured", "prediction"] = "log_prob",
    by: Literal["kind", "name"] = "kind",
    ax: Axes | None = None,
) -> Figure:
    """Draw what a tracker recorded, against the number of optimiser steps taken.

    Args:
        records: The rows, from ``tracker.table`` or `read_records`.
        y: "log_prob" draws log π(y | x), a sum over the response's tokens; "top" the log-probability of the most
            likely tokens in the response's own context, summed likewise; "top_mass" their probability, averaged over
            the places; "measured" the change in each recorded step, and the prediction beside it, dashed;
            "prediction" the measured against the predicted change, one point for each response and recorded step.
        by: "kind" draws for each kind the mean over its responses, "name" each response.
        ax: Where to draw; None opens a figure in the book's style.

    Returns:
        The figure. Where there were steps of several phases, a thin line marks where each begins.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no records, an option is unknown, or there is no step among the records where a
            change is asked for.
    """
    if y not in _LABELS:
        raise ValueError(f"y: expected one of {sorted(_LABELS)}, got {_checks.describe(y)}")
    if by not in ("kind", "name"):
        raise ValueError(f"by: expected 'kind' or 'name', got {_checks.describe(by)}")
    rows = list(records)
    if not rows or not all(isinstance(row, Record) for row in rows):
        raise ValueError(f"records: expected at least one Record, got {len(rows)} object(s)")
    if y in ("measured", "prediction") and not any(row.stepped for row in rows):
        raise ValueError("records: expected at least one step, got observations only")
    if ax is None:
        import matplotlib as mpl

        with mpl.rc_context(dict(plots.STYLE)):
            _, ax = plots.figure()
            _draw(ax, rows, y, by)
    else:
        _draw(ax, rows, y, by)
    return cast("Figure", ax.get_figure())


def _draw(ax: Axes, rows: list[Record], y: str, by: str) -> None:
    """Draw everything on given axes."""
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(row.kind if by == "kind" else f"{row.kind}, {row.name}", []).append(row)
    for number, (label, group) in enumerate(groups.items()):
        style = _Style(
            plots.PALETTE[_COLOURS[number % len(_COLOURS)]],
            plots.LINE_STYLES[number % len(plots.LINE_STYLES)],
            _MARKERS[number % len(_MARKERS)],
        )
        _draw_group(ax, group, y, label, style)
    if y == "prediction":
        ax.axline((0, 0), slope=1, color=plots.PALETTE["grey"], linewidth=0.8, zorder=0)
        ax.set_xlabel("predicted change (nats)")
    else:
        ax.set_xlabel("optimiser steps taken")
        _mark_phases(ax, rows)
    ax.set_ylabel(_LABELS[y])
    if y == "measured" and any(math.isfinite(row.predicted) for row in rows):
        ax.plot([], [], "--", marker="o", color=plots.PALETTE["grey"], markerfacecolor="none", label="predicted")
    # many names would cover the curves, so they stand beside them
    ax.legend(**({"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(groups) > 4 else {}))


def _draw_group(ax: Axes, rows: list[Record], y: str, label: str, style: _Style) -> None:
    """Draw one kind, or one response."""
    taken = [row for row in rows if row.stepped]
    if y == "prediction":
        points = [(row.predicted, row.measured) for row in taken if math.isfinite(row.predicted)]
        x, height = zip(*points, strict=True) if points else ((), ())
        ax.plot(x, height, style.marker, color=style.color, markersize=3.5, alpha=0.8, label=label)
    elif y == "measured":
        ax.plot(*_means(taken, "measured"), "-", marker=style.marker, color=style.color, label=label)
        told = [row for row in taken if math.isfinite(row.predicted)]
        ax.plot(*_means(told, "predicted"), "--", marker=style.marker, color=style.color, markerfacecolor="none")
    else:
        columns = {"log_prob": "log_prob_before", "top": "top_before", "top_mass": "top_mass"}
        steps, values = _means(rows, columns[y])
        if y != "top_mass" and rows[-1].stepped:  # the state that the last recorded step led to
            last = [row for row in rows if row.stepped and row.step == rows[-1].step]
            after = "log_prob_after" if y == "log_prob" else "top_after"
            steps, values = [*steps, rows[-1].step + 1], [*values, *_means(last, after)[1]]
        ax.plot(
            steps,
            values,
            linestyle=style.linestyle,
            marker=style.marker,
            markersize=3.0,
            color=style.color,
            label=label,
        )


def _means(rows: Iterable[Record], column: str) -> tuple[list[int], list[float]]:
    """Average a column over the rows of each step."""
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(row.step, []).append(getattr(row, column))
    return list(values), [statistics.fmean(value) for value in values.values()]


def _mark_phases(ax: Axes, rows: list[Record]) -> None:
    """Mark where each phase begins, if there are several."""
    starts: list[tuple[int, str]] = []
    for row in (row for row in rows if row.stepped):
        if not starts or row.phase != starts[-1][1]:
            starts.append((row.step, row.phase))
    if len(starts) < 2:
        return
    for step, phase in starts:
        ax.axvline(step, color=plots.PALETTE["grey"], linewidth=0.8, zorder=0)
        # beside the line, just above the axes, so that no curve runs through it
        ax.text(step, 1.01, phase, fontsize=8.0, color=plots.INK, va="bottom", transform=ax.get_xaxis_transform())
