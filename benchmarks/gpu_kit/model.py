"""An expert with random weights, made where it computes, block by block: nothing is downloaded, nothing read.

What: `make_expert` gives a frozen transformer in 8 bits with a LoRA of `networks.lora` on it, whose blocks' weights lie
in pinned host memory (`HostMasters`); `make_batch` a clip, its noise and its text.

How: weights are Gaussian with the deviation that training starts from, norms are one, so that activations have the size
of those of a real model. Both halves of the LoRA are random, so that all its gradients are there from the first step.

Cost: one block in bf16 and one expert in 8 bits on the device while it is made (on the real shape 15 GB).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_kit.optimizer import AdamW8
from benchmarks.gpu_kit.settings import Clip
from memory.device import Device
from memory.masters import HostMasters
from memory.quant import QuantLinear, QuantRecipe, quantize
from memory.runners import BlockRunner
from memory.stream import move_all_but
from networks.lora import Network, create_network
from wan_ext import flow
from wan_ext.assemble import assign, quantize_linears, tensors_of
from wan_ext.configs import Expert as ExpertName
from wan_ext.configs import WanVariant
from wan_ext.dit import WanDiT, storage_dtype

DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One clip on its device."""

    latents: Tensor  # [1, C, F, H, W]
    noise: Tensor  # [1, C, F, H, W]
    context: Tensor  # [1, S, text_dim]
    sigma: Tensor  # [1]


@dataclass(kw_only=True)
class Expert:
    """One of the two."""

    name: ExpertName
    dit: WanDiT
    network: Network
    optimizer: AdamW8
    masters: HostMasters | None

    def move(self, device: torch.device) -> None:
        """Move what trains and all that is not in blocks; the blocks' weights stay where they are."""
        move_all_but(self.dit, self.dit.blocks, device)
        self.optimizer.to(device)


def make_expert(
    variant: WanVariant,
    name: ExpertName,
    *,
    recipe: QuantRecipe,
    rank: int,
    device: torch.device,
    host: Device | None,
    seed: int,
) -> Expert:
    """Build one expert.

    Args:
        variant: the task.
        name: which expert.
        recipe: how the blocks' linears are kept.
        rank: of the LoRA.
        device: where it computes.
        host: whose host memory takes the blocks' weights; None: they stay on the device.
        seed: of all weights.
    """
    with torch.device("meta"):
        dit = WanDiT(variant.dit)
    quantize_linears(dit.blocks, recipe, bias_dtype=DTYPE)
    generator = torch.Generator(device).manual_seed(seed)
    _fill(dit, generator)
    network = create_network(
        dit,
        variant=variant,
        expert=name,
        rank=rank,
        alpha=float(rank),
        network_args={},
        generator=torch.Generator().manual_seed(seed),
    )
    for adapter in network.named_adapters.values():
        nn.init.normal_(adapter.up, std=0.01, generator=generator)
    optimizer = AdamW8(network.parameters(), learning_rate=1e-4)
    masters = None
    if host is not None:
        masters = HostMasters(list(dit.blocks), range(len(dit.blocks)), host, place=device, kind="pinned")
    return Expert(name=name, dit=dit, network=network, optimizer=optimizer, masters=masters)


@torch.no_grad()
def _fill(dit: WanDiT, generator: torch.Generator) -> None:
    """Give every tensor of a model on meta its values."""
    device = generator.device
    for name, empty in tensors_of(dit).items():
        path, _, leaf = name.rpartition(".")
        owner = dit.get_submodule(path)
        is_quantised = isinstance(owner, QuantLinear)
        if is_quantised and leaf in ("weight_scale", "weight_transposed"):
            continue  # made with the weight
        if leaf == "modulation":
            values = _normal(empty.shape, dit.config.dim**-0.5, generator)
        elif "norm" in name:
            values = torch.full(empty.shape, 1.0 if leaf == "weight" else 0.0, device=device)
        elif leaf == "bias":
            values = _normal(empty.shape, 0.02, generator)
        else:
            fans = empty.shape[0] + math.prod(empty.shape[1:])
            values = _normal(empty.shape, (2 / fans) ** 0.5, generator)
        if is_quantised and leaf == "weight":
            owner.take(quantize(values, recipe=owner.recipe, name=name))  # type: ignore[operator]
        else:
            assign(dit, name, values.to(storage_dtype(name, DTYPE)))


def _normal(shape: torch.Size, deviation: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=generator.device, generator=generator).mul_(deviation)


def make_batch(variant: WanVariant, clip: Clip, *, device: torch.device, seed: int) -> Batch:
    """A clip of random latents, its noise and its text, all tokens of it."""
    stride_t, stride_h, stride_w = variant.vae.stride
    frames = (clip.frames - 1) // stride_t + 1
    shape = torch.Size((1, variant.dit.in_dim, frames, clip.height // stride_h, clip.width // stride_w))
    generator = torch.Generator(device).manual_seed(seed)
    return Batch(
        latents=_normal(shape, 1.0, generator),
        noise=_normal(shape, 1.0, generator),
        context=_normal(torch.Size((1, variant.dit.text_len, variant.dit.text_dim)), 0.1, generator).to(DTYPE),
        sigma=torch.full((1,), 0.7, device=device),
    )


def velocity(dit: WanDiT, batch: Batch, run_blocks: BlockRunner) -> Tensor:
    """The model's prediction. [1, C, F, H, W]"""
    noised = flow.add_noise(batch.latents, batch.noise, batch.sigma)
    return dit(noised, timestep=1000 * batch.sigma, context=batch.context, run_blocks=run_blocks)


def loss_of(dit: WanDiT, batch: Batch, run_blocks: BlockRunner) -> Tensor:
    """The flow-matching loss, as `training.step` has it."""
    return F.mse_loss(velocity(dit, batch, run_blocks), flow.velocity_target(batch.latents, batch.noise))


def trained(expert: Expert) -> list[Tensor]:
    """Copies of what trains, on the host."""
    return [parameter.detach().cpu().clone() for parameter in expert.network.parameters()]
