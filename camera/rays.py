"""Rays of a pinhole camera: Plücker coordinates of every pixel, and video frames folded onto latent frames."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def pixel_directions(c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
    """Unit directions, in world coordinates, of the rays through the pixel centres.

    Args:
        c2w: camera-to-world poses, OpenCV axes, [..., 4, 4].
        K: intrinsics in pixels of a frame of height x width, [..., 3, 3].
        height: H.
        width: W.

    Returns:
        [..., 3, H, W], in the dtype and on the device of c2w.
    """
    c2w, K = c2w.unsqueeze(-3), K.to(c2w).unsqueeze(-3)  # [..., 1, 4, 4], [..., 1, 3, 3]
    columns = torch.arange(width, dtype=c2w.dtype, device=c2w.device) + 0.5  # [W]
    rows = torch.arange(height, dtype=c2w.dtype, device=c2w.device) + 0.5  # [H]
    x = (columns - K[..., 0, 2, None]) / K[..., 0, 0, None]  # [..., 1, W]
    y = (rows - K[..., 1, 2, None]) / K[..., 1, 1, None]  # [..., 1, H]
    x, y = torch.broadcast_tensors(x, y.mT)  # [..., H, W]
    in_camera = torch.stack([x, y, torch.ones_like(x)], -3)  # [..., 3, H, W]
    directions = torch.einsum("...ij,...jhw->...ihw", c2w[..., 0, :3, :3], in_camera)
    return directions / directions.norm(dim=-3, keepdim=True)


def plucker_rays(c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
    """Plücker coordinates (o x d, d) of the rays through the pixel centres; the same line has the same six numbers.

    Args:
        c2w: camera-to-world poses, OpenCV axes, [..., 4, 4].
        K: intrinsics in pixels of a frame of height x width, [..., 3, 3].
        height: H.
        width: W.

    Returns:
        Moment o x d, then unit direction d, [..., 6, H, W], in the dtype and on the device of c2w.

    Source:
        CameraCtrl (arXiv 2404.02101); the channel order is that of the Wan-Fun camera control models.
    """
    directions = pixel_directions(c2w, K, height, width)  # [..., 3, H, W]
    origins = c2w[..., :3, 3, None, None].expand_as(directions)  # [..., 3, H, W]
    return torch.cat([torch.linalg.cross(origins, directions, dim=-3), directions], -3)


def fold_frames(frames: Tensor) -> Tensor:
    """Put the video frames that a latent frame holds into its channels: frame 0 four times, then groups of four.

    Args:
        frames: one value per video frame, [B, C, T, H, W] with T = 4 (F - 1) + 1.

    Returns:
        [B, 4 C, F, H, W]; channel c * 4 + i holds channel c of the group's frame i.
    """
    if frames.shape[2] % 4 != 1:
        raise ValueError(f"expected 4n + 1 frames, found {frames.shape[2]}")
    padded = torch.cat([frames[:, :, :1].expand(-1, -1, 3, -1, -1), frames], 2)  # [B, C, 4 F, H, W]
    return rearrange(padded, "b c (f i) h w -> b (c i) f h w", i=4)


def unfold_frames(folded: Tensor) -> Tensor:
    """The inverse of fold_frames: [B, 4 C, F, H, W] -> [B, C, T, H, W]."""
    return rearrange(folded, "b (c i) f h w -> b c (f i) h w", i=4)[:, :, 3:]


def scale_intrinsics(K: Tensor, *, from_size: tuple[float, float], to_size: tuple[float, float]) -> Tensor:
    """Intrinsics after a resize of the frame, or for rays on a smaller grid that covers the same frame.

    Args:
        K: intrinsics in pixels of a frame of from_size, [..., 3, 3].
        from_size: (height, width).
        to_size: (height, width).

    Returns:
        Intrinsics in pixels of a frame of to_size, [..., 3, 3]. With pixel centres at +0.5 a resize is a plain scaling.
    """
    scaled = K.clone()
    scaled[..., 0, :] *= to_size[1] / from_size[1]
    scaled[..., 1, :] *= to_size[0] / from_size[0]
    return scaled
