"""What the book's own Sphinx extensions do, without building a book."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from pygments import highlight
from pygments.lexers import PythonLexer
from pygments.styles import get_style_by_name
from pygments.token import Text
from sphinx.testing.util import SphinxTestApp

sys.path.insert(0, str(Path(__file__).parents[1] / "book" / "_ext"))

import explorable
import figures
import highlighting
import library_cache
import maths
import plain_notebooks
import previews

SVG = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg width="72pt" height="36pt" viewBox="0 0 72 36" xmlns="http://www.w3.org/2000/svg" version="1.1">
 <defs><style type="text/css">*{stroke-linejoin: round}</style></defs>
 <g id="figure_1"><path id="mark" d="M 0 0" style="fill: #ffffff"/>
 <use xlink:href="#mark" style="stroke: #1b1b1b; fill: #0072b2"/><path clip-path="url(#mark)" d=""/></g>
</svg>"""


def test_a_drawing_takes_the_page_s_colours() -> None:
    drawn = figures.inline_svg(SVG, prefix="drawing1-", label='a "line" & more')
    assert drawn.startswith("<svg ")
    assert 'role="img" aria-label="a &quot;line&quot; &amp; more"' in drawn
    assert "stroke: currentColor" in drawn
    assert "fill: var(--figure-ground)" in drawn
    assert "fill: var(--figure-blue)" in drawn
    assert "<style" not in drawn
    assert 'width="96"' in drawn


def test_the_ids_of_two_drawings_differ() -> None:
    first, second = (figures.inline_svg(SVG, prefix=f"drawing{n}-", label="x") for n in (1, 2))
    assert 'id="drawing1-mark"' in first
    assert 'xlink:href="#drawing1-mark"' in first
    assert "url(#drawing1-mark)" in first
    assert "figure_1" not in first
    assert "drawing1-" not in second


def test_what_is_no_drawing_is_refused() -> None:
    with pytest.raises(ValueError, match="source: expected an SVG drawing"):
        figures.inline_svg("<p>text</p>", prefix="", label="")


def test_formulas_are_typeset_and_wrong_ones_refused() -> None:
    assert 'class="katex"' in maths.render("x^2", display=False)
    assert "katex-display" in maths.render(r"\sum_i p_i", display=True)
    with pytest.raises(maths.TypesettingError, match="Undefined control sequence"):
        maths.render(r"\nosuchcommand", display=False)
    assert 'class="katex"' in maths.render("y", display=False)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "ldyn" / "part").mkdir(parents=True)
    (tmp_path / "ldyn" / "part" / "topic.py").write_text("x = 1\n")
    (tmp_path / "requirements.lock").write_text("torch==1\n")
    return tmp_path


def test_the_cache_belongs_to_one_state_of_the_library(library: Path) -> None:
    before = library_cache.library_hash(library)
    assert library_cache.library_hash(library) == before
    (library / "ldyn" / "__pycache__").mkdir()
    (library / "ldyn" / "__pycache__" / "topic.pyc").write_text("compiled")
    assert library_cache.library_hash(library) == before
    (library / "requirements.lock").write_text("torch==2\n")
    changed = library_cache.library_hash(library)
    (library / "ldyn" / "part" / "topic.py").write_text("x = 2\n")
    assert len({before, changed, library_cache.library_hash(library)}) == 3


def test_a_renamed_module_is_another_state(library: Path) -> None:
    before = library_cache.library_hash(library)
    (library / "ldyn" / "part" / "topic.py").rename(library / "ldyn" / "part" / "other.py")
    assert library_cache.library_hash(library) != before


def test_old_caches_are_forgotten(library: Path) -> None:
    class Settings(dict):
        pass

    app = SimpleNamespace(srcdir=str(library), outdir=str(library / "_build" / "html"))
    for number in range(5):
        (library / "ldyn" / "part" / "topic.py").write_text(f"x = {number}\n")
        settings = Settings()
        library_cache.name_cache(app, settings)
        assert Path(settings["nb_execution_cache_path"]).is_dir()
    assert len(list((library / "_build" / "cells").iterdir())) <= library_cache.KEPT


MYST = """(target)=
# Title

```{prf:theorem} A name
:label: a-theorem

For every $z$,

$$
x = y
$$ (an-equation)

```

See {prf:ref}`a-theorem`, {eq}`an-equation`, {doc}`the chapter <kl>`, {cite:t}`someone` and [](#a-theorem).

````{admonition} Proof
:class: dropdown

```{note}
Nested.
```
````

```python
{prf:ref}
```

+++
% a comment
```{solution-start} exercise
:class: dropdown
```
"""


