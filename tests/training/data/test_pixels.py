"""Decoded pixels: the same bytes from every residence, in order, without the images that are broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedserve.errors import BadRequest, InvalidField, NotFound
from tests.training.data.samples import array, encoded, folder_of, picture
from training.data import EpochOrder, Pixels, Source, native_size, open_pixels, open_source

RESIDENCES = ["device", "host", "stream"]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Eleven images of all kinds, of which two are broken."""
    folder = folder_of(tmp_path / "images", [f"{number:02}.png" for number in range(6)])
    (folder / "06-large.jpg").write_bytes(encoded(picture(6, 300, 200), "JPEG"))
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "07-turned.jpg").write_bytes(encoded(picture(7, 320, 160), "JPEG", exif=turned))
    (folder / "08-cut.jpg").write_bytes(encoded(picture(8, 300, 200), "JPEG")[:1500])
    (folder / "09-gray.png").write_bytes(encoded(picture(9).convert("L")))
    (folder / "10-text.png").write_text("no image")
    return open_source(folder)


def opened(source: Source, size: int, residence: str, folder: Path, **options: object) -> Pixels:
    return open_pixels(source, size, device="cpu", residence=residence, folder=folder, workers=2, **options)  # type: ignore[arg-type]


def steps(order: EpochOrder, count: int) -> Iterator[np.ndarray]:
    return (order.rows(step) for step in range(count))


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("embedserve-data")]


# ----------------------------------------------------------------------------------------- the bytes


def test_batches_are_equal_bit_for_bit_whatever_the_residence(source: Source, tmp_path: Path) -> None:
    order = EpochOrder(9, 4, seed=0)
    batches = []
    for residence in RESIDENCES:
        pixels = opened(source, 20, residence, tmp_path / "cache")
        assert pixels.residence == residence
        assert len(pixels) == 9
        batches.append(torch.stack(list(pixels.prefetch(steps(order, 7)))))
        assert torch.equal(batches[-1][3], pixels.batch(order.rows(3)))
    assert batches[0].shape == (7, 4, 20, 20, 3)
    assert batches[0].dtype == torch.uint8
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


@pytest.mark.parametrize("residence", RESIDENCES)
def test_an_image_of_the_stored_size_is_stored_as_it_is(tmp_path: Path, residence: str) -> None:
    source = open_source(folder_of(tmp_path / "images", ["a.png", "b.png"], 16, 16))
    batch = opened(source, 16, residence, tmp_path / "cache").batch(np.array([1, 0, 1]))
    for image, seed in zip(batch.numpy(), [1, 0, 1], strict=True):
        assert (image == array(picture(seed, 16, 16))).all()


def test_other_shapes_are_squashed_with_the_antialiased_triangle(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "images", ["a.png"], 40, 10))
    pixels = opened(source, 10, "host", tmp_path / "cache")
    assert pixels.aspect.tolist() == [4.0]
    original = array(picture(0, 40, 10)).astype(np.float64)
    for column in (3, 7):  # a triangle of 4 pixels to either side of the centre at 4 column + 2
        centre = 4 * column + 2
        places = np.arange(centre - 4, centre + 4)
        weights = 1 - np.abs(places + 0.5 - centre) / 4
        expected = (original[:, places] * weights[None, :, None]).sum(1) / weights.sum()
        assert np.abs(pixels.batch(np.array([0])).numpy()[0, :, column] - expected).max() <= 0.51


def test_aspects_are_those_of_the_upright_originals(source: Source, tmp_path: Path) -> None:
    for residence in RESIDENCES:
        pixels = opened(source, 8, residence, tmp_path / residence)
        aspect = dict(zip(pixels.source.keys, pixels.aspect.tolist(), strict=True))
        assert aspect["06-large.jpg"] == 1.5
        assert aspect["07-turned.jpg"] == 0.5
        assert aspect["09-gray.png"] == pytest.approx(24 / 18)
        assert pixels.aspect.dtype == np.float32


