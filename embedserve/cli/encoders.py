"""The verbs on encoders: `classify`, `embed`, `check`, `models`, `compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedserve.cli.base import HERE, OK, PARTLY, Usage, Where, app, exit_code, image_argument
from embedserve.cli.terminal import error_object, note, print_json, progress_bar
from embedserve.config import Switch
from embedserve.errors import EmbedServeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedserve.client import Client, ImageInput
    from embedserve.compare import Comparison

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
def check(
    bundle: str, /, *, device: str = "auto", threads: int = 0, seconds: float = 1.0, json: Switch = False
) -> int:
    """Prove an encoder bundle (files by sha256, vectors by the probe) and time it on this machine.

    Args:
        bundle: Its folder, or 'starter'.
        device: auto, cpu, cuda, cuda:1, tensorrt or tensorrt:1.
        threads: Threads of one run on the CPU; 0 takes all cores.
        seconds: How long each tower is timed, in batches and again one by one.
        json: Print JSON only.
    """
    from embedserve.check import check_bundle

    report = check_bundle(bundle, device=device, threads=threads, seconds=seconds)
    if json:
        print_json({"ok": True, **dataclasses.asdict(report)})
        return OK
    print(f"{report.name}: {' and '.join(report.towers)}, {report.dim} numbers, from '{report.folder}'")
    print(
        f"files   {report.files} with the sha256 they should have ({report.bytes / 1e6:.0f} MB); loaded in "
        f"{report.load_seconds:.2f} s"
    )
    print(f"device  {report.device} ({report.provider}), {report.precision}")
    for tower, cosine in (("image", report.proof.image_cosine), ("text", report.proof.text_cosine)):
        if cosine is not None:
            print(f"probe   {tower}: cosine {cosine:.6f} (at least {report.proof.min_cosine})")
    for one in report.outputs:
        form = " × ".join(map(str, one.shape))
        space = ", in the space of texts" if one.name == "patches" and one.text_space else ""
        print(f"offers  {one.name}: {form} on {one.rows} × {one.columns} cells{space}")
    if report.dims:
        print(f"offers  prefixes of {', '.join(map(str, report.dims))} numbers")
    speed = report.speed
    on = "" if report.device != "cpu" else f", {speed.threads} threads"
    if speed.images_per_second is not None:
        print(
            f"speed   {speed.images_per_second:.0f} images/s in batches of {speed.image_batch}, "
            f"{speed.single_images_per_second:.0f} one by one{on}"
        )
    if speed.texts_per_second is not None:
        print(
            f"speed   {speed.texts_per_second:.0f} texts/s of {speed.text_tokens} tokens in batches of "
            f"{speed.text_batch}, {speed.single_texts_per_second:.0f} one by one{on}"
        )
    print(
        f"memory  {speed.resident_bytes / 1e6:.0f} MB in all, {report.loaded_bytes / 1e6:.0f} MB by loading"
    )
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


@app.command
def compare(
    a: str,
    b: str,
    /,
    *,
    images: Path,
    k: int = 10,
    most: int = 1000,
    show: int = 8,
    out: Path | None = None,
    device: str = "auto",
    json: Switch = False,
) -> int:
    """Show where two encoders differ: which neighbours they give the same images.

    Args:
        a: A bundle's folder, or 'starter'.
        b: Another one; it may have other dimensions.
        images: Folder of images, searched with its subfolders.
        k: How many neighbours of each image are compared.
        most: From more images, so many are drawn at random.
        show: How many of the images that differ most are shown.
        out: Folder for comparison.json and comparison.png; made when missing.
        device: auto, cpu, cuda, cuda:1, tensorrt or tensorrt:1.
        json: Print JSON only.
    """
    from embedserve.compare import compare as compare_encoders
    from embedserve.compare import lines
    from embedserve.encoder import Encoder

    for name, value in (("--k", k), ("--most", most), ("--show", show)):
        if value < 1:
            raise Usage(f"{name} is {value}; it must be at least 1.")
    first, second = Encoder.load(a, device=device), Encoder.load(b, device=device)
    with progress_bar("compare", hidden=json) as progress:
        found = compare_encoders(first, second, images, k=k, most=most, show=show, progress=progress)
    document = dataclasses.asdict(found)
    if json:
        print_json(document)
    else:
        for line in lines(found):
            print(line)
    for problem in found.problems:
        note(f"  {problem.path}: {problem.reason}")
    if out is not None:
        _save_comparison(out, found, document, images)
    return PARTLY if found.problems else OK


def _save_comparison(out: Path, found: Comparison, document: dict[str, Any], images: Path) -> None:
    from embedserve.compare_picture import draw

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.json").write_text(dumps(document, indent=1) + "\n", encoding="utf-8")
        draw(found, images).save(out / "comparison.png")
    except OSError as error:
        raise EmbedServeError(f"--out '{out}' cannot be written: {error.strerror}.") from None
    note(f"written: {out / 'comparison.json'} and {out / 'comparison.png'}")
