"""Tests of training run on one thread: tiny networks lose more to waking threads than they gain from them."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
