"""The built site, served on loopback, and a browser to read it in."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from .opened import Shelf, Visit, Way, start

SITE = Path(os.environ.get("LDYN_SITE", Path(__file__).parents[2] / "_build" / "html"))
LEDGER = SITE / "ledger.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def pages() -> list[str]:
    """List the site's pages by their path; the bare redirect at the root has a test of its own."""
    found = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    return [path for path in found if path != "index.html" and not path.startswith("_")]


def chapters() -> list[str]:
    """List the chapters; each has statements."""
    return [path for path in pages() if path.count("/") > 1]


def titled() -> list[str]:
    """List the pages with a statement that has a title."""
    rows = json.loads(LEDGER.read_text(encoding="utf-8")) if LEDGER.is_file() else []
    return sorted({f"{row['page']}.html" for row in rows if row["title"]})


PAGES = {"path": pages, "chapter": chapters, "stated": titled}
"""What a test gets in turn for an argument of this name."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for every page of the kind that it asks for."""
    for name in PAGES.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, PAGES[name]() or ["(no site)"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the site; skip it where there is none. Bring the tests of a page together."""
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    places = [place for place, item in enumerate(items) if item in set(ours)]
    for item in ours:
        item.add_marker(pytest.mark.site)
        if group(item):
            item.add_marker(pytest.mark.xdist_group(group(item)))
        if not pages():
            item.add_marker(pytest.mark.skip(reason=f"no site in {SITE}: run `make book` first"))
    for place, item in zip(places, sorted(ours, key=group), strict=True):
        items[place] = item


def group(item: pytest.Item) -> str:
    """Name the tests that share something that takes long to get: open pages, or the parsed text of all of them."""
    if item.path.stem == "test_links":
        return item.path.stem
    given: dict[str, str] = item.callspec.params if hasattr(item, "callspec") else {}
    return next((value for name, value in given.items() if name in PAGES), "")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """Serve the site on loopback; the value is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start the browser of this machine, or skip."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser found on the path (looked for {', '.join(BROWSERS)})")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=SWITCHES)
        yield started
        started.close()


Open = Callable[..., AbstractContextManager[Visit]]


@pytest.fixture
def visit(browser: Browser, site: str) -> Open:
    """Open a page of one's own, to act on: `with visit(path, scheme="dark", width=390) as seen: seen.page`."""

    @contextmanager
    def opened(path: str, *, base: str = site, **way: Any) -> Iterator[Visit]:
        context, seen = start(browser, base, Way(path, **way))
        yield seen
        context.close()

    return opened


@pytest.fixture(scope="session")
def shelf(browser: Browser, site: str) -> Iterator[Shelf]:
    """Keep the pages that tests share."""
    kept = Shelf(browser, site)
    yield kept
    kept.clear()


@pytest.fixture
def read(shelf: Shelf) -> Open:
    """Read a page that tests share: `with read(path, unfolded=True) as seen`.

    A test leaves it as it is, or says `last=True`: then no other test gets it.
    """

    def opened(path: str, *, last: bool = False, **way: Any) -> AbstractContextManager[Visit]:
        return shelf.read(Way(path, **way), last=last)

    return opened
