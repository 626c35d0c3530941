"""Mechanisms that stand outside the blocks: one term, added once, that the whole model then works on.

    bias            frame numbers -> one vector per latent frame, added to its tokens
    plucker_light   ray numbers   -> one vector per token, added to it
    latent_bias     frame numbers -> one number per latent channel and frame, added to the noised latents

Each is one MLP whose last linear starts at zero (see networks/mechanisms/features.py). The term has to survive the
layer norms of the blocks, which it does: it is added to the stream that they all read, before anything has grown large.

Shapes: B clips, F latent frames, h w token rows and columns, C latent channels, D model width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from networks.mechanisms.features import (
    FRAME_NUMBERS,
    CameraEncoder,
    FeatureMLP,
    frame_numbers,
    num_ray_numbers,
    ray_numbers,
)
from networks.mechanisms.settings import CameraSettings
from wan_ext.condition import CameraCondition
from wan_ext.configs import WanVariant


class BiasEncoder(CameraEncoder):
    """One vector for all tokens of a latent frame."""

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__(variant)
        assert settings.hidden is not None
        self.mlp = FeatureMLP(FRAME_NUMBERS, settings.hidden, variant.dit.dim, zero_start=True, generator=generator)

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        return CameraCondition(tokens=self.mlp(frame_numbers(c2w, K, width)))  # [B, F, 1, 1, D]


class LightPluckerEncoder(CameraEncoder):
    """One vector per token, from the rays through it."""

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__(variant)
        assert settings.hidden is not None
        numbers, dim = num_ray_numbers(self.patch_size), variant.dit.dim
        self.mlp = FeatureMLP(numbers, settings.hidden, dim, zero_start=True, generator=generator)

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        numbers = ray_numbers(c2w, K, height, width, stride=self.stride, patch_size=self.patch_size)
        return CameraCondition(tokens=self.mlp(numbers))  # [B, F, h, w, D]


class LatentBiasEncoder(CameraEncoder):
    """One number per channel for all latents of a latent frame."""

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__(variant)
        assert settings.hidden is not None
        channels = variant.vae.z_dim
        self.mlp = FeatureMLP(FRAME_NUMBERS, settings.hidden, channels, zero_start=True, generator=generator)

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        vectors = self.mlp(frame_numbers(c2w, K, width))  # [B, F, 1, 1, C]
        return CameraCondition(latents=rearrange(vectors, "b f h w c -> b c f h w"))
