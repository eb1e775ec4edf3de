"""What a reader does: open the evidence, unfold a solution, turn on the dark, search, take a notebook along."""

from __future__ import annotations

import json
import re

import nbformat
import pytest

from .conftest import LEDGER, SITE, Open

FOLDED = "details.ldyn-badge, details.admonition"
# Whether the details are open, whether what follows their summary has a size and shows, and the summary.
LOOK = """element => {
  const [summary, inside] = [':scope > summary', ':scope > :not(summary)'].map(e => element.querySelector(e));
  const {width, height} = inside.getBoundingClientRect();
  const shows = width > 0 && height > 0 && inside.checkVisibility({visibilityProperty: true});
  return [element.open, shows, summary.textContent.trim()];
}"""
# The place of what a link leads to, once it has stood still for a third of a second.
COMES_TO_REST = """label => new Promise(resolve => {
  const place = () => document.getElementById(label).getBoundingClientRect().top;
  let [last, still] = [place(), 0];
  const look = () => {
    const now = place();
    [last, still] = [now, now === last ? still + 1 : 0];
    if (still < 20) requestAnimationFrame(look); else resolve(now);
  };
  requestAnimationFrame(look);
})"""


def test_a_reference_shows_what_it_leads_to(visit: Open) -> None:
    entries = {row["label"]: row for row in json.loads(LEDGER.read_text())}
    with visit("book/foundations/kl.html") as seen:
        link = seen.page.locator("article a.reference.internal[href='#kl-range-bound']").first
        preview = seen.page.locator("[data-tippy-root]")
        statement = seen.page.locator("#kl-range-bound")
        # previews come after the page, and a mouse that is there before them has to come again
        seen.page.wait_for_function("link => link._tippy", arg=link.element_handle())
        for show, leave in (
            (link.hover, lambda: seen.page.mouse.move(0, 0)),
            (link.focus, lambda: seen.page.keyboard.press("Escape")),
        ):
            assert preview.count() == 0
            show()
            preview.wait_for()
            assert entries["kl-range-bound"]["title"] in preview.text_content()
            formulas = preview.locator(".katex-html")
            beside = statement.locator(":not(.ldyn-badge *) > .katex > .katex-html")
            assert formulas.count() == beside.count() > 0
            assert formulas.first.bounding_box()["width"] > 0
            assert preview.locator("[id]:not(svg *), a, .ldyn-badge").count() == 0
            box = preview.bounding_box()
            assert box["width"] <= 510 and box["x"] >= 0 and box["x"] + box["width"] <= 1280
            leave()
            preview.wait_for(state="detached")
        link.click()
        assert seen.page.url.endswith("#kl-range-bound")
        assert seen.complaints == []


def test_every_statement_has_its_badge(read: Open, chapter: str) -> None:
    stated = [row["label"] for row in json.loads(LEDGER.read_text()) if f"{row['page']}.html" == chapter]
    measure = """list => list.map(badge => {
      const title = badge.previousElementSibling, summary = badge.querySelector(':scope > summary');
      const [across, beside] = [title, summary].map(element => element.getBoundingClientRect());
      return [badge.parentElement.id, title.className, beside.x - across.x, beside.y - across.y];
    })"""
    with read(chapter) as seen:
        badges = seen.page.locator("details.ldyn-badge").evaluate_all(measure)
    assert sorted(holder for holder, *_ in badges) == sorted(stated)
    for holder, title, right, down in badges:
        assert "admonition-title" in title, holder
        assert right > 100 and abs(down) < 12, holder


def test_dark_and_light(visit: Open, chapter: str) -> None:
    colours = """() => {
      const drawn = document.querySelector('.drawing svg');
      const inked = drawn && [...drawn.querySelectorAll('path, g, use')].find(
        e => /currentcolor/i.test(e.getAttribute('style') || ''));
      const style = inked && getComputedStyle(inked);
      const solid = inked && (/stroke: *currentcolor/i.test(inked.getAttribute('style')) ? style.stroke : style.fill);
      return [getComputedStyle(document.body).backgroundColor,
              getComputedStyle(document.querySelector('article p')).color, solid];
    }"""
    with visit(chapter) as seen:
        light = seen.page.evaluate(colours)
        button = seen.page.locator(".theme-switch-button:visible").first
        for _ in range(3):
            if seen.page.locator("html").get_attribute("data-theme") == "dark":
                break
            button.click()
        dark = seen.page.evaluate(colours)
        assert luminance(light[0]) > 200 > 80 > luminance(light[1])
        assert luminance(dark[0]) < 60 < 160 < luminance(dark[1])
        if light[2] is not None:
            assert luminance(light[2]) < 80
            assert luminance(dark[2]) > 160
        seen.page.reload()
        assert seen.page.locator("html").get_attribute("data-theme") == "dark"


