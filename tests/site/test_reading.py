"""Every page as a reader meets it: quiet, typeset, whole without scripts, at home on a phone and in the dark."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, TimeoutError

from .conftest import SITE, Open, pages

RAW_TEX = re.compile(r"\$[^$\n]{1,200}\$|\\[\[\](]|\\(?:frac|sum|mathbb|operatorname|Sigma|Delta|begin|text)\b")
OPEN_ALL = """() => {
  document.querySelectorAll('details').forEach(element => { element.open = true });
}"""
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
UNREACHABLE = """() => [...document.querySelectorAll('article *')].filter(e =>
  ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1
  && !e.closest('details:not([open])') && e.tabIndex < 0
).map(e => `${e.tagName}.${e.getAttribute('class')}`)"""

FIGURE_BLUE = "getComputedStyle(document.documentElement).getPropertyValue('--figure-blue').trim()"
CODE_INKS = "[...document.querySelectorAll('article .highlight span')].map(e => getComputedStyle(e).color)"


def unfold(page: Page) -> None:
    """Open everything, and give the page's script the time to make what now overflows reachable by keyboard."""
    page.evaluate(OPEN_ALL)
    with suppress(TimeoutError):  # what stays unreachable is for the test to report
        page.wait_for_function(f"() => ({UNREACHABLE})().length === 0")


def test_nothing_goes_wrong_and_nothing_leaves_the_machine(visit: Open, path: str) -> None:
    with visit(path) as seen:
        seen.page.wait_for_load_state("networkidle")
        assert seen.complaints == []


def test_a_page_reads_from_the_disk(visit: Open, path: str) -> None:
    with visit(path, base=SITE.resolve().as_uri()) as seen:
        seen.page.wait_for_load_state("networkidle")
        assert seen.complaints == []


def test_mathematics_is_typeset(visit: Open, path: str) -> None:
    with visit(path) as seen:
        assert seen.page.locator(".katex-error, .maths-error").count() == 0
        assert RAW_TEX.findall(seen.page.evaluate(PROSE)) == []
        empty = "elements => elements.filter(e => e.getBoundingClientRect().width === 0).length"
        seen.page.evaluate(OPEN_ALL)
        assert seen.page.locator(".katex-html").evaluate_all(empty) == 0


def test_mathematics_needs_no_scripts(visit: Open, chapter: str) -> None:
    with visit(chapter, scripts=False) as bare, visit(chapter) as full:
        formulas = bare.page.locator("article .katex-html")
        assert formulas.count() == full.page.locator("article .katex-html").count() > 0
        assert formulas.first.bounding_box()["width"] > 0
        assert "KaTeX" in formulas.first.evaluate("element => getComputedStyle(element).fontFamily")


def test_a_phone_never_scrolls_sideways(visit: Open, path: str) -> None:
    with visit(path, width=390) as seen:
        unfold(seen.page)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert seen.page.evaluate(LOST_TO_THE_RIGHT) == []
        assert seen.page.evaluate(UNREACHABLE) == []


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_accessibility(visit: Open, path: str, scheme: str, width: int) -> None:
    with visit(path, scheme=scheme, width=width) as seen:
        unfold(seen.page)
        seen.page.evaluate(STRIP_DRAWN)
        found = Axe().run(seen.page).response["violations"]
        grave = [
            f"{rule['id']} ({rule['impact']}): {node['html'][:160]} {node['failureSummary']}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
        assert grave == []


def test_paper(visit: Open, chapter: str) -> None:
    with visit(chapter, scheme="dark") as seen:
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


def test_the_column_holds_a_comfortable_line(visit: Open, chapter: str) -> None:
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
    with visit(chapter) as seen:
        seen.page.evaluate(OPEN_ALL)
        lengths = seen.page.evaluate(count)
    if not lengths:
        pytest.skip("no long paragraph without formulas on this page")
    assert 60 <= sum(lengths) / len(lengths) <= 80


def test_the_root_leads_to_the_front_page(visit: Open) -> None:
    with visit("index.html") as seen:
        seen.page.wait_for_url("**/book/index.html")
        assert seen.page.locator("article h1").count() == 1


def test_every_page_was_found() -> None:
    assert {"book/index.html", "book/ledger.html", "search.html"} <= set(pages())
