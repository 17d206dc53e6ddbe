"""LiT: CLIP with one tower locked, so that the other learns to speak its language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.methods.clip import CLIP, CLIPOptions
from training.tuning import Tuning

__all__ = ["LiT", "LiTOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiTOptions(CLIPOptions):
    """Settings of LiT."""

    lock: Literal["image", "text", "both"] = "image"
    """The tower that is locked; where its image_learns or text_learns is blocks or lora, that much learns."""

    def learns(self) -> tuple[Tuning, Tuning]:
        image, text = self.image_learns, self.text_learns
        return (
            "nothing" if image == "all" and self.lock != "text" else image,
            "nothing" if text == "all" and self.lock != "image" else text,
        )


class LiT(CLIP):
    paper = "Zhai et al. 2022, arXiv:2111.07991"
    summary = "CLIP with the image tower locked (or with lock=text the text tower); learns from captions"
    Options = LiTOptions
