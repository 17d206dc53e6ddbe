"""What people do on the page: search by words, pictures and results, classify, add, give a key."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from playwright.sync_api import Page, expect

from embedserve.bundle import pack_vector
from tests.embedserve.page.conftest import COLOURS, READ_KEY, WRITE_KEY, Servers, Visit, png

TRANSFER = """([kind, selectors, files]) => {
  const data = new DataTransfer();
  for (const [bytes, name, type] of files) data.items.add(new File([new Uint8Array(bytes)], name, { type }));
  const how = { bubbles: true, cancelable: true };
  const send = (selector, event) => document.querySelector(selector).dispatchEvent(event);
  if (kind === "paste") send("body", new ClipboardEvent("paste", { ...how, clipboardData: data }));
  else for (const [event, selector] of Object.entries(selectors))
    send(selector, new DragEvent(event, { ...how, dataTransfer: data }));
}"""


def paste(page: Page, *files: tuple[bytes, str]) -> None:
    page.evaluate(TRANSFER, ["paste", {}, [[list(data), name, "image/png"] for data, name in files]])


def drop(page: Page, zone: str, *files: tuple[bytes, str]) -> None:
    selectors = {"dragenter": "body", "dragover": zone, "drop": zone}
    page.evaluate(TRANSFER, ["drop", selectors, [[list(data), name, "image/png"] for data, name in files]])


def names(page: Page) -> list[str]:
    return page.locator("#results .name").all_inner_texts()


def ask(page: Page, text: str) -> None:
    page.get_by_role("searchbox").fill(text)
    page.keyboard.press("Enter")


def results(page: Page, first: str, status: str = r"\d+ results? in") -> None:
    expect(page.locator("#results .name").first).to_have_text(first)
    expect(page.locator("#search-status")).to_have_text(re.compile(status))


def test_the_collection_is_shown_before_anything_is_asked(visit: Visit) -> None:
    page = visit.open("open")
    expect(page.locator(".card")).to_have_count(len(COLOURS))
    expect(page.locator("#search-status")).to_have_text(f"{len(COLOURS)} items · Paint.")
    expect(page.locator("#collection")).to_have_value("colours")
    assert (
        page.locator(".card img").first.evaluate("async (img) => (await img.decode(), img.naturalWidth)") > 0
    )


def test_a_text_search_shows_ranked_results_with_scores_and_thumbnails(visit: Visit) -> None:
    page = visit.open("open")
    ask(page, "red")
    results(page, "red", "^24 results in")
    assert names(page)[:3] == ["red", "orange", "dark red"]
    scores = [
        float(text) for text in page.locator(".score").evaluate_all("all => all.map((s) => s.lastChild.data)")
    ]
    assert scores[0] == pytest.approx(1, abs=0.001)
    assert scores == sorted(scores, reverse=True)
    assert (
        page.locator(".card img").first.evaluate("async (img) => (await img.decode(), img.naturalWidth)") > 0
    )
    assert page.locator(".card img").first.get_attribute("alt") == "red"


def test_show_more_doubles_the_results(visit: Visit) -> None:
    page = visit.open("open", "/#/search?in=colours&text=red")
    expect(page.locator(".card")).to_have_count(24)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".card")).to_have_count(len(COLOURS))
    assert page.evaluate("document.activeElement === document.querySelectorAll('.like')[24]")


def test_typing_searches_after_a_pause_and_back_skips_the_prefixes(visit: Visit) -> None:
    page = visit.open("open")
    expect(page.locator(".card")).to_have_count(len(COLOURS))
    page.get_by_role("searchbox").press_sequentially("blue", delay=20)
    results(page, "blue")
    page.get_by_role("searchbox").fill("green")
    results(page, "green")
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("")
    expect(page.locator(".card")).to_have_count(len(COLOURS))


def test_back_forward_and_a_shared_link_bring_a_search_again(visit: Visit, visitor: Any) -> None:
    page = visit.open("open")
    ask(page, "green")
    results(page, "green")
    ask(page, "blue")
    results(page, "blue")
    page.go_back()
    results(page, "green")
    expect(page.get_by_role("searchbox")).to_have_value("green")
    page.go_forward()
    results(page, "blue")
    other = visitor().page
    other.goto(page.url)
    results(other, "blue")


def test_a_chosen_image_finds_its_like_and_back_brings_it_again(visit: Visit) -> None:
    page = visit.open("open")
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": png((0, 0, 250))})
    results(page, "blue")
    expect(page.locator(".part")).to_contain_text("mine.png")
    page.get_by_role("button", name="Remove mine.png").click()
    expect(page.locator(".score")).to_have_count(0)
    page.go_back()
    results(page, "blue")
    page.reload()
    expect(page.locator("#search-status")).to_contain_text("gone after a reload")


def test_a_dropped_image_finds_its_like(visit: Visit) -> None:
    page = visit.open("open")
    expect(page.locator(".card")).to_have_count(len(COLOURS))
    drop(page, "#drop-use", (png((0, 240, 0)), "leaf.png"))
    results(page, "green")
    expect(page.locator("#drop")).to_be_hidden()


def test_a_pasted_image_mixes_with_text(visit: Visit) -> None:
    page = visit.open("open")
    expect(page.locator(".card")).to_have_count(len(COLOURS))
    paste(page, (png((0, 0, 255)), "image.png"))
    results(page, "blue")
    page.get_by_role("searchbox").fill("dark")
    page.keyboard.press("Enter")
    results(page, "gray 100")
    page.get_by_text("Options").click()
    page.get_by_role("slider", name="Text against image").fill("0.9")
    results(page, "black")


def test_a_file_that_is_no_image_gets_the_servers_words(visit: Visit) -> None:
    page = visit.open("open")
    page.set_input_files(
        "#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"<html>not found</html>"}
    )
    expect(page.locator(".notice h2")).to_have_text("Not an image")
    expect(page.locator(".notice")).to_contain_text("HTML")
    visit.excuse("status of 415")


def test_a_click_on_a_result_searches_by_it(visit: Visit) -> None:
    page = visit.open("open", "/#/search?in=colours&text=red")
    page.get_by_role("button", name="More like orange").click()
    expect(page.get_by_role("button", name="More like orange")).to_have_count(0)
    results(page, "red")
    expect(page.locator(".part")).to_contain_text("like orange")
    assert "like=paint" in page.url
    ask(page, "green")  # moves the search: like orange, but green
    results(page, "green")
    page.go_back()
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("red")


def test_options_filter_and_reject_what_is_no_json(visit: Visit) -> None:
    page = visit.open("open", "/#/search?in=colours&text=red")
    results(page, "red")
    page.get_by_text("Options").click()
    field = page.get_by_label("Filter on metadata")
    field.fill('{"level": {"$lt": 2}}')
    field.press("Enter")
    results(page, "red", "^2 results")
    field.fill('{"level": ')
    field.press("Enter")
    expect(page.locator("#filter-error")).to_contain_text("not JSON")
    field.fill('{"level": {"$gt": 999}}')
    field.press("Enter")
    expect(page.locator(".notice")).to_contain_text("No item matches the filter")
    page.get_by_role("button", name="Remove the filter").click()
    results(page, "red", "^24 results")
    field.fill('{"level": {"$near": 2}}')
    field.press("Enter")
    expect(page.locator(".notice")).to_contain_text("$near")
    visit.excuse("status of 422")


def test_a_heat_map_covers_the_picture_and_goes_away_again(visit: Visit) -> None:
    page = visit.open("seeing", "/#/search?in=colours&text=green")
    results(page, "green")
    page.locator(".card").first.hover()
    page.get_by_role("button", name="Details of green", exact=True).click()
    dialog = page.get_by_role("dialog")
    button = dialog.get_by_role("button", name="Heat map")
    button.click()
    expect(dialog.get_by_text("Bright: like “green”")).to_be_visible()
    shown = dialog.get_by_role("img", name="Heat map of green")
    assert shown.evaluate("async (img) => (await img.decode(), [img.naturalWidth, img.naturalHeight])") == [
        8,
        8,
    ]
    button.click()
    expect(shown).to_have_count(0)
    expect(dialog.locator(".frame img")).to_have_count(1)


def test_without_words_the_heat_map_is_the_attention(visit: Visit) -> None:
    page = visit.open("seeing", "/#/search?in=colours")
    page.locator(".card").first.hover()
    page.locator(".card .info").first.click()
    page.get_by_role("button", name="Heat map").click()
    expect(page.get_by_text("Bright: what the vector is made from")).to_be_visible()


def test_an_encoder_without_heat_maps_has_no_button_for_them(visit: Visit) -> None:
    page = visit.open("open", "/#/search?in=colours")
    page.locator(".card").first.hover()
    page.locator(".card .info").first.click()
    expect(page.get_by_role("button", name="More like this")).to_be_visible()
    expect(page.get_by_role("button", name="Heat map")).to_have_count(0)


def test_details_show_all_metadata_and_lead_on(visit: Visit) -> None:
    page = visit.open("open", "/#/search?in=colours&text=red")
    page.locator(".card").first.hover()
    page.get_by_role("button", name="Details of red", exact=True).click()
    dialog = page.get_by_role("dialog", name="red")
    expect(dialog.locator("dd")).to_have_text(["paint/red.pngCopy", "1.000", "red", "0"])
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("dialog", name="orange")).to_be_visible()
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#classify-view")).to_be_visible()
    expect(page.locator("#bars li")).to_have_count(6)


def test_zero_shot_bars_follow_the_labels(visit: Visit) -> None:
    page = visit.open("open")
    page.get_by_role("link", name="Classify").click()
    page.set_input_files(
        "#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": png((0, 0, 255))}
    )
    expect(page.locator("#bars li")).to_have_count(6)
    page.get_by_label("Labels").fill("red, green\nblue, blue")
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.locator(".bar-label")).to_have_text(["blue", "red", "green"])
    expect(page.locator("#classify-status")).to_have_text("blue, 100% among 3 labels")
    widths = page.locator(".bar-fill").evaluate_all(
        "all => all.map((bar) => bar.getBoundingClientRect().width)"
    )
    assert widths[0] > 10 * widths[1]
    page.get_by_label("Template").fill("no braces")
    expect(page.locator("#bars .notice")).to_contain_text("{}")
    visit.excuse("status of 422")


def test_an_encoder_without_text_says_so(visit: Visit) -> None:
    page = visit.open("wordless")
    expect(page.get_by_role("searchbox")).to_be_disabled()
    expect(page.get_by_role("searchbox")).to_have_attribute("placeholder", re.compile("reads no text"))
    paste(page, (png((255, 0, 0)), "image.png"))
    results(page, "red")
    page.get_by_role("link", name="Classify").click()
    expect(page.locator("#bars .notice h2")).to_have_text("This encoder reads no text")


def test_a_saved_label_set_is_chosen_by_name(visit: Visit) -> None:
    url = visit.servers["open"]
    httpx2.put(f"{url}/v1/labelsets/tones", json={"labels": {"warm": ["red"], "cool": ["blue"]}})
    try:
        page = visit.open("open")
        page.get_by_role("link", name="Classify").click()
        page.get_by_label("Label set").select_option("tones")
        expect(page.get_by_label("Labels")).to_be_hidden()
        page.set_input_files(
            "#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": png((0, 0, 255))}
        )
        expect(page.locator(".bar-label")).to_have_text(["cool", "warm"])
        page.get_by_label("Label set").select_option("My own words")
        expect(page.get_by_label("Labels")).to_be_visible()
        expect(page.locator("#bars li")).to_have_count(6)
    finally:
        httpx2.delete(f"{url}/v1/labelsets/tones")
    page.goto(f"{url}/#/classify?set=tones")
    page.reload()
    page.set_input_files(
        "#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": png((0, 0, 255))}
    )
    expect(page.get_by_label("Label set")).to_have_value("tones")
    expect(page.locator("#bars .notice")).to_contain_text("There is no label set 'tones'")
    visit.excuse("status of 404")


def test_an_encoder_without_text_classifies_with_a_fitted_label_set(visit: Visit) -> None:
    url = visit.servers["wordless"]
    collection = httpx2.get(f"{url}/v1/collections/colours").json()
    fitted = {
        "kind": "linear",
        "labels": ["warm", "cool"],
        "dim": 3,
        "weights": pack_vector(np.array([[20, 10, 0], [0, 0, 20]], np.float32)),
        "bias": [0, 0],
        "encoder": collection["encoder"],
        "fingerprint": collection["fingerprint"],
        "fitted": {"kind": "linear", "counts": {"warm": 3, "cool": 3}},
    }
    httpx2.put(f"{url}/v1/labelsets/tones", json=fitted).raise_for_status()
    try:
        page = visit.open("wordless", "/#/classify")
        expect(page.get_by_label("Label set")).to_have_value("tones")
        page.set_input_files(
            "#classify-file", {"name": "a.png", "mimeType": "image/png", "buffer": png((255, 0, 0))}
        )
        expect(page.locator(".bar-label")).to_have_text(["warm", "cool"])
        expect(page.locator("#classify-status")).to_have_text("warm, 100% by the label set “tones”")
        expect(page.get_by_label("Labels")).to_be_hidden()
    finally:
        httpx2.delete(f"{url}/v1/labelsets/tones")


@pytest.mark.parametrize(
    ("server", "place", "title", "says"),
    [
        ("bare", "/", "No collections yet", "embedserve index photos/ --collection photos"),
        (
            "open",
            "/#/search?in=nothing",
            "“nothing” is empty",
            "embedserve index photos/ --collection nothing",
        ),
        ("open", "/#/search?in=colour&text=red", "Not found", "colours"),
        ("open", "/#/classify", "Give an image", "No training needed"),
    ],
)
def test_an_empty_page_says_why(visit: Visit, server: str, place: str, title: str, says: str) -> None:
    page = visit.open(server, place)
    expect(page.locator("section:visible .notice h2")).to_have_text(title)
    expect(page.locator("section:visible .notice")).to_contain_text(says)
    if title == "Not found":
        page.get_by_role("button", name="colours").click()
        results(page, "red")
        visit.excuse("status of 404")


def test_dropped_images_are_added_and_bad_ones_are_listed(visit: Visit) -> None:
    page = visit.open("bare")
    expect(page.locator(".notice")).to_be_visible()
    drop(
        page,
        "#drop-add",
        (png((255, 0, 0)), "one.png"),
        (b"<html>", "two.png"),
        (png((0, 0, 255)), "three.png"),
    )
    page.get_by_label("Collection a new name").fill("mine")
    page.get_by_role("button", name="Add 3 images").click()
    expect(page.locator("#add-status")).to_have_text("2 images added, 1 failed.")
    expect(page.locator("#add-errors li")).to_contain_text(["two.png: "])
    page.get_by_role("dialog").get_by_role("button", name="Close").first.click()
    expect(page.locator("#results .name")).to_have_text(["one.png", "three.png"])
    expect(page.locator("#collection")).to_have_value("mine")


def test_a_key_is_asked_for_kept_and_sent_with_thumbnails(visit: Visit) -> None:
    page = visit.open("locked", "/#/search?in=colours&text=red")
    dialog = page.get_by_role("dialog", name="This server asks for an API key")
    expect(dialog).to_contain_text("needs an API key")
    dialog.get_by_role("textbox", name="API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("not one of this server's")
    dialog.get_by_role("textbox", name="API key").fill(READ_KEY)
    page.keyboard.press("Enter")
    results(page, "red")
    image = page.locator(".card img").first
    expect(image).to_have_attribute("src", re.compile("^blob:"))
    assert image.evaluate("async (img) => (await img.decode(), img.naturalWidth)") > 0
    page.reload()
    results(page, "red")
    visit.excuse("status of 401")

    drop(page, "#drop-add", (png((255, 0, 0)), "one.png"))
    page.get_by_role("button", name="Add 1 image").click()
    expect(page.locator("#add-errors")).to_contain_text("may only read")
    page.keyboard.press("Escape")
    visit.excuse("status of 403")
    page.get_by_role("button", name="Forget the API key").click()
    expect(dialog).to_be_visible()
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator(".notice h2")).to_have_text("An API key is needed")
    visit.excuse("status of 401")


def test_a_server_that_stops_is_told_and_its_return_noticed(visit: Visit, servers: Servers) -> None:
    page = visit.open("mortal", "/#/search?in=colours&text=red")
    results(page, "red")
    servers.stop("mortal")
    ask(page, "blue")
    expect(page.locator(".notice h2")).to_have_text("No answer")
    servers.start("mortal")
    results(page, "blue")
    visit.excuse("ERR_CONNECTION_REFUSED")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on PATH")
def test_the_curl_lines_shown_really_work(visit: Visit, tmp_path: Path) -> None:
    page = visit.open("locked")
    page.get_by_role("textbox", name="API key").fill(WRITE_KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(len(COLOURS))
    visit.excuse("status of 401")
    (tmp_path / "it's 50% blue.png").write_bytes(png((0, 0, 255)))

    def run() -> Any:
        line = page.locator("#search-call code").text_content()
        assert line
        assert WRITE_KEY not in line
        environment = {"PATH": os.environ["PATH"], "EMBEDSERVE_API_KEY": WRITE_KEY}
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, check=True
        )
        return json.loads(done.stdout)

    assert len(run()["items"]) == len(COLOURS)
    ask(page, "it's \\ 100% red")
    results(page, "red")
    assert run()["hits"][0]["id"] == "paint/red.png"
    ask(page, "")
    page.set_input_files("#file", tmp_path / "it's 50% blue.png")
    results(page, "blue")
    assert run()["hits"][0]["id"] == "paint/blue.png"
    ask(page, "it's \\ %s dark")
    results(page, "gray 100")  # as near to blue as to dark
    assert run()["hits"][0]["id"] == "paint/gray 100.png"
