"""Licences of published weights, as their authors state them. Code has licences of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["licence_of", "spdx", "stated_in"]

LICENCES: Mapping[str, str] = {
    "openai/clip-": "MIT",
    "laion/": "MIT",
    "google/siglip": "Apache-2.0",
    "google/vit-": "Apache-2.0",
    "microsoft/beit-": "Apache-2.0",
    "facebook/dinov2": "Apache-2.0",
    "facebook/PE-Core": "Apache-2.0",
    "facebook/metaclip": "CC-BY-NC-4.0",
    "visheratin/": "CC-BY-NC-4.0",
}
"""How the name of a repository on the Hugging Face hub begins → SPDX."""

OPEN_CLIP_TAGS: Mapping[str, str] = {
    "openai": "MIT",
    "laion": "MIT",
    "commonpool": "MIT",
    "datacomp_": "MIT",
    "webli": "Apache-2.0",
    "meta": "Apache-2.0",
    "metaclip": "CC-BY-NC-4.0",
}
"""How an open_clip tag begins → SPDX; for weights that lie in repositories of open_clip and timm."""


def licence_of(repository: str, tag: str = "") -> str:
    """SPDX of weights from `repository` (of the hub; "" for a plain address), else where to look."""
    table = OPEN_CLIP_TAGS if tag and _is_open_clips(repository) else LICENCES
    name = tag if table is OPEN_CLIP_TAGS else repository
    fitting = [prefix for prefix in table if name.startswith(prefix)]
    if fitting:
        return table[max(fitting, key=len)]
    where = f"https://huggingface.co/{repository}" if repository else "who published the weights"
    return f"unknown: see {where}"


def stated_in(folder: Path) -> str | None:
    """What the model card in `folder` says in its header, as the hub does: `license: apache-2.0`."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0] != "---":
        return None
    for line in lines[1:]:
        if line == "---":
            break
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return spdx(value.strip().strip("'\""))
    return None


def spdx(name: str) -> str:
    """A licence's name in SPDX's spelling, where it is one of those that are known here."""
    return next((known for known in LICENCES.values() if known.lower() == name.lower()), name)


def _is_open_clips(repository: str) -> bool:
    return not repository or repository.startswith(("laion/", "timm/"))