def luminance(colour: str) -> float:
    red, green, blue = map(float, re.findall(r"[\d.]+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_figures_say_what_they_show(read: Open, chapter: str) -> None:
    describe = """drawings => drawings.map(drawing => [
      drawing.getAttribute('role'), drawing.getAttribute('aria-label') || '',
      drawing.closest('figure')?.querySelector('figcaption')?.textContent || '',
    ])"""
    with read(chapter) as seen:
        for role, label, caption in seen.page.locator(".drawing svg").evaluate_all(describe):
            assert role == "img"
            assert len(label) > 20
            assert len(caption) > 20


def test_search_finds_every_statement(visit: Open, stated: str) -> None:
    rows = json.loads(LEDGER.read_text())
    titles = [row["title"] for row in rows if f"{row['page']}.html" == stated and row["title"]]
    assert titles
    with visit("search.html") as seen:
        for title in titles:
            words = re.findall(r"[A-Za-z]{4,}", re.sub(r"\$[^$]*\$|\\\w+", " ", title))
            seen.page.goto(seen.page.url.split("?")[0] + "?q=" + "+".join(words))
            seen.page.locator(f"#search-results a[href*='{stated}']").first.wait_for()
        assert seen.complaints == []


def test_a_search_starts_from_any_page(visit: Open, chapter: str) -> None:
    with visit(chapter) as seen:
        seen.page.keyboard.press("Control+k")
        field = seen.page.locator("#search-input:visible")
        field.wait_for()
        field.fill("theorem")
        field.press("Enter")
        seen.page.wait_for_url("**/search.html?q=theorem**")


def test_the_ledger_is_one_click_away(read: Open, path: str) -> None:
    with read(path) as seen:
        assert seen.page.locator("nav a[href$='ledger.html'], nav li.current a").count() > 0


def test_the_ledger_page_and_the_json_agree(visit: Open) -> None:
    entries = {row["label"]: row for row in json.loads(LEDGER.read_text())}
    with visit("book/ledger.html") as seen:
        rows = seen.page.locator("table.ldyn-ledger tbody tr")
        shown = rows.evaluate_all("rows => rows.map(row => [row.id.replace('ledger-', ''), row.className])")
        assert [label for label, _ in shown] == list(entries)
        for label, css in shown:
            assert css == f"ldyn-{entries[label]['status']}"
        assert seen.page.locator("svg.ldyn-graph a").count() == len(entries)


def test_a_link_to_a_statement_leads_to_it(visit: Open, chapter: str) -> None:
    """Also far down a long page, from another page and on this one."""
    stated = [row["label"] for row in json.loads(LEDGER.read_text()) if f"{row['page']}.html" == chapter]
    with visit("book/ledger.html") as seen:
        seen.page.locator(f"#ledger-{stated[-1]} th a").click()
        seen.page.wait_for_url(f"**/{chapter}#{stated[-1]}")
        for label in (stated[-1], stated[0], stated[len(stated) // 2]):
            seen.page.evaluate("label => { location.hash = label }", label)
            assert 0 <= seen.page.evaluate(COMES_TO_REST, label) < 300


def test_a_chapter_can_be_taken_along(read: Open, chapter: str) -> None:
    with read(chapter) as seen:
        link = seen.page.locator("a.btn-download-notebook-button")
        target = link.evaluate("element => element.href").split("/notebooks/")[1]
    notebook = nbformat.read(SITE / "notebooks" / target, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.execution_count for cell in code)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"^\s*[`:]{3,}\s*\{|\{[\w:-]+\}`|^\([\w-]+\)=", prose, re.MULTILINE)


def test_evidence_and_solutions_open_by_click_and_by_keyboard(read: Open, chapter: str) -> None:
    with read(chapter, last=True) as seen:
        press = seen.page.keyboard.press
        folded = seen.page.locator(FOLDED).element_handles()
        if not folded:
            pytest.skip("nothing to unfold on this page")
        for details in folded:
            summary = details.query_selector(":scope > summary")
            is_open, shows, text = details.evaluate(LOOK)
            assert text and not is_open and not shows
            summary.click()
            assert details.evaluate(LOOK)[:2] == [True, True], text
            summary.click()
            assert details.evaluate(LOOK)[:2] == [False, False], text
            summary.focus()
            press("Enter")
            assert details.evaluate(LOOK)[:2] == [True, True], text
            press("Space")
            assert details.evaluate(LOOK)[:2] == [False, False], text
