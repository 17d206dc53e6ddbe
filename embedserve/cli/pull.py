"""The verb `pull`: encoders that others exported. The work is done by `embedserve.hub`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from embedserve.cli.base import OK, Usage, app
from embedserve.cli.terminal import note, print_json
from embedserve.config import Switch
from embedserve.errors import EmbedServeError


@app.command
def pull(
    sources: list[str],
    /,
    *,
    out: Path | None = None,
    variant: str = "fp32",
    name: str | None = None,
    activation: Literal["softmax", "sigmoid"] | None = None,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
    json: Switch = False,
) -> int:
    """Make a bundle of an encoder that others exported to ONNX, and prove it against their graphs.

    Layouts: Immich, transformers.js (Xenova, onnx-community), Qdrant; CLIP, SigLIP, DINOv2. HF_ENDPOINT,
    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are respected.

    Args:
        sources: A repository such as Xenova/clip-vit-base-patch32 (a revision behind an @) or a local folder;
            two where one has the images and the other the texts.
        out: The bundle's folder; one here with the encoder's name when left out.
        variant: Which file of several: fp32, fp16, quantized, int8, uint8, q4, q4f16 or bnb4.
        name: The encoder's name.
        activation: How zero-shot similarities become probabilities.
        logit_scale: The trained scale of similarities, which the files do not hold.
        logit_bias: The trained bias, for sigmoid.
        json: Print JSON only.
    """
    if not sources or len(sources) > 2:
        raise Usage("Give one repository or folder, or two: one with the images, one with the texts.")
    if logit_scale is not None and not logit_scale > 0:
        raise Usage(f"--logit-scale {logit_scale:g} is not above 0; CLIP's is about 100 (not its logarithm).")
    try:
        from embedserve.hub.fetching import Hub
        from embedserve.hub.pull import Wishes
        from embedserve.hub.pull import pull as write
    except ImportError as error:
        if (error.name or "").startswith("embedserve"):  # our own fault, not a missing extra
            raise
        raise EmbedServeError(
            f"Pulling needs '{error.name}'; install it with `pip install 'embedserve[hub]'`.",
            code="missing_extra",
        ) from None

    wishes = Wishes(
        variant=variant,
        name=name,
        activation=activation,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
    )
    watched = not json and sys.stderr.isatty()
    pulled = write(sources, out, wishes, Hub(progress=watched), say=note if watched else lambda step: None)
    bundle = pulled.bundle
    for warning in pulled.warnings:
        note(warning)
    described = bundle.description
    towers = [which for which in ("image", "text") if getattr(described, which)]
    if json:
        print_json(
            {
                "name": bundle.name,
                "folder": str(bundle.folder),
                "dim": bundle.dim,
                "towers": towers,
                "fingerprint": bundle.fingerprint,
                "parity": dict(described.parity),
                "warnings": list(pulled.warnings),
            }
        )
        return OK
    print(f"{bundle.name}: {' and '.join(towers)}, {bundle.dim} numbers, written to '{bundle.folder}'")
    for which in towers:
        one = described.parity[which]
        print(f"{which:6}least cosine {one['min_cosine']:.6f} to their own graph on {one['n']} inputs")
    return OK
