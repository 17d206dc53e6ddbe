"""The model card of a pulled bundle."""

from __future__ import annotations

from collections.abc import Sequence

from embedserve.bundle import Description

__all__ = ["model_card"]


def model_card(description: Description, warnings: Sequence[str]) -> str:
    """README.md of a pulled bundle: where it is from, how it is fed, what was proven and assumed."""
    lines = [
        f"# {description.name}",
        "",
        "Written by `embedserve pull` from graphs that others exported. The weights are theirs, bit for bit; "
        "pixel arithmetic, masks and the scaling to unit length were put in front and behind.",
        "",
        f"- From: {description.source}",
        f"- Licence: {description.licence}",
        f"- Vectors: {description.dim} numbers of unit length; {description.precision}",
    ]
    if description.image is not None:
        spec = description.image.preprocessing
        lines.append(
            f"- Images: {spec.resize} to {spec.resize_to} pixels ({spec.interpolation}), then "
            f"{spec.height} × {spec.width}"
        )
    if description.text is not None:
        text = description.text
        padded = "always to that length" if text.padding == "context" else "to the longest of a batch"
        lines.append(f"- Texts: at most {text.context_length} tokens, padded {padded} with id {text.pad_id}")
    if description.image is not None and description.text is not None:
        scoring = description.scoring
        bias = f" {scoring.logit_bias:+g}" if scoring.logit_bias else ""
        lines.append(f"- Zero-shot: {scoring.activation}({scoring.logit_scale:g} · cosine{bias})")
    lines += [
        "",
        "## Agreement with the graphs it was made from",
        "",
        f"Against {description.parity['against']}.",
        "",
        "| tower | n | least cosine | mean cosine | least cosine, alone against in a batch |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {tower} | {one['n']} | {one['min_cosine']:.6f} | {one['mean_cosine']:.6f} | "
        f"{one['min_cosine_batched']:.6f} |"
        for tower in ("image", "text")
        if (one := description.parity.get(tower))
    ]
    if warnings:
        lines += ["", "## Assumed", "", *(f"- {warning}" for warning in warnings)]
    return "\n".join(lines) + "\n"
