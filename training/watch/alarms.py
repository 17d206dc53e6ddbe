"""What an alarm says: what is wrong, how it shows, and what to change, for the method at hand."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODES", "Alarm", "advice"]

CODES = ("collapsed", "dimensional_collapse", "stuck_at_ln_k", "same_images")


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that will not get better by waiting."""

    code: str
    """One of `CODES`."""
    message: str
    """What is wrong, how it shows, and what to change."""
    epoch: float
    """When it was raised."""
    until: float | None = None
    """When it was over; None while it lasts."""


LOWER_LR = "a third of the learning rate (`lr`)"
CONTRASTIVE = (
    f"Negatives should prevent this. Try {LOWER_LR}, a longer `warmup_epochs`, or a larger `batch_size`; a "
    "`temperature` below 0.05 or above 1 can be the cause"
)
QUEUED = f"{CONTRASTIVE}, and so can a `queue_length` of more than half the images"
TEACHER = (
    "The teacher gives every image the same target. Try a sharper one (a smaller `teacher_temperature`, such "
    f"as 0.04), a teacher that moves less (`momentum_start` closer to 1), and {LOWER_LR}"
)
SHARPER = (
    "Try a sharper target (a smaller `teacher_temperature`, such as 0.04), fewer prototypes (`output_dim`; a "
    f"sixteenth of the number of images), more `freeze_epochs`, or {LOWER_LR}"
)
CAPTIONED = (
    "Other images' captions should prevent this. See whether captions differ from each other (`captions`, "
    f"`filter`); then try {LOWER_LR} and a longer `warmup_epochs`"
)
FALLBACK = f"Try {LOWER_LR} and a longer `warmup_epochs`"

COLLAPSED = {
    "barlow_twins": f"Try {LOWER_LR} and a larger `batch_size`, of which the correlations are taken; a "
    "smaller `projection_dim` makes them less noisy",
    "byol": f"The target runs ahead of the predictor. Try {LOWER_LR}, a target that moves less "
    "(`momentum_start` closer to 1, such as 0.996), or a larger `batch_size`",
    "clip": f"{CAPTIONED}, or a larger `batch_size`",
    "densecl": f"{QUEUED}. A smaller `dense_weight` leaves more to whole images",
    "dino": f"{TEACHER}. A `center_momentum` of 0.99 steadies its centre",
    "dinov2": f"{TEACHER}. A larger `koleo` pushes features apart",
    "lit": f"{CAPTIONED}. A locked image tower keeps its features as they were: start from better ones "
    "(`start`), or let its last blocks learn (`image_learns`)",
    "moco_v1": QUEUED,
    "moco_v2": QUEUED,
    "moco_v3": f"{CONTRASTIVE}. With a vision transformer it is usually `lr`",
    "nnclr": QUEUED,
    "simclr": CONTRASTIVE,
    "simclr_v2": CONTRASTIVE,
    "siglip": CAPTIONED,
    "simsiam": f"The predictor does not keep up. Try {LOWER_LR}, to which this method is sensitive, and a "
    "larger `batch_size`; byol is more robust",
    "swav": "All images went to the same few prototypes. Try a smaller `epsilon`, such as 0.03, more "
    "`freeze_epochs`, or fewer `prototypes`",
    "vicreg": f"Its variance term should prevent this. Try twice the `variance`, or {LOWER_LR}",
}
REDUNDANT = {
    "barlow_twins": "Features repeat each other. Try twice the `redundancy` and a larger `projection_dim`",
    "vicreg": "Features repeat each other. Try twice the `covariance` and a larger `projection_dim`",
    "simclr": "Try a lower `temperature` and stronger views (a smaller `crop_min`)",
    "simclr_v2": "Try a lower `temperature` and stronger views (a smaller `crop_min`)",
}
STUCK = {
    "dino": f"{SHARPER}. A `center_momentum` of 0.99 steadies the centre",
    "dinov2": SHARPER,
    "swav": "Try sharper assignments (a smaller `epsilon`, such as 0.03), fewer `prototypes` (a hundredth of "
    "the number of images), more `freeze_epochs`, or a later queue (`queue_epochs`)",
}


def advice(code: str, method: str) -> str:
    """What to change, as whole sentences. The settings that it names in backticks are the method's.

    Args:
        code: One of `CODES`.
        method: A key of `training.methods.METHODS`; for others the advice is general.
    """
    general = COLLAPSED.get(method, FALLBACK)
    if code == "same_images":
        return (
            "Look at views.png: where it shows blank or equal images, their files are not what they should "
            f"be. Where it does not, training failed at once. {general}."
        )
    particular = {"dimensional_collapse": REDUNDANT, "stuck_at_ln_k": STUCK}.get(code, COLLAPSED)
    return f"{particular.get(method, general)}."
