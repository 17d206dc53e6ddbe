"""Everything random follows from (seed, step, …) alone, so that a resumed run needs no generator's state."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["generator", "mix", "seed_everything"]


def mix(*numbers: int) -> int:
    """One number of 63 bits from several, such that neighbours give unrelated ones (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator for `mix(*numbers)`."""
    return torch.Generator().manual_seed(mix(*numbers))


def seed_everything(*numbers: int) -> None:
    """Seeds the global generators of torch (every device), NumPy and Python."""
    seed = mix(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
