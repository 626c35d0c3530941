"""What conditions the DiT besides text: a camera, a known first frame.

Shapes: B clips, F H W latent frames, height and width, C latent channels, h w token rows and columns, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

TEMPORAL_STRIDE = 4
"""Video frames of one latent frame: latent frame 0 is frame 0, latent frame k holds frames 4k-3 .. 4k."""


@dataclass(frozen=True)
class CameraCondition:
    """A camera as the DiT sees it: one vector per token, added right after the patch embedding."""

    tokens: Tensor
    """[B, F, h, w, D], or [B, F, 1, 1, D] when every token of a frame gets the same vector"""


def first_frame_mask(num_latent_frames: int, height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Which video frames are known when the first is, folded onto latent frames: 1 = known.

    The first video frame stands four times, so that T = 4 (F - 1) + 1 frames fill 4 F places; place 4 k + c is
    channel c of latent frame k. Hence all four channels of latent frame 0 are 1 and all others 0.

    Args:
        num_latent_frames: F.
        height, width: H and W of the latents.

    Returns:
        float32. [4, F, H, W]

    Source: Wan-Video/Wan2.2 `wan/image2video.py`.
    """
    known = torch.zeros(TEMPORAL_STRIDE * (num_latent_frames - 1) + 1, device=device)  # [T]
    known[0] = 1
    known = torch.cat((known[:1].expand(TEMPORAL_STRIDE - 1), known))  # [4 F]
    return repeat(known, "(f c) -> c f h w", c=TEMPORAL_STRIDE, h=height, w=width).contiguous()


def first_frame_condition(latents: Tensor) -> Tensor:
    """The condition channels of the I2V models: the mask, then the latents of what is known.

    Args:
        latents: the VAE's normalised latents of a video that is the first frame followed by zeros (mid-grey), as
            long as the clip. [16, F, H, W]

    Returns:
        [20, F, H, W]
    """
    mask = first_frame_mask(*latents.shape[1:], device=latents.device)
    return torch.cat((mask.to(latents), latents))


def first_frame_video(frame: Tensor, num_frames: int) -> Tensor:
    """The video whose latents `first_frame_condition` takes: the frame, then zeros.

    Args:
        frame: in [-1, 1]. [3, 8H, 8W]
        num_frames: T.

    Returns:
        [3, T, 8H, 8W]
    """
    rest = frame.new_zeros(frame.shape[0], num_frames - 1, *frame.shape[1:])
    return torch.cat((frame[:, None], rest), dim=1)


def first_frame_timestep(timestep: Tensor, num_latent_frames: int) -> Tensor:
    """TI2V: the known first latent frame is clean, at timestep 0; the others share the clip's timestep. [B] -> [B, F]

    Source: Wan-Video/Wan2.2 `wan/textimage2video.py`, where the same two values are spread over all tokens.
    """
    per_frame = repeat(timestep, "b -> b f", f=num_latent_frames).clone()
    per_frame[:, 0] = 0
    return per_frame


def with_first_frame(noised: Tensor, first_latents: Tensor) -> Tensor:
    """TI2V: put the clean latents of the first frame in place. To repeat after every solver step.

    Args:
        noised: [B, C, F, H, W]
        first_latents: [B, C, 1, H, W] or [C, 1, H, W]

    Returns:
        a new tensor. [B, C, F, H, W]
    """
    first_latents = first_latents.to(noised).expand_as(noised[:, :, :1])
    return torch.cat((first_latents, noised[:, :, 1:]), dim=2)


def add_camera(tokens: Tensor, camera: CameraCondition, grid: tuple[int, int, int]) -> Tensor:
    """Add a camera's vectors to the tokens of the grid F, h, w. tokens [B, L, D] -> [B, L, D]"""
    f, h, w = grid
    tokens = rearrange(tokens, "b (f h w) d -> b f h w d", f=f, h=h, w=w)
    return rearrange(tokens + camera.tokens.to(tokens.dtype), "b f h w d -> b (f h w) d")
