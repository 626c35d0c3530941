"""The Wan2.1 autoencoder run on a whole clip at once: for training it, and where many small clips are encoded.

AutoencoderKLWan walks through a clip in chunks and carries a cache from chunk to chunk; that saves memory, but is slow
to train. These functions run the same modules on all frames: a causal convolution over the whole clip sees what the
cache would have brought. Normalisation and activation between convolutions are one compiled kernel where a C++
compiler is found, and everything runs in the dtype of its input.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKLWan
from torch import Tensor, nn


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """silu(x / rms(x) * gamma), statistics in float32. [B, C, T, H, W]"""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(dim=1, keepdim=True) + 1e-12) * gamma.float()
    return F.silu(values).to(x.dtype)


def norm_silu_kernel() -> Callable[[Tensor, Tensor], Tensor]:
    """The fused kernel, or the plain function where nothing can compile it."""
    if shutil.which("g++") is None:
        return _norm_silu
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(_norm_silu, dynamic=True)


class WholeClip:
    """Encoder and decoder of one autoencoder, cache-free.

    Args:
        network: a Wan2.1 autoencoder (no patches, not residual).
        norm_silu: the function between convolutions.
    """

    def __init__(self, network: AutoencoderKLWan, norm_silu: Callable[[Tensor, Tensor], Tensor] = _norm_silu) -> None:
        self.network: Any = network  # diffusers declares none of its parts
        self.norm_silu = norm_silu

    def encode(self, video: Tensor) -> Tensor:
        """Posterior means [B, z, F, h, w] of clips [B, 3, T, H, W] in [-1, 1]."""
        encoder = self.network.encoder
        x = _conv3d(encoder.conv_in, _channels_last(video))
        for layer in encoder.down_blocks:
            x = self._down(layer, x) if hasattr(layer, "resample") else self._residual(layer, x)
        x = _conv3d(encoder.conv_out, self.norm_silu(self._middle(encoder.mid_block, x), encoder.norm_out.gamma))
        return _conv3d(self.network.quant_conv, x)[:, : self.network.z_dim]

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W], not clamped, of latents [B, z, F, h, w]."""
        decoder = self.network.decoder
        x = _conv3d(decoder.conv_in, _conv3d(self.network.post_quant_conv, _channels_last(latents)))
        x = self._middle(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            if block.upsamplers is not None:
                x = self._up(block.upsamplers[0], x)
        return _conv3d(decoder.conv_out, self.norm_silu(x, decoder.norm_out.gamma))

    def _middle(self, block: Any, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        attention = block.attentions[0]
        if attention.proj.weight.requires_grad or bool(attention.proj.weight.any()):
            x = attention(x)
        return self._residual(block.resnets[1], x)

    def _residual(self, block: Any, x: Tensor) -> Tensor:
        shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _conv3d(block.conv_shortcut, x)
        if not block.conv2.weight.requires_grad and not bool(block.conv2.weight.any()):
            return shortcut  # a frozen branch that adds nothing
        x = _conv3d(block.conv1, self.norm_silu(x, block.norm1.gamma))
        return shortcut + _conv3d(block.conv2, self.norm_silu(x, block.norm2.gamma))

    @staticmethod
    def _down(layer: Any, x: Tensor) -> Tensor:
        conv = layer.resample[1]
        weight, bias = conv.weight[:, :, None].to(x.dtype), conv.bias.to(x.dtype)
        x = F.conv3d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2))
        if layer.mode == "downsample3d" and x.shape[2] > 1:
            conv = layer.time_conv
            later = F.conv3d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), stride=(2, 1, 1))
            x = torch.cat([x[:, :, :1], later], dim=2)
        return x

    @staticmethod
    def _up(layer: Any, x: Tensor) -> Tensor:
        if layer.mode == "upsample3d" and x.shape[2] > 1:
            later = _conv3d(layer.time_conv, x[:, :, 1:])
            batch, _, frames, height, width = later.shape
            later = later.reshape(batch, 2, -1, frames, height, width).transpose(1, 2)  # [B, C, 2, F, h, w]
            later = later.transpose(2, 3).reshape(batch, -1, 2 * frames, height, width)
            x = torch.cat([x[:, :, :1], later], dim=2)
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        conv = layer.resample[1]
        x = _channels_last(x)
        return F.conv3d(x, conv.weight[:, :, None].to(x.dtype), conv.bias.to(x.dtype), padding=(0, 1, 1))


def _conv3d(conv: Any, x: Tensor) -> Tensor:
    """A causal convolution over the whole clip."""
    left, _, top, _, past, _ = conv._padding
    if past:
        x = F.pad(x, (0, 0, 0, 0, past, 0))
    return F.conv3d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), stride=conv.stride, padding=(0, top, left))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
