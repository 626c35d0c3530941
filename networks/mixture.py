"""From noise to clean latents with a mixture of experts of which only one is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from core.randomness import generator_for
from networks.guided import GuidedExpert
from networks.video_settings import Settings
from wan_ext.condition import with_first_frame
from wan_ext.configs import Expert, WanVariant
from wan_ext.experts import expert_at
from wan_ext.sampling import sample


def sample_latents(
    load_expert: Callable[[Expert], GuidedExpert],
    *,
    variant: WanVariant,
    settings: Settings,
    num_frames: int,
    first_latents: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Sample one video, with a progress bar.

    Args:
        load_expert: called when the sampler reaches an expert; the one before is gone then.
        variant: the task, with the boundary between its experts.
        settings: size, steps, solver, shift, seed.
        num_frames: T = 4 (F - 1) + 1, at least that of the settings.
        first_latents: clean first frame of TI2V, [1, C, 1, h, w].
        device: where to sample. The noise is drawn on the CPU, so it is the same everywhere.

    Returns:
        float32 [1, C, F, h, w].
    """
    stride_t, stride_h, stride_w = variant.vae.stride
    num_latent_frames = (num_frames - 1) // stride_t + 1
    shape = (1, variant.vae.z_dim, num_latent_frames, settings.height // stride_h, settings.width // stride_w)
    noise = torch.randn(shape, generator=generator_for(settings.seed, "generate")).to(device)
    loaded: dict[Expert, GuidedExpert] = {}

    def velocity(latents: Tensor, timestep: float) -> Tensor:
        name = expert_at(variant, timestep)
        if name not in loaded:
            loaded.clear()  # the other expert's memory is free before this one comes
            progress.write(f"loading the {name}-noise expert" if len(variant.experts) > 1 else "loading the DiT")
            loaded[name] = load_expert(name)
        return loaded[name].velocity(latents, timestep)

    def count(step: int, latents: Tensor) -> None:
        progress.update()

    with tqdm(total=settings.steps, desc="sample", unit="step") as progress:
        return sample(
            velocity,
            noise,
            solver=settings.solver,
            steps=settings.steps,
            shift=settings.shift,
            constrain=None if first_latents is None else lambda latents: with_first_frame(latents, first_latents),
            on_step=count,
        )
