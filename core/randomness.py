"""Random numbers as a function of what they are for, never of what was drawn before.

A resumed run then draws what an uninterrupted one draws, and adding one consumer of randomness changes no other.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose: `seed_of(seed, "noise", step, rank)`. Any change of any part changes all of it."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *purpose: int | str) -> torch.Generator:
    """A fresh CPU generator for one purpose. Draws happen on the CPU so that they do not depend on the device."""
    import torch

    return torch.Generator().manual_seed(seed_of(seed, *purpose))
