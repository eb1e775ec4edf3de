"""Every page as a reader meets it: quiet, typeset, whole without scripts, at home on a phone and in the dark."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe

from .conftest import SITE, Open, pages
from .opened import UNREACHABLE

RAW_TEX = re.compile(r"\$[^$\n]{1,200}\$|\\[\[\](]|\\(?:frac|sum|mathbb|operatorname|Sigma|Delta|begin|text)\b")
# Hidden from assistive technology, in the colour of the text around it, and nine tenths of a page's elements.
STRIP_DRAWN = """() => document.querySelectorAll('.katex-html > *, .drawing svg > *').forEach(e => e.remove())"""
PROSE = """() => {
  const copy = document.querySelector('article').cloneNode(true);
  copy.querySelectorAll('.katex, code, pre, script, style, svg').forEach(element => element.remove());
  return copy.textContent;
}"""
LOST_TO_THE_RIGHT = """() => {
  const scrolls = element => {
    for (let e = element; e && e !== document.body; e = e.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  return [...document.querySelectorAll('article *')]
    .filter(e => !e.closest('.katex-mathml, svg') && e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e))
    .map(e => `${e.tagName}.${e.getAttribute('class')}: ${e.textContent.slice(0, 60)}`);
}"""

# Most of axe's time goes into colours: it reads the same few again for each element and its ancestors, and keeps their
# parts in weak maps and sets, of which the browser then has hundreds of thousands of entries to tidy. Read once, and
# with the parts on the objects themselves, the result is the same.
FIELDS_FOR_WEAK_KEYS = """() => {
  window.WeakMap = class {
    constructor(entries) {
      this.field = Symbol();
      for (const [key, value] of entries || []) this.set(key, value);
    }
    has(key) { return Object.hasOwn(key, this.field); }
    get(key) { return this.has(key) ? key[this.field] : undefined; }
    set(key, value) { key[this.field] = value; return this; }
    delete(key) { return this.has(key) && delete key[this.field]; }
  };
  window.WeakSet = class extends window.WeakMap {
    constructor(members) { super(Array.from(members || [], member => [member, true])); }
    add(member) { return this.set(member, true); }
  };
}"""
COLOURS_READ_ONCE = """() => {
  const colour = axe.commons.color.Color.prototype, parse = colour.parseString, known = new Map();
  colour.parseString = function (text) {
    if (known.has(text)) [this.r, this.g, this.b, this.alpha] = known.get(text);
    else {
      parse.call(this, text);
      known.set(text, [this.r, this.g, this.b, this.alpha]);
    }
    return this;
  };
}"""

# The ledger's table and its graph are as wide as they need to be, and scroll on any screen.
TOO_WIDE = """() => [...document.querySelectorAll('article *')].filter(e =>
  ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1
  && !e.matches('.ldyn-scroll')
).map(e => `${e.tagName} by ${e.scrollWidth - e.clientWidth}: ` + (e.innerText || '').slice(0, 300))"""

FIGURE_BLUE = "getComputedStyle(document.documentElement).getPropertyValue('--figure-blue').trim()"
CODE_INKS = "[...document.querySelectorAll('article .highlight span')].map(e => getComputedStyle(e).color)"


def test_nothing_goes_wrong_and_nothing_leaves_the_machine(read: Open, path: str) -> None:
    with read(path) as seen:
        seen.page.wait_for_load_state("networkidle")
        assert seen.complaints == []


def test_a_page_reads_from_the_disk(visit: Open, path: str) -> None:
    with visit(path, base=SITE.resolve().as_uri()) as seen:
        seen.page.wait_for_load_state("networkidle")
        assert seen.complaints == []


def test_mathematics_is_typeset(read: Open, path: str) -> None:
    with read(path, unfolded=True) as seen:
        assert seen.page.locator(".katex-error, .maths-error").count() == 0
        assert RAW_TEX.findall(seen.page.evaluate(PROSE)) == []
        empty = "elements => elements.filter(e => e.getBoundingClientRect().width === 0).length"
        assert seen.page.locator(".katex-html").evaluate_all(empty) == 0


def test_mathematics_needs_no_scripts(visit: Open, read: Open, chapter: str) -> None:
    with visit(chapter, scripts=False) as bare, read(chapter) as full:
        formulas = bare.page.locator("article .katex-html")
        assert formulas.count() == full.page.locator("article .katex-html").count() > 0
        assert formulas.first.bounding_box()["width"] > 0
        assert "KaTeX" in formulas.first.evaluate("element => getComputedStyle(element).fontFamily")


def test_a_phone_never_scrolls_sideways(read: Open, path: str) -> None:
    with read(path, width=390, unfolded=True) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert seen.page.evaluate(LOST_TO_THE_RIGHT) == []
        assert seen.page.evaluate(UNREACHABLE) == []


def test_code_and_formulas_fit_the_column_of_a_desktop(read: Open, path: str) -> None:
    with read(path, unfolded=True) as seen:
        assert seen.page.evaluate(TOO_WIDE) == []


def test_paper(read: Open, chapter: str) -> None:
    with read(chapter, scheme="dark", unfolded=True) as seen:
        seen.page.emulate_media(media="print")
        assert seen.page.locator("article h1").first.is_visible()
        assert not seen.page.locator(".bd-sidebar-primary").is_visible()
        assert not seen.page.locator(".bd-header-article").is_visible()
        assert seen.page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
        assert seen.page.locator("article p").first.evaluate("e => getComputedStyle(e).color") == "rgb(0, 0, 0)"
        # margins, figures and code too: whatever the reader's screen shows, paper is light
        assert seen.page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
        assert seen.page.evaluate(FIGURE_BLUE) == "#0072b2"
        assert set(seen.page.evaluate(CODE_INKS)) <= {"rgb(0, 0, 0)", "rgb(51, 51, 51)"}
        seen.page.emulate_media(media="null")


def test_the_column_holds_a_comfortable_line(read: Open, chapter: str) -> None:
    """Characters in the full lines of a page's paragraphs: between 60 and 80, as the mean over the page."""
    count = """() => {
      const lengths = [];
      for (const p of document.querySelectorAll('article > section > section > p, article > section > p')) {
        if (p.querySelector('.katex, code') || p.textContent.length < 150) continue;
        const range = document.createRange();
        range.selectNodeContents(p);
        const lines = new Set([...range.getClientRects()].map(r => Math.round(r.bottom))).size;
        if (lines > 2) lengths.push(p.textContent.length / (lines - 0.5));
      }
      return lengths;
    }"""
    with read(chapter, unfolded=True) as seen:
        lengths = seen.page.evaluate(count)
    if not lengths:
        pytest.skip("no long paragraph without formulas on this page")
    assert 60 <= sum(lengths) / len(lengths) <= 80


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_accessibility(read: Open, path: str, scheme: str, width: int) -> None:
    axe = Axe()
    with read(path, scheme=scheme, width=width, unfolded=True, last=True) as seen:
        for script in (STRIP_DRAWN, FIELDS_FOR_WEAK_KEYS, axe.axe_script, COLOURS_READ_ONCE):
            seen.page.evaluate(script)
        found = seen.page.evaluate("() => axe.run({resultTypes: ['violations']})")["violations"]
        grave = [
            f"{rule['id']} ({rule['impact']}): {node['html'][:160]} {node['failureSummary']}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
        assert grave == []


def test_the_root_leads_to_the_front_page(visit: Open) -> None:
    with visit("index.html") as seen:
        seen.page.wait_for_url("**/book/index.html")
        assert seen.page.locator("article h1").count() == 1


def test_every_page_was_found() -> None:
    assert {"book/index.html", "book/ledger.html", "search.html"} <= set(pages())
