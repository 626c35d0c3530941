"""One step: whose it is, its loss, its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.randomness import generator_for
from dataset.batches import Batch
from memory.runners import BlockRunner
from networks.network import Network
from training.weighting import loss_weights
from wan_ext import flow
from wan_ext.condition import first_frame_timestep, with_first_frame
from wan_ext.configs import Expert
from wan_ext.dit import WanDiT


@dataclass(frozen=True, kw_only=True)
class TrainedExpert:
    """One expert: frozen transformer, what is trained on it, and its share of the noise levels."""

    name: Expert
    dit: WanDiT
    network: Network
    run_blocks: BlockRunner
    optimizer: torch.optim.Optimizer
    learning_rates: tuple[float, ...]  # of the optimizer's groups, before the schedule
    interval: tuple[float, float]  # of sigma
    probability: float  # of a step
    clean_first_frame: bool = False  # whether the first latent frame is known and at timestep 0


def draw_expert(experts: Sequence[TrainedExpert], *, seed: int, step: int) -> TrainedExpert:
    """The expert of one step, the same on every process, with the probability of its interval under the law."""
    weights = torch.tensor([expert.probability for expert in experts])
    return experts[int(torch.multinomial(weights, 1, generator=generator_for(seed, "expert", step)))]


def training_step(
    expert: TrainedExpert,
    batch: Batch,
    noise: Tensor,
    sigma: Tensor,
    keep: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The flow-matching loss of one batch.

    Args:
        expert: whose noise levels these are.
        batch: on the expert's device.
        noise: [B, C, F, H, W]
        sigma: [B]
        keep: of the network's `draw_keep`. [B]
        weights: what each clip's loss is multiplied with; None: 1. [B]

    Returns:
        a scalar.
    """
    noised = flow.add_noise(batch.latents, noise, sigma)  # [B, C, F, H, W]
    timestep, known = 1000 * sigma, 0
    if expert.clean_first_frame and noised.shape[2] > 1:  # as in sampling; there is nothing to learn of it then
        noised, known = with_first_frame(noised, batch.latents[:, :, :1]), 1
        timestep = first_frame_timestep(timestep, noised.shape[2])  # [B, F]
    camera = None
    if batch.c2w is not None and batch.K is not None:
        camera = expert.network.encode_camera(batch.c2w, batch.K, batch.height, batch.width, keep=keep)
    velocity = expert.dit(
        noised,
        timestep=timestep,
        context=batch.context,
        condition=batch.condition,
        image_context=batch.image_context,
        camera=camera,
        run_blocks=expert.run_blocks,
    )  # [B, C, F, H, W]
    target = flow.velocity_target(batch.latents, noise)
    velocity, target = velocity[:, :, known:], target[:, :, known:]
    if weights is None:
        return F.mse_loss(velocity, target)
    return (weights * F.mse_loss(velocity, target, reduction="none").mean(dim=(1, 2, 3, 4))).mean()


def accumulate_gradients(
    expert: TrainedExpert,
    batches: Sequence[Batch],
    *,
    seed: int,
    step: int,
    rank: int,
    law: Mapping[str, Any],
    weighting: str = "none",
    device: torch.device,
) -> float:
    """Leave the gradients of one optimizer step in the network's parameters.

    Args:
        expert: whose step it is.
        batches: as many as gradients are accumulated over.
        seed: of the run.
        step: number of the step; with seed, rank and the batch's place it decides everything random.
        rank: this process.
        law: of sigma, as `flow.sample_sigma` takes it.
        weighting: of the loss, as `loss_weights` takes it.
        device: of the expert.

    Returns:
        The mean loss.
    """
    mean_loss = 0.0
    low, high = expert.interval
    for place, batch in enumerate(batches):
        batch = batch.to(device)
        generator = generator_for(seed, "noise", step, place, rank)
        sigma = flow.sample_sigma(len(batch.keys), low=low, high=high, generator=generator, **law)  # [B]
        noise = torch.randn(batch.latents.shape, generator=generator)
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # dropout draws from the global state
        keep = expert.network.draw_keep(len(batch.keys), generator_for(seed, "camera_dropout", step, place, rank))
        sigma = sigma.to(device)
        loss = training_step(expert, batch, noise.to(device), sigma, keep, loss_weights(weighting, sigma))
        (loss / len(batches)).backward()
        mean_loss += loss.item() / len(batches)
    return mean_loss
