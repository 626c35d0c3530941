"""`--network_module networks.lora`: LoRA on the linears of the blocks, without a camera.

    --network_args include_patterns=...   which linears, by regular expressions over their names
                   exclude_patterns=...
                   loraplus_lr_ratio=16    learning rate of the LoRA's up matrices over that of its down matrices

A network module is two functions: `create_network` for training, `load_network` for a saved file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from core.errors import InputError
from networks.arguments import check_names, read_patterns, read_positive
from networks.lora_linear import LoRALinear, block_linears, inject_lora, merge_lora, remove_lora, select_linears
from networks.mechanisms.adapter import RaysEncoder
from networks.network import (
    Network,
    NetworkSettings,
    adapters_from_weights,
    attach,
    build_adapters,
    check_belongs,
    check_structure,
    check_weights,
    lora_shapes,
    settings_from_metadata,
)
from wan_ext.configs import Expert, WanVariant
from wan_ext.dit import WanDiT

__all__ = [
    "LoRALinear",
    "Network",
    "block_linears",
    "create_network",
    "inject_lora",
    "load_network",
    "merge_lora",
    "remove_lora",
    "select_linears",
]

MODULE = "networks.lora"
NEEDS_CAMERA = False
ARGUMENTS = ("include_patterns", "exclude_patterns", "loraplus_lr_ratio")


def create_network(
    dit: WanDiT,
    *,
    variant: WanVariant,
    expert: Expert,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    network_args: Mapping[str, str],
    pose_frame: str | None = None,
    scale_rule: str | None = None,
    generator: torch.Generator | None = None,
) -> Network:
    """Put a new LoRA on one expert, whose own parameters are frozen.

    Args:
        dit: the expert; its linears are replaced.
        variant: the task.
        expert: which expert it is.
        rank: of every adapter (--network_dim).
        alpha: strength (--network_alpha).
        dropout: share of the rank that a training step leaves out (--network_dropout).
        network_args: --network_args.
        pose_frame: not used: this network knows no camera.
        scale_rule: not used.
        generator: CPU generator that draws the weights; None: the global one.

    Returns:
        The network, in training mode.

    Raises:
        InputError: an unknown network argument, a pattern that finds nothing, or a rank, alpha or dropout out of range.
    """
    check_names(network_args, ARGUMENTS, module=MODULE)
    check_structure(rank, alpha, dropout)
    if variant.hears_camera:
        raise InputError(
            f"--network_module {MODULE}: {variant.name} hears a camera, which this module leaves out; train "
            f"networks.lora_camera"
        )
    settings = NetworkSettings(
        module=MODULE,
        task=variant.name,
        expert=expert,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        include=read_patterns(network_args, "include_patterns"),
        exclude=read_patterns(network_args, "exclude_patterns"),
    )
    ratio = read_positive(network_args, "loraplus_lr_ratio")
    adapters = build_adapters(dit, settings, generator=generator)
    return attach(dit, Network(settings, adapters, loraplus_lr_ratio=ratio))


def load_network(
    dit: WanDiT,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    variant: WanVariant,
    expert: Expert,
    multiplier: float = 1.0,
) -> Network:
    """Put a saved LoRA on one expert.

    Args:
        dit: the expert; its linears are replaced.
        weights: of the file.
        metadata: of the file. A file of another tool, whose metadata name no task, is taken as it is.
        variant: the task.
        expert: which expert it is.
        multiplier: strength in use.

    Returns:
        The network, frozen and in evaluation mode.

    Raises:
        InputError: a LoRA of another task, expert or model; the DiT is unchanged then.
    """
    adapters = adapters_from_weights(dit, weights)
    if "task" in metadata:
        settings = settings_from_metadata(metadata)
        check_belongs(settings, variant, expert)
        check_weights(weights, lora_shapes(dit, settings))
    else:
        first = next(iter(adapters.values()))
        names = tuple(f"^{re.escape(name)}$" for name in adapters)
        settings = NetworkSettings(
            module=MODULE, task=variant.name, expert=expert, rank=first.rank, alpha=first.alpha, include=names
        )
    network = Network(settings, adapters, rays_encoder=RaysEncoder(variant) if variant.hears_camera else None)
    return attach(dit, network, multiplier=multiplier).requires_grad_(False).eval()
