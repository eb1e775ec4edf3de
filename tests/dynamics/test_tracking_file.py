"""The file of a tracker: plain, exact, never overwritten, whole after a kill, and continued where it ended."""

import csv
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ldyn.dynamics import _records
from ldyn.dynamics import tracking as tk
from ldyn.models import causal_transformer

PROBES = (tk.Probe("chosen", 'a, "b"', [1, 2], [3, 4]), tk.Probe("rejected", "é", [1], [5]))
BATCH = torch.tensor([[1, 2, 3, 4, 5]])


def tiny():
    return causal_transformer(6, width=4, seed=1)


def train(model, tracker, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(BATCH).log_softmax(-1)[0, :-1].gather(-1, BATCH[0, 1:, None]).sum().neg().backward()
        with tracker.step():
            optimizer.step()


def written(path, steps=3, **options):
    tracker = tk.Tracker(tiny(), PROBES, path, **options)
    train(tracker._model, tracker, steps)
    return tracker


def test_the_file_is_plain_csv_that_reads_back_exactly(tmp_path):
    path = tmp_path / "run.csv"
    tracker = written(path, phase="sft")
    tracker.observe()
    found = tk.read_records(path)
    assert len(found) == 8 and str(found) == str(list(tracker.table))  # as text, since NaN differs from itself
    assert [type(cell) for cell in found[0]] == [int, str, str, str, int, *[float] * 7, str]
    with path.open(encoding="utf-8", newline="") as file:
        plain = list(csv.DictReader(file))
    assert [row["name"] for row in plain[:2]] == ['a, "b"', "é"]
    assert [float(row["measured"]) for row in plain[:6]] == [row.measured for row in tracker.table[:6]]
    assert b"\r" not in path.read_bytes() and path.read_bytes().endswith(b"\n")


def test_nothing_is_written_before_the_first_record(tmp_path):
    tk.Tracker(tiny(), PROBES, tmp_path / "run.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_one_write_handed_to_the_disk(tmp_path, monkeypatch):
    synced = []
    path = tmp_path / "run.csv"
    monkeypatch.setattr(_records.os, "fsync", lambda _: synced.append(path.read_bytes().count(b"\n")))
    written(path)
    assert synced == [3, 5, 7]  # a header and two rows, then two rows at a time


def test_a_file_that_is_there_is_never_overwritten(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"path: expected a new file, or resume=True to continue it"):
        tk.Tracker(tiny(), PROBES, path)
    with pytest.raises(ValueError, match=r"path: expected a table that a tracker wrote"):
        tk.Tracker(tiny(), PROBES, path, resume=True)
    assert path.read_text() == "precious"


def test_a_continued_run_has_the_table_of_one_that_was_never_stopped(tmp_path):
    whole = written(tmp_path / "whole.csv", 6, every=2)
    model, path = tiny(), tmp_path / "run.csv"
    train(model, tk.Tracker(model, PROBES, str(path), 2), 4)
    tracker = tk.Tracker(model, PROBES, path, 2, resume=True)
    assert tracker.steps == 3  # step 2 was the last recorded one; step 3 was taken, which the table cannot know
    tracker.continue_at(4)
    assert len(tracker.table) == 4
    train(model, tracker, 2)
    assert tracker.table == whole.table and tuple(tk.read_records(path)) == whole.table
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_resume_where_there_is_nothing_begins(tmp_path):
    path = tmp_path / "run.csv"
    assert written(path, resume=True).steps == 3
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert written(empty, resume=True).steps == 3 and empty.read_bytes() == path.read_bytes()


def test_every_way_to_cut_the_last_record_is_mended(tmp_path):
    path = tmp_path / "run.csv"
    table, data = written(path).table, path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    records = [0, *ends[2::2]]  # where zero, one, two, three whole records end
    assert records[-1] == len(data)
    panel = table[0].panel
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        whole = sum(cut >= end for end in records[1:])
        file = _records.RecordFile(path, resume=True, panel=panel, size=2)
        assert [row for rows in file.records for row in rows] == list(table[: 2 * whole])
        if whole > 1:
            assert tuple(tk.read_records(path)) == table[: 2 * whole]
        assert path.read_bytes() == data[:cut]  # looking alone writes nothing
        if cut % 50 == 0:
            tracker = tk.Tracker(tiny(), PROBES, path, resume=True)
            assert tracker.steps == whole
            tracker.observe()
            kept = path.read_bytes()
            assert kept.startswith(data[: records[whole]]) and kept.count(b"\n") == 3 + 2 * whole
            assert str(tk.read_records(path)) == str(list(tracker.table))


def test_going_back_shortens_the_file_too(tmp_path):
    path = tmp_path / "run.csv"
    model = tiny()
    optimizer, tracker = torch.optim.SGD(model.parameters(), lr=0.1), tk.Tracker(model, PROBES, path)
    train(model, tracker, 2, optimizer)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, tracker, 3, optimizer)
    data, table = path.read_bytes(), tracker.table
    model.load_state_dict(state)
    again = tk.Tracker(model, PROBES, path, resume=True)
    assert again.steps == 5
    again.continue_at(2)
    assert tuple(tk.read_records(path)) == again.table == table[:4]
    train(model, again, 3)
    assert path.read_bytes() == data
    again.continue_at(0)
    assert path.read_bytes() == b"" and tk.read_records(path) == []
    train(model, again, 1)
    assert len(tk.read_records(path)) == 2


def test_a_disk_that_refuses_leaves_whole_records(tmp_path, monkeypatch):
    path = tmp_path / "run.csv"
    tracker = written(path)
    data, table = path.read_bytes(), tracker.table

    def full(_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(_records.os, "fsync", full)
        train(tracker._model, tracker, 1)
    assert path.read_bytes() == data and tracker.table == table and tracker.steps == 4
    train(tracker._model, tracker, 1)
    assert [row.step for row in tk.read_records(path)[-2:]] == [4, 4]


def test_two_writers_do_not_cut_off_each_others_records(tmp_path):
    path = tmp_path / "run.csv"
    first = written(path)
    second = tk.Tracker(tiny(), PROBES, path, resume=True)
    second.observe()
    data = path.read_bytes()
    for call in (first.observe, lambda: first.continue_at(1)):
        with pytest.raises(ValueError, match=r"path: expected .*run.csv' as it was left, .* something else writes"):
            call()
    assert path.read_bytes() == data and len(first.table) == 6
    path.unlink()
    with pytest.raises(ValueError, match="got 0 bytes"):
        second.observe()


def test_steps_are_counted_on_from_a_step_or_from_an_observation(tmp_path):
    path = tmp_path / "run.csv"
    written(path, phase="sft").observe()
    assert tk.Tracker(tiny(), PROBES, path, resume=True, phase="sft").steps == 3
    tracker = tk.Tracker(tiny(), PROBES, path, 2, resume=True, phase="dpo")
    assert (tracker.steps, tracker.phase_start) == (3, 3)
    train(tracker._model, tracker, 3)
    again = tk.Tracker(tiny(), PROBES, path, 2, resume=True, phase="dpo")
    assert [row.step for row in again.table[-4::2]] == [3, 5]
    assert (again.steps, again.phase_start) == (6, 3)


SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_tracking_file import PROBES, tiny, train
from ldyn.dynamics import tracking as tk

torch.set_num_threads(1)
folder, model = Path(sys.argv[1]), tiny()
tracker = tk.Tracker(model, PROBES, folder / "run.csv", resume=True)
state = folder / "state.pt"
if state.exists():
    model.load_state_dict(torch.load(state, weights_only=True))
    tracker.continue_at(3)
while tracker.steps < int(sys.argv[3]):
    train(model, tracker, 1)
    if tracker.steps == 3:
        torch.save(model.state_dict(), folder / "new.pt")
        (folder / "new.pt").rename(state)
"""


def test_a_killed_run_loses_at_most_its_last_record_and_is_continued(tmp_path):
    here = os.path.dirname(__file__)

    def run(steps):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), here, str(steps)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    path = tmp_path / "run.csv"
    with run(10**9) as process:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_bytes().count(b"\n") > 40) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen = path.read_bytes()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
    left = path.read_bytes()
    assert left.startswith(seen[: seen.rindex(b"\n") + 1])
    records = tk.read_records(path)
    assert len(records) >= 40 and [row.step for row in records] == sorted([*range(len(records) // 2)] * 2)
    path.write_bytes(left + b"21,train,chos")  # what a failing disk could have left besides
    with run(25) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    whole = written(tmp_path / "whole.csv", 25)
    assert tuple(tk.read_records(path)) == whole.table


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "what"),
    [
        (PROBES[:1], "fewer"),
        (PROBES[::-1], "another order"),
        ((PROBES[0], tk.Probe("rejected", "é", [1], [4])), "another token"),
        ((*PROBES, tk.Probe("more", "c", [1], [4])), "more"),
    ],
)
def test_other_probes_are_refused(tmp_path, others, what):
    path = tmp_path / "run.csv"
    written(path, 1)
    with pytest.raises(ValueError, match="probes: expected those whose records"):
        tk.Tracker(tiny(), others, path, resume=True)


def test_what_is_no_table_is_refused(tmp_path):
    path = tmp_path / "run.csv"
    written(path)
    data = path.read_bytes()
    lines = data.split(b"\n")
    wrong = {
        "path: expected the columns step, phase": data.replace(b"measured", b"Measured", 1),
        "path: expected a row of 13 columns in line 3": b"\n".join([*lines[:2], lines[2] + b",1", *lines[3:]]),
        "path: expected a row of 13 columns in line 4": b"\n".join([*lines[:3], b"x" + lines[3], *lines[4:]]),
        "path: expected the same probes in every record, got others in line 4": b"\n".join([*lines[:3], *lines[4:]]),
        "path: expected a table that a tracker wrote": b"\xff\xfe",
        "path: expected a row of 13 columns in line 2": lines[0] + b"\n\xff\n",
    }
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            tk.read_records(path)
        with pytest.raises(ValueError, match="path: expected"):
            tk.Tracker(tiny(), PROBES, path, resume=True)
        assert path.read_bytes() == content


def test_a_table_that_an_editor_gave_other_line_ends_is_read(tmp_path):
    path = tmp_path / "run.csv"
    table = written(path).table
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert tuple(tk.read_records(path)) == table
    tracker = tk.Tracker(tiny(), PROBES, path, resume=True)
    tracker.continue_at(2)
    assert tuple(tk.read_records(path)) == table[:4]


def test_places_that_are_no_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="path: expected a file in an existing folder"):
        tk.Tracker(tiny(), PROBES, tmp_path / "nowhere" / "run.csv")
    with pytest.raises(ValueError, match="path: expected the name of a file"):
        tk.Tracker(tiny(), PROBES, tmp_path)
    with pytest.raises(ValueError, match="which is no file"):
        tk.read_records(tmp_path / "run.csv")


def test_a_table_without_prediction_keeps_its_columns(tmp_path):
    path = tmp_path / "run.csv"
    written(path, predict=False)
    assert all(math.isnan(row.predicted) and row.stepped for row in tk.read_records(path))
