"""Which of several files with the same network, in which precision."""

from __future__ import annotations

from collections.abc import Mapping

from embedserve.errors import InvalidField, NotFound, closest
from embedserve.hub.fetching import Repository

__all__ = ["SUFFIXES", "graph_file", "only_float32"]

FLOAT32 = "fp32"
SUFFIXES: Mapping[str, str] = {
    FLOAT32: "",
    "fp16": "_fp16",
    "quantized": "_quantized",
    "int8": "_int8",
    "uint8": "_uint8",
    "q4": "_q4",
    "q4f16": "_q4f16",
    "bnb4": "_bnb4",
}
"""Variant → what transformers.js puts behind a graph's name."""


def graph_file(repository: Repository, stem: str, variant: str) -> str:
    """Such as 'onnx/vision_model_fp16.onnx' for the stem 'onnx/vision_model'.

    Raises:
        InvalidField: No such variant is known.
        NotFound: The repository lacks it; the message says which it has.
    """
    if variant not in SUFFIXES:
        raise InvalidField(f"There is no variant '{variant}'; {closest(variant, SUFFIXES)}", param="variant")
    name = f"{stem}{SUFFIXES[variant]}.onnx"
    if name in repository.files:
        return name
    there = [known for known, suffix in SUFFIXES.items() if f"{stem}{suffix}.onnx" in repository.files]
    raise NotFound(
        f"{repository.at} has no '{name}'. Variants of it that are there: {', '.join(there) or 'none'}; "
        "choose one with --variant.",
        code="variant_not_found",
    )


def only_float32(variant: str, repository: Repository) -> None:
    """For layouts with one file for each network. Raises NotFound."""
    if variant != FLOAT32:
        raise NotFound(
            f"{repository.at} has one file for each tower, so there is no variant '{variant}'; leave "
            "--variant out.",
            code="variant_not_found",
        )
