"""Pages open in the browser, and those of them that several tests read in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from playwright.sync_api import Browser, BrowserContext, Page, TimeoutError

OPEN_ALL = """() => {
  document.querySelectorAll('details').forEach(element => { element.open = true });
}"""
UNREACHABLE = """() => [...document.querySelectorAll('article *')].filter(e =>
  ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1
  && !e.closest('details:not([open])') && e.tabIndex < 0
).map(e => `${e.tagName}.${e.getAttribute('class')}`)"""
# What a test may change without meaning to: it shows in one of these.
LOOKS = """() => ({
  address: location.href, focus: document.activeElement.tagName, theme: document.documentElement.dataset.theme,
  elements: document.querySelectorAll('article *').length, unfolded: document.querySelectorAll('details[open]').length,
  printed: matchMedia('print').matches, size: [innerWidth, innerHeight], scrolled: [scrollX, scrollY],
})"""


@dataclass(frozen=True)
class Way:
    """How a page is opened.

    Attributes:
        path: which page.
        scheme: the colours that the reader's system asks for, "light" or "dark".
        width: of the window, in pixels.
        scripts: whether scripts run.
        unfolded: whether all that is folded is opened once the page has loaded.
    """

    path: str
    scheme: str = "light"
    width: int = 1280
    scripts: bool = True
    unfolded: bool = False


@dataclass
class Visit:
    """A page that is open in the browser, and what happened while it was read."""

    page: Page
    complaints: list[str] = field(default_factory=list)


def unfold(page: Page) -> None:
    """Open everything, and give the page's script the time to make what now overflows reachable by keyboard."""
    page.evaluate(OPEN_ALL)
    with suppress(TimeoutError):  # what stays unreachable is for the test to report
        page.wait_for_function(f"() => ({UNREACHABLE})().length === 0")


def start(browser: Browser, base: str, way: Way) -> tuple[BrowserContext, Visit]:
    """Open a page in a context of its own, and note what goes wrong from its first request on."""
    context = browser.new_context(
        color_scheme=way.scheme,
        viewport={"width": way.width, "height": 900},
        java_script_enabled=way.scripts,
        reduced_motion="reduce",
    )
    context.set_default_timeout(5000)
    seen = Visit(context.new_page())
    note = seen.complaints.append
    seen.page.on("console", lambda m: note(f"console: {m.text}") if m.type in ("error", "warning") else None)
    seen.page.on("pageerror", lambda error: note(f"uncaught: {error}"))
    # A request that the next page cuts short is no failure.
    seen.page.on("requestfailed", lambda r: None if "ABORTED" in r.failure else note(f"failed: {r.url}"))
    seen.page.on("response", lambda r: note(f"{r.status}: {r.url}") if r.status >= 400 else None)
    seen.page.on("request", lambda r: None if r.url.startswith((base, "data:", "blob:")) else note(f"request: {r.url}"))
    seen.page.goto(f"{base}/{way.path}", wait_until="load")
    if way.unfolded:
        unfold(seen.page)
    return context, seen


class Shelf:
    """Open pages of one path, each kept for all tests that read it in the same way.

    Loading a page with hundreds of formulas takes longer than most tests of it. A page that a test has failed on, or
    has been told to be the last with, is closed; so are all when a test asks for another path.
    """

    def __init__(self, browser: Browser, base: str) -> None:
        """Start empty."""
        self._browser, self._base = browser, base
        self._kept: dict[Way, tuple[BrowserContext, Visit]] = {}

    @contextmanager
    def read(self, way: Way, *, last: bool) -> Iterator[Visit]:
        """Lend a page; unless the test is the last reader, it must leave the page as it found it."""
        if any(kept.path != way.path for kept in self._kept):
            self.clear()
        context, seen = self._kept.pop(way, None) or start(self._browser, self._base, way)
        try:
            before = seen.page.evaluate(LOOKS)
            yield seen
            if not last:
                after = seen.page.evaluate(LOOKS)
                changed = {name: (value, after[name]) for name, value in before.items() if value != after[name]}
                assert not changed, f"a test that shares its page has changed it: {changed}"
                self._kept[way] = context, seen
        finally:
            if way not in self._kept:
                context.close()

    def clear(self) -> None:
        """Close all pages."""
        while self._kept:
            self._kept.popitem()[1][0].close()
