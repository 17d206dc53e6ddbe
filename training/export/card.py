"""The model card of an exported encoder: what it is, how it agrees with its network, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedserve.bundle import Description, ImageTower, TextTower
from training.export.original import Original

__all__ = ["card"]


def card(description: Description, original: Original, command: str) -> str:
    """README.md of a bundle, in Markdown.

    Args:
        description: The bundle's, with its figures.
        original: What it was made from.
        command: What was typed; left out when empty.
    """
    lines = [f"# Model card: {description.name}", "", f"- From: {description.source}"]
    lines += [f"- Licence: {description.licence}", f"- Precision: {description.precision}"]
    lines += [f"- Written by `{command}`"] if command else []
    lines += ["", f"Vectors of {description.dim} numbers, of unit length; compare them by their cosine.", ""]
    lines += [_image(description.image)] if description.image else []
    lines += [_text(description.text)] if description.text else []
    if description.image and description.text:
        lines += [_scoring(description)]
    if description.dims:
        lengths = ", ".join(map(str, description.dims))
        lines += [
            f"- The first {lengths} numbers work on their own once rescaled to unit length (Matryoshka)."
        ]
    lines += ["", *(f"- {note}" for note in original.notes)] if original.notes else []
    lines += ["", *_agreement(description.parity)]
    lines += [
        "",
        "## Try it",
        "",
        "```",
        "embedserve check FOLDER",
        "embedserve serve --encoder FOLDER",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _image(tower: ImageTower) -> str:
    spec = tower.preprocessing
    how = {
        "shortest": f"the shorter side becomes {spec.resize_to} and the middle is cut out",
        "longest": f"the longer side becomes {spec.resize_to}, on {spec.background}",
        "squash": "both sides are stretched",
    }[spec.resize]
    text = f"- Images: uint8 [batch, {spec.height}, {spec.width}, 3]; {spec.interpolation}, {how}."
    if tower.outputs is not None:
        given = []
        if tower.outputs.patches:
            given.append(f"`patches`, {tower.outputs.patches} numbers")
        if tower.outputs.attention:
            given.append(f"`attention`, {tower.outputs.attention} heads")
        text += (
            f" Beside the vector, for each of {tower.outputs.rows} × {tower.outputs.columns} cells: "
            f"{' and '.join(given)}."
        )
    return text


def _text(tower: TextTower) -> str:
    padded = (
        f"always padded to {tower.context_length} tokens"
        if tower.padding == "context"
        else f"any length up to {tower.context_length} tokens; padding is not needed and changes nothing"
    )
    return f"- Texts: int64 [batch, length], {padded}."


def _scoring(description: Description) -> str:
    scoring = description.scoring
    bias = f" {scoring.logit_bias:+.4g}" if scoring.logit_bias else ""
    return f"- Zero-shot probabilities: {scoring.activation}({scoring.logit_scale:.4g} · cosine{bias})."


def _agreement(parity: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Agreement with PyTorch",
        "",
        f"Measured on: {parity['measured_on']}. Serving's whole path (decode, preprocess or tokenize, ONNX "
        "Runtime) against the network in PyTorch.",
        "",
        "| | compared with | n | least cosine | mean cosine | same 10 neighbours |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for tower in ("image", "text"):
        if tower not in parity:
            continue
        found = parity[tower]
        lines.append(
            f"| {tower} | {found['compared_with']} | {found['n']} | {found['min_cosine']:.6f} | "
            f"{found['mean_cosine']:.6f} | {found['top10_overlap']:.1%} |"
        )
        sizes = found["alone_or_in_a_batch"]
        notes.append(
            f"- {tower}: alone and in batches of {' and '.join(sizes)}, least cosine "
            f"{min(one['min_cosine'] for one in sizes.values()):.6f}."
        )
    image, text = parity.get("image", {}), parity.get("text", {})
    if "worst_pixel" in image:
        notes.append(
            f"- Preprocessing: no channel of a pixel differs by more than {image['worst_pixel']} of 255."
        )
    if "large_jpegs" in image:
        large = image["large_jpegs"]
        notes.append(
            f"- Large JPEGs, of which serving decodes a fraction: least cosine {large['min_cosine']:.6f} "
            f"({large['n']} of them, not in the table)."
        )
    if "as_evaluated" in image:
        seen = image["as_evaluated"]
        notes.append(
            "- Evaluations of the run cut their images from small squares that were decoded once, serving "
            f"from the image itself: mean cosine {seen['mean_cosine']:.4f}, least {seen['min_cosine']:.4f} ("
            f"{seen['worst']}). It is 1 for square images, and falls with their elongation and fine detail."
        )
    if text.get("tokens_compared"):
        notes.append(
            f"- Tokens: {text['tokens_equal']} of {text['tokens_compared']} texts equal the library's."
        )
    if "lengths" in text:
        lengths = text["lengths"]
        notes.append(
            f"- Texts of {lengths['shortest']} to {lengths['longest']} tokens: least cosine "
            f"{lengths['min_cosine']:.6f}."
        )
    if "zero_shot" in parity:
        shot = parity["zero_shot"]
        notes.append(
            f"- Zero-shot, {shot['images']} images and {shot['labels']} labels: same best label "
            f"{shot['same_best']:.1%}, probabilities within {shot['worst_probability']:.6f}."
        )
    return [*lines, "", *notes]
