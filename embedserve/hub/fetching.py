"""Where files come from: a model hub (through `huggingface_hub` and its cache) or a local folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import ERROR
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import httpx2
import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from embedserve.errors import BundleError, EmbedServeError, NotFound, NotReady

__all__ = ["Hub", "Repository", "open_repository"]

T = TypeVar("T")

DEFAULT_REVISION = "main"
INFO_TIMEOUT = 20.0
"""Seconds for the hub to say what a repository holds."""

_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """Which hub, and how. The defaults are `huggingface_hub`'s own: HF_ENDPOINT, HF_HOME, HF_TOKEN,
    HF_HUB_OFFLINE."""

    endpoint: str | None = None
    cache: Path | None = None
    progress: bool = False
    """Show bars on stderr while files come in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """Files with names, of which only those that are asked for are fetched."""

    name: str
    """'owner/name', or the name of a local folder."""
    commit: str | None
    """The hub's commit; None for a local folder."""
    files: frozenset[str]
    folder: Path | None
    """Where all files lie already; None: they come from the hub."""
    hub: Hub = field(default_factory=Hub)

    @property
    def at(self) -> str:
        return f"{self.name}@{self.commit}" if self.commit else f"folder '{self.name}'"

    def path(self, name: str) -> Path:
        """The file `name` on this machine, fetched if need be.

        Raises:
            NotFound: The repository has no such file.
            EmbedServeError: It cannot be fetched.
        """
        if name not in self.files:
            near = sorted(
                other for other in self.files if PurePosixPath(other).suffix == PurePosixPath(name).suffix
            )
            shown = ", ".join(f"'{other}'" for other in near[:12]) or "none"
            raise NotFound(
                f"{self.at} has no file '{name}'. Files of that kind: {shown}"
                f"{', …' if len(near) > 12 else ''}. Is the copy or the export complete?",
                code="file_not_found",
            )
        if self.folder is not None:
            return self.folder / name
        commit = self.commit or DEFAULT_REVISION
        return _ask(lambda: _download(self.name, name, commit, self.hub), self.name, commit, self.hub)

    def json(self, name: str) -> dict[str, Any]:
        """A file that holds one JSON object."""
        path = self.path(name)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BundleError(f"'{name}' of {self.at} is not JSON ({error}).") from None
        if not isinstance(found, dict):
            raise BundleError(f"'{name}' of {self.at} is not a JSON object.")
        return found

    def licence(self) -> str | None:
        """What the model card's header says; None where it says nothing."""
        if _CARD not in self.files:
            return None
        try:
            header = huggingface_hub.metadata_load(self.path(_CARD)) or {}
        except Exception:  # noqa: BLE001 -- whatever a header is that cannot be read, it names no licence
            return None
        licence = header.get("license")
        if licence is None or licence == "other":
            parts = [header.get("license_name"), header.get("license_link")]
            return ", ".join(str(part) for part in parts if part) or None
        return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)


