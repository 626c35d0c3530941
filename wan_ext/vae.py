"""Wan's causal video autoencoder: clips to normalised latents and back, for Wan2.1 (16 channels) and Wan2.2 (48).

The network is diffusers' `AutoencoderKLWan`; weights come from native, ComfyUI or diffusers files. Latents are

    latents = (mu - mean) / std

with mu the mean of the posterior and mean, std one number per channel, as the DiT was trained on. Everything runs in
float32 unless asked otherwise, and without tiling: tiles change the latents of a random clip by half a deviation at
worst, and caches are made once.

Shapes: B clips, T video frames, F = (T - 1) / 4 + 1 latent frames, C channels; H, W pixels, h, w latent positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from einops import rearrange
from torch import Tensor

from core.errors import InputError
from core.files import save_safetensors
from wan_ext.assemble import fill_module
from wan_ext.checkpoint_files import Checkpoint, open_checkpoint
from wan_ext.configs import VAEConfig
from wan_ext.key_maps import vae_native_name
from wan_ext.whole_vae import WholeClip

WHOLE_CLIP_BYTES = 2**30
"""Clips whose activations stay below this are run at once, which is up to ten times faster on a CPU; larger ones in
chunks. The numbers are the same to 1e-5 (wan_ext/whole_vae.py)."""

CHUNK_FRAMES = 4


class WanVAE:
    """A frozen autoencoder and its latent normalisation. `network` is the AutoencoderKLWan inside."""

    def __init__(self, network: AutoencoderKLWan, config: VAEConfig):
        self.network = network.eval().requires_grad_(False)
        self.config = config
        is_plain = config.patch_size is None and not config.is_residual  # the Wan2.1 autoencoder
        self._whole = WholeClip(self.network) if is_plain else None
        self._mean = torch.tensor(config.latents_mean)
        self._std = torch.tensor(config.latents_std)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def to(self, device: torch.device | str) -> WanVAE:
        """Move the weights; returns itself."""
        self.network.to(device)  # type: ignore[arg-type]  # diffusers wraps the method in a decorator that hides it
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Clips to latents: the mean of the posterior, normalised.

        Args:
            video: values in [-1, 1], or uint8 from 0 to 255, which becomes floats a few frames at a time: a quarter
                of the memory; T = 4n + 1. [B, 3, T, H, W]

        Returns:
            float32 on the device of `video`. [B, C, F, h, w]

        Raises:
            InputError: T, H or W does not fit the strides.
        """
        require_video_size(video.shape[2:], self.config)
        whole = self._at_once(video.numel() // 3)
        posterior = whole.encode(self._inside(video)) if whole else self._in_chunks(video)
        mean, std = self._channels(self.device)
        return ((posterior.float() - mean) / std).to(video.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to clips.

        Args:
            latents: normalised. [B, C, F, h, w]

        Returns:
            float32 in [-1, 1], on the device of `latents`. [B, 3, 4 (F - 1) + 1, H, W]
        """
        if latents.shape[1] != self.config.z_dim:
            raise InputError(
                f"latents: expected {self.config.z_dim} channels ({self.config.name} VAE), found {latents.shape[1]}"
            )
        mean, std = self._channels(self.device)
        z = (latents.to(device=self.device, dtype=torch.float32) * std + mean).to(self.dtype)
        whole = self._at_once(latents.shape[0] * prod(latents.shape[2:]) * prod(self.config.stride))
        video = whole.decode(z).clamp(-1, 1) if whole else self.network.decode(z).sample
        return video.float().to(latents.device)

    def _inside(self, video: Tensor) -> Tensor:
        """Frames as the network takes them: its device and dtype, values in [-1, 1]."""
        video = video.to(self.device)
        if video.dtype == torch.uint8:
            video = video.float().div_(127.5).sub_(1)
        return video.to(self.dtype)

    def _in_chunks(self, video: Tensor) -> Tensor:
        """Posterior means, of the first frame and then of four frames at a time, as AutoencoderKLWan.encode walks."""
        network: Any = self.network
        network.clear_cache()
        encoded = []
        for chunk in (video[:, :, :1], *video[:, :, 1:].split(CHUNK_FRAMES, dim=2)):
            if chunk.shape[2] == 0:
                continue  # nothing follows the one frame of an image
            inside = self._inside(chunk)
            if self.config.patch_size is not None:
                inside = patchify(inside, patch_size=self.config.patch_size)
            position = network._enc_conv_idx = [0]
            encoded.append(network.encoder(inside, feat_cache=network._enc_feat_map, feat_idx=position))
        posterior = network.quant_conv(torch.cat(encoded, dim=2))
        network.clear_cache()
        return posterior[:, : self.config.z_dim]

    def _at_once(self, pixels: int) -> WholeClip | None:
        """The way without chunks, where a few of its largest activations fit `WHOLE_CLIP_BYTES`."""
        channels = max(self.config.base_dim, self.config.decoder_base_dim or 0)
        num_bytes = 4 * pixels * channels * self.dtype.itemsize
        return self._whole if num_bytes <= WHOLE_CLIP_BYTES else None

    def _channels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, shaped to broadcast. [C, 1, 1, 1]"""
        return tuple(rearrange(v.to(device), "c -> c 1 1 1") for v in (self._mean, self._std))  # type: ignore[return-value]


def require_video_size(size: Iterable[int], config: VAEConfig) -> None:
    """Refuse a clip that the strides cut short, rather than drop its tail.

    Args:
        size: T, H, W in frames and pixels.

    Raises:
        InputError: T is not 4n + 1, or H or W is not a multiple of the stride.
    """
    num_frames, height, width = size
    _, stride_height, stride_width = config.stride
    if num_frames % config.stride[0] != 1:
        below = max(num_frames - 1, 0) // config.stride[0] * config.stride[0] + 1
        raise InputError(
            f"video: expected 4n + 1 frames, found {num_frames}; use {below} or {below + config.stride[0]} frames"
        )
    if height % stride_height or width % stride_width:
        raise InputError(
            f"video: expected height and width in multiples of {stride_height} and {stride_width} pixels "
            f"({config.name} VAE), found {height}x{width} (height x width)"
        )


def build_vae(config: VAEConfig) -> AutoencoderKLWan:
    """An AutoencoderKLWan of this shape with fresh weights, on the default device (meta to load, else to train)."""
    channels = 3 * (config.patch_size or 1) ** 2
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        decoder_base_dim=config.decoder_base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
        is_residual=config.is_residual,
        in_channels=channels,
        out_channels=channels,
        patch_size=config.patch_size,
        scale_factor_temporal=config.stride[0],
        scale_factor_spatial=config.stride[1],
    )


def load_vae(
    path: Path | str,
    config: VAEConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> WanVAE:
    """Load a native, ComfyUI or diffusers autoencoder.

    Args:
        path: file (.pth, .safetensors) or folder (diffusers' `vae/`).
        config: which VAE the task needs.
        dtype: precision of the weights and the computation.
        device: where it runs.

    Raises:
        InputError: the file is broken, or holds another model.
    """
    checkpoint = open_checkpoint(path, stems=("diffusion_pytorch_model", "Wan2.1_VAE", "Wan2.2_VAE"))
    _require_vae(checkpoint, config)
    is_diffusers = "encoder.conv_in.weight" in checkpoint
    with torch.device("meta"):
        network = build_vae(config)
    fill_module(
        network,
        checkpoint,
        what=f"the {config.name} VAE",
        name_in_file=(lambda name: name) if is_diffusers else (lambda name: _native(name, config)),
        dtype_of=lambda name: dtype,
        device=device,
    )
    return WanVAE(network, config)


def save_vae_native(vae: WanVAE, path: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write an autoencoder under native key names, atomically.

    Args:
        path: the .safetensors file.
        dtype: stored precision; None keeps the weights' own.
    """
    tensors = {_native(name, vae.config): t.to(dtype or t.dtype) for name, t in vae.network.state_dict().items()}
    save_safetensors(tensors, path, {"format": "pt"})


def _native(name: str, config: VAEConfig) -> str:
    return vae_native_name(name, num_res_blocks=config.num_res_blocks, is_residual=config.is_residual)


def _require_vae(checkpoint: Checkpoint, config: VAEConfig) -> None:
    """Tell the two VAEs apart by their latent channels, before a list of keys does it at length."""
    for name in ("conv2.weight", "post_quant_conv.weight"):
        if name in checkpoint:
            channels = checkpoint.shape(name)[0]
            if channels != config.z_dim:
                found = {16: "the Wan2.1 VAE", 48: "the Wan2.2 VAE"}.get(channels, "another VAE")
                raise InputError(
                    f"{checkpoint.path}: expected the {config.name} VAE ({config.z_dim} latent channels), "
                    f"found {found} ({channels}); give the VAE of this task with --vae"
                )
            return
    raise InputError(f"{checkpoint.path}: expected the {config.name} VAE, found a checkpoint of another kind")
