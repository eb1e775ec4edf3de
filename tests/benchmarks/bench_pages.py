"""How long the pages of the built site take until their last formula and font stand, from the disk, on the clock."""

import shutil
import statistics
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

SITE = Path(__file__).parents[2] / "_build" / "html"
PAGES = ("index", "verification", "foundations/jacobians", "foundations/softmax", "foundations/kl")
ROUNDS = 5
LIMIT = 1500  # milliseconds


def milliseconds(browser: Browser, page: str) -> float:
    """Time one visit, from asking for the page to its last font."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.goto((SITE / "book" / f"{page}.html").resolve().as_uri(), wait_until="load")
    elapsed = float(tab.evaluate("document.fonts.ready.then(() => performance.now())"))
    context.close()
    return elapsed


def main() -> None:
    """Print medians; fail when one is over the limit."""
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None or not SITE.is_dir():
        sys.exit("the pages are timed in Chromium on a built site: install chromium and run `make book` first")
    slow = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for page in PAGES:
            median = statistics.median(milliseconds(browser, page) for _ in range(ROUNDS))
            print(f"{page:24} {median:6.0f} ms of {LIMIT}")
            if median > LIMIT:
                slow.append(page)
        browser.close()
    if slow:
        sys.exit(f"over the limit of {LIMIT} ms: {slow}")


if __name__ == "__main__":
    main()