def test_a_shrunk_jpeg_is_close_to_the_whole_one(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "images", ["a.jpg"], 640, 480))
    stored = opened(source, 16, "host", tmp_path / "cache").batch(np.array([0])).numpy()[0]
    whole = array(source.read(0).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.abs(stored.astype(int) - whole).max() <= 2


def test_any_rows_may_be_asked_for(source: Source, tmp_path: Path) -> None:
    for residence in RESIDENCES:
        pixels = opened(source, 8, residence, tmp_path / "cache")
        assert pixels.batch(np.array([], np.int64)).shape == (0, 8, 8, 3)
        repeated = pixels.batch(np.array([8, 0, 8, 8]))
        assert torch.equal(repeated[0], repeated[3])
        for rows in ([9], [0, -1]):
            with pytest.raises(IndexError, match="of 9 images"):
                pixels.batch(np.array(rows))


# ---------------------------------------------------------------------------------------- bad images


@pytest.mark.parametrize("residence", RESIDENCES)
def test_a_broken_image_among_many_is_listed_and_skipped(
    source: Source, tmp_path: Path, residence: str
) -> None:
    for _ in range(2):  # decoded, and from the cache
        pixels = opened(source, 8, residence, tmp_path / "cache")
        assert [one.key for one in pixels.skipped] == ["08-cut.jpg", "10-text.png"]
        assert "damaged or cut short" in pixels.skipped[0].reason
        assert "looks like text" in pixels.skipped[1].reason
        assert len(pixels.source) == len(pixels) == len(pixels.aspect) == 9
        assert not {"08-cut.jpg", "10-text.png"} & set(pixels.source.keys)


def test_rows_of_pixels_and_source_agree(source: Source, tmp_path: Path) -> None:
    pixels = opened(source, 18, "host", tmp_path / "cache")
    row = pixels.source.keys.index("09-gray.png")
    expected = pixels.source.read(row).resize((18, 18), Image.Resampling.BILINEAR)
    assert (pixels.batch(np.array([row])).numpy()[0] == array(expected)).all()


def test_what_could_not_be_listed_is_among_the_skipped(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png"])
    (tmp_path / "list.csv").write_text("path\na.png\ngone.png\n")
    pixels = opened(open_source(tmp_path / "list.csv"), 8, "host", tmp_path / "cache")
    assert [one.key for one in pixels.skipped] == ["gone.png"]


@pytest.mark.parametrize("residence", RESIDENCES)
def test_nothing_but_broken_images_is_refused(tmp_path: Path, residence: str) -> None:
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.png").write_text("no image")
    source = open_source(tmp_path / "images")
    with pytest.raises(BadRequest, match=r"None of the 5 images .* can be decoded: '0.png: This looks like"):
        opened(source, 8, residence, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(BadRequest, match=r"No image of .* can be read: '0.png: "):
        native_size(source)


def test_one_image_is_enough(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "images", ["a.png"]))
    pixels = opened(source, 8, "auto", tmp_path / "cache")
    assert (len(pixels), pixels.distinct(), native_size(source)) == (1, 1, 18)
    assert pixels.batch(np.array([0])).shape == (1, 8, 8, 3)


# ------------------------------------------------------------------------------------------ prefetch


@pytest.mark.parametrize("residence", ["host", "stream"])
def test_closing_a_prefetch_ends_its_threads(source: Source, tmp_path: Path, residence: str) -> None:
    batches = opened(source, 8, residence, tmp_path / "cache").prefetch(steps(EpochOrder(9, 3, 0), 1000))
    next(batches)
    assert ours() != []
    batches.close()
    assert ours() == []


def test_closing_a_stream_does_not_wait_for_a_whole_batch(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "images", ["a.png"]))
    pixels = opened(source, 8, "stream", tmp_path / "cache")
    read: list[int] = []
    fetch = source.fetch

    def slowly(row: int) -> bytes | np.ndarray:
        time.sleep(0.002)
        read.append(row)
        return fetch(row)

    object.__setattr__(pixels.source, "fetch", slowly)
    batches = pixels.prefetch(iter([np.zeros(1, np.int64), *[np.zeros(1000, np.int64)] * 9]))
    next(batches)
    batches.close()
    assert len(read) < 200
    assert ours() == []


@pytest.mark.parametrize("residence", RESIDENCES)
def test_an_error_while_prefetching_is_raised_at_its_batch(
    source: Source, tmp_path: Path, residence: str
) -> None:
    pixels = opened(source, 8, residence, tmp_path / "cache")
    batches = pixels.prefetch(iter([np.array([0]), np.array([1]), np.array([99]), np.array([2])]))
    assert len(list(zip(range(2), batches, strict=False))) == 2
    with pytest.raises(IndexError, match="rows 99 to 99 of 9 images"):
        next(batches)
    assert ours() == []


def test_streaming_a_file_that_is_gone_names_it(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "images", ["a.png", "b.png"]))
    pixels = opened(source, 8, "stream", tmp_path / "cache")
    (tmp_path / "images" / "b.png").unlink()
    batches = pixels.prefetch(iter([np.array([0]), np.array([0, 1])]))
    assert next(batches).shape == (1, 8, 8, 3)
    with pytest.raises(NotFound, match=r"'b.png' of .* is gone"):
        next(batches)


