"""The camera adapter of the Wan-Fun models: rays of every pixel to one vector per token, by convolutions.

    rays of four video frames, 24 channels at pixel resolution
        -> fold 8 x 8 pixels (16 x 16 for the Wan2.2 VAE) into channels -> conv 2 x 2, stride 2: one vector per token
        -> x + conv2(relu(conv1(x))), 3 x 3, among the tokens of one latent frame

The result is added to the tokens after the patch embedding. Parameter names are those of the public checkpoints
(`control_adapter.conv`, `control_adapter.residual_blocks.0.conv1`, `.conv2`), so they load and save without a map.

It is large, because its 3 x 3 kernels join all channels with all: 503,331,840 parameters for D = 5120 (per expert), 245
million for the 5B model, 52 million for D = 1536. Frozen in bf16 that is 1 GB per expert of D = 5120. Trained in
float32 it is 2 GB of weights, 2 GB of gradients and 4 GB of AdamW's moments (1 GB in 8 bits). At 81 frames of
480 x 832 a forward is 33 TFLOP, 2 % of the transformer's 1,800.

Activations are kept small instead: latent frames do not see each other here, so they go through a few at a time and are
computed again in backward. Without that, the folded rays of 81 frames of 480 x 832 alone would be 0.8 GB.

Shapes: B clips, F latent frames, H W pixels, h w token rows and columns, D model width.
Source: VideoX-Fun, `models/wan_camera_adapter.py`; the structure and the names, checked against its numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.errors import InputError

RAY_CHANNELS = 24
"""Moment and direction (6 numbers) of the four video frames of a latent frame; channel c * 4 + i: c of frame i"""
FRAMES_AT_ONCE = 4
"""Latent frames that are computed together: 150 MB of rays at 480 x 832."""
PREFIX = "control_adapter."
"""What the names of its parameters begin with in a checkpoint."""


class ControlAdapter(nn.Module):
    """Turns folded rays into the tokens' camera term.

    Args:
        dim: D.
        downscale: pixels per latent pixel: 8 (Wan2.1 VAE) or 16 (Wan2.2 VAE). A token covers twice as many.
    """

    def __init__(self, dim: int, downscale: int):
        super().__init__()
        self.downscale = downscale
        self.conv = nn.Conv2d(RAY_CHANNELS * downscale**2, dim, kernel_size=2, stride=2)
        self.residual_blocks = nn.ModuleList([ResidualBlock(dim)])

    def forward(self, rays: Tensor) -> Tensor:
        """The term for the tokens.

        Args:
            rays: Plücker rays in pixel resolution, four video frames folded into the channels, [B, 24, F, H, W].

        Returns:
            float32 [B, F, h, w, D], h = H / (2 downscale).

        Raises:
            InputError: a number of channels or a frame size that does not fit.
        """
        token = 2 * self.downscale
        if rays.shape[1] != RAY_CHANNELS or rays.shape[3] % token or rays.shape[4] % token:
            raise InputError(
                f"rays: expected [B, {RAY_CHANNELS}, F, H, W] with H and W multiples of {token}, found {[*rays.shape]}"
            )
        return torch.cat([self.some_frames(part) for part in rays.split(FRAMES_AT_ONCE, 2)], 1)

    def some_frames(self, rays: Tensor) -> Tensor:
        """The same for the few latent frames that are computed together. [B, 24, f, H, W] -> [B, f, h, w, D]"""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return checkpoint(self.convolve, rays, use_reentrant=False)
        return self.convolve(rays)

    def convolve(self, rays: Tensor) -> Tensor:
        """[B, 24, f, H, W] -> [B, f, h, w, D]

        The first convolution is float32 whatever its weights are stored in: rays rounded to bf16 would be up to 0.2
        degrees off. The residual block computes in the precision of its weights.
        """
        with torch.autocast(rays.device.type, enabled=False):
            batch = rays.shape[0]
            x = F.pixel_unshuffle(rearrange(rays.float(), "b c f h w -> (b f) c h w"), self.downscale)
            weight, bias = (parameter.float() for parameter in self.conv.parameters())
            x = F.conv2d(x, weight, bias, stride=2)  # [B f, D, h, w]
            for block in self.residual_blocks:
                x = block(x)
        return rearrange(x, "(b f) d h w -> b f h w d", b=batch)


class ResidualBlock(nn.Module):
    """x + conv2(relu(conv1(x))), 3 x 3 each."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [N, D, h, w] -> the same."""
        return x + self.conv2(F.relu(self.conv1(x.to(self.conv1.weight.dtype)))).float()


def zero_start(adapter: ControlAdapter, generator: torch.Generator | None = None) -> None:
    """Fill a new adapter so that its output is exactly zero and every parameter is trained by the second step.

    `conv` and `conv2` are zero, `conv1` is drawn at random, its bias too. Two zeros, but not in a row: the skip of the
    residual block leads around `conv2`, so `conv` has a gradient at the first step. So has `conv2`, because
    relu(conv1(0)) is the positive part of conv1's bias. From the second step on conv2 is no longer zero and `conv1` has
    a gradient as well. Were conv1's bias zero, conv1 would stand still for one step longer.
    """
    block = adapter.residual_blocks[0]
    assert isinstance(block, ResidualBlock)
    for parameter in (*adapter.conv.parameters(), *block.conv2.parameters()):
        nn.init.zeros_(parameter)
    conv1 = block.conv1
    bound = (9 * conv1.in_channels) ** -0.5  # 1 / sqrt(fan in), as nn.Conv2d draws them
    for parameter in conv1.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
