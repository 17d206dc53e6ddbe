"""Bytes and words to vectors, through real decoding, queues and sessions."""

from __future__ import annotations

import asyncio
import io
import shutil
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedserve.bundle import open_bundle, seal
from embedserve.config import Limits, ServeConfig
from embedserve.encoder import Encoder
from embedserve.errors import (
    BadRequest,
    BundleError,
    Busy,
    EmbedServeError,
    InvalidField,
    NotReady,
    TooLarge,
    UnsupportedMedia,
)
from embedserve.towers import Picture, Towers
from tests.embedserve.colours import BLUE, GREEN, RED, axis, png
from tests.tiny_bundle import write_tiny_bundle

pytestmark = pytest.mark.anyio


class Gated(Encoder):
    """The tiny encoder, whose image runs and decoding wait for the test."""

    run_gate: threading.Event
    decode_gate: threading.Event

    def embed_images(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        assert self.run_gate.wait(10)
        return super().embed_images(pixels)

    def read_image(self, data: bytes, limits: Limits) -> np.ndarray:
        assert self.decode_gate.wait(10)
        if data == b"bug":
            raise ZeroDivisionError
        return super().read_image(data, limits)


@pytest.fixture
def gated(tiny_folder: Path) -> Iterator[Gated]:
    encoder = Gated(open_bundle(tiny_folder), threads=1)
    encoder.run_gate, encoder.decode_gate = threading.Event(), threading.Event()
    encoder.run_gate.set()
    encoder.decode_gate.set()
    yield encoder
    encoder.run_gate.set()
    encoder.decode_gate.set()


@pytest.fixture
async def small(gated: Gated) -> AsyncIterator[Towers]:
    """Towers with three places in each queue."""
    towers = Towers(gated, ServeConfig(limits=Limits(queue_size=3, max_pixels=10_000)))
    yield towers
    gated.run_gate.set()
    gated.decode_gate.set()
    await towers.close()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_an_image_becomes_its_vector(towers: Towers) -> None:
    np.testing.assert_allclose(await towers.image(png(RED)), axis("red"), atol=1e-6)


async def test_bad_images_fail_alone_in_their_places(towers: Towers) -> None:
    good = png(GREEN, size=64)
    data = [png(RED), b"", good[: len(good) // 2], b"<html><body>404</body></html>", png(BLUE, size=1), good]
    results = await towers.images(data)
    np.testing.assert_allclose(
        [results[0], results[4], results[5]], [axis("red"), axis("blue"), axis("green")], atol=1e-6
    )
    assert [type(result) for result in results[1:4]] == [BadRequest, BadRequest, UnsupportedMedia]
    with pytest.raises(BadRequest):
        await towers.image(b"")


async def test_a_bug_in_preparing_an_image_fails_that_image_alone(
    small: Towers, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = await small.images([b"bug", png(RED)])
    assert isinstance(bad, EmbedServeError)
    assert (bad.status, bad.code) == (500, "encoder_failed")
    assert isinstance(good, np.ndarray)
    assert "ZeroDivisionError" in caplog.text


async def test_limits_are_those_of_the_configuration(small: Towers) -> None:
    with pytest.raises(TooLarge):
        await small.image(png(RED, size=101))


async def test_a_picture_has_the_same_vector_as_the_image(towers: Towers) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG")
    picture, bad = await towers.pictures([file.getvalue(), b"nothing"])
    assert isinstance(picture, Picture)
    np.testing.assert_array_equal(picture.vector, await towers.image(file.getvalue()))
    assert Image.open(io.BytesIO(picture.thumbnail)).size == (256, 192)
    assert isinstance(bad, UnsupportedMedia)


async def test_texts_keep_their_order_whatever_their_length(towers: Towers) -> None:
    words = ["red", "blue " * 9, "green dark", "large " * 300]
    vectors = await towers.texts(words)
    both = (axis("green") + axis("dark")) / np.sqrt(2)
    np.testing.assert_allclose(vectors, [axis("red"), axis("blue"), both, axis("large")], atol=1e-6)


async def test_token_ids_are_texts_too(towers: Towers) -> None:
    (ids,) = towers.encoder.tokenize(["red round"])
    as_ids, as_words, bad, long = await towers.texts([ids, "red round", [2, 99], [2] * 17])
    np.testing.assert_array_equal(as_ids, as_words)
    assert isinstance(bad, InvalidField)
    assert "Token id 99" in str(bad)
    assert "17 ids; this encoder takes at most 16" in str(long)


async def test_an_empty_text_fails_alone_where_the_encoder_sees_nothing_in_it(towers: Towers) -> None:
    empty, blank, nothing, red = await towers.texts(["", " \n", [], "red"])
    assert type(empty) is type(blank) is type(nothing) is InvalidField
    np.testing.assert_allclose(red, axis("red"), atol=1e-6)


@pytest.mark.parametrize("text", ["\0", "\ud800", "שלום", "😀", "x" * 100_000, "red " * 25_000])
async def test_any_text_gets_a_vector(towers: Towers, text: str) -> None:
    (vector,) = await towers.texts([text])
    assert isinstance(vector, np.ndarray)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


async def test_tokens_are_counted_as_the_encoder_sees_them(towers: Towers) -> None:
    assert towers.count_tokens("never embedded before") == 3
    await towers.texts(["red round small", "red " * 40])
    assert towers.count_tokens("red round small") == 3
    assert towers.count_tokens("red " * 40) == 16  # cut to the context


async def test_images_still_to_be_decoded_count_to_the_bound(small: Towers, gated: Gated) -> None:
    gated.decode_gate.clear()
    accepted = asyncio.create_task(small.images([png(RED)] * 2))
    await turns()
    with pytest.raises(Busy):
        await small.images([png(GREEN)] * 2)
    with pytest.raises(Busy):
        await small.pictures([png(GREEN)] * 2)
    gated.decode_gate.set()
    assert len(await accepted) == 2
    assert small.queues["image"].waiting == 0


async def test_texts_have_a_bound_too(small: Towers) -> None:
    with pytest.raises(TooLarge, match="4 inputs at once"):
        await small.texts(["red"] * 4)


async def test_texts_do_not_wait_for_images(small: Towers, gated: Gated) -> None:
    gated.run_gate.clear()
    image = asyncio.create_task(small.image(png(RED)))
    async with asyncio.timeout(10):
        (vector,) = await small.texts(["red"])
    assert not image.done()
    gated.run_gate.set()
    np.testing.assert_allclose(await image, vector, atol=1e-6)


async def test_a_cancelled_request_gives_its_places_back(small: Towers, gated: Gated) -> None:
    gated.decode_gate.clear()
    gone = asyncio.create_task(small.images([png(RED)] * 3))
    await turns()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    gated.decode_gate.set()
    assert len(await small.images([png(RED)] * 3)) == 3


async def test_closing_answers_what_was_accepted_and_refuses_the_rest(gated: Gated) -> None:
    towers = Towers(gated, ServeConfig())
    gated.decode_gate.clear()
    accepted = asyncio.create_task(towers.images([png(RED), png(BLUE)]))
    await turns()
    closing = asyncio.create_task(towers.close())
    await turns()
    for refused in (towers.image(png(RED)), towers.texts(["red"]), towers.pictures([png(RED)])):
        with pytest.raises(NotReady):
            await refused
    assert not closing.done()
    gated.decode_gate.set()
    await closing
    np.testing.assert_allclose(await accepted, [axis("red"), axis("blue")], atol=1e-6)


async def test_starting_proves_the_encoder(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "bundle"))
    described = open_bundle(folder).description
    probe = Encoder.load(folder, threads=1).make_probe(png(RED), "red")
    seal(folder, described.model_copy(update={"probe": probe}))
    good = Towers(Encoder.load(folder, threads=1), ServeConfig())
    await good.start()
    assert good.proof is not None
    assert good.proof.image_cosine == pytest.approx(1, abs=1e-6)
    await good.close()
    shutil.copy(write_tiny_bundle(tmp_path / "other", rotate=1).path("text.onnx"), folder / "text.onnx")
    seal(folder, described.model_copy(update={"probe": probe}))
    wrong = Towers(Encoder.load(folder, threads=1), ServeConfig())
    with pytest.raises(BundleError, match="text probe"):
        await wrong.start()
    await wrong.close()


async def test_a_missing_tower_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "bundle"))
    described = open_bundle(folder).description
    seal(folder, described.model_copy(update={"text": None}))
    looks = Towers(Encoder.load(folder, threads=1), ServeConfig())
    with pytest.raises(InvalidField, match="no text tower"):
        await looks.texts(["red"])
    assert len(await looks.images([png(RED)])) == 1
    await looks.close()
    seal(folder, described.model_copy(update={"image": None}))
    words = Towers(Encoder.load(folder, threads=1), ServeConfig())
    for refused in (words.image(png(RED)), words.images([png(RED)]), words.pictures([png(RED)])):
        with pytest.raises(InvalidField, match="no image tower"):
            await refused
    assert len(await words.texts(["red"])) == 1
    await words.close()