def test_notebooks_are_plain() -> None:
    names = dict(plain_notebooks.labelled(MYST))
    assert names["a-theorem"] == "Theorem (A name)"
    assert plain_notebooks.plain(MYST, names).split("\n\n") == [
        "# Title",
        "**Theorem (A name)**",
        "For every $z$,",
        r"$$" + "\nx = y " + r"\tag{an-equation}$$",
        "See Theorem (A name), (an-equation), the chapter, [someone] and Theorem (A name).",
        "**Proof**",
        "**Note**",
        "Nested.",
        "```python\n{prf:ref}\n```",
        "**Solution**",
    ]


def test_every_executed_chapter_is_written(tmp_path: Path) -> None:
    for name, text in {"index": "# Front", "part/topic": MYST}.items():
        cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("1 + 1", execution_count=1)]
        path = tmp_path / "executed" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    written = plain_notebooks.write_all(tmp_path / "executed", tmp_path / "notebooks")
    assert [path.name for path in written] == ["index.ipynb", "part-topic.ipynb"]
    notebook = nbformat.read(written[1], as_version=4)
    assert notebook.cells[1].source == "1 + 1"
    assert notebook.metadata.kernelspec.name == "python3"
    assert "{prf" not in notebook.cells[0].source.replace("{prf:ref}\n```", "")


def test_printed_text_that_arrives_in_pieces_is_stored_once() -> None:
    def printed(text: str, name: str = "stdout") -> nbformat.NotebookNode:
        return nbformat.v4.new_output("stream", name=name, text=text)

    picture = nbformat.v4.new_output("display_data", data={"text/plain": "picture"})
    outputs = [printed("one\n"), picture, printed("two\n"), printed("oops\n", "stderr"), printed("three")]
    joined = library_cache.joined_streams(outputs)
    assert [output.get("text") for output in joined] == ["one\ntwo\nthree", None, "oops\n"]
    assert joined == library_cache.joined_streams(joined)


def test_a_preview_carries_no_anchor_link_or_evidence() -> None:
    badge = '<details class="ldyn-badge"><summary>proved</summary></details>'
    shown = previews.clean(f'<div class="admonition" id="a"><p>See <a href="#b">it</a>.</p>{badge}</div>')
    assert shown == '<div class="admonition"><p>See it.</p></div>'
    drawn = previews.clean('<svg><path id="m"/><use xlink:href="#m" clip-path="url(#m)" style="fill: #ffffff"/></svg>')
    assert 'id="preview-m"' in drawn
    assert 'xlink:href="#preview-m"' in drawn
    assert 'clip-path="url(#preview-m)"' in drawn
    assert "fill: #ffffff" in drawn


def test_only_references_in_the_text_have_previews() -> None:
    body = '<a class="reference internal" href="kl.html#x"></a><a class="headerlink" href="#y"></a><a href="#z"></a>'
    assert previews.references(body, "book/foundations") == {("book/foundations/kl", "x")}


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_token_left_unmarked_looks_like_plain_text(mode: str) -> None:
    settings = yaml.safe_load((Path(__file__).parents[1] / "_config.yml").read_text(encoding="utf-8"))
    style = get_style_by_name(settings["sphinx"]["config"]["html_theme_options"][f"pygments_{mode}_style"])
    for kind in highlighting.PLAIN:
        assert style.style_for_token(kind) == style.style_for_token(Text), kind


def test_only_what_has_a_colour_of_its_own_is_marked() -> None:
    marked = highlight("from m import f\nf(a, [b])  # c\n", PythonLexer(), highlighting.PlainNamesFormatter())
    assert 'class="kn"' in marked
    assert 'class="c1"' in marked
    assert not any(f'class="{plain}"' in marked for plain in ("n", "nn", "p", "w"))
    assert "f(a, [b])" in marked


def test_previews_start_when_their_script_is_read() -> None:
    written = 'tips = {}\nwindow.onload = function () {\n  for (;;) { f(); };\n  console.log("done");\n};\n'
    started = previews.start_at_once(written)
    assert "onload" not in started
    assert "console" not in started
    assert "for (;;) { f(); };" in started
    assert started.count("{") == started.count("}")
    assert previews.start_at_once(started) == started


STATE = {"p": "0.5, 0.3 0.2", "y": "2", "s": "1.5"}


