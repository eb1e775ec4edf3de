"""The figure that the reader moves: its numbers are the library's, and it fits the page it stands on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from .conftest import SITE, Open, pages
from .live_figure import API, CHAPTER, NAME, check_live, check_numbers, live, put, state


def test_random_settings_give_what_the_library_gives(visit: Open) -> None:
    """The pure function, for two to ten labels, steps from 1e-12 to 1000 and probabilities down to 1e-30."""
    settings = [draw(seed) for seed in range(400)]
    with visit(CHAPTER) as seen:
        found = seen.page.evaluate(f"settings => settings.map(([p, y, s]) => {API}.compute(p, y, s))", settings)
    for (p, y, s), result in zip(settings, found, strict=True):
        check_numbers(p, y, s, result["after"], result["threshold"], result["rising"])
        logits = torch.tensor(p, dtype=torch.float64).log() + s * torch.tensor(p, dtype=torch.float64)
        logits[y] -= s
        assert result["normaliser"] == pytest.approx(logits.logsumexp(-1).exp().item(), rel=1e-9)


def draw(seed: int, labels: int | None = None, *, reach: tuple[float, float] = (-12, 3)) -> tuple[Any, ...]:
    """Draw a setting; one in eight has the step 0, every other one probabilities over many orders of magnitude."""
    at = torch.Generator().manual_seed(seed)
    count = labels or int(torch.randint(2, 11, (), generator=at))
    spread = 20.0 if seed % 2 else 1.5
    p = torch.softmax(spread * torch.randn(count, generator=at, dtype=torch.float64), -1)
    low, high = reach
    s = 10 ** float(low + (high - low) * torch.rand((), generator=at, dtype=torch.float64)) if seed % 8 else 0.0
    return p.tolist(), int(torch.randint(count, (), generator=at)), s


def test_the_figure_shows_what_the_library_gives(visit: Open) -> None:
    """The data of the figure, and what is drawn and written from them, in states set from outside."""
    with visit(CHAPTER) as seen:
        count = len(state(seen.page)["p"])
        for seed in range(1, 40):
            p, y, s = draw(seed, count, reach=(-3, 1.47))
            put(seen.page, {"p": p, "y": y, "s": s})
            check_live(seen.page)
        assert seen.complaints == []


def test_it_starts_from_the_state_of_its_caption(visit: Open) -> None:
    with visit(CHAPTER, scripts=False) as bare:
        place = bare.page.locator("[data-explorable]")
        given = {key: json.loads(place.get_attribute(f"data-{key}")) for key in ("p", "y", "s")}
        caption = bare.page.locator(f"#{NAME} figcaption > p").text_content()
    with visit(CHAPTER) as seen:
        assert check_live(seen.page) == given
        assert seen.page.locator(f"#{NAME} figcaption > p").first.text_content() == caption
        assert seen.page.locator(f"#{NAME} .explorable-help").is_visible()
        assert live(seen.page).locator("[role=status]").text_content() == ""


def test_without_scripts_the_static_figure_stands(visit: Open) -> None:
    with visit(CHAPTER, scripts=False) as seen:
        assert seen.page.locator(f"#{NAME} .drawing svg").is_visible()
        assert seen.page.locator("article").locator("input, button, [role=slider], .explorable").count() == 0
        assert not seen.page.locator("[data-explorable]").is_visible()


def test_the_live_figure_stands_in_its_place_and_the_static_one_on_paper(visit: Open) -> None:
    with visit(CHAPTER, scheme="dark") as seen:
        drawing = seen.page.locator(f"#{NAME} .drawing")
        assert live(seen.page).is_visible() and not drawing.is_visible()
        seen.page.emulate_media(media="print")
        assert drawing.is_visible()
        assert not live(seen.page).is_visible()
        assert not seen.page.locator(".explorable-help").is_visible()


def test_no_other_page_loads_it(visit: Open) -> None:
    scripts = re.compile(r'(?:src|href)="[^"]*explorables/')
    assert [path for path in pages() if scripts.search((SITE / path).read_text(encoding="utf-8"))] == [CHAPTER]
    with visit("book/index.html") as seen:
        assert seen.page.evaluate("window.ldynExplorables === undefined")


def test_it_works_from_the_disk(visit: Open) -> None:
    with visit(CHAPTER, base=SITE.resolve().as_uri()) as seen:
        seen.page.wait_for_load_state("networkidle")
        check_live(seen.page)
        assert seen.complaints == []


def test_a_state_that_is_none_is_refused(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        before = state(seen.page)
        refused = f"""part => {{ try {{ {API}.figures['{NAME}'].set(part); }} catch (e) {{ return e.message; }} }}"""
        count = len(before["p"])
        for part, message in (
            ({"p": [0.5] * count}, "p: expected probabilities that sum to 1"),
            ({"p": [1.5, -0.5, *[0] * (count - 2)]}, "p: expected probabilities"),
            ({"p": [0.5, 0.5], "y": 0}, f"p: expected {count} labels, got 2"),
            ({"y": count}, f"y: expected a label below {count}, got {count}"),
            ({"y": 0.5}, "y: expected a label"),
            ({"s": -1}, "s: expected a finite step"),
            ({"s": None}, "s: expected a finite step"),
        ):
            answer = seen.page.evaluate(refused, part)
            assert answer is not None and answer.startswith(message), part
        assert check_live(seen.page) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible(visit: Open, scheme: str) -> None:
    """Contrast with the ground: 4.5 for text, 3 for what is drawn."""
    with visit(CHAPTER, scheme=scheme) as seen:
        ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        for selector, paint, least in (
            ("text.number", "fill", 4.5),
            (".tick text", "fill", 4.5),
            (".threshold-value", "fill", 4.5),
            ("dd", "color", 4.5),
            ("dt", "color", 4.5),
            (".labels span", "color", 4.5),
            (".key li", "color", 4.5),
            (".rises .after", "fill", 3),
            (".falls:not(.pushed) .after", "fill", 3),
            (".falls .arrow", "fill", 3),
            (".stripe", "stroke", 3),
            (".before", "stroke", 3),
            (".grip", "stroke", 3),
            (".threshold", "stroke", 3),
            (".axis", "stroke", 3),
        ):
            painted = live(seen.page).locator(selector).first.evaluate(f"e => getComputedStyle(e).{paint}")
            assert contrast(painted, ground) >= least, selector


def contrast(first: str, second: str) -> float:
    """Ratio of contrast of two opaque colours, as the WCAG define it."""
    light = sorted(luminance(colour) for colour in (first, second))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(colour: str) -> float:
    channels = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)]
    assert len(channels) == 3, colour
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_buttons_stand_under_their_bars_at_every_width(visit: Open) -> None:
    middle = "elements => elements.map(e => e.getBoundingClientRect()).map(box => box.x + box.width / 2)"
    with visit(CHAPTER) as seen:
        start = check_live(seen.page)
        for width in (1280, 390, 720, 320, 1600):
            seen.page.set_viewport_size({"width": width, "height": 900})
            seen.page.wait_for_function(
                f"() => (r => Math.abs(r.querySelector('svg').viewBox.baseVal.width - r.clientWidth) < 1)"
                f"(document.querySelector('#{NAME} > .explorable'))"
            )
            bars = live(seen.page).locator(".bar > .before").evaluate_all(middle)
            buttons = live(seen.page).get_by_role("radio").evaluate_all(middle)
            assert buttons == pytest.approx(bars, abs=1)
            assert live(seen.page).evaluate("element => element.scrollWidth <= element.clientWidth + 1")
            assert check_live(seen.page) == start


def test_a_page_that_is_come_back_to_is_whole(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        live(seen.page).get_by_label("Step s").press("End")
        live(seen.page).get_by_role("radio").last.check()
        seen.page.goto(seen.page.url.replace(CHAPTER, "book/index.html"))
        seen.page.go_back(wait_until="load")
        live(seen.page).wait_for()
        check_live(seen.page)
        live(seen.page).get_by_label("Step s").press("Home")
        assert check_live(seen.page)["s"] == 0
        seen.page.reload()
        check_live(seen.page)
        assert live(seen.page).count() == 1
        assert seen.complaints == []
