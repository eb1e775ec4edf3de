"""The figure that the reader moves: mouse, finger and keyboard move it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page

from .conftest import Open
from .live_figure import API, CHAPTER, LABELS, NAME, check_live, live, state

LEAST, MOST = 0.001, 0.99


def test_keys_move_a_bar_and_the_others_keep_their_proportions(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        count = len(state(seen.page)["p"])
        for press, expected in (
            ("ArrowUp", lambda before: before + 0.01),
            ("Shift+ArrowRight", lambda before: before + 0.1),
            ("ArrowLeft", lambda before: before - 0.01),
            ("PageUp", lambda before: before + 0.1),
            ("Shift+ArrowDown", lambda before: before - 0.1),
            ("PageDown", lambda before: max(LEAST, before - 0.1)),
            ("Home", lambda _: LEAST),
            ("ArrowDown", lambda _: LEAST),
            ("End", lambda _: MOST),
            ("PageUp", lambda _: MOST),
            ("ArrowDown", lambda before: before - 0.01),
        ):
            before = state(seen.page)["p"]
            live(seen.page).get_by_role("slider").nth(1).press(press)
            after = check_live(seen.page)["p"]
            assert after[1] == pytest.approx(expected(before[1]), abs=1e-12), press
            check_proportions(before, after, moved=1)
        before = state(seen.page)
        for press in ("Control+ArrowUp", "Alt+ArrowUp", "a", "Enter"):
            live(seen.page).get_by_role("slider").nth(1).press(press)
        assert state(seen.page) == before
        assert live(seen.page).locator(".bar").count() == count


def check_proportions(before: list[float], after: list[float], *, moved: int) -> None:
    assert sum(after) == pytest.approx(1, abs=1e-12)
    scale = (1 - after[moved]) / (1 - before[moved])
    expected = [value * scale for label, value in enumerate(before) if label != moved]
    assert [value for label, value in enumerate(after) if label != moved] == pytest.approx(expected, rel=1e-9)


def test_where_nothing_is_left_the_others_share_equally(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        assert seen.page.evaluate(f"{API}.withBar([0, 1, 0], 1, 0.4)") == pytest.approx([0.3, 0.4, 0.3])
        assert seen.page.evaluate(f"{API}.compute([0, 1, 0], 1, 3)")["after"] == [0, 1, 0]
        assert seen.page.evaluate(f"{API}.compute([0, 1, 0], 1, 3)")["rising"] == []


def test_the_mouse_drags_a_bar(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        mouse, before = seen.page.mouse, state(seen.page)["p"]
        x, y, unit = grip(seen.page, 2)
        mouse.move(x, y)
        mouse.down()
        mouse.move(x + 3, y - 20)
        mouse.move(x + 5, y - 60)
        after = check_live(seen.page)["p"]
        assert after[2] == pytest.approx(before[2] + 60 / unit, abs=6e-4)
        check_proportions(before, after, moved=2)
        mouse.move(x, y - 5000)
        assert check_live(seen.page)["p"][2] == MOST
        mouse.move(x, y - 30)
        mouse.up()
        mouse.move(x, y - 22)  # still over the bar, which has been let go
        assert seen.page.evaluate("getSelection().toString()") == ""
        after = check_live(seen.page)["p"]
        assert after[2] == pytest.approx(before[2] + 30 / unit, abs=6e-4)
        check_proportions(before, after, moved=2)
        assert seen.complaints == []


def grip(page: Page, label: int) -> tuple[float, float, float]:
    """Scroll a bar into view; return the middle of its grip, and how many pixels tall a probability of 1 is."""
    live(page).locator("svg").first.scroll_into_view_if_needed()
    box = live(page).locator(".bar > .grip").nth(label).bounding_box()
    top, base = page.evaluate(
        f"document.querySelector('#{NAME} .axis').getAttribute('d').match(/ ([\\d.]+)V([\\d.]+)/).slice(1).map(Number)"
    )
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, base - top


@contextmanager
def phone(browser: Browser, site: str) -> Iterator[Page]:
    """Open the chapter on a touch screen."""
    context = browser.new_context(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 700})
    page = context.new_page()
    page.goto(f"{site}/{CHAPTER}", wait_until="load")
    live(page).locator("svg").first.evaluate("element => element.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(200)
    yield page
    context.close()


def swipe(page: Page, x: float, y: float, up: float) -> None:
    """Draw a finger upwards over the screen."""
    session = page.context.new_cdp_session(page)
    places = [y - up * part / 10 for part in range(11)]
    for kind, place in [("touchStart", y), *(("touchMove", place) for place in places[1:])]:
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": place}]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(300)


def test_a_finger_drags_the_grip_and_scrolls_elsewhere(browser: Browser, site: str) -> None:
    with phone(browser, site) as page:
        x, y, unit = grip(page, 1)
        before, scrolled = state(page)["p"], page.evaluate("scrollY")
        swipe(page, x, y, up=50)
        after = check_live(page)["p"]
        assert after[1] == pytest.approx(before[1] + 50 / unit, abs=6e-4)
        check_proportions(before, after, moved=1)
        assert page.evaluate("scrollY") == scrolled
        x, y, unit = grip(page, 1)
        swipe(page, x, y + 0.6 * after[1] * unit, up=150)  # the body of the same bar
        assert check_live(page)["p"] == after
        assert page.evaluate("scrollY") > scrolled + 50


def test_what_a_finger_aims_at_is_large_enough(browser: Browser, site: str) -> None:
    with phone(browser, site) as page:
        for kind in (".reach", ".labels label", "button", ".step input"):
            for target in live(page).locator(kind).all():
                box = target.bounding_box()
                assert box["width"] >= 24 and box["height"] >= 24, kind
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_labels_are_chosen_by_click_and_by_keyboard(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        buttons = live(seen.page).get_by_role("radiogroup", name="Label to push down").get_by_role("radio")
        count = len(state(seen.page)["p"])
        assert buttons.count() == count
        live(seen.page).locator(".labels label").nth(count - 1).click()
        assert check_live(seen.page)["y"] == count - 1
        buttons.nth(count - 1).press("ArrowLeft")
        assert check_live(seen.page)["y"] == count - 2
        seen.page.keyboard.press("ArrowRight")
        seen.page.keyboard.press("ArrowRight")
        assert check_live(seen.page)["y"] == 0


def test_the_step_runs_from_nothing_to_thirty(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        slider = live(seen.page).get_by_label("Step s")
        slider.press("Home")
        assert check_live(seen.page)["s"] == 0
        slider.press("ArrowRight")
        assert 0 < check_live(seen.page)["s"] < 0.01
        slider.press("End")
        assert check_live(seen.page)["s"] == 30
        slider.press("ArrowLeft")
        assert 28 < check_live(seen.page)["s"] < 30
        slider.fill("100")
        assert check_live(seen.page)["s"] == pytest.approx(1.42, abs=0.01)
        assert slider.get_attribute("aria-valuetext") == "1.42"
        steps = seen.page.evaluate(f"Array.from({{length: 201}}, (_, place) => {API}.stepAt(place))")
        assert steps == sorted(set(steps))
        assert seen.page.evaluate(f"steps => steps.map({API}.placeOf)", steps) == list(range(201))


def test_reset_goes_back_to_the_start(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        start = state(seen.page)
        live(seen.page).get_by_role("slider").first.press("End")
        live(seen.page).get_by_label("Step s").press("End")
        live(seen.page).get_by_role("radio").last.check()
        assert all(state(seen.page)[key] != start[key] for key in ("p", "s"))
        live(seen.page).get_by_role("button", name="Reset").click()
        assert check_live(seen.page) == start


def test_what_happens_is_announced_once_the_reader_pauses(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        status = live(seen.page).locator("[role=status]")
        live(seen.page).get_by_label("Step s").press("End")
        seen.page.wait_for_function("element => element.textContent !== ''", arg=status.element_handle())
        now = check_live(seen.page)
        assert status.text_content().startswith(
            f"Label {LABELS[now['y']]} is pushed down with step 30. The threshold is"
        )
        bar = live(seen.page).get_by_role("slider").first
        assert re.fullmatch(
            r"\d\.\d{3}; after \d\.\d{3}, (rises|falls|pushed down)", bar.get_attribute("aria-valuetext")
        )


def test_the_keyboard_s_place_is_seen(visit: Open) -> None:
    with visit(CHAPTER) as seen:
        count = len(state(seen.page)["p"])
        live(seen.page).get_by_role("slider").first.focus()
        reached = []
        for _ in range(count + 3):
            outline, where = seen.page.evaluate(
                "() => { const e = document.activeElement, style = getComputedStyle(e);"
                " return [style.outlineStyle + ' ' + style.outlineWidth, e.getAttribute('role') || e.type]; }"
            )
            assert outline == "solid 2px", where
            reached.append(where)
            seen.page.keyboard.press("Tab")
        assert reached == ["slider"] * count + ["radio", "range", "button"]
