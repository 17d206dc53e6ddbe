"""In which precision a bundle computes, chosen by measurement.

forms.py      how a graph is written in float16 or int8
judging.py    what that does to vectors and to speed, on the calibration set
choosing.py   the rule, and the search for layers that have to stay in float
"""

from training.export.precision.choosing import LEAST_COSINE, LEAST_OVERLAP, Chosen, Wanted, choose, suffices
from training.export.precision.judging import Inputs, Judged

__all__ = [
    "LEAST_COSINE",
    "LEAST_OVERLAP",
    "Chosen",
    "Inputs",
    "Judged",
    "Wanted",
    "choose",
    "suffices",
]
