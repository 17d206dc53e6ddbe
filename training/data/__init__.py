"""Data sets: listed once, decoded once, handed out in batches.

source (a folder, a table, tars, arrays) → pixels (squares of uint8 and their aspect) → batches on the device
"""

from training.data.listing import Skipped
from training.data.order import EpochOrder, Partners
from training.data.pixels import Pixels, Residence, native_size, open_pixels
from training.data.source import Source, open_source
from training.data.split import split

__all__ = [
    "EpochOrder",
    "Partners",
    "Pixels",
    "Residence",
    "Skipped",
    "Source",
    "native_size",
    "open_pixels",
    "open_source",
    "split",
]
