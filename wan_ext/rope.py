"""Rotary positions in three dimensions: which angle each channel pair of a head turns by, at each token of the grid.

A head of d channels is split into (frame, row, column) = (d - 4 (d // 6), 2 (d // 6), 2 (d // 6)) channels. Channels
2i and 2i + 1 of a part form a pair, which turns by position * 10000^(-2i / width of the part). Positions are integer
indices of tokens. Angles are float64 and the table float32: with cosines in bf16 every attention is off by 1e-3.

Shapes: B clips, F H W token grid, L = F * H * W tokens, N heads, d channels of a head.
Source: Su et al. 2021, arXiv:2104.09864; Wan-Video/Wan2.2 `wan/modules/model.py` (`rope_params`, `rope_apply`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def pairs_per_axis(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs of a head that turn with the frame, the row and the column."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


@lru_cache(maxsize=16)
def rope_table(frames: int, height: int, width: int, *, head_dim: int, device: torch.device) -> Tensor:
    """Cosine and sine of every angle, made once per grid and device.

    Args:
        frames, height, width: the token grid.
        head_dim: channels of a head, even.
        device: where the table lives.

    Returns:
        float32, cosines then sines, to broadcast over heads. [2, L, 1, d/2]
    """
    if head_dim % 2:
        raise ValueError(f"head_dim: rotary positions need an even number of channels a head, found {head_dim}")
    grid = (frames, height, width)
    # A table first made while sampling in inference mode must still serve a later training step.
    with torch.inference_mode(False), torch.no_grad():
        angles = []
        for axis, (size, pairs) in enumerate(zip(grid, pairs_per_axis(head_dim), strict=True)):
            frequency = THETA ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / max(pairs, 1))
            angle = torch.arange(size, dtype=torch.float64, device="cpu")[:, None] * frequency
            shape = [1, 1, 1, pairs]
            shape[axis] = size
            angles.append(angle.view(shape).expand(*grid, pairs))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)[:, None]  # [L, 1, d/2]
        return torch.stack((angle.cos(), angle.sin())).to(device, torch.float32)  # [2, L, 1, d/2]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each channel pair of each head by its angle.

    Args:
        x: queries or keys. [B, L, N, d]
        table: from `rope_table`. [2, L, 1, d/2]

    Returns:
        float32, as the table is. [B, L, N, d]
    """
    cos, sin = table
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, L, N, d/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
