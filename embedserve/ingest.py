"""A folder of pictures into a collection: resumable, and no bad file stops it.

Every file is one item whose id is its path below the folder. Its metadata holds `path`, `folder`, `bytes` and
`modified`, and the columns of a sidecar file. One of these may be embedded with the pictures as caption, and
`caption_column` then says which. An item whose metadata already says all this is up to date, so the file is
not even read. Whatever a batch wrote is durable once it is answered: stopping loses nothing, and running
again goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from embedserve.client import Client, Upload
from embedserve.config import Limits
from embedserve.errors import InvalidField, NotFound, TooLarge, closest
from embedserve.folder import CAPTION_COLUMN, FileFound, Problem, Walk, read_sidecar, walk

__all__ = ["IngestReport", "Progress", "ingest", "upload_all"]

BATCH_ITEMS = 32
BATCH_BYTES = 16 * 1024 * 1024
MAX_IMAGE_BYTES = Limits().max_image_bytes
IN_FLIGHT = 2
"""Requests at once: while one batch is in the encoder, the next is read and decoded."""

Progress = Callable[[int, int], None]
"""Called with (items finished, items in all)."""

Outcome = Literal["ok"] | Problem


def _no_progress(done: int, total: int) -> None: ...


@dataclass(slots=True)
class IngestReport:
    """What `ingest` did."""

    collection: str
    found: int = 0
    """Image files in the folder."""
    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    pruned: int = 0
    ignored: int = 0
    """Files that are no images, by their extension or first bytes."""
    unmatched: list[str] = field(default_factory=list)
    """Paths of the sidecar that no file has."""
    problems: list[Problem] = field(default_factory=list)


async def ingest(
    client: Client,
    folder: Path,
    collection: str,
    *,
    metadata: Path | None = None,
    caption: str | None = None,
    dimensions: int | None = None,
    prune: bool = False,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    progress: Progress = _no_progress,
) -> IngestReport:
    """Brings `collection` (made when missing) up to date with `folder`.

    Args:
        metadata: A CSV or JSONL file with a `path` column; its other columns become metadata.
        caption: The column whose text is embedded with the picture. A file without one is embedded alone.
        dimensions: A new collection keeps so many leading numbers of each vector; None: all.
        prune: Delete items that came from a file which is gone. Nothing is deleted when the folder holds no
            image at all (an unmounted disk), nor below a folder that could not be listed.
        max_image_bytes: Larger files are reported, not sent.

    Raises what the server raises for the request as a whole (Unauthorized, Conflict, NotReady, …), BadRequest
    or NotFound for the folder and the sidecar, InvalidField for a caption that the sidecar lacks. A bad file
    is one of the report's `problems`.
    """
    sidecar = read_sidecar(metadata) if metadata is not None else {}
    if caption is not None:
        sidecar = _captioned(sidecar, caption, metadata)
    tree = await asyncio.to_thread(walk, folder)
    report = IngestReport(collection, found=len(tree.files), ignored=tree.ignored, problems=tree.problems)
    present = {file.id for file in tree.files}
    report.unmatched = sorted(set(sidecar) - present)
    if not tree.files:
        return report
    known = await known_items(client, collection, dimensions)
    todo: list[tuple[FileFound, Mapping[str, Any]]] = []
    for file in tree.files:
        wanted = {**sidecar.get(file.id, {}), **file.metadata()}
        if file.id in known and _up_to_date(known[file.id], wanted, exactly=metadata is not None):
            report.unchanged += 1
        elif file.size > max_image_bytes:
            report.problems.append(
                Problem(file.id, f"{file.size} bytes; allowed are {max_image_bytes} (--max-image-bytes)")
            )
        else:
            todo.append((file, wanted))
    start = len(tree.files) - len(todo)
    progress(start, len(tree.files))

    def account(name: str, outcome: Outcome) -> None:
        if isinstance(outcome, Problem):
            report.problems.append(outcome)
        elif name in known:
            report.replaced += 1
        else:
            report.added += 1
        finished = report.added + report.replaced + len(report.problems) - problems_before
        progress(start + finished, len(tree.files))

    problems_before = len(report.problems)
    await upload_all(client, collection, _read_batches(todo), account)
    if prune:
        report.pruned = await _prune(client, collection, tree, known)
    report.problems.sort(key=lambda problem: problem.path)
    return report


def _captioned(
    sidecar: Mapping[str, Mapping[str, Any]], column: str, source: Path | None
) -> dict[str, dict[str, Any]]:
    """The sidecar with a note of the column wherever that has a text. Raises InvalidField."""
    if source is None:
        raise InvalidField(f"--caption {column} names a column, but of no file; give one with --metadata.")
    texts = {path: row[column] for path, row in sidecar.items() if row.get(column) not in (None, "")}
    if not texts:
        columns = {name for row in sidecar.values() for name in row}
        raise InvalidField(f"--caption: '{source}' has no text in '{column}'; {closest(column, columns)}")
    for path, text in texts.items():
        if not isinstance(text, str | int | float):
            raise InvalidField(
                f"--caption: '{column}' of '{path}' in '{source}' is no text; write one there."
            )
    return {
        path: {**row, CAPTION_COLUMN: column} if path in texts else dict(row) for path, row in sidecar.items()
    }


def _caption(metadata: Mapping[str, Any]) -> str | None:
    column = metadata.get(CAPTION_COLUMN)
    return None if column is None else str(metadata[column])


def _up_to_date(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, exactly: bool) -> bool:
    """Without a sidecar, metadata from an earlier one is left alone."""
    return stored == wanted if exactly else all(stored.get(key) == value for key, value in wanted.items())


async def known_items(
    client: Client, collection: str, dimensions: int | None = None
) -> dict[str, dict[str, Any]]:
    """Metadata by id of what the collection holds; makes the collection if there is none.

    Raises Conflict if it keeps another number of `dimensions` than asked for.
    """
    try:
        if dimensions is not None:
            await client.create_collection(collection, dimensions=dimensions)
        return {item["id"]: item["metadata"] async for item in client.all_items(collection)}
    except NotFound:
        await client.create_collection(collection)
        return {}


async def upload_all(
    client: Client,
    collection: str,
    batches: Iterator[Callable[[], Sequence[Upload | Problem]]],
    account: Callable[[str, Outcome], None],
) -> None:
    """Sends batches, `IN_FLIGHT` at a time, and tells `account` what became of each item.

    `batches` yields functions that read one batch; they run in a thread. On an error of a whole request the
    other requests are cancelled and it is raised; what has been answered stays written.
    """

    async def worker() -> None:
        for read in batches:
            ready: list[Upload] = []
            for one in await asyncio.to_thread(read):
                if isinstance(one, Problem):
                    account(one.path, one)
                else:
                    ready.append(one)
            await _send(client, collection, ready, account)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(worker())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _send(
    client: Client, collection: str, uploads: Sequence[Upload], account: Callable[[str, Outcome], None]
) -> None:
    if not uploads:
        return
    try:
        answer = await client.upload(collection, uploads)
    except TooLarge as error:
        if len(uploads) == 1:
            account(uploads[0].id, Problem(uploads[0].id, str(error)))
        else:  # this server takes smaller requests than ours
            for half in (uploads[: len(uploads) // 2], uploads[len(uploads) // 2 :]):
                await _send(client, collection, half, account)
        return
    for upload, result in zip(uploads, answer["results"], strict=True):
        failed = result["status"] != "ok"
        account(upload.id, Problem(upload.id, result["error"]["message"]) if failed else "ok")


def _read_batches(
    todo: Iterable[tuple[FileFound, Mapping[str, Any]]],
) -> Iterator[Callable[[], Sequence[Upload | Problem]]]:
    batch: list[tuple[FileFound, Mapping[str, Any]]] = []
    size = 0
    for file, wanted in todo:
        if batch and (len(batch) == BATCH_ITEMS or size + file.size > BATCH_BYTES):
            yield _reader(batch)
            batch, size = [], 0
        batch.append((file, wanted))
        size += file.size
    if batch:
        yield _reader(batch)


def _reader(
    batch: Sequence[tuple[FileFound, Mapping[str, Any]]],
) -> Callable[[], Sequence[Upload | Problem]]:
    def read() -> list[Upload | Problem]:
        uploads: list[Upload | Problem] = []
        for file, wanted in batch:
            try:
                image = file.path.read_bytes()
                uploads.append(Upload(id=file.id, image=image, text=_caption(wanted), metadata=wanted))
            except OSError as error:
                uploads.append(Problem(file.id, f"cannot be read: {error.strerror}"))
        return uploads

    return read


async def _prune(client: Client, collection: str, tree: Walk, known: Mapping[str, Mapping[str, Any]]) -> int:
    seen = {file.id for file in tree.files} | {problem.path for problem in tree.problems}
    gone = [
        name
        for name, metadata in known.items()
        if metadata.get("path") == name  # only what came from a file
        and name not in seen
        and not name.startswith(tuple(tree.unreadable))
    ]
    return await client.delete_items(collection, gone)
