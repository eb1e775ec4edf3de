"""How long the pages of the built site take until their last formula and font stand, from the disk, on the clock."""

import shutil
import statistics
import sys
from pathlib import Path

import table
from playwright.sync_api import Browser, sync_playwright

SITE = Path(__file__).parents[2] / "_build" / "html"
PAGES = (
    "index",
    "verification",
    "foundations/jacobians",
    "foundations/softmax",
    "foundations/kl",
    "dynamics/akg",
    "dynamics/sequences",
    "dynamics/objectives",
    "dynamics/squeezing",
    "dynamics/tracking",
    "kernels/entk",
    "kernels/width",
    "kernels/regression",
    "kernels/pntk",
    "kernels/pntk_bound",
    "kernels/pntk_regression",
    "kernels/tiles",
    "hessians/layernorm",
    "hessians/ffn",
    "hessians/attention",
    "hessians/attention_bound",
    "hessians/block",
    "hessians/spectrum",
    "hessians/stability",
)
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
    """Write medians into the table; stop when one is over the limit."""
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None or not SITE.is_dir():
        sys.exit("the pages are timed in Chromium on a built site: install chromium and run `make book` first")
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for page in PAGES:
            median = statistics.median(milliseconds(browser, page) for _ in range(ROUNDS))
            rows.append(
                table.Row(
                    f"the page {page}, until its last font stands",
                    table.seconds(median / 1e3),
                    "–",
                    "–",
                    "–",
                    f"≤ {table.seconds(LIMIT / 1e3)}",
                    median <= LIMIT,
                )
            )
        browser.close()
    table.publish("pages", rows)


if __name__ == "__main__":
    main()
