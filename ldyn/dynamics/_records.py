"""The table that a tracker writes: its columns, its file, and how it is read; the public names are in `tracking`."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Record(NamedTuple):
    """One response at one recorded optimiser step: one row of the table.

    A row of `Tracker.observe`, where no step was taken, has the same values before and after, and NaN as measured and
    predicted change.

    Attributes:
        step: optimiser steps taken before this one.
        phase: what the tracker's phase was.
        kind: the probe's kind.
        name: the probe's name.
        tokens: number of tokens of the response.
        log_prob_before: log π(y | x) before the step: the sum over the response's tokens, in nats.
        log_prob_after: the same after the step.
        measured: log_prob_after − log_prob_before.
        predicted: the change to first order in the step, A J Δθ summed over the tokens; NaN if not asked for.
        top_before: the log-probability of the most likely token at each place of the response, with the response's
            own tokens before it, summed over the places; before the step.
        top_after: the same after the step.
        top_mass: probability of the most likely token, averaged over the places; before the step.
        panel: fingerprint of all probes of the table, the same in every row.
    """

    step: int
    phase: str
    kind: str
    name: str
    tokens: int
    log_prob_before: float
    log_prob_after: float
    measured: float
    predicted: float
    top_before: float
    top_after: float
    top_mass: float
    panel: str

    @property
    def stepped(self) -> bool:
        """Whether a step was taken, and not only an observation made."""
        return not math.isnan(self.measured)


Rows = tuple[Record, ...]
"""The rows of all probes at one step."""

_INTEGERS, _TEXTS = ("step", "tokens"), ("phase", "kind", "name", "panel")


def _line(cells: Sequence[object]) -> bytes:
    """Write one line; floats with as many digits as they need to be read back exactly."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


HEADER = _line(Record._fields)


class _Stored(NamedTuple):
    """What a file holds: its complete records, and where each of them ends, in bytes."""

    records: list[Rows]
    ends: list[int]


def read_records(path: str | Path) -> list[Record]:
    """Read the table that a tracker wrote.

    A record that a killed run left incomplete at the end of the file is passed over.

    Args:
        path: The CSV file.

    Returns:
        Its rows, in the order of writing.

    Raises:
        ValueError: If there is no such file, or it is no table of a tracker.
    """
    place = Path(path)
    if not place.is_file():
        raise ValueError(f"path: expected a table that a tracker wrote, got {str(path)!r}, which is no file")
    return [row for rows in _stored(place).records for row in rows]


class RecordFile:
    """A CSV file to which whole records are appended; what is in it survives the process.

    Attributes:
        records: those the file held when it was opened.
    """

    def __init__(self, path: str | Path, *, resume: bool, panel: str, size: int) -> None:
        """Look at the file without writing to it yet.

        Args:
            path: The file.
            resume: Whether to continue a file that is there.
            panel: Fingerprint of the probes.
            size: Their number.

        Raises:
            ValueError: If the folder is missing, the file is there and not to be continued, or it holds something
                other than records of these probes.
        """
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise ValueError(f"path: expected a file in an existing folder, got {str(path)!r}")
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"path: expected the name of a file, got {str(path)!r}")
        if self.path.exists() and not resume:
            raise ValueError(f"path: expected a new file, or resume=True to continue it, got {str(path)!r}")
        self.records: list[Rows] = []
        self._ends: list[int] = []
        self._size = self._present_size()
        if self.path.exists():
            self.records, self._ends = _stored(self.path, panel=panel, size=size)

    def append(self, rows: Rows) -> None:
        """Add one record: one write, handed to the disk before this returns.

        Args:
            rows: The rows.

        Raises:
            ValueError: If something else has written to the file meanwhile.
            OSError: If the system refuses; the file then ends where it ended before.
        """
        self._require_untouched()
        start = self._ends[-1] if self._ends else 0
        data = (b"" if start else HEADER) + b"".join(_line(row) for row in rows)
        self._size = start
        with self.path.open("ab") as file:
            file.truncate(start)  # what a killed or failed write left behind the last whole record
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise
        self._size = start + len(data)
        self._ends.append(self._size)

    def keep(self, count: int) -> None:
        """Drop all records but the first ones.

        Args:
            count: How many to keep.

        Raises:
            ValueError: If something else has written to the file meanwhile.
        """
        if count < len(self._ends):
            self._require_untouched()
            self._ends = self._ends[:count]
            self._size = self._ends[-1] if self._ends else 0
            with self.path.open("r+b") as file:
                file.truncate(self._size)
                os.fsync(file.fileno())

    def _present_size(self) -> int:
        """Return the size of the file in bytes, 0 if there is none."""
        return self.path.stat().st_size if self.path.exists() else 0

    def _require_untouched(self) -> None:
        """Require the size that the file was left with: two writers would cut off each other's records."""
        if (size := self._present_size()) != self._size:
            raise ValueError(
                f"path: expected {str(self.path)!r} as it was left, with {self._size} bytes, got {size} bytes: "
                "something else writes to it"
            )


def _stored(path: Path, *, panel: str | None = None, size: int | None = None) -> _Stored:
    """Read a file record by record, up to the last complete one."""
    lines = path.read_bytes().split(b"\n")
    last = lines.pop()  # what stands behind the last line break is no whole line
    if not lines:
        if not HEADER.startswith(last):
            raise ValueError(f"path: expected a table that a tracker wrote, got {str(path)!r} with another beginning")
        return _Stored([], [])
    if lines[0].rstrip(b"\r") + b"\n" != HEADER:
        raise ValueError(
            f"path: expected the columns {', '.join(Record._fields)}, got {lines[0].decode(errors='replace')!r} "
            f"in {str(path)!r}"
        )
    rows = [_row(line, number, path) for number, line in enumerate(lines[1:], start=2)]
    if rows and panel is not None and rows[0].panel != panel:
        raise ValueError(
            f"probes: expected those whose records {str(path)!r} holds (panel {rows[0].panel}, starting with "
            f"{rows[0].kind!r} {rows[0].name!r}), got others (panel {panel})"
        )
    identities = [(row.kind, row.name, row.tokens, row.panel) for row in rows]
    period = size
    if period is None:  # a record ends where its first probe comes again
        period = next((at for at in range(1, len(rows)) if identities[at] == identities[0]), len(rows))
    whole = len(rows) // period * period if period else 0
    for at in range(len(rows)):
        first = rows[at // period * period]
        if identities[at] != identities[at % period] or (rows[at].step, rows[at].phase) != (first.step, first.phase):
            raise ValueError(f"path: expected the same probes in every record, got others in line {at + 2} of {path}")
    ends, offset = [], len(lines[0]) + 1
    for at, line in enumerate(lines[1 : whole + 1], start=1):
        offset += len(line) + 1
        if at % period == 0:
            ends.append(offset)
    return _Stored([tuple(rows[at : at + period]) for at in range(0, whole, period or 1)], ends)


def _row(line: bytes, number: int, path: Path) -> Record:
    """Read one whole line."""
    try:
        (cells,) = csv.reader([line.decode().rstrip("\r")])
        pairs = zip(Record._fields, cells, strict=True)
        return Record._make(_cell(key, text) for key, text in pairs)
    except ValueError as error:
        wanted, shown = f"a row of {len(Record._fields)} columns in line {number}", line.decode(errors="replace")
        raise ValueError(f"path: expected {wanted} of {path}, got {shown!r}") from error


def _cell(column: str, text: str) -> int | str | float:
    """Turn the text of a cell into what the column holds."""
    if column in _TEXTS:
        return text
    return int(text) if column in _INTEGERS else float(text)
