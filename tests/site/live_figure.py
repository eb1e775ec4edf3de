"""The figure that the reader moves: where it is, how to read and set it, and that all it says agrees."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from playwright.sync_api import Locator, Page

from ldyn.dynamics.squeezing import negative_step, squeezing_threshold

CHAPTER = "book/dynamics/squeezing.html"
NAME = "fig-squeezing-explorable"
API = "window.ldynExplorables.squeezing"
LABELS = "abcdefghij"
TINY = 1e-13


def state(page: Page) -> dict[str, Any]:
    return page.evaluate(f"() => {API}.figures['{NAME}'].state()")


def put(page: Page, part: dict[str, Any]) -> None:
    page.evaluate(f"part => {API}.figures['{NAME}'].set(part)", part)


def live(page: Page) -> Locator:
    return page.locator(f"#{NAME} > .explorable")


def check_live(page: Page) -> dict[str, Any]:
    """Check that state, data, drawing, controls and readout say one thing, the library's; return the state."""
    data = live(page).evaluate("element => ({...element.dataset})")
    now = {"p": json.loads(data["p"]), "y": int(data["y"]), "s": float(data["s"])}
    after, threshold, rising = json.loads(data["after"]), float(data["threshold"]), json.loads(data["rising"])
    assert now == state(page)
    check_numbers(*now.values(), after, threshold, rising)
    drawn = page.evaluate(DRAWN)
    assert drawn["before"] == pytest.approx(now["p"], abs=1e-6)
    assert drawn["after"] == pytest.approx(after, abs=1e-6)
    assert drawn["values"] == pytest.approx(now["p"], abs=1e-12)
    assert drawn["checked"] == [str(now["y"])]
    assert drawn["pushed"] == [now["y"]]
    assert drawn["rises"] == rising
    if threshold >= 0:
        assert drawn["threshold"] == pytest.approx(threshold, abs=1e-6)
    else:
        assert drawn["threshold"] < 0
    shown = live(page).locator("dd").all_text_contents()
    assert number(shown[0]) == pytest.approx(threshold, abs=5.1e-4)
    assert [number(text) for text in shown[2].split("→")] == pytest.approx(
        [now["p"][now["y"]], after[now["y"]]], abs=5.1e-4
    )
    names = ", ".join(LABELS[label] for label in rising)
    assert shown[4] == f"{len(rising)} of {len(after) - 1}" + (f" ({names})" if rising else "")
    assert float(live(page).locator("output").text_content()) == now["s"]
    return now


# Heights in units of the axis, whose ends are the probabilities 0 and 1.
DRAWN = f"""() => {{
  const root = document.querySelector('#{NAME} > .explorable');
  const number = (element, name) => Number(element.getAttribute(name));
  const [, top, base] = root.querySelector('.axis').getAttribute('d').match(/M[\\d.]+ ([\\d.]+)V([\\d.]+)/).map(Number);
  const heights = kind => [...root.querySelectorAll(`.bar > .${{kind}}`)].map(
    bar => (base - number(bar, 'y')) / (base - top));
  const bars = [...root.querySelectorAll('.bar')];
  const marked = kind => [...bars.keys()].filter(label => bars[label].classList.contains(kind));
  return {{
    before: heights('before'), after: heights('after'), pushed: marked('pushed'), rises: marked('rises'),
    values: bars.map(bar => number(bar, 'aria-valuenow')),
    threshold: (base - number(root.querySelector('.threshold'), 'y1')) / (base - top),
    checked: [...root.querySelectorAll(':checked')].map(button => button.value),
  }};
}}"""


def number(text: str) -> float:
    """Read a number as the figure writes it: with a minus sign, and perhaps a power of ten."""
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")
    digits, _, power = text.strip().translate(superscripts).removesuffix(" < 0").partition(" × 10")
    return float(f"{digits}e{power or 0}")


def check_numbers(p: list[float], y: int, s: float, after: list[float], threshold: float, rising: list[int]) -> None:
    """Compare with the library; who rises follows from its threshold, within rounding."""
    before = torch.tensor(p, dtype=torch.float64)
    expected = negative_step(before, y, s)
    torch.testing.assert_close(torch.tensor(after, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)
    tau = squeezing_threshold(before, y, s).item()
    assert threshold == pytest.approx(tau, rel=0, abs=1e-12)
    others = [label for label in range(len(p)) if label != y and abs(p[label] - tau) > TINY]
    assert [label for label in others if label in rising] == [label for label in others if p[label] > tau]
    assert y not in rising
