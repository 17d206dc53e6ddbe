"""A fitted scale goes into its bundle, so that `/v1/classify` gives the probabilities that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedserve.bundle import MANIFEST, Bundle, open_bundle, seal
from embedserve.encoder import resolve
from embedserve.errors import BundleError, InvalidField
from training.evaluate.bundle import BundleEncoder
from training.evaluate.embedding import EvaluationEncoder

__all__ = ["check_storable", "store_scoring"]


def check_storable(encoder: EvaluationEncoder) -> Bundle:
    """The encoder's bundle, if it may be written to.

    Raises:
        InvalidField: It is no bundle, or the one that comes with this package.
        BundleError: The folder was altered, or holds files that are no part of the bundle.
    """
    if not isinstance(encoder, BundleEncoder):
        raise InvalidField(
            f"store=true writes into a bundle, and '{encoder.name}' is a run. Export it (`embedserve export "
            "RUN --out BUNDLE`), then evaluate the bundle on the images that the run held out.",
            param="store",
        )
    folder = encoder.bundle.folder.resolve()
    if folder == resolve("starter").resolve():
        raise InvalidField(
            f"store=true would change the starter inside the installed package ('{folder}'). Copy that "
            "folder, and evaluate the copy.",
            param="store",
        )
    bundle = open_bundle(folder)
    # `seal` describes whatever it finds, and more files would make it another encoder to collections.
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and "__pycache__" not in path.parts
    }
    if more := sorted(found - set(bundle.description.files)):
        raise BundleError(
            f"'{folder}' holds what is no part of the bundle: {', '.join(more[:5])}. Move it elsewhere (and "
            "--out as well), then store again."
        )
    if bundle.fingerprint != encoder.bundle.fingerprint:
        raise BundleError(f"'{folder}' became another bundle while it was evaluated; evaluate it again.")
    return bundle


def store_scoring(bundle: Bundle, scale: float, bias: float, name: str, figures: Mapping[str, Any]) -> Bundle:
    """Rewrites encoder.json whole or not at all; vectors and fingerprint stay, so collections do.

    Args:
        bundle: From `check_storable`.
        scale, bias: Of the probabilities.
        name: Of the evaluation; earlier figures of that name are replaced.
        figures: JSON values.
    """
    described = bundle.description
    scoring = described.scoring.model_copy(update={"logit_scale": scale, "logit_bias": bias})
    evaluation = {**described.evaluation, name: dict(figures)}
    return seal(
        Path(bundle.folder), described.model_copy(update={"scoring": scoring, "evaluation": evaluation})
    )
