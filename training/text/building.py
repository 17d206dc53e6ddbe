"""Name → text tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedserve.errors import InvalidField
from training.text import hugging_face, open_clip, sentences
from training.text.base import TextTower
from training.text.rules import TextRules

__all__ = ["build_text", "rebuild_text"]


def build_text(name: str, *, start: str = "") -> TextTower:
    """A text tower: float32, on the CPU, in training mode.

    Args:
        name: 'sentences' (all-MiniLM-L6-v2, with its weights), 'open_clip:ARCHITECTURE', 'hf:FOLDER' (with
            its weights), or 'transformer/LAYERSxWIDTH', CLIP's own in any size.
        start: For open_clip: a checkpoint of the whole model, or a tag. "" for random weights.

    Raises:
        InvalidField: An unknown name, or weights that do not fit.
        NotFound: A folder or file that is not there.
        BundleError: The package with the weights is not installed.
    """
    if start and not name.startswith(open_clip.PREFIX):
        raise InvalidField(
            f"text_start is for text towers of open_clip; '{name}' "
            + ("has random weights." if open_clip.SIZED.fullmatch(name) else "brings its own."),
            param="text_start",
        )
    if name == sentences.NAME:
        return sentences.sentences()
    if name.startswith(open_clip.PREFIX):
        return open_clip.text_tower(name.removeprefix(open_clip.PREFIX), start)
    if name.startswith(hugging_face.PREFIX):
        return hugging_face.from_folder(name.removeprefix(hugging_face.PREFIX))
    if size := open_clip.SIZED.fullmatch(name):
        return open_clip.sized(int(size[1]), int(size[2]))
    raise InvalidField(
        f"text='{name}' is unknown; give 'sentences', 'open_clip:ViT-B-32' (any of its architectures), "
        "'hf:FOLDER', or 'transformer/4x256' (layers and width).",
        param="text",
    )


def rebuild_text(carried: Mapping[str, Any]) -> TextTower:
    """The tower that `TextTower.carried` describes, without its weights and what it once came from."""
    name, rules = str(carried["name"]), TextRules.from_json(carried["rules"])
    if name.startswith(hugging_face.PREFIX):
        return hugging_face.from_config(name, carried["config"], rules, trained=bool(carried["trained"]))
    if name.startswith(open_clip.PREFIX):
        tower = open_clip.text_tower(name.removeprefix(open_clip.PREFIX), rules=rules)
    elif size := open_clip.SIZED.fullmatch(name):
        tower = open_clip.sized(int(size[1]), int(size[2]), rules)
    else:
        tower = build_text(name)
    tower.trained = bool(carried["trained"])
    return tower
