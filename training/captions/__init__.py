"""Captions: what is said about images, found beside them, cleaned, and drawn one for each image and step.

wording.py    where captions come from: files beside the images, a column, file names, class names
filters.py    what captions are left out, and how many
drawing.py    captions as token ids; which of an image's captions a step sees
"""

from training.captions.drawing import Captions
from training.captions.filters import FILTERS
from training.captions.wording import CaptionRules, Worded, worded

__all__ = ["FILTERS", "CaptionRules", "Captions", "Worded", "worded"]
