"""The verbs on collections: `index`, `demo`, `search`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedserve.cli.base import (
    FAILED,
    HERE,
    OK,
    PARTLY,
    SERVE_DEFAULTS,
    Usage,
    Where,
    app,
    image_argument,
    is_url,
)
from embedserve.cli.terminal import note, print_json, progress_bar, show_hits, show_report
from embedserve.config import Limits, Switch
from embedserve.errors import EmbedServeError, closest

if TYPE_CHECKING:
    from embedserve.client import Client
    from embedserve.ingest import IngestReport


@app.command
def index(
    folder: Path,
    /,
    *,
    collection: str,
    metadata: Path | None = None,
    caption: str | None = None,
    dimensions: int | None = None,
    prune: Switch = False,
    max_image_bytes: int = SERVE_DEFAULTS.limits.max_image_bytes,
    where: Where = HERE,
) -> int:
    """Bring a collection up to date with a folder of pictures; files that are known are skipped.

    Args:
        folder: Searched with its subfolders, hidden ones excepted.
        collection: Name of the collection; made when missing.
        metadata: CSV or JSONL file with a column 'path' (below FOLDER); the others become metadata.
        caption: Column of that file whose text is embedded with the picture, so that words find it too.
        dimensions: Keep so many leading numbers of each vector in a new collection (Matryoshka encoders).
        prune: Delete the collection's items that came from a file which FOLDER no longer holds.
        max_image_bytes: Larger files are listed, not sent.
    """
    from embedserve.ingest import ingest

    start = time.perf_counter()
    with progress_bar(collection, hidden=where.json) as progress:
        report = where.run(
            lambda client: ingest(
                client,
                folder,
                collection,
                metadata=metadata,
                caption=caption,
                dimensions=dimensions,
                prune=prune,
                max_image_bytes=max_image_bytes,
                progress=progress,
            ),
            limits=Limits(max_image_bytes=max_image_bytes),
        )
    if not report.found and not report.problems:
        raise EmbedServeError(
            f"'{folder}' holds no images ({report.ignored} other files); JPEG, PNG, WebP, GIF, BMP, TIFF and "
            "AVIF are looked for, in subfolders too.",
            code="no_images",
        )
    return _finish(report, time.perf_counter() - start, where)


@app.command
def demo(*, images: Path | None = None, where: Where = HERE) -> int:
    """Build the demo collection 'openmoji' (1,918 emoji by OpenMoji, CC BY-SA 4.0), or what is missing of it.

    Args:
        images: Index this folder instead, as the collection 'images'.
    """
    if images is not None:
        return index(images, collection="images", where=where)
    from embedserve.demo import COLLECTION, build_demo

    start = time.perf_counter()
    with progress_bar(COLLECTION, hidden=where.json) as progress:
        report = where.run(lambda client: build_demo(client, progress=progress))
    return _finish(report, time.perf_counter() - start, where)


def _finish(report: IngestReport, seconds: float, where: Where) -> int:
    if where.json:
        print_json({**dataclasses.asdict(report), "seconds": round(seconds, 3)})
    else:
        show_report(report, seconds)
    if not report.problems:
        return OK
    return PARTLY if report.added or report.replaced or report.unchanged else FAILED


@app.command
def search(
    query: str | None = None,
    /,
    *,
    collection: str | None = None,
    image: str | None = None,
    text: str | None = None,
    id: str | None = None,
    k: int = 10,
    filter: str | None = None,
    min_score: float | None = None,
    diversity: float | None = None,
    group_by: str | None = None,
    where: Where = HERE,
) -> int:
    """Find what is most like a text, an image or an item.

    Args:
        query: An image's file or URL if it is one, else a text.
        collection: Name of the collection; may be left out while there is only one.
        image: File or URL of an image, '-' for stdin.
        text: A text.
        id: An item of the collection.
        k: How many to find.
        filter: Only items whose metadata match, as JSON: '{"folder": "cats"}'.
        min_score: Only items at least this alike (cosine).
        diversity: 0 to 1: towards 1, results differ more from one another.
        group_by: Only the best of each value of this metadata field.
    """
    given = [value for value in (query, image, text, id) if value is not None]
    if len(given) != 1:
        raise Usage("Give one QUERY, or one of --image, --text and --id.")
    if query is not None and (query == "-" or is_url(query) or Path(query).is_file()):
        image = query
    elif query is not None:
        text = query

    async def work(client: Client) -> Any:
        return await client.search(
            collection or await _only_collection(client),
            image=None if image is None else image_argument(image),
            text=text,
            id=id,
            k=k,
            filter=_json_object("--filter", filter),
            min_score=min_score,
            diversity=diversity,
            group_by=group_by,
        )

    answer = where.run(work)
    if where.json:
        print_json(answer)
    elif not answer["hits"]:
        note("Nothing matches.")
    else:
        show_hits(answer["hits"])
    return OK


async def _only_collection(client: Client) -> str:
    names = [str(one["name"]) for one in await client.collections()]
    if len(names) == 1:
        return names[0]
    if not names:
        raise Usage("There is no collection yet. Make one: `embedserve index FOLDER --collection NAME`.")
    raise Usage(f"--collection is missing; {closest('', names)}")


def _json_object(flag: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Usage(
            f'{flag} is not JSON ({error}); quote it, as in {flag} \'{{"folder": "cats"}}\'.'
        ) from None
    if not isinstance(value, dict):
        raise Usage(f"{flag} is {text}; it must be a JSON object.")
    return value