# --------------------------------------------------------------------------------------- small things


def test_the_native_size_is_the_median_shorter_side(tmp_path: Path) -> None:
    for number, (width, height) in enumerate([(30, 10), (12, 50), (90, 90)]):
        folder_of(tmp_path / str(number), ["a.png"], width, height)
    (tmp_path / "broken.png").write_text("no image")
    assert native_size(open_source(tmp_path)) == 12


def test_the_native_size_looks_at_two_hundred_images_at_most(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["a.png"])).select(np.zeros(5000, np.int64))
    seen: list[int] = []
    counted = source.fetch

    def fetch(row: int) -> bytes | np.ndarray:
        seen.append(row)
        return counted(row)

    object.__setattr__(source, "fetch", fetch)
    assert native_size(source) == 18
    assert len(seen) == 200
    assert (seen[0], seen[-1]) == (0, 4999)


def test_equal_images_are_counted_once(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "images", ["a.png", "b.png", "c.png"]))
    doubled = source.select(np.array([0, 1, 1, 2, 0]))
    assert opened(doubled, 8, "host", tmp_path / "cache").distinct() == 3


def test_every_residence_has_the_same_fingerprint_and_every_size_another(
    source: Source, tmp_path: Path
) -> None:
    prints = {opened(source, 8, residence, tmp_path / "cache").fingerprint for residence in RESIDENCES}
    assert len(prints) == 1
    assert opened(source, 9, "host", tmp_path / "cache").fingerprint not in prints


def test_progress_is_told_from_nothing_to_all(source: Source, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    opened(source, 8, "host", tmp_path / "cache", progress=lambda done, total: told.append((done, total)))
    assert (told[0], told[-1]) == ((0, 11), (11, 11))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": -3}, "size=-3"),
        ({"workers": -1}, "workers=-1"),
        ({"residence": "hots"}, r"residence='hots' is unknown; did you mean 'host'\?.*'auto', 'device'"),
    ],
)
def test_options_that_make_no_sense_are_refused(source: Source, options: dict, message: str) -> None:
    with pytest.raises(InvalidField, match=message):
        open_pixels(source, **{"size": 8, "device": "cpu", **options})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_gets_the_same_bytes(source: Source, tmp_path: Path) -> None:
    order = EpochOrder(9, 4, seed=0)
    expected = list(opened(source, 20, "host", tmp_path / "cache").prefetch(steps(order, 40)))
    for residence in ("auto", *RESIDENCES):
        pixels = open_pixels(source, 20, device="cuda", residence=residence, folder=tmp_path / "cache")  # type: ignore[arg-type]
        assert pixels.residence == ("device" if residence == "auto" else residence)
        for batch, there in zip(expected, pixels.prefetch(steps(order, 40)), strict=True):
            assert there.device.type == "cuda"
            assert torch.equal(batch, there.cpu())
