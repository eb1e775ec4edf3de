"""A progress bar that short work, a missing package and a quiet caller never show."""

import itertools
import sys

import pytest

from ldyn._progress import progress_bar


def test_long_work_is_shown_on_stderr_and_short_work_is_not(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    with progress_bar(2, desc="waiting", unit="step") as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")
    ticks = itertools.count(0.0, 3.0)
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks))
    with progress_bar(3, desc="waiting", unit="step", done=1) as bar:
        bar.update()
        bar.set_postfix({"loss": "1.0"}, refresh=True)
    out, err = capsys.readouterr()
    assert out == "" and "waiting" in err and "2/3" in err and "loss=1.0" in err


@pytest.mark.parametrize("why", ["not asked for", "not installed"])
def test_a_bar_that_nobody_sees_takes_the_same_calls(capsys, monkeypatch, why):
    if why == "not installed":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar(None, desc="waiting", unit="step", shown=why == "not installed") as bar:
        bar.update(5)
        bar.set_postfix({"loss": "1.0"}, refresh=True)
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_an_error_passes_through():
    with pytest.raises(RuntimeError, match="stop"), progress_bar(2, desc="waiting", unit="step", shown=False):
        raise RuntimeError("stop")
