"""Chapters executed before their pages are read, in a small book."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sphinx.testing.util import SphinxTestApp

sys.path.insert(0, str(Path(__file__).parents[1] / "book" / "_ext"))

SETTINGS = """
extensions = ["myst_nb", "library_cache", "execute_ahead"]
html_theme = "basic"
exclude_patterns = ["_build"]
nb_execution_mode = "cache"
nb_execution_raise_on_error = False
execute_first = ["two", "absent"]
"""
PAGE = """---
jupytext:
  text_representation: {extension: .md, format_name: myst, format_version: 0.13}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
# A page

```{code-cell} ipython3
%s
```
"""


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "conf.py").write_text(SETTINGS)
    (tmp_path / "index.md").write_text("# Contents\n\n```{toctree}\none\ntwo\n```\n")
    apps: list[SphinxTestApp] = []

    def built(one: str, two: str) -> tuple[str, str, list[str]]:
        for name, code in (("one", one), ("two", two)):
            (tmp_path / f"{name}.md").write_text(PAGE % code)
        apps.append(SphinxTestApp("html", srcdir=tmp_path, freshenv=True))
        apps[-1].build()
        page = "".join((apps[-1].outdir / f"{name}.html").read_text() for name in ("one", "two"))
        ahead = [line for line in apps[-1].status.getvalue().splitlines() if line.startswith("executed ")]
        return page, apps[-1].warning.getvalue(), ahead

    yield built
    for app in apps:
        app.cleanup()


def test_what_the_cache_does_not_know_is_executed_once_and_shown(build: Any, tmp_path: Path) -> None:
    mark = 'open("runs", "a").write("{0}"); print("{0}" * 3)'
    page, warnings, ahead = build(mark.format("x"), mark.format("y"))
    assert warnings == ""
    assert len(ahead) == 2
    assert "xxx" in page and "yyy" in page
    assert sorted((tmp_path / "runs").read_text()) == ["x", "y"]

    # nothing has changed, then one page has
    _, _, ahead = build(mark.format("x"), mark.format("y"))
    assert ahead == []
    page, _, ahead = build(mark.format("x"), mark.format("z"))
    assert [line.split()[1] for line in ahead] == ["two"]
    assert "zzz" in page
    assert sorted((tmp_path / "runs").read_text()) == ["x", "y", "z"]


def test_a_page_that_fails_is_reported_and_not_kept(build: Any) -> None:
    page, warnings, ahead = build("print('fine')", "1 / 0")
    assert "ZeroDivisionError" in page
    assert "Executing notebook failed" in warnings
    assert sorted(line.split()[2] for line in ahead) == ["failed", "in"]
    _, warnings, ahead = build("print('fine')", "1 / 0")
    assert "Executing notebook failed" in warnings
    assert [line.split()[1] for line in ahead] == ["two"]
