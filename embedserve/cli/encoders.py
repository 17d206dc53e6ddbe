"""The verbs on encoders: `classify`, `embed`, `check`, `models`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embedserve.cli.base import HERE, OK, Usage, Where, app, exit_code, image_argument
from embedserve.cli.terminal import error_object, note, print_json, progress_bar
from embedserve.config import Switch
from embedserve.errors import EmbedServeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedserve.client import Client, ImageInput

EMBED_BATCH = 32


@app.command
def classify(
    images: list[str],
    /,
    *,
    labels: list[str] | None = None,
    label_set: str | None = None,
    template: list[str] | None = None,
    top: int = 5,
    where: Where = HERE,
) -> int:
    """Say which of your labels fits an image best (zero-shot).

    Args:
        images: Files or URLs, '-' for stdin.
        labels: The labels, with commas between them; repeatable.
        label_set: A label set saved on the server, instead of --labels.
        template: Put each label into a sentence, as in 'a photo of a {}.'; repeatable.
        top: How many labels to show.
    """
    names = [name.strip() for one in labels or () for name in one.split(",") if name.strip()]
    if bool(names) == (label_set is not None):
        raise Usage("Give the labels, as in --labels cat,dog, or a saved --label-set.")
    answer = where.run(
        lambda client: client.classify(
            [image_argument(one) for one in images],
            labels=names or None,
            label_set=label_set,
            templates=template,
            top=top,
        )
    )
    results = [{"image": name, **result} for name, result in zip(images, answer["results"], strict=True)]
    if where.json:
        print_json({**answer, "results": results})
    failed = 0
    for result in results:
        if "error" in result:
            failed += 1
            note(f"{result['image']}: {result['error']['message']}")
        elif not where.json:
            print(result["image"])
            for label in result["labels"]:
                print(f"  {label['probability']:6.1%}  {label['label']}")
    return exit_code(failed, len(results))


@app.command
def embed(
    images: list[str] | None = None,
    /,
    *,
    text: list[str] | None = None,
    out: Path | None = None,
    where: Where = HERE,
) -> int:
    """Print or save the vectors of images and texts.

    Args:
        images: Files or URLs, '-' for stdin.
        text: A text; repeatable. Texts come after the images.
        out: Save float32 (inputs, dim) as a .npy file; the row of an input that failed is NaN.
    """
    names = [*(images or ()), *(text or ())]
    inputs: list[ImageInput | dict[str, str]] = [image_argument(one) for one in images or ()]
    inputs += [{"text": one} for one in text or ()]
    if not inputs:
        raise Usage("Give images, or --text.")

    async def work(client: Client) -> list[NDArray[np.float32] | EmbedServeError]:
        vectors: list[NDArray[np.float32] | EmbedServeError] = []
        for start in range(0, len(inputs), EMBED_BATCH):
            vectors += await client.embed(inputs[start : start + EMBED_BATCH])
            progress(len(vectors), len(inputs))
        return vectors

    with progress_bar("embed", hidden=where.json) as progress:
        vectors = where.run(work)
    good = [vector for vector in vectors if not isinstance(vector, EmbedServeError)]
    if out is not None and good:
        _save(out, vectors, len(good[0]))
    if where.json:
        print_json(
            {
                "results": [
                    {"input": name, "error": error_object(vector)}
                    if isinstance(vector, EmbedServeError)
                    else {"input": name, "embedding": vector.tolist()}
                    for name, vector in zip(names, vectors, strict=True)
                ]
            }
        )
    for name, vector in zip(names, vectors, strict=True):
        if isinstance(vector, EmbedServeError):
            note(f"{name}: {vector}")
        elif not where.json and out is None:
            start = ", ".join(f"{number:.4f}" for number in vector[:6])
            print(f"{name}: {len(vector)} numbers [{start}, …]")
    return exit_code(len(vectors) - len(good), len(vectors))


def _save(out: Path, vectors: Sequence[NDArray[np.float32] | EmbedServeError], dim: int) -> None:
    import numpy as np

    rows = np.full((len(vectors), dim), np.nan, np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        if not isinstance(vector, EmbedServeError):
            row[:] = vector
    try:
        with out.open("wb") as file:  # np.save would add an ending of its own
            np.save(file, rows)
    except OSError as error:
        raise EmbedServeError(f"--out '{out}' cannot be written: {error.strerror}.") from None
    note(f"{len(vectors)} vectors of {dim} numbers saved to '{out}'.")


@app.command
def check(bundle: str, /, *, json: Switch = False) -> int:
    """Prove an encoder bundle (files by sha256, vectors by the probe) and time it on this machine.

    Args:
        bundle: Its folder, or 'starter'.
        json: Print JSON only.
    """
    from embedserve.check import check_bundle

    report = check_bundle(bundle)
    if json:
        print_json({"ok": True, **dataclasses.asdict(report)})
        return OK
    print(f"{report.name}: {' and '.join(report.towers)}, {report.dim} numbers, from '{report.folder}'")
    print(f"files   {report.files} with the sha256 they should have; loaded in {report.load_seconds:.2f} s")
    for tower, cosine in (("image", report.proof.image_cosine), ("text", report.proof.text_cosine)):
        if cosine is not None:
            print(f"probe   {tower}: cosine {cosine:.6f} (at least {report.proof.min_cosine})")
    speed = report.speed
    if speed.images_per_second is not None:
        print(f"speed   {speed.images_per_second:.0f} images/s on {speed.threads} threads")
    if speed.texts_per_second is not None:
        print(f"speed   {speed.texts_per_second:.0f} texts/s of {speed.text_tokens} tokens")
    return OK


@app.command
def models(*, where: Where = HERE) -> int:
    """List the encoders that are served."""
    answer = where.run(lambda client: client.models())
    if where.json:
        print_json(answer)
    else:
        for model in answer["data"]:
            print(model["id"])
    return OK
