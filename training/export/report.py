"""What a person reads after an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from embedserve.bundle import Bundle

__all__ = ["report"]


def report(bundle: Bundle) -> Iterator[str]:
    """Lines: what was written, and how it agrees with PyTorch."""
    described = bundle.description
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    what = f"{bundle.dim} numbers, {described.precision}, {size / 1e6:,.1f} MB"
    yield f"{bundle.name}: {what}, in '{bundle.folder}'"
    for tower in ("image", "text"):
        if "min_cosine" in described.parity.get(tower, {}):
            yield f"{tower:11}{_agreement(described.parity[tower])}"
    if "zero_shot" in described.parity:
        yield f"{'zero-shot':11}{_zero_shot(described.parity['zero_shot'])}"
    for tower, figures in described.parity.get("precision", {}).items():
        yield f"{tower:11}{_precision(figures)}"


def _agreement(found: Mapping[str, Any]) -> str:
    parts = [
        f"cosine to PyTorch at least {found['min_cosine']:.6f}, mean {found['mean_cosine']:.6f} "
        f"({found['n']} inputs)"
    ]
    if "top10_overlap" in found:
        parts.append(f"same 10 neighbours {found['top10_overlap']:.1%}")
    if found.get("tokens_compared"):
        parts.append(f"same tokens {found['tokens_equal']} of {found['tokens_compared']}")
    return ", ".join(parts)


def _zero_shot(found: Mapping[str, Any]) -> str:
    return (
        f"the same best of {found['labels']} labels for {found['same_best']:.1%} of the images, "
        f"probabilities within {found['worst_probability']:.6f}"
    )


def _precision(figures: Mapping[str, Any]) -> str:
    if "chosen" not in figures:
        return "float32 was kept"
    found = figures[figures["chosen"]]
    return (
        f"{figures['chosen']}: {found['times_float32']} times float32's speed on this CPU, cosine to it at "
        f"least {found['min_cosine']:.4f}, same 10 neighbours {found['top10_overlap']:.1%}"
    )
