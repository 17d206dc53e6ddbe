"""Text towers to be trained: token ids in, one vector for each text out, with the tokenizer they belong to.

rules.py          a tokenizer, and how its ids are cut and padded
base.py           the contract every text tower keeps
open_clip.py      those of open_clip's models, and CLIP's transformer in sizes of one's own
hugging_face.py   encoders of transformers from a folder
sentences.py      the starter's: all-MiniLM-L6-v2
building.py       name → text tower
"""

from training.text.base import TextTower
from training.text.building import build_text, rebuild_text
from training.text.rules import TextRules

__all__ = ["TextRules", "TextTower", "build_text", "rebuild_text"]
