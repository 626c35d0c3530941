"""Videos along many camera paths at once, with experts that are loaded already: for validation and for benchmarks.

`generate.py` films one path and holds one expert in memory at a time; here both experts stay and a batch of paths goes
through them. The same seed starts from the same noise in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from core.randomness import generator_for
from memory.runners import BlockRunner, run_plain
from networks.guided import Conditions, GuidedExpert
from networks.network import Network
from wan_ext.condition import with_first_frame
from wan_ext.configs import Expert, WanVariant
from wan_ext.dit import WanDiT
from wan_ext.experts import expert_at
from wan_ext.sampling import Solver, sample
from wan_ext.vae import WanVAE


@dataclass(frozen=True, kw_only=True)
class FilmingExpert:
    """One expert, ready to run: its DiT with the network's LoRA in it."""

    dit: WanDiT
    network: Network | None = None
    """What encodes the camera; None, or a network without camera encoder: the base model, which hears no camera."""
    run_blocks: BlockRunner = run_plain


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How noise becomes a video."""

    steps: int
    shift: float
    solver: Solver = "unipc"
    guidance_scale: float = 1.0
    """Of the low-noise expert, or of the only one. 1: no text guidance, and half the time."""
    guidance_scale_high_noise: float = 1.0
    camera_guidance: float = 1.0
    """Weight of the step from no camera to the path, of both experts. 1: no guidance by the camera."""


@dataclass(frozen=True, kw_only=True)
class Cameras:
    """The camera paths of a batch, in the pose frame and scale that the network was trained in."""

    c2w: Tensor  # [B, T, 4, 4]
    K: Tensor  # [B, T, 3, 3], pixels of height x width
    height: int
    width: int


def film_paths(
    experts: Mapping[Expert, FilmingExpert],
    *,
    variant: WanVariant,
    cameras: Cameras,
    conditions: Conditions,
    seeds: Sequence[int],
    sampling: Sampling,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Latents of one video for each camera path.

    Args:
        experts: all that the variant has, by name.
        variant: the task.
        cameras: B paths of T = 4 (F - 1) + 1 frames.
        conditions: text, and what is known of the first frame; B rows each, or 1 for all (negative_prompt).
        seeds: of the noise, one a path; equal seeds are equal noise.
        sampling: steps, solver and guidance.
        device: where the experts run.
        on_step: told the number of steps done and the latents, after each of them.

    Returns:
        float32 on `device`. [B, C, F, h, w]
    """
    missing = [name for name in variant.experts if name not in experts]
    if missing or len(seeds) != len(cameras.c2w):
        raise ValueError(
            f"expected the experts {variant.experts} and {len(cameras.c2w)} seeds, found {(*experts,)} and {len(seeds)}"
        )
    stride_t, stride_h, stride_w = variant.vae.stride
    num_latent_frames = (cameras.c2w.shape[1] - 1) // stride_t + 1
    shape = (1, variant.vae.z_dim, num_latent_frames, cameras.height // stride_h, cameras.width // stride_w)
    noise = torch.cat([torch.randn(shape, generator=generator_for(seed, "generate")) for seed in seeds])
    conditions = _expanded(conditions, len(seeds), device)
    networks = [expert.network for expert in experts.values() if expert.network is not None]
    with torch.no_grad(), evaluating([*(expert.dit for expert in experts.values()), *networks]):
        guided = {name: _guided(experts[name], name, conditions, cameras, sampling, device) for name in variant.experts}
        return sample(
            lambda latents, timestep: guided[expert_at(variant, timestep)].velocity(latents, timestep),
            noise.to(device),
            solver=sampling.solver,
            steps=sampling.steps,
            shift=sampling.shift,
            constrain=lambda latents: _with_known(latents, conditions.first_latents),
            on_step=on_step,
        )


def decode_frames(vae: WanVAE, latents: Tensor) -> Tensor:
    """Latents to pictures, one clip at a time, which is what memory is needed for.

    Args:
        vae: of the variant.
        latents: [B, C, F, h, w]

    Returns:
        uint8 on the CPU. [B, T, H, W, 3]
    """
    videos = [vae.decode(clip[None])[0].cpu() for clip in latents]  # [3, T, H, W] in [-1, 1]
    return to_pictures(torch.stack(videos))


def to_pictures(videos: Tensor) -> Tensor:
    """Decoded videos as pictures: [B, 3, T, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3]."""
    levels = ((videos + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(levels, "b c t h w -> b t h w c").contiguous()


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode inside the block, each in its former mode after it."""
    was_training = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in was_training:
            part.training = False
        yield
    finally:
        for part, training in was_training:
            part.training = training


def _guided(
    expert: FilmingExpert,
    name: Expert,
    conditions: Conditions,
    cameras: Cameras,
    sampling: Sampling,
    device: torch.device | str,
) -> GuidedExpert:
    camera = None
    if expert.network is not None:
        camera = expert.network.encode_camera(
            cameras.c2w.to(device), cameras.K.to(device), cameras.height, cameras.width
        )
    return GuidedExpert(
        dit=expert.dit,
        conditions=conditions,
        guidance_scale=sampling.guidance_scale_high_noise if name == "high" else sampling.guidance_scale,
        camera=camera,
        camera_guidance=sampling.camera_guidance,
        run_blocks=expert.run_blocks,
    )


def _with_known(latents: Tensor, first_latents: Tensor | None) -> Tensor:
    """Latents with the clean first frame in place, where one is known."""
    return latents if first_latents is None else with_first_frame(latents, first_latents)


def _expanded(conditions: Conditions, batch_size: int, device: torch.device | str) -> Conditions:
    """Conditions on the device, with as many rows as there are paths."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device).expand(batch_size, *tensor.shape[1:])

    prompt, negative_prompt = rows(conditions.prompt), rows(conditions.negative_prompt)
    assert prompt is not None and negative_prompt is not None
    return Conditions(
        prompt=prompt,
        negative_prompt=negative_prompt,
        condition=rows(conditions.condition),
        image_context=rows(conditions.image_context),
        first_latents=rows(conditions.first_latents),
    )