def test_a_live_figure_starts_inside_the_simplex() -> None:
    assert explorable.starting_state(STATE) == {"p": [0.5, 0.3, 0.2], "y": 2, "s": 1.5}
    assert explorable.starting_state({"p": " ".join(["0.1"] * 10), "y": " 0 ", "s": "0"})["s"] == 0


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("p", "", "p: expected a value, got none"),
        ("p", "0.5 half", "p: expected numbers, got '0.5 half'"),
        ("p", "1.0", "p: expected 2 to 10 probabilities, got 1"),
        ("p", "0.05 " * 20, "p: expected 2 to 10 probabilities, got 20"),
        ("p", "0.5 0.3 0.3", "p: expected probabilities that sum to 1, got a sum of 1.1"),
        ("p", "0.5 0.3 0.2000001", "p: expected probabilities that sum to 1"),
        ("p", "0.7 0.5 -0.2", "p: expected probabilities between 0.001 and 0.99"),
        ("p", "0.5 0.5 0", "p: expected probabilities between 0.001 and 0.99"),
        ("p", "0.5 0.5 nan", "p: expected probabilities between 0.001 and 0.99"),
        ("y", "3", "y: expected a label from 0 to 2, got '3'"),
        ("y", "-1", "y: expected a label from 0 to 2, got '-1'"),
        ("y", "1.0", "y: expected a label from 0 to 2, got '1.0'"),
        ("s", "-0.1", "s: expected one number from 0 to 30, got '-0.1'"),
        ("s", "nan", "s: expected one number from 0 to 30"),
        ("s", "30.5", "s: expected one number from 0 to 30"),
        ("s", "1 2", "s: expected one number from 0 to 30"),
    ],
)
def test_a_start_outside_is_refused(option: str, given: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        explorable.starting_state({**STATE, option: given})
    assert str(refused.value).startswith(message)


DRAWN = """
Title
=====

.. figure:: drawing.svg
   :name: fig-static
   :alt: a drawing

   A caption.

.. figure:: drawing.svg
   :name: fig-other
   :alt: a drawing

   Another.
"""
PLACED = """
.. explorable:: squeezing
   :fallback: fig-static
   :p: 0.5 0.3 0.2
   :y: 2
   :s: 1.5
"""


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[[str], tuple[str, str, str]]]:
    """Build a page and one beside it; return both and the warnings."""
    (tmp_path / "conf.py").write_text("extensions = ['explorable']\nhtml_theme = 'basic'\n")
    (tmp_path / "drawing.svg").write_text(SVG)
    (tmp_path / "other.rst").write_text(":orphan:\n\nOther\n=====\n")
    source, apps = tmp_path / "index.rst", list[SphinxTestApp]()

    def built(text: str) -> tuple[str, str, str]:
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        apps.append(SphinxTestApp("html", srcdir=tmp_path))
        apps[-1].build()
        pages = [(apps[-1].outdir / f"{name}.html").read_text() for name in ("index", "other")]
        return pages[0], pages[1], apps[-1].warning.getvalue()

    yield built
    for app in apps:
        app.cleanup()


def test_only_the_page_with_a_live_figure_loads_its_files(build: Any, tmp_path: Path) -> None:
    page, other, warnings = build(DRAWN + PLACED)
    assert warnings == ""
    place = BeautifulSoup(page, "html.parser").select_one("[data-explorable]")
    assert place is not None and place.has_attr("hidden")
    assert place["data-explorable"] == "squeezing"
    assert place["data-fallback"] == "fig-static"
    assert place["data-p"] == "[0.5, 0.3, 0.2]"
    assert (place["data-y"], place["data-s"]) == ("2", "1.5")
    for name in ("squeezing.js", "squeezing.css"):
        assert f"_static/explorables/{name}" in page
        assert f"_static/explorables/{name}" not in other
        served = tmp_path / "_build" / "html" / "_static" / "explorables" / name
        assert served.read_bytes() == (explorable.SOURCES / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLACED.replace("squeezing", "stretching"), "explorable: expected one of squeezing, got stretching"),
        (PLACED.replace("fig-static", "fig-absent"), "explorable: no figure on this page is named fig-absent"),
        (PLACED.replace("   :fallback: fig-static\n", ""), "explorable: expected the option fallback"),
        (PLACED.replace("0.5 0.3", "0.5 0.4"), "explorable: p: expected probabilities that sum to 1"),
        (PLACED.replace(":y: 2", ":y: 3"), "explorable: y: expected a label from 0 to 2"),
        (PLACED + PLACED, "explorable: the figure fig-static is replaced twice"),
    ],
)
def test_a_wrong_place_is_a_warning(build: Any, text: str, message: str) -> None:
    assert message in build(DRAWN + text)[2]


def test_two_figures_of_a_page_can_be_live(build: Any) -> None:
    page, _, warnings = build(DRAWN + PLACED + PLACED.replace("fig-static", "fig-other"))
    assert warnings == ""
    assert page.count("explorables/squeezing.js") == 1


def test_a_changed_script_is_fetched_anew(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorable, "SOURCES", shutil.copytree(explorable.SOURCES, tmp_path / "_explorables"))
    address = re.compile(r"explorables/squeezing\.js\?v=\w+")
    first = address.search(build(DRAWN + PLACED)[0])
    again = address.search(build(DRAWN + PLACED)[0])
    (tmp_path / "_explorables" / "squeezing.js").write_text("// another")
    changed = address.search(build(DRAWN + PLACED)[0])
    assert first is not None and again is not None and changed is not None
    assert first[0] == again[0] != changed[0]
