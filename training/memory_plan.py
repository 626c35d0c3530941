"""The memory plan of a training run, from its flags, its data set and its network, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from dataset.clips import Clip
from memory.card import find_card
from memory.machine import host_bytes, parse_bytes
from memory.plan import MemoryPlan
from memory.quant import QuantRecipe
from wan_ext.configs import Expert, WanVariant
from wan_ext.dit import WanDiT
from wan_ext.planning import plan_training
from wan_ext.quantized_files import recipe_name
from wan_ext.workload import tokens_of


def plan_of_run(
    variant: WanVariant,
    clips: Sequence[Clip],
    *,
    experts: Sequence[Expert],
    recipe: QuantRecipe | None,
    from_file: bool,
    network_module: ModuleType,
    network_args: Mapping[str, str],
    network_dim: int,
    pose_frame: str | None,
    bf16: bool,
    optimizer: str,
    average: bool,
    blocks_to_swap: int | None,
    vram: str | None,
    ram: str | None,
    gpu: str | None,
) -> tuple[MemoryPlan, str | None]:
    """The fastest plan that fits, and a note on what was assumed.

    Args:
        variant: the task.
        clips: of the data set; the largest batch is planned for.
        experts: that are trained.
        recipe: how the blocks' linears are kept; None: not quantised.
        from_file: whether blocks can be streamed from files of 8-bit weights.
        network_module: what is trained.
        network_args: --network_args.
        network_dim: rank.
        pose_frame: of the data set.
        bf16: whether linears and activations are bfloat16.
        optimizer: --optimizer_type.
        average: whether a moving average of what is trained is kept beside it.
        blocks_to_swap: the user's number of streamed blocks; None: the planner's choice.
        vram: --vram.
        ram: --ram.
        gpu: --gpu.

    Raises:
        InputError: nothing fits, or sizes that are none.
    """
    largest = max(clips, key=lambda clip: clip.batch_size * _tokens(variant, clip))
    card = find_card(vram=vram, gpu=gpu)
    trained = trained_parameters(variant, network_module, network_args, network_dim, pose_frame)
    plan = plan_training(
        variant,
        frames=largest.num_frames,
        height=largest.height,
        width=largest.width,
        batch_size=largest.batch_size,
        rank=network_dim,
        experts=experts,
        recipe=None if recipe is None else recipe_name(recipe),
        vram_bytes=card.vram_bytes,
        ram_bytes=host_bytes() if ram is None else parse_bytes(ram, "--ram"),
        rates=card.rates,
        bf16=bf16,
        optimizer=optimizer,
        trained_parameters=trained,
        camera_bytes=_camera_bytes(variant, network_module, largest) + (4 * trained * len(experts) if average else 0),
        from_file=from_file,
        blocks_to_swap=blocks_to_swap,
    )
    return plan, card.note


def trained_parameters(
    variant: WanVariant,
    network_module: ModuleType,
    network_args: Mapping[str, str],
    rank: int,
    pose_frame: str | None,
) -> int:
    """Numbers that one expert's network trains: the network is made on the meta device, as shapes alone."""
    counts = []
    for expert in variant.experts:
        with torch.device("meta"):
            network = network_module.create_network(
                WanDiT(variant.dit),
                variant=variant,
                expert=expert,
                rank=rank,
                alpha=1.0,
                network_args=network_args,
                pose_frame=pose_frame,
            )
        counts.append(sum(parameter.numel() for parameter in network.parameters()))
    return max(counts)


def _camera_bytes(variant: WanVariant, network_module: ModuleType, clip: Clip) -> int:
    """What a camera adds to a step at most: two float32 vectors a token, the term and its gradient."""
    if not network_module.NEEDS_CAMERA:
        return 0
    return 2 * 4 * clip.batch_size * _tokens(variant, clip) * variant.dit.dim


def _tokens(variant: WanVariant, clip: Clip) -> int:
    return tokens_of(variant, frames=clip.num_frames, height=clip.height, width=clip.width)