def open_repository(source: str, hub: Hub) -> Repository:
    """What `source` names: a local folder if there is one, else 'owner/name[@revision]' on the hub.

    Raises:
        NotFound: No such folder, repository or revision.
        Forbidden, NotReady, EmbedServeError: As the hub answered.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return _local(folder)
    named = _HUB_NAME.fullmatch(source.removeprefix("https://huggingface.co/").rstrip("/"))
    if named is None:
        raise NotFound(
            f"'{source}' is neither a folder here nor a repository's name such as "
            "'immich-app/ViT-B-32__openai' (a revision goes behind an @).",
            code="repository_not_found",
        )
    name, revision = named["repository"], named["revision"] or DEFAULT_REVISION
    try:
        return _ask(lambda: _remote(name, revision, hub), name, revision, hub)
    except NotReady:
        cached = _cached(name, revision, hub)
        if cached is None:
            raise
        return cached


def _local(folder: Path, *, name: str | None = None, commit: str | None = None) -> Repository:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Repository(
        name=name or folder.resolve().name,
        commit=commit,
        files=frozenset(file for file in files if not file.startswith(".git/")),
        folder=folder,
    )


def _remote(name: str, revision: str, hub: Hub) -> Repository:
    info = huggingface_hub.HfApi(endpoint=hub.endpoint).model_info(
        name, revision=revision, timeout=INFO_TIMEOUT
    )
    files = frozenset(one.rfilename for one in info.siblings or ())
    # Asked for by the branch's name, one file makes the cache remember which commit that is: for offline use.
    for small in ("config.json", _CARD, *sorted(files)):
        if small in files:
            _download(name, small, revision, hub)
            break
    return Repository(name=name, commit=info.sha, files=files, folder=None, hub=hub)


def _cached(name: str, revision: str, hub: Hub) -> Repository | None:
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=hub.cache,
                local_files_only=True,
                allow_patterns=["config.json"],
            )
        )
    except hub_errors.LocalEntryNotFoundError:
        return None
    return _local(snapshot, name=name, commit=snapshot.name)


def _download(name: str, file: str, revision: str, hub: Hub) -> Path:
    with _bars(shown=hub.progress):
        return Path(
            huggingface_hub.hf_hub_download(
                name, file, revision=revision, cache_dir=hub.cache, endpoint=hub.endpoint
            )
        )


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """`huggingface_hub` switches bars and messages for the whole process; afterwards all is as it was."""
    were_disabled, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    logging.set_verbosity(ERROR)
    if not shown:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not shown and not were_disabled:
            enable_progress_bars()


def _ask(work: Callable[[], T], name: str, revision: str, hub: Hub) -> T:
    """What `work` returns; the hub's failures as ours, each with what to do."""
    endpoint = hub.endpoint or huggingface_hub.constants.ENDPOINT
    try:
        return work()
    except hub_errors.GatedRepoError:
        raise EmbedServeError(
            f"'{name}' is open only to those who accepted its conditions. Accept them at {endpoint}/{name}, "
            "then log in with `hf auth login` or set HF_TOKEN.",
            code="repository_gated",
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise NotFound(
            f"'{name}' has no revision '{revision}' at {endpoint}. Give a branch, a tag or a full commit "
            "behind the @, or leave it out for 'main'.",
            code="revision_not_found",
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise NotFound(
            f"{endpoint} has no repository '{name}', or keeps it private. Check the spelling (capitals "
            "count); for a private one log in with `hf auth login` or set HF_TOKEN.",
            code="repository_not_found",
        ) from None
    except (hub_errors.HFValidationError, hub_errors.RemoteEntryNotFoundError) as error:
        raise NotFound(f"{endpoint} has no '{name}': {error}", code="repository_not_found") from None
    except (
        hub_errors.OfflineModeIsEnabled,
        hub_errors.LocalEntryNotFoundError,
        httpx2.TransportError,
    ) as error:
        raise NotReady(_unreachable(name, revision, endpoint, error), code="hub_unreachable") from None
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise NotReady(_unreachable(name, revision, endpoint, error), code="hub_unreachable") from None
        raise EmbedServeError(
            f"{endpoint} refuses '{name}' with status {status}. If it needs a login, set HF_TOKEN or run "
            "`hf auth login`; else try again later.",
            code="hub_refused",
        ) from None
    except OSError as error:
        raise EmbedServeError(
            f"'{name}' cannot be stored in the cache: {error.strerror or error}. Free some space, or move "
            "the cache by setting HF_HOME.",
            code="cache_not_writable",
        ) from None


def _unreachable(name: str, revision: str, endpoint: str, error: Exception) -> str:
    if huggingface_hub.constants.is_offline_mode():
        why = "HF_HUB_OFFLINE is set, and the cache lacks"
    else:
        first = next(iter(str(error).splitlines()), "")[:200]
        why = f"{endpoint} cannot be reached ({type(error).__name__}: {first}), and the cache lacks"
    return (
        f"{why} '{name}' at '{revision}' or one of its files. Pull it where there is a network and copy the "
        "bundle; or copy the repository's files into a folder and pull that folder; or set HF_ENDPOINT to a "
        "mirror."
    )
