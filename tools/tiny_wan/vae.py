"""Train the tiny autoencoder: principal components in the encoder, a decoder that learns to invert them."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from tqdm import tqdm

from core.files import atomic_path, read_safetensors, save_safetensors
from tools.tiny_wan.clips import held_out_clips, psnr, to_video, training_clips
from tools.tiny_wan.vae_start import principal_start
from wan_ext.condition import first_frame_condition, first_frame_video
from wan_ext.configs import VAEConfig
from wan_ext.vae import WanVAE, build_vae
from wan_ext.whole_vae import WholeClip, norm_silu_kernel

PRINCIPAL_CLIPS = 100
CROP = (6, 8)  # latent rows and columns of a training crop
EMA_DECAY, WARMUP_STEPS, SAVE_EVERY = 0.995, 50, 250


def train_vae(
    config: VAEConfig, work: Path, *, num_scenes: int, steps: int, batch_size: int, learning_rate: float, seed: int
) -> WanVAE:
    """Train, or continue from the checkpoint in the work folder.

    Args:
        config: the shape of the autoencoder.
        work: folder of the rendered clips and of the checkpoint `vae.pt`.
        num_scenes: training scenes.
        steps: decoder steps in all.
        batch_size: crops a step.
        learning_rate: the highest; it falls to zero along a half cosine.
        seed: of weights and order.

    Returns:
        The autoencoder with averaged weights.
    """
    clips, _ = training_clips(work / "clips", num_scenes)
    network, checkpoint = build_vae(config), work / "vae.pt"
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    if saved is None:
        principal_start(network, to_video(clips[:: max(len(clips) // PRINCIPAL_CLIPS, 1)]), _generator(seed, 0))
    else:
        network.load_state_dict(saved["network"])
        network.encoder.requires_grad_(False)
    whole = WholeClip(network, norm_silu_kernel())
    latents = encode_all(network, clips, work / "vae_latents.safetensors")
    decoder = nn.ModuleList([network.post_quant_conv, network.decoder])
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    first = 0
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        average, first = saved["average"], saved["step"]

    progress = tqdm(range(first, steps), initial=first, total=steps, desc="vae", unit="step")
    shown, since = 0.0, time.monotonic()
    for step in progress:
        rate = learning_rate * min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        latent, video = _crops(latents, clips, batch_size, _generator(seed, step + 1), whole_frame=step % 4 == 3)
        loss = (whole.decode(latent.bfloat16()).float() - video).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        shown = 0.95 * shown + 0.05 * loss.item() if shown else loss.item()
        progress.set_postfix(psnr=f"{-10 * math.log10(shown / 4):.2f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            with atomic_path(checkpoint) as temporary:
                torch.save(state | {"step": step + 1}, temporary)
            quality = _with_average(parameters, average, lambda: evaluate_vae(WanVAE(network, config)))
            for parameter in parameters:
                parameter.requires_grad_(True)
            progress.write(f"step {step + 1}, {time.monotonic() - since:.0f} s: held-out PSNR {quality.mean():.2f} dB")
    for parameter, value in zip(parameters, average, strict=True):
        parameter.data.copy_(value)
    return WanVAE(network, config)


@torch.no_grad()
def encode_all(
    network: AutoencoderKLWan, clips: Tensor, file: Path, *, prepare: Callable[[Tensor], Tensor] = to_video
) -> Tensor:
    """Latents [N, z, F, h, w] of clips uint8 [N, T, H, W, 3], from the file if it holds these, else computed.

    `prepare` makes the videos [n, 3, T, H, W] in [-1, 1] that are encoded.
    """
    digest = hashlib.sha256(clips[:: max(len(clips) // 50, 1)].contiguous().numpy().tobytes())
    for value in network.encoder.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    source = f"{len(clips)} {digest.hexdigest()}"
    if file.exists():
        tensors, metadata = read_safetensors(file)
        if metadata.get("source") == source:
            return tensors["latents"]
    whole = WholeClip(network)
    batches = tqdm(clips.split(8), desc="encode", unit="batch")
    latents = torch.cat([whole.encode(prepare(batch)).contiguous() for batch in batches])
    save_safetensors({"latents": latents}, file, {"source": source})
    return latents


@torch.no_grad()
def encode_first_frames(network: AutoencoderKLWan, clips: Tensor, file: Path) -> Tensor:
    """Condition channels [N, 20, F, h, w] of an I2V model for clips, from the file or computed; as `encode_all`."""

    def known(batch: Tensor) -> Tensor:
        return torch.stack([first_frame_video(video[:, 0], video.shape[1]) for video in to_video(batch)])

    latents = encode_all(network, clips, file, prepare=known)
    return torch.stack([first_frame_condition(clip) for clip in latents])


@torch.no_grad()
def evaluate_vae(vae: WanVAE, num_scenes: int = 12) -> Tensor:
    """PSNR in dB of each held-out clip, [num_scenes], at the demo's size and length."""
    videos = to_video(held_out_clips(num_scenes)[0])
    return torch.cat([psnr(vae.decode(vae.encode(video)), video) for video in videos.split(4)])


def _crops(
    latents: Tensor, clips: Tensor, batch_size: int, generator: torch.Generator, *, whole_frame: bool
) -> tuple[Tensor, Tensor]:
    """Random clips, whole or cropped, as latents and video; in space only, since time is causal."""
    rows, columns = latents.shape[3:]
    height, width = (rows, columns) if whole_frame else CROP
    which = torch.randint(len(clips), (batch_size,), generator=generator)
    top = int(torch.randint(rows - height + 1, (), generator=generator))
    left = int(torch.randint(columns - width + 1, (), generator=generator))
    latent = latents[which, :, :, top : top + height, left : left + width]
    clip = clips[which, :, 8 * top : 8 * (top + height), 8 * left : 8 * (left + width)]
    return latent, to_video(clip)


def _with_average(parameters: list[nn.Parameter], average: list[Tensor], function: Callable[[], Tensor]) -> Tensor:
    """Call a function while the parameters hold their averages."""
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, average, strict=True):
        parameter.data.copy_(value)
    result = function()
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data.copy_(value)
    return result


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
