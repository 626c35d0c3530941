"""Injection `plucker`: the camera adapter of the Wan-Fun models.

On any other Wan model it is new and zero at start. A Wan-Fun model has one already, which is frozen unless
--train_control_adapter is given; it hears the rays whatever the injection is.

    rays of every pixel of every video frame -> convolutions (wan_ext/control_adapter.py) -> one vector per token

The rays are those that the Wan-Fun models know: moment o x d and unit direction d through the pixel centres, frame 0
four times, then groups of four frames folded into channels. Hence its weights, saved under their `control_adapter.*`
names, are of use to other tools. They were taught with poses relative to the first frame and unscaled translations
(pose frame "first", scale rule "none"); what is trained here may use others, and its file says which.

It is large (503 million parameters per expert for D = 5120, see wan_ext/control_adapter.py); `plucker_light` hears the
same rays on a coarser grid through a few million.

Shapes: B clips, T video frames, F latent frames, H W pixels, h w token rows and columns, D model width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from camera.rays import plucker_rays
from networks.mechanisms.features import CameraEncoder
from networks.mechanisms.settings import CameraSettings
from wan_ext.condition import TEMPORAL_STRIDE, CameraCondition
from wan_ext.configs import WanVariant
from wan_ext.control_adapter import FRAMES_AT_ONCE, ControlAdapter, zero_start

WAN_FUN_CONVENTIONS = {"injection": "plucker", "pose_frame": "first", "scale_rule": "none"}
"""What the published Wan-Fun models were taught, in the words of a network's metadata."""


class PluckerAdapter(CameraEncoder):
    """A new control adapter as a camera encoder: poses and intrinsics to one vector per token.

    Rays of a few latent frames at a time are made, used and forgotten, and made again in backward: at 81 frames of
    480 x 832 all of them would be 0.8 GB.

    Args:
        variant: the model: its width, and how many pixels a token covers.
        settings: not looked at: the adapter has no choices.
        generator: CPU generator that draws the weights; None: the global one.
    """

    prefix = ""  # the names begin with control_adapter. as they are

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__(variant)
        with torch.device("meta"):
            self.control_adapter = ControlAdapter(variant.dit.dim, variant.vae.stride[1])
        self.control_adapter.to_empty(device=torch.get_default_device())
        zero_start(self.control_adapter, generator)

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        """One vector per token, float32 [B, F, h, w, D]."""
        groups = FRAMES_AT_ONCE * TEMPORAL_STRIDE
        poses = repeat_first(c2w).split(groups, 1)  # [B, 4 f, 4, 4], f latent frames each
        intrinsics = repeat_first(K).split(groups, 1)
        parts = zip(poses, intrinsics, strict=True)
        return CameraCondition(tokens=torch.cat([self.some_frames(*part, height, width) for part in parts], 1))

    def some_frames(self, c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
        """The term of a few latent frames, from four poses each. -> [B, f, h, w, D]"""

        def from_poses(c2w: Tensor, K: Tensor) -> Tensor:
            return self.control_adapter.convolve(rays_of_groups(c2w, K, height, width))

        if torch.is_grad_enabled():
            return checkpoint(from_poses, c2w, K, use_reentrant=False)
        return from_poses(c2w, K)


class RaysEncoder(CameraEncoder):
    """What a Wan-Fun model is told of the camera, for its own adapter to make vectors of; it has no weights."""

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        """The rays of every pixel, float32 [B, 24, F, H, W]."""
        return CameraCondition(rays=control_rays(c2w, K, height, width))


def control_rays(c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
    """What a Wan-Fun model is told of the camera: the rays of every pixel, folded onto latent frames.

    Args:
        c2w: camera-to-world poses of every video frame, [B, T, 4, 4], T = 4 (F - 1) + 1.
        K: intrinsics in pixels of the frame, [B, T, 3, 3].
        height: H, pixels.
        width: W, pixels.

    Returns:
        float32 [B, 24, F, H, W]; 0.8 GB for a clip of 81 frames of 480 x 832.
    """
    return rays_of_groups(repeat_first(c2w), repeat_first(K), height, width)


def rays_of_groups(c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
    """Rays of poses that stand in groups of four. [B, 4 F, 4, 4], [B, 4 F, 3, 3] -> float32 [B, 24, F, H, W]"""
    with torch.autocast(c2w.device.type, enabled=False):
        rays = plucker_rays(c2w, K, height, width).float()  # [B, 4 F, 6, H, W]
    return rearrange(rays, "b (f i) c h w -> b (c i) f h w", i=TEMPORAL_STRIDE)


def repeat_first(frames: Tensor) -> Tensor:
    """The first of T = 4 (F - 1) + 1 frames four times, then the rest: groups of four. [B, T, ...] -> [B, 4 F, ...]"""
    return torch.cat([frames[:, :1].expand(-1, TEMPORAL_STRIDE - 1, *frames.shape[2:]), frames], 1)
