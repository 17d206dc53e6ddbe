"""Checkpoints that the authors of self-supervised methods published: to export, and to start training from.

releases.py   methods: licence, preprocessing, layout of the file
table.py      their checkpoints by name, such as "moco_v2/resnet50-800ep"
layouts.py    how each names its tensors
locating.py   a local copy, torch.hub's cache, or a download
reading.py    file → weights
listing.py    the table for people; docs/published.md is written from it
"""

from training.published.listing import document, rows
from training.published.locating import locate
from training.published.reading import for_training, from_foreign, read
from training.published.table import TABLE, Checkpoint, find

__all__ = [
    "TABLE",
    "Checkpoint",
    "document",
    "find",
    "for_training",
    "from_foreign",
    "locate",
    "read",
    "rows",
]
