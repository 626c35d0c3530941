"""The camera mechanisms by name: what `--network_args injection=NAME` builds.

A mechanism is an encoder, which turns poses and intrinsics into a `CameraCondition` once per forward, and for some a
branch in each chosen block, which stands at its self-attention or cross-attention and reads the encoder's features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from networks.mechanisms.adapter import PluckerAdapter
from networks.mechanisms.cross_attention import CameraTokensEncoder, CrossAttentionBranch
from networks.mechanisms.features import CameraEncoder
from networks.mechanisms.film import FilmBranch, FrameFeaturesEncoder
from networks.mechanisms.ray_attention import RayAttentionBranch, RayFramesEncoder
from networks.mechanisms.self_attention import SelfAttentionBranch
from networks.mechanisms.settings import CameraSettings, Defaults
from networks.mechanisms.tokens import BiasEncoder, LatentBiasEncoder, LightPluckerEncoder
from wan_ext.condition import CameraBranch
from wan_ext.configs import WanVariant

Build = Callable[[WanVariant, CameraSettings, torch.Generator | None], CameraEncoder]
BuildBranch = Callable[[WanVariant, CameraSettings, torch.Generator | None], CameraBranch]


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One way for the camera to enter."""

    encoder: Build
    branch: BuildBranch | None = None
    """Of one block; None: the mechanism stands outside the blocks."""
    seam: Literal["self_attn", "cross_attn"] = "self_attn"
    """Where in the block the branch stands."""
    defaults: Defaults


INJECTIONS: dict[str, Mechanism] = {
    "plucker": Mechanism(encoder=PluckerAdapter, defaults=Defaults()),
    "plucker_light": Mechanism(encoder=LightPluckerEncoder, defaults=Defaults(hidden=512)),
    "bias": Mechanism(encoder=BiasEncoder, defaults=Defaults(hidden=512)),
    "latent_bias": Mechanism(encoder=LatentBiasEncoder, defaults=Defaults(hidden=512)),
    "film": Mechanism(
        encoder=FrameFeaturesEncoder,
        branch=FilmBranch,
        defaults=Defaults(hidden=512, rank=64, in_blocks=True),
    ),
    "cross_attention": Mechanism(
        encoder=CameraTokensEncoder,
        branch=CrossAttentionBranch,
        seam="cross_attn",
        defaults=Defaults(hidden=512, rank=64, in_blocks=True),
    ),
    "self_attention": Mechanism(
        encoder=FrameFeaturesEncoder,
        branch=SelfAttentionBranch,
        defaults=Defaults(hidden=512, rank=64, in_blocks=True, full_rank=True),
    ),
    "ray_attention": Mechanism(
        encoder=RayFramesEncoder,
        branch=RayAttentionBranch,
        defaults=Defaults(hidden=512, rank=96, in_blocks=True, absolute=True),
    ),
}
"""Mechanisms by the name that `--network_args injection=` gives them."""
DEFAULT_INJECTIONS = {"scene": "plucker_light", "first": "ray_attention"}
"""The mechanism whose videos follow best, by pose frame (docs/mechanisms_measured.md)."""


def default_injection(variant: WanVariant, pose_frame: str) -> str:
    """What stands for a missing `injection=`: a Wan-Fun model's own adapter, or the default of the pose frame."""
    return "plucker" if variant.hears_camera else DEFAULT_INJECTIONS[pose_frame]


def build_camera(
    settings: CameraSettings, variant: WanVariant, *, generator: torch.Generator | None, device: torch.device | str
) -> tuple[CameraEncoder | None, dict[int, CameraBranch]]:
    """A new encoder, and the branches by the number of their block; None where a Wan-Fun model needs no encoder.

    Args:
        settings: the mechanism and its choices.
        variant: the model that it is for.
        generator: CPU generator that draws the weights; None: the global one.
        device: where the weights live.
    """
    if settings.injection == "plucker" and variant.hears_camera:
        return None, {}  # the model has this mechanism of its own
    mechanism = INJECTIONS[settings.injection]
    encoder = mechanism.encoder(variant, settings, generator).to(device)
    build = mechanism.branch
    if build is None:
        return encoder, {}
    return encoder, {block: build(variant, settings, generator).to(device) for block in settings.block_numbers}
