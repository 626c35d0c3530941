"""Mechanism `film`: the camera scales and shifts the modulated input of self-attention in every chosen block.

    frame numbers -> MLP -> R features of a latent frame          once, shared by the blocks
    R features -> linear, zero at start -> scale, shift           per block;  x = x + x * scale + shift

It is the way in which Wan hears its timestep, per latent frame and for the camera. `camera_rank` is R: it keeps the
40 linears of a 14B model at 26 million parameters, where the full width would take 2 billion.

Source: FiLM (Perez et al. 2018, arXiv 1709.07871); per block of a video model: lingbot-world.
Shapes: B clips, F latent frames, L tokens, D model width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from networks.mechanisms.features import FRAME_NUMBERS, CameraEncoder, FeatureMLP, frame_numbers, zero_linear
from networks.mechanisms.settings import CameraSettings
from wan_ext.condition import CameraBranch, CameraCondition
from wan_ext.configs import WanVariant


class FrameFeaturesEncoder(CameraEncoder):
    """R features of each latent frame, for mechanisms whose blocks have their own zero start."""

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__(variant)
        assert settings.hidden is not None
        width = feature_width(settings)
        self.mlp = FeatureMLP(FRAME_NUMBERS, settings.hidden, width, zero_start=False, generator=generator)

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        return CameraCondition(features=self.mlp(frame_numbers(c2w, K, width)))  # [B, F, 1, 1, R]


class FilmBranch(CameraBranch):
    """Scale and shift of one block."""

    tokenwise = True

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__()
        self.scale_shift = zero_linear(feature_width(settings), 2 * variant.dit.dim)

    def before(self, x: Tensor, features: Tensor) -> Tensor:
        frame = rearrange(features, "b f 1 1 r -> b f 1 r")
        scale, shift = self.scale_shift(frame).to(x.dtype).chunk(2, -1)  # [B, F, 1, D]
        return x.unflatten(1, (scale.shape[1], -1)) * scale + shift  # [B, F, h w, D]


FULL_RANK_FEATURES = 64
"""Features of a frame where camera_rank=full says nothing about them."""


def feature_width(settings: CameraSettings) -> int:
    """How many features of a frame the blocks read."""
    assert settings.rank is not None
    return FULL_RANK_FEATURES if settings.rank == "full" else settings.rank
