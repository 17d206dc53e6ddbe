"""A run's records as the loop writes them, for what shows them."""

from __future__ import annotations

from typing import Any

__all__ = ["config_record", "metrics"]


def config_record(**changed: Any) -> dict[str, Any]:
    """What config.json holds: a small run of SimCLR."""
    record: dict[str, Any] = {
        "config": {
            "method": "simclr",
            "data": "/data/my flowers",
            "backbone": "resnet18",
            "start": "",
            "size": 32,
            "epochs": 5,
            "batch_size": 64,
            "group_by": "",
            "seed": 7,
            "compile": True,
        },
        "recipe": {"optimizer": "sgd", "lr": 0.12, "weight_decay": 5e-4, "weight_decay_end": None},
        "augmentation": {"crop_min": 0.2, "flip": 0.5},
        "options": {"temperature": 0.5},
        "facts": {"images": 5400, "size": 32, "epochs": 5, "batch_size": 64, "steps_per_epoch": 20},
        "origin": {
            **dict.fromkeys(("method", "data", "seed", "compile", "lr"), "set"),
            **dict.fromkeys(("size", "batch_size", "temperature"), "suited"),
            "flip": "default",
        },
        "encoder": {
            "name": "resnet18",
            "parameters": 11_168_832,
            "dim": 512,
            "notes": ["A small-image stem."],
        },
        "data": {
            "images": 5400,
            "heldout": 600,
            "classes": ["rose", "tulip | <b>"],
            "native_size": 30,
            "skipped": [{"key": f"broken {at}.jpg", "reason": "the file is cut short"} for at in range(12)],
            "fingerprint": "abc123",
        },
        "world_size": 1,
        "torch": "2.13.0",
    }
    return {**record, **changed}


def metrics(steps: int = 100, *, labels: bool = True) -> list[dict[str, Any]]:
    """Log lines of every fifth step, and a measurement every epoch of 20; k-NN is best after step 80."""
    found: list[dict[str, Any]] = []
    for step in range(5, steps + 1, 5):
        at = {"step": step, "epoch": step / 20}
        found.append({**at, "loss": 5 - step / 50, "lr": 0.03 * step / 100, "images_per_second": 160.0})
        if step % 20 == 0:
            found.append({**at, "feature_std": 0.5, "feature_rank": 30 + step / 10})
            if labels:
                found[-1]["knn"] = 0.9 - abs(step - 80) / 200
    return found
