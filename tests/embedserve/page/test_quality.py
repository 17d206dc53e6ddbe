"""How the page behaves for everyone: safe, by keyboard, by screen reader, in the dark, on a phone."""

from __future__ import annotations

import io
from typing import Any

import httpx2
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, expect

from tests.embedserve.page.conftest import COLOURS, HOSTILE, Servers, Visit, png

PLACES = ("/", "/#/search?in=colours&text=red", "/#/search?in=nothing", "/#/classify")


def settle(page: Page) -> None:
    expect(page.locator("section:visible .notice, section:visible .card").first).to_be_visible()


def show_bars(page: Page) -> None:
    page.set_input_files(
        "#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": png((0, 0, 255))}
    )
    expect(page.locator("#bars li")).to_have_count(6)


def test_hostile_ids_and_metadata_stay_text(visit: Visit) -> None:
    page = visit.open("open", "/#/search?in=hostile&text=red")
    expect(page.locator(".name")).to_have_text(HOSTILE)
    page.locator(".card").hover()
    page.locator(".info").click()
    expect(page.get_by_role("dialog").get_by_role("heading")).to_have_text(HOSTILE)
    expect(page.locator("dt")).to_have_text(["id", "score", "caption", HOSTILE])
    page.get_by_role("button", name="More like this").last.click()
    expect(page.locator(".part-name")).to_have_text(f"like {HOSTILE}")
    page.get_by_role("searchbox").fill(HOSTILE)
    page.keyboard.press("Enter")
    expect(page.locator("#search-call code")).to_contain_text("onerror=")
    assert page.evaluate("window.hacked") is None
    assert page.locator("[onerror]").count() == 0


def test_the_policy_lets_no_string_become_code(visit: Visit, servers: Servers) -> None:
    policy = httpx2.get(servers["open"] + "/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "script-src 'self'" in policy or "default-src 'self'" in policy
    page = visit.open("open")
    settle(page)
    assert (
        page.evaluate("(() => { try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; } })()")
        == "TypeError"
    )
    visit.excuse("TrustedHTML")


def test_every_file_of_the_page_needs_no_other_server(visit: Visit) -> None:
    page = visit.open("open")
    settle(page)
    assert any(url.endswith("/page/style.css") for url in visit.requests)
    assert all(url.startswith(visit.servers["open"]) for url in visit.requests)


def test_a_whole_search_by_keyboard(visit: Visit) -> None:
    page = visit.open("open")
    expect(page.locator(".card")).to_have_count(len(COLOURS))
    page.keyboard.press("/")
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    expect(page.locator(".score").first).to_be_visible()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.like')"):
            break
    assert page.evaluate("document.activeElement === document.querySelector('.like')")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="orange")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate("document.activeElement.textContent") == "Details of orange"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(page.locator(".part")).to_contain_text("like red")
    expect(page.locator(".name").first).to_have_text("orange")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement === document.querySelector('.like')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(visitor: Any, scheme: str) -> None:
    visit = visitor(color_scheme=scheme, reduced_motion="reduce")
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if scheme == "dark":  # differs in its colours alone
        options["runOnly"] = ["color-contrast"]

    def check(where: str) -> None:
        found = Axe().run(visit.page, options=options).response["violations"]
        problems = [(v["id"], [node["html"] for node in v["nodes"]]) for v in found]
        assert problems == [], where

    for place in PLACES:
        page = visit.open("open", place)
        settle(page)
        check(place)
    show_bars(page)
    check("bars")
    page = visit.open("open", PLACES[1])
    settle(page)
    page.get_by_text("Options").click()
    page.locator("#search-call summary").click()
    check("options")
    page.locator(".info").first.click()
    check("details")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Add images").click()
    check("add")
    page = visit.open("seeing", PLACES[1])
    settle(page)
    page.locator(".info").first.click()
    page.get_by_role("button", name="Heat map").click()
    page.get_by_text("Bright: ").wait_for()
    check("heat map")


def brightness(page: Page) -> float:
    return float(np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).mean())


def test_dark_is_dark_and_light_is_light(visitor: Any) -> None:
    shades = []
    for scheme in ("light", "dark"):
        page = visitor(color_scheme=scheme).open("open", "/#/classify")
        settle(page)
        shades.append(brightness(page))
    assert shades[0] > 200
    assert shades[1] < 60


@pytest.mark.parametrize("width", [320, 2200])
def test_nothing_scrolls_sideways(visitor: Any, width: int) -> None:
    visit = visitor(viewport={"width": width, "height": 700})

    def check(where: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), where

    for place in PLACES:
        page = visit.open("open", place)
        settle(page)
        check(place)
    show_bars(page)
    check("bars")
    page = visit.open("open", "/#/search?in=hostile&text=" + "a" * 300)
    settle(page)
    page.get_by_text("Options").click()
    page.locator("#search-call summary").click()
    check("a long word")
    page.locator(".info").click()
    check("details")
    assert page.locator("#detail").evaluate("(dialog) => dialog.scrollWidth <= dialog.clientWidth")


def test_the_status_is_announced_and_landmarks_are_there(visit: Visit) -> None:
    page = visit.open("open", PLACES[1])
    settle(page)
    expect(page.locator("#search-status")).to_contain_text("24 results")
    for role in ("banner", "navigation", "main", "contentinfo", "search"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("region", name="Results").get_by_role("listitem")).to_have_count(24)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the skip link
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.url.endswith("text=red")
