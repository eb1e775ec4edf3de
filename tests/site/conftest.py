"""The built site, served on loopback, and a browser to read it in."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

SITE = Path(os.environ.get("LDYN_SITE", Path(__file__).parents[2] / "_build" / "html"))
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for `path` every page, and one that asks for `chapter` every page with statements."""
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", pages() or ["(no site)"])
    if "chapter" in metafunc.fixturenames:
        chapters = [path for path in pages() if path.count("/") > 1]
        metafunc.parametrize("chapter", chapters or ["(no site)"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the site; skip it where there is none."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.site)
            if not pages():
                item.add_marker(pytest.mark.skip(reason=f"no site in {SITE}: run `make book` first"))


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


@dataclass
class Visit:
    """A page that is open in the browser, and what happened while it was read."""

    page: Page
    complaints: list[str] = field(default_factory=list)


Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Browser, site: str) -> Open:
    """Open pages: `with visit(path, scheme="dark", width=390) as seen: seen.page`."""

    @contextmanager
    def opened(
        path: str, *, scheme: str = "light", width: int = 1280, scripts: bool = True, base: str = site
    ) -> Iterator[Visit]:
        context = browser.new_context(
            color_scheme=scheme,
            viewport={"width": width, "height": 900},
            java_script_enabled=scripts,
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
        seen.page.on(
            "request", lambda r: None if r.url.startswith((base, "data:", "blob:")) else note(f"request: {r.url}")
        )
        seen.page.goto(f"{base}/{path}", wait_until="load")
        yield seen
        context.close()

    return opened
