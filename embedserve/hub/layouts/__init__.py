"""The ways in which repositories are laid out. A folder is recognised by its files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from embedserve.errors import BundleError
from embedserve.hub.fetching import Repository
from embedserve.hub.foreign import Foreign
from embedserve.hub.layouts import dinov2, immich, qdrant, transformers_js

__all__ = ["LAYOUTS", "Layout", "recognise"]


@dataclass(frozen=True, slots=True)
class Layout:
    example: str
    looks_for: str
    """The files by which it is known, in words."""
    matches: Callable[[frozenset[str]], bool]
    read: Callable[[Repository, str], Foreign]
    """The repository and the variant that was asked for → what is in it."""


LAYOUTS: Mapping[str, Layout] = {
    "immich": Layout("immich-app/ViT-B-32__openai", immich.LOOKS_FOR, immich.matches, immich.read),
    "transformers.js": Layout(
        "Xenova/clip-vit-base-patch32",
        transformers_js.LOOKS_FOR,
        transformers_js.matches,
        transformers_js.read,
    ),
    "dinov2": Layout("onnx-community/dinov2-small", dinov2.LOOKS_FOR, dinov2.matches, dinov2.read),
    "qdrant": Layout("Qdrant/clip-ViT-B-32-vision", qdrant.LOOKS_FOR, qdrant.matches, qdrant.read),
}
"""Layout name → what it looks like. The first that matches is taken."""


def recognise(repository: Repository) -> tuple[str, Layout]:
    """The name of the repository's layout, and the layout. Raises BundleError: none is known."""
    for name, layout in LAYOUTS.items():
        if layout.matches(repository.files):
            return name, layout
    looked_for = "".join(
        f"\n  {name}: {layout.looks_for} (such as {layout.example})" for name, layout in LAYOUTS.items()
    )
    found = sorted(repository.files)
    graphs = [file for file in found if file.endswith(".onnx")]
    shown = ", ".join((graphs or found)[:12]) or "no files at all"
    raise BundleError(
        f"{repository.at} has no layout that is known. Looked for:{looked_for}\nFound {len(found)} files"
        f"{' and no .onnx' if not graphs else ''}: {shown}{', …' if len(graphs or found) > 12 else ''}.",
        code="unknown_layout",
    )
