"""A folder into a collection, through the real app in this process, with the tiny encoder."""

from __future__ import annotations

import asyncio
import os
import signal
import unicodedata
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from PIL import Image

from embedserve.client import Client
from embedserve.config import Limits, ServeConfig
from embedserve.errors import BadRequest, InvalidField, NotFound
from embedserve.folder import read_sidecar, walk
from embedserve.ingest import IngestReport, ingest

T = TypeVar("T")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def paint(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path, "PNG")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures in two folders."""
    folder = tmp_path / "photos"
    paint(folder / "red.png", COLOURS["red"])
    paint(folder / "sub" / "green.png", COLOURS["green"])
    paint(folder / "sub" / "blue.png", COLOURS["blue"])
    return folder


class Server:
    """Runs coroutines against an app on one data folder."""

    def __init__(self, encoder: Path, data: Path) -> None:
        self.config = ServeConfig(data=data, encoder=str(encoder))

    def run(self, work: Callable[[Client], Awaitable[T]], **limits: Any) -> T:
        async def connected() -> T:
            config = ServeConfig(data=self.config.data, encoder=self.config.encoder, limits=Limits(**limits))
            async with Client.local(config) as client:
                return await work(client)

        return asyncio.run(connected())

    def ingest(self, folder: Path, **options: Any) -> IngestReport:
        return self.run(lambda client: ingest(client, folder, "photos", **options))

    def items(self) -> dict[str, dict[str, Any]]:
        async def read(client: Client) -> dict[str, dict[str, Any]]:
            return {item["id"]: item["metadata"] async for item in client.all_items("photos", page=2)}

        return self.run(read)


@pytest.fixture
def server(tiny_folder: Path, tmp_path: Path) -> Server:
    return Server(tiny_folder, tmp_path / "data")


# ---- the walk ----------------------------------------------------------------------------------------


def test_files_are_found_in_id_order_whatever_the_disk_says(photos: Path) -> None:
    paint(photos / "sub-2" / "a.PNG")
    assert [file.id for file in walk(photos).files] == [
        "red.png",
        "sub-2/a.PNG",
        "sub/blue.png",
        "sub/green.png",
    ]


def test_hidden_and_other_files_are_passed_over(photos: Path) -> None:
    paint(photos / ".trash" / "a.png")
    paint(photos / ".b.png")
    paint(photos / "__MACOSX" / "c.png")
    (photos / "notes.txt").write_text("not an image")
    (photos / "README").write_text("no extension, no image")
    found = walk(photos)
    assert len(found.files) == 3
    assert found.ignored == 2
    assert not found.problems


def test_a_file_without_extension_counts_when_it_begins_like_an_image(photos: Path) -> None:
    paint(photos / "scan")
    assert "scan" in {file.id for file in walk(photos).files}


def test_link_loops_end_and_a_linked_folder_is_entered_once_under_its_real_name(photos: Path) -> None:
    (photos / "sub" / "up").symlink_to(photos)
    (photos / "a-link").symlink_to(photos / "sub")
    assert [file.id for file in walk(photos).files] == ["red.png", "sub/blue.png", "sub/green.png"]


def test_a_linked_folder_from_elsewhere_is_entered(photos: Path, tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere" / "x.png")
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    assert "more/x.png" in {file.id for file in walk(photos).files}


def test_a_broken_link_is_a_problem_and_a_pipe_is_never_opened(photos: Path) -> None:
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    os.mkfifo(photos / "pipe.png")
    found = walk(photos)
    assert [problem.path for problem in found.problems] == ["gone.png"]
    assert len(found.files) == 3


def test_a_name_that_is_not_utf8_is_a_problem(photos: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    paint(photos / "x.png").rename(photos / name)
    [problem] = walk(photos).problems
    assert "rename" in problem.reason
    problem.path.encode()


def test_names_that_differ_only_in_unicode_form_do_not_overwrite_each_other(photos: Path) -> None:
    paint(photos / unicodedata.normalize("NFC", "é.png"))
    paint(photos / unicodedata.normalize("NFD", "é.png"))
    found = walk(photos)
    assert [file.id for file in found.files].count("é.png") == 1
    assert [problem.path for problem in found.problems] == ["é.png"]


def test_a_folder_that_cannot_be_listed_is_a_problem_and_the_rest_is_found(photos: Path) -> None:
    """A path beyond the system's longest: even root gets an error there."""
    here = os.open(photos, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    found = walk(photos)
    assert len(found.files) == 3
    assert len(found.problems) == len(found.unreadable) == 1


def test_a_missing_folder_and_a_file_are_told_apart(photos: Path) -> None:
    with pytest.raises(NotFound, match="no folder"):
        walk(photos / "nope")
    with pytest.raises(BadRequest, match="Not a directory"):
        walk(photos / "red.png")


# ---- the sidecar -------------------------------------------------------------------------------------


def test_csv_columns_of_numbers_become_numbers_and_empty_cells_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "about.csv"
    file.write_text(
        'path,year,code,title\na.png,1999,007,"two\nlines"\n./b\\c.png,2001.5,,\n', encoding="utf-8-sig"
    )
    assert read_sidecar(file) == {
        "a.png": {"year": 1999, "code": "007", "title": "two\nlines"},
        "b/c.png": {"year": 2001.5},
    }


def test_jsonl_keeps_its_types(tmp_path: Path) -> None:
    file = tmp_path / "about.jsonl"
    file.write_text('{"path": "a.png", "tags": ["x", "y"], "ok": true}\n\n{"path": "b.png", "s": "\u2028"}\n')
    assert read_sidecar(file) == {"a.png": {"tags": ["x", "y"], "ok": True}, "b.png": {"s": "\u2028"}}


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.csv", "file,year\na,1\n", InvalidField, "called 'path'"),
        ("a.csv", "path,year\na,1,2\n", BadRequest, "line 2 has more cells"),
        ("a.csv", "path,bytes\na,1\n", InvalidField, "'bytes' is reserved"),
        ("a.csv", "path,_image\na,1\n", InvalidField, "'_image' is reserved"),
        ("a.csv", "path,year\n,1\n", InvalidField, "line 2: 'path' is missing"),
        ("a.jsonl", "{nope\n", BadRequest, "line 1 is not JSON"),
        ("a.jsonl", "[]\n", BadRequest, "not a JSON object"),
    ],
)
def test_a_malformed_sidecar_names_its_line(
    tmp_path: Path, name: str, text: str, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read_sidecar(tmp_path / name)


# ---- into a collection -------------------------------------------------------------------------------


def test_every_picture_becomes_an_item_named_by_its_path(server: Server, photos: Path) -> None:
    report = server.ingest(photos)
    assert (report.found, report.added, report.problems) == (3, 3, [])
    items = server.items()
    assert list(items) == ["red.png", "sub/blue.png", "sub/green.png"]
    about = items["sub/blue.png"]
    assert about["path"] == "sub/blue.png"
    assert about["folder"] == "sub"
    assert about["bytes"] == (photos / "sub/blue.png").stat().st_size
    assert about["modified"].endswith("Z")


def test_the_item_is_the_picture_at_its_path(server: Server, photos: Path) -> None:
    server.ingest(photos)
    answer = server.run(lambda client: client.search("photos", text="green", k=1))
    [hit] = answer["hits"]
    assert hit["id"] == "sub/green.png"
    assert hit["score"] == pytest.approx(1, abs=0.01)


def test_known_files_are_skipped_without_being_read(server: Server, photos: Path) -> None:
    server.ingest(photos)
    file = photos / "red.png"
    before = file.stat()
    file.write_bytes(b"\0" * before.st_size)  # no longer an image, as far as anyone who reads it can tell
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    report = server.ingest(photos)
    assert (report.unchanged, report.added, report.replaced, report.problems) == (3, 0, 0, [])


def test_a_changed_file_replaces_its_item(server: Server, photos: Path) -> None:
    server.ingest(photos)
    paint(photos / "red.png", COLOURS["blue"], size=9)
    report = server.ingest(photos)
    assert (report.unchanged, report.replaced) == (2, 1)
    answer = server.run(lambda client: client.search("photos", text="blue", k=3))
    assert {hit["id"] for hit in answer["hits"] if hit["score"] > 0.9} == {"red.png", "sub/blue.png"}


def test_a_bad_file_is_listed_with_its_reason_and_the_rest_goes_in(server: Server, photos: Path) -> None:
    (photos / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (photos / "empty.png").touch()
    report = server.ingest(photos)
    assert report.added == 3
    assert [problem.path for problem in report.problems] == ["empty.png", "page.jpg"]
    assert "html" in report.problems[1].reason.lower()


def test_a_file_over_the_limit_is_listed_and_not_sent(server: Server, photos: Path) -> None:
    (photos / "big.png").write_bytes(b"\0" * 5000)
    report = server.ingest(photos, max_image_bytes=4999)
    [problem] = report.problems
    assert problem.path == "big.png"
    assert "5000 bytes" in problem.reason
    assert "4999" in problem.reason


def test_a_server_with_a_small_body_limit_gets_smaller_requests(server: Server, photos: Path) -> None:
    for number in range(10):
        paint(photos / f"{number}.png", size=64)
    report = server.run(lambda client: ingest(client, photos, "photos"), max_body_bytes=1500)
    assert (report.added, report.problems) == (13, [])


def test_prune_deletes_what_came_from_a_file_that_is_gone(server: Server, photos: Path) -> None:
    server.ingest(photos)
    server.run(lambda client: client.upsert("photos", [{"id": "note", "text": "red"}]))
    (photos / "red.png").unlink()
    assert server.ingest(photos).pruned == 0
    assert server.ingest(photos, prune=True).pruned == 1
    assert list(server.items()) == ["note", "sub/blue.png", "sub/green.png"]


def test_prune_spares_everything_when_the_folder_is_empty(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    server.ingest(photos)
    empty = tmp_path / "unmounted"
    empty.mkdir()
    report = server.ingest(empty, prune=True)
    assert (report.found, report.pruned) == (0, 0)
    assert len(server.items()) == 3


def test_sidecar_metadata_is_added_and_a_new_value_replaces_the_item(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    sidecar = tmp_path / "about.csv"
    sidecar.write_text("path,year\nred.png,1999\nlost.png,1\n")
    report = server.ingest(photos, metadata=sidecar)
    assert report.unmatched == ["lost.png"]
    assert server.items()["red.png"]["year"] == 1999
    assert "year" not in server.items()["sub/blue.png"]
    sidecar.write_text("path,year\nred.png,2001\n")
    assert server.ingest(photos, metadata=sidecar).replaced == 1
    assert server.items()["red.png"]["year"] == 2001
    assert server.ingest(photos).unchanged == 3  # a run without the sidecar leaves its metadata alone


def test_a_column_of_the_sidecar_is_embedded_as_caption(server: Server, photos: Path, tmp_path: Path) -> None:
    sidecar = tmp_path / "about.csv"
    sidecar.write_text("path,title\nred.png,round\nsub/blue.png,\n")
    assert server.ingest(photos, metadata=sidecar).added == 3
    assert server.ingest(photos, metadata=sidecar, caption="title").replaced == 1  # of whom it now is another
    answer = server.run(lambda client: client.search("photos", text="round", k=1))
    assert answer["hits"][0]["id"] == "red.png"
    assert answer["hits"][0]["score"] == pytest.approx(0.5 / 1.25**0.5, abs=1e-3)
    items = server.items()
    assert (items["red.png"]["title"], items["red.png"]["caption_column"]) == ("round", "title")
    assert "caption_column" not in items["sub/blue.png"]
    assert server.ingest(photos, metadata=sidecar, caption="title").unchanged == 3
    assert server.ingest(photos).unchanged == 3
    assert server.ingest(photos, metadata=sidecar).replaced == 1  # without --caption, the picture alone again
    assert server.run(lambda client: client.search("photos", text="round", k=1))["hits"][0][
        "score"
    ] == pytest.approx(0, abs=1e-3)


def test_a_caption_that_the_sidecar_lacks_is_refused(server: Server, photos: Path, tmp_path: Path) -> None:
    sidecar = tmp_path / "about.jsonl"
    sidecar.write_text('{"path": "red.png", "title": "round", "tags": ["x"], "year": 1999}\n')
    with pytest.raises(InvalidField, match="no text in 'titel'; did you mean 'title'"):
        server.ingest(photos, metadata=sidecar, caption="titel")
    with pytest.raises(InvalidField, match=r"'tags' of 'red\.png' .* is no text"):
        server.ingest(photos, metadata=sidecar, caption="tags")
    with pytest.raises(InvalidField, match="give one with --metadata"):
        server.ingest(photos, caption="title")
    assert server.ingest(photos, metadata=sidecar, caption="year").added == 3  # a number is read as it stands


def test_an_interrupted_run_keeps_what_was_answered_and_the_next_one_goes_on(
    server: Server, photos: Path
) -> None:
    for number in range(100):
        paint(photos / f"{number:03}.png", (number, 255 - number, 0))

    def interrupt(done: int, total: int) -> None:
        if done == 40:
            signal.raise_signal(signal.SIGINT)  # what Ctrl-C does

    with pytest.raises(KeyboardInterrupt):
        server.ingest(photos, progress=interrupt)
    kept = len(server.items())
    assert 40 <= kept < 103
    report = server.ingest(photos)
    assert (report.unchanged, report.added) == (kept, 103 - kept)


def test_progress_counts_up_to_the_number_of_files(server: Server, photos: Path) -> None:
    (photos / "empty.png").touch()
    seen: list[tuple[int, int]] = []
    server.ingest(photos, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [0, 1, 2, 3, 4]
    assert {total for _, total in seen} == {4}
