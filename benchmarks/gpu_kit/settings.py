"""What is measured: the model, the clips, the sizes of cards; and the same as a toy for a machine without a GPU.

How: `REAL` is one task of the catalogue (t2v-A14B, both experts, rank 32). `TOY` has its structure and none of its
size; every section runs through with it on the CPU in seconds, and nothing that it gives is a figure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from wan_ext.configs import WanVariant, get_variant
from wan_ext.workload import tokens_of

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames and pixels of a training clip."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run of the kit measures."""

    real: bool
    """Whether figures may be taken from it."""
    variant: WanVariant
    image: Clip
    short: Clip
    long: Clip
    large: Clip
    rank: int
    width: int
    """Of the matrices that the checks multiply, and of the rows of the element-wise kernels."""
    hidden: int
    heads: int
    rows: int
    """Rows of these matrices; odd."""
    few_blocks: int
    """Of the model in which streamed and resident are compared."""
    steps: int
    """Optimizer steps of that comparison."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.real else torch.device("cpu")

    def tokens(self, clip: Clip) -> int:
        return tokens_of(self.variant, frames=clip.frames, height=clip.height, width=clip.width)


_A14B = get_variant("t2v-A14B")

REAL = Setting(
    real=True,
    variant=_A14B,
    image=Clip(frames=1, height=512, width=512),
    short=Clip(frames=17, height=480, width=832),
    long=Clip(frames=81, height=480, width=832),
    large=Clip(frames=81, height=720, width=1280),
    rank=32,
    width=_A14B.dit.dim,
    hidden=_A14B.dit.ffn_dim,
    heads=_A14B.dit.num_heads,
    rows=1561,
    few_blocks=4,
    steps=6,
)
TOY = Setting(
    real=False,
    variant=replace(
        _A14B,
        dit=replace(_A14B.dit, dim=64, ffn_dim=128, num_heads=2, num_layers=6, text_dim=32, text_len=8),
    ),
    image=Clip(frames=1, height=32, width=32),
    short=Clip(frames=5, height=32, width=32),
    long=Clip(frames=5, height=32, width=64),
    large=Clip(frames=9, height=32, width=64),
    rank=4,
    width=64,
    hidden=192,
    heads=2,
    rows=37,
    few_blocks=2,
    steps=3,
)
