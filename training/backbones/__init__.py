"""Encoders to be trained: images in, one feature vector and a map of patch features out.

    base.py                the contract every encoder keeps
    convolutional.py       torchvision's ResNets with a stem that suits the image's size; timm's others
    widened.py             ResNets of other widths, and as SimCLR's and BYOL's authors built theirs
    vision_transformer.py  timm's vision transformers: class token, mask token, attention, fixed positions
    starting.py            weights to start from: a run, a file, the starter, a library's, a published one
    files.py, pickles.py   tensors out of a file, without running code from it
    loading.py             those weights into an encoder, strictly
    building.py            name and image size → encoder

torchvision and timm are imported when a network of theirs is built, not before.
"""

from training.backbones.base import Backbone
from training.backbones.building import build, default_backbone, describe, kind_of, known
from training.backbones.convolutional import Stem, stem_for

__all__ = ["Backbone", "Stem", "build", "default_backbone", "describe", "kind_of", "known", "stem_for"]
