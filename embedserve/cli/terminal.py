"""What the command line shows: results on stdout, progress and complaints on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from embedserve.errors import EmbedServeError

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

    from embedserve.ingest import IngestReport, Progress

__all__ = ["complain", "error_object", "note", "print_json", "progress_bar", "show_hits", "show_report"]

SHOWN_PROBLEMS = 20


def print_json(answer: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(answer, ensure_ascii=False))


def note(message: str) -> None:
    """A line for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def complain(error: EmbedServeError, *, as_json: bool = False) -> None:
    """The message on stderr and, for scripts, the API's error form on stdout."""
    note(f"embedserve: {error}")
    if as_json:
        print_json({"error": error_object(error)})


def error_object(error: EmbedServeError) -> dict[str, Any]:
    return {"message": str(error), "type": error.type, "param": error.param, "code": error.code}


@contextmanager
def progress_bar(label: str, *, hidden: bool = False) -> Iterator[Progress]:
    """A bar with images/s and the time left; nothing when stderr is no terminal."""
    if hidden or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.0f}/s" if task.speed else "")

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)

        def progress(done: int, total: int) -> None:
            if bar.tasks[0].total is None:  # what was known before does not count as speed
                bar.reset(task, total=total, completed=done)
            else:
                bar.update(task, completed=done)

        yield progress


def show_hits(hits: Sequence[Mapping[str, Any]]) -> None:
    """One line for each hit: score, id and what its metadata calls it."""
    for hit in hits:
        metadata = hit.get("metadata") or {}
        names = [metadata[key] for key in ("emoji", "caption", "name", "title") if key in metadata]
        print(f"{hit['score']:7.3f}  {hit['id']}{'  ' if names else ''}{'  '.join(map(str, names[:2]))}")


def show_report(report: IngestReport, seconds: float) -> None:
    """What `index` and `demo` did, and the files that failed."""
    done = report.added + report.replaced
    parts = [f"{report.added} added", f"{report.replaced} replaced", f"{report.unchanged} unchanged"]
    parts += [f"{report.pruned} pruned"] if report.pruned else []
    parts += [f"{len(report.problems)} failed"] if report.problems else []
    parts += [f"{report.ignored} other files ignored"] if report.ignored else []
    speed = f" ({done / seconds:.0f} images/s)" if done and seconds > 0 else ""
    print(f"{report.collection}: {', '.join(parts)} in {seconds:.1f} s{speed}")
    for problem in report.problems[:SHOWN_PROBLEMS]:
        note(f"  {problem.path}: {problem.reason}")
    if len(report.problems) > SHOWN_PROBLEMS:
        note(f"  … and {len(report.problems) - SHOWN_PROBLEMS} more; --json lists all.")
    if report.unmatched:
        example = report.unmatched[0]
        note(f"  --metadata: {len(report.unmatched)} paths without a file, such as '{example}'.")
