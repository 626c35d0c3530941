"""What conditions the DiT besides text: a camera, a known first frame.

A camera has three places to enter, from the outside in: the noised latents, the tokens after the patch embedding, and
the attentions of the blocks, where `CameraBranch`es stand.

Shapes: B clips, F H W latent frames, height and width, C latent channels, h w token rows and columns, L = F * h * w
tokens, D model width, N heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from wan_ext.configs import WanVariant

TEMPORAL_STRIDE = 4
"""Video frames of one latent frame: latent frame 0 is frame 0, latent frame k holds frames 4k-3 .. 4k."""


@dataclass(frozen=True, kw_only=True)
class CameraCondition:
    """A camera as the DiT hears it; what is None is not used."""

    latents: Tensor | None = None
    """Added to the noised latents, not to the channels of a known first frame. [B, C, F, 1, 1]"""
    tokens: Tensor | None = None
    """Added right after the patch embedding. [B, F, h, w, D], or [B, F, 1, 1, D]: one vector for a frame's tokens"""
    rays: Tensor | None = None
    """Rays of every pixel, of which a Wan-Fun model's own adapter makes vectors for the tokens. [B, 24, F, 8 H, 8 W]"""
    features: Tensor | None = None
    """Handed to the camera branches of the blocks, which know what it means. [B, F, h | 1, w | 1, ...]"""
    keep: Tensor | None = None
    """1 where a clip hears its camera and 0 where it is as if there were none; None: all hear it. [B]"""


class CameraBranch(nn.Module):
    """What a camera adds around one attention of a block: it stands there as `attention.camera`.

    Both methods return what is added, in the dtype of `x`, as [B, F, 1 | h w, D] or [B, 1, L, D].
    The base adds nothing.
    """

    tokenwise: ClassVar[bool] = False
    """Whether what a token gets depends on itself and on the features of its own latent frame alone. Such a branch may
    be given some tokens at a time, whole frames or a part of one, with the features of those frames."""

    def before(self, x: Tensor, features: Tensor) -> Tensor | None:
        """For the input of self-attention. Not asked at cross-attention.

        Args:
            x: the modulated input. [B, L, D]
            features: of the CameraCondition.
        """
        return None

    def after(self, out: Tensor, x: Tensor, q: Tensor, features: Tensor) -> Tensor | None:
        """For the output of the attention.

        Args:
            out: the output without this. [B, L, D]
            x: the input, with what `before` added. [B, L, D]
            q: the queries. [B, L, N, d]
            features: of the CameraCondition.
        """
        return None


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
            long as the clip. [C, F, H, W]

    Returns:
        [4 + C, F, H, W]
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


def encode_first_frame(
    encode: Callable[[Tensor], Tensor], frame: Tensor, num_frames: int, variant: WanVariant
) -> Tensor:
    """The condition channels that a model takes of a known first frame, in the layout that it was trained with.

    I2V and most Wan-Fun models take a mask and the latents of the frame followed by mid-grey. The Wan-Fun models of
    Wan2.1 take latents alone, those of the frame as a picture, and zeros after them.

    Args:
        encode: of the VAE: video in [-1, 1] [1, 3, T, 8H, 8W] -> normalised latents [1, C, F, H, W].
        frame: in [-1, 1]. [3, 8H, 8W]
        num_frames: T.
        variant: the model.

    Returns:
        [condition_channels, F, H, W]

    Source: VideoX-Fun, `pipeline_wan_fun_control.py` (start_image) and `pipeline_wan2_2_fun_control.py` (video).
    """
    if variant.dit.condition_channels > variant.vae.z_dim:
        return first_frame_condition(encode(first_frame_video(frame, num_frames)[None])[0])
    picture = encode(frame[None, :, None])[0]  # [C, 1, H, W]
    later = picture.new_zeros(picture.shape[0], (num_frames - 1) // TEMPORAL_STRIDE, *picture.shape[2:])
    return torch.cat((picture, later), dim=1)


def no_first_frame(
    variant: WanVariant, height: int, width: int, num_frames: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """What a Wan-Fun model takes in place of a first frame: nothing is known, all latents and CLIP features are zero.

    Args:
        variant: the model.
        height: of the video, pixels.
        width: of the video, pixels.
        num_frames: T.
        device: where the tensors go.

    Returns:
        condition [1, condition_channels, F, H, W], and CLIP features [1, 257, 1280] for models with an image branch.

    Source: VideoX-Fun, `pipeline_wan_fun_control.py` and `pipeline_wan2_2_fun_control.py` without an image.
    """
    dit, (stride_t, stride_h, stride_w) = variant.dit, variant.vae.stride
    size = ((num_frames - 1) // stride_t + 1, height // stride_h, width // stride_w)
    condition = torch.zeros(1, dit.condition_channels, *size, device=device)
    if dit.image_dim is None:
        return condition, None
    return condition, torch.zeros(1, dit.image_len, dit.image_dim, device=device)


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


def add_camera_latents(noised: Tensor, camera: CameraCondition) -> Tensor:
    """Add a camera's vectors to the noised latents. [B, C, F, H, W] -> [B, C, F, H, W]"""
    if camera.latents is None:
        return noised
    return noised + kept(camera.latents.to(noised.dtype), camera.keep)


def add_camera_tokens(tokens: Tensor, camera: CameraCondition, grid: tuple[int, int, int]) -> Tensor:
    """Add a camera's vectors to the tokens of the grid F, h, w. tokens [B, L, D] -> [B, L, D]"""
    if camera.tokens is None:
        return tokens
    f, h, w = grid
    tokens = rearrange(tokens, "b (f h w) d -> b f h w d", f=f, h=h, w=w)
    return rearrange(tokens + kept(camera.tokens.to(tokens.dtype), camera.keep), "b f h w d -> b (f h w) d")


def add_branch(x: Tensor, added: Tensor | None, keep: Tensor | None) -> Tensor:
    """Add what a camera branch returned. x [B, L, D], added [B, F, 1 | h w, D] or [B, 1, L, D] -> [B, L, D]"""
    if added is None:
        return x
    return (x.unflatten(1, (added.shape[1], -1)) + kept(added, keep)).flatten(1, 2)


def kept(added: Tensor, keep: Tensor | None) -> Tensor:
    """What a camera adds, or exactly zero where it is dropped. [B, ...] -> [B, ...]"""
    return added if keep is None else added * keep.to(added).view(-1, *(1,) * (added.ndim - 1))
