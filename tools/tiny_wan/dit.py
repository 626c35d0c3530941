"""Train the two experts of the tiny mixture: one model on every noise level, then a copy of it on each interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.files import atomic_path
from core.randomness import generator_for
from wan_ext.configs import Expert, WanVariant
from wan_ext.dit import WanDiT, init_weights
from wan_ext.experts import expert_at, expert_interval
from wan_ext.flow import add_noise, sample_sigma, velocity_target
from wan_ext.sampling import guidance, sample

EMA_DECAY, WARMUP_STEPS, SAVE_EVERY, CAPTION_DROPOUT = 0.998, 50, 250, 0.1
TRAINING_SHIFT = 2.0  # of the sigma law; the first layout of a clip needs more practice than its grain


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the experts learn from: latents [N, C, F, h, w], padded contexts [N, S, D], that of no caption [S, D]."""

    latents: Tensor
    context: Tensor
    empty_context: Tensor
    condition: Tensor | None = None  # first-frame channels of an I2V model [N, 20, F, h, w]


def train_dit(
    variant: WanVariant,
    material: Material,
    checkpoint: Path,
    *,
    expert: Expert | None,
    start: WanDiT | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> WanDiT:
    """Train, or continue from the checkpoint.

    Args:
        variant: the model's shape and the experts' intervals.
        material: latents and contexts.
        checkpoint: file of weights, averages and optimiser.
        expert: whose interval of sigma; None for all of them.
        start: weights to begin with; None begins from scratch.
        steps, batch_size, learning_rate: the rate falls to zero along a half cosine.
        seed: of weights, order and noise.

    Returns:
        The model with averaged weights.
    """
    low, high = (0.0, 1.0) if expert is None else expert_interval(variant, expert)
    name = expert or "both"
    dit = WanDiT(variant.dit)
    init_weights(dit, generator_for(seed, "tiny dit"))
    if start is not None:
        dit.load_state_dict(widened(start.state_dict(), variant.dit.in_dim))
    average = WanDiT(variant.dit).requires_grad_(False)
    average.load_state_dict(dit.state_dict())
    optimizers = _optimizers(dit, learning_rate)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        dit.load_state_dict(saved["dit"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]

    shown = 0.0
    progress = tqdm(range(first, steps), initial=first, total=steps, desc=f"dit {name}", unit="step")
    for step in progress:
        rate = min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["highest_lr"]
        generator = generator_for(seed, name, step)
        which = torch.randint(len(material.latents), (batch_size,), generator=generator)
        latents, context = material.latents[which], material.context[which]
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        context = torch.where(dropped[:, None, None], material.empty_context, context)
        noise = torch.randn(latents.shape, generator=generator)
        sigma = sample_sigma(
            batch_size, law="shift", shift=TRAINING_SHIFT, low=low, high=high, sigmoid_scale=1.2, generator=generator
        )
        velocity = dit(
            add_noise(latents, noise, sigma),
            timestep=1000 * sigma,
            context=context,
            condition=None if material.condition is None else material.condition[which],
        )
        loss = (velocity - velocity_target(latents, noise)).square().mean()
        dit.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in dit.parameters()], 1 - decay)
        shown = 0.98 * shown + 0.02 * loss.item() if shown else loss.item()
        progress.set_postfix(loss=f"{shown:.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "dit": dit.state_dict(),
                "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            with atomic_path(checkpoint) as temporary:
                torch.save(state, temporary)
            progress.write(f"{name}: step {step + 1}, loss {shown:.4f}")
    return average


def widened(state: dict[str, Tensor], in_dim: int) -> dict[str, Tensor]:
    """Weights for a model with more input channels: the new ones, which come after the old ones, start at zero."""
    patches = state["patch_embedding.weight"]  # [D, C, 1, 2, 2]
    more = patches.new_zeros(patches.shape[0], in_dim - patches.shape[1], *patches.shape[2:])
    return state | {"patch_embedding.weight": torch.cat([patches, more], 1)}


def _optimizers(dit: WanDiT, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which learns them in fewer steps, and AdamW for the rest."""
    matrices = [parameter for parameter in dit.blocks.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in dit.parameters() if id(parameter) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["highest_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def generate(
    variant: WanVariant,
    experts: dict[Expert, WanDiT],
    context: Tensor,
    empty_context: Tensor,
    *,
    shape: tuple[int, int, int, int],
    seed: int,
    scale: float | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Latents from captions, through both experts.

    Args:
        variant: boundary, steps, shift and guidance scale.
        experts: the models.
        context: [B, S, D]; the context of no caption is [S, D].
        shape: C, F, h, w of a clip's latents.
        seed: of the noise.
        scale: of the guidance; the variant's when None.
        condition: first-frame channels of an I2V model, [B, 20, F, h, w].

    Returns:
        [B, C, F, h, w]
    """
    scale = variant.guidance_scale if scale is None else scale
    latents = torch.randn(len(context), *shape, generator=generator_for(seed, "sample"))
    both = torch.cat([context, empty_context.expand_as(context)])
    first = None if condition is None else torch.cat([condition, condition])

    def velocity(x: Tensor, timestep: float) -> Tensor:
        dit = experts[expert_at(variant, timestep)]
        time = torch.full((2 * len(x),), float(timestep))
        cond, uncond = dit(torch.cat([x, x]), timestep=time, context=both, condition=first).chunk(2)
        return guidance(cond, uncond, scale)

    return sample(velocity, latents, solver="unipc", steps=variant.steps, shift=variant.shift)
