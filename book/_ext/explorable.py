"""Figures that the reader can move: a script takes the place of a static figure, on the pages that ask for it.

```` ```{explorable} squeezing ```` under a figure marks the place. The option `fallback` is the name of that figure,
which is what stands on the page without scripts, in previews and on paper; the other options are the state to start
from. The script and its style sheet lie in `book/_explorables`, outside the folder whose scripts go into every page.
What is wrong with a place is a warning, and so, in this book's build, an error.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[1] / "_explorables"
SERVED = "explorables"
LABELS = (2, 10)
INSIDE = (0.001, 0.99)
LARGEST_STEP = 30.0
ROUNDING = 1e-9


class explorable_place(nodes.General, nodes.Element):
    """Where a page says that one of its figures can be moved."""


def known() -> list[str]:
    """List the live figures there are."""
    return sorted(path.stem for path in SOURCES.glob("*.js"))


def numbers(name: str, text: str) -> list[float]:
    """Read numbers that stand between blanks or commas."""
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{name}: expected numbers, got {text!r}") from None


def starting_state(options: Mapping[str, str]) -> dict[str, Any]:
    """Read the state that a figure starts from: probabilities `p`, the label `y` that is pushed down, the step `s`.

    Raises ValueError if `p` does not lie inside the simplex, `y` is none of its labels (counted from 0), or `s` is out
    of the reach of the figure's slider. Where they are read the labels go by letters: label 0 is a.
    """
    for name in ("p", "y", "s"):
        if not options.get(name, "").strip():
            raise ValueError(f"{name}: expected a value, got none")
    p = numbers("p", options["p"])
    fewest, most = LABELS
    least, largest = INSIDE
    if not fewest <= len(p) <= most:
        raise ValueError(f"p: expected {fewest} to {most} probabilities, got {len(p)}")
    if not all(least <= value <= largest for value in p):
        raise ValueError(f"p: expected probabilities between {least} and {largest}, got {options['p']!r}")
    if abs(math.fsum(p) - 1) > ROUNDING:
        raise ValueError(f"p: expected probabilities that sum to 1, got a sum of {math.fsum(p):.12g}")
    label = options["y"].strip()
    if not (label.isdecimal() and int(label) < len(p)):
        raise ValueError(f"y: expected a label from 0 to {len(p) - 1}, got {label!r}")
    step = numbers("s", options["s"])
    if not (len(step) == 1 and 0 <= step[0] <= LARGEST_STEP):
        raise ValueError(f"s: expected one number from 0 to {LARGEST_STEP:g}, got {options['s']!r}")
    return {"p": p, "y": int(label), "s": step[0]}


class ExplorableDirective(SphinxDirective):
    """The place of a live figure: its name, and as options the figure it replaces and the state to start from."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {
        "fallback": directives.unchanged_required,
        "p": directives.unchanged_required,
        "y": directives.unchanged_required,
        "s": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in known():
            raise self.error(f"explorable: expected one of {', '.join(known())}, got {name}")
        fallback = (self.options.get("fallback") or "").strip()
        if not fallback:
            raise self.error("explorable: expected the option fallback, the name of a figure, got none")
        try:
            state = starting_state({key: value or "" for key, value in self.options.items()})
        except ValueError as problem:
            raise self.error(f"explorable: {problem}") from problem
        for path in files(name):
            self.env.note_dependency(str(path))  # a changed script changes the page that loads it
        place = explorable_place(name=name, fallback=fallback, state=state)
        self.set_source_info(place)
        return [place]


def files(name: str) -> list[Path]:
    """List the files of a live figure: its script and, if it has one, its style sheet."""
    return [path for path in (SOURCES / f"{name}.js", SOURCES / f"{name}.css") if path.is_file()]


def find_fallbacks(app: Sphinx, doctree: nodes.document) -> None:
    """Find, for every place, the figure on its page that it replaces; each figure at most once."""
    named = {name: figure for figure in doctree.findall(nodes.figure) for name in figure["names"] + figure["ids"]}
    taken: set[str] = set()
    for place in doctree.findall(explorable_place):
        name = place["fallback"]
        if name not in named:
            logger.warning("explorable: no figure on this page is named %s", name, location=place, type="explorable")
        elif named[name]["ids"][0] in taken:
            logger.warning("explorable: the figure %s is replaced twice", name, location=place, type="explorable")
        else:
            place["fallback"] = named[name]["ids"][0]
            taken.add(place["fallback"])


def visit_place(translator: HTML5Translator, node: explorable_place) -> None:
    state = {key: json.dumps(value) for key, value in node["state"].items()}
    data = {"explorable": node["name"], "fallback": node["fallback"], **state}
    attributes = "".join(f' data-{key}="{escape(value)}"' for key, value in data.items())
    translator.body.append(f"<div hidden{attributes}></div>\n")
    raise nodes.SkipNode


def leave_out(translator: Any, node: explorable_place) -> None:
    raise nodes.SkipNode


def publish(app: Sphinx) -> None:
    """Put the scripts and style sheets beside the pages, before the pages that name them are written."""
    if app.builder.format == "html":
        target = Path(app.outdir) / "_static" / SERVED
        target.mkdir(parents=True, exist_ok=True)
        for path in (path for name in known() for path in files(name)):
            shutil.copyfile(path, target / path.name)


def load(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Have a page load the files of its live figures, and no other page."""
    names = {place["name"] for place in doctree.findall(explorable_place)} if doctree else set()
    for path in (path for name in sorted(names) for path in files(name)):
        if path.suffix == ".js":
            app.add_js_file(f"{SERVED}/{path.name}", loading_method="defer")
        else:
            app.add_css_file(f"{SERVED}/{path.name}")


def setup(app: Sphinx) -> dict[str, Any]:
    html, other = (visit_place, None), (leave_out, None)
    app.add_node(explorable_place, html=html, latex=other, text=other, man=other, texinfo=other)
    app.add_directive("explorable", ExplorableDirective)
    app.connect("builder-inited", publish)
    app.connect("doctree-read", find_fallbacks)
    app.connect("html-page-context", load)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
