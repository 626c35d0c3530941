"""`--network_module networks.lora_camera`: LoRA and a camera mechanism, trained together.

--network_args injection=...           how the camera enters: see docs/mechanisms.md
               camera_...=...          its choices: see networks/mechanisms/settings.py
               camera_lr=1e-3          learning rate of the mechanism; that of the LoRA if not given
               include_patterns=...    which linears get a LoRA, by regular expressions over their names
               exclude_patterns=...
               loraplus_lr_ratio=16    learning rate of the LoRA's up matrices over that of its down matrices
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor

from core.errors import InputError
from networks.arguments import check_names, read_choice, read_patterns, read_positive
from networks.lora_linear import LoRAAdapter
from networks.mechanisms.adapter import RaysEncoder
from networks.mechanisms.registry import INJECTIONS, build_camera, default_injection
from networks.mechanisms.settings import OPTIONS, read_camera_settings
from networks.network import (
    CAMERA_PREFIXES,
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
from wan_ext.condition import CameraBranch
from wan_ext.configs import Expert, WanVariant
from wan_ext.dit import WanDiT

MODULE = "networks.lora_camera"
NEEDS_CAMERA = True
ARGUMENTS = (*OPTIONS, "include_patterns", "exclude_patterns", "loraplus_lr_ratio")


def create_network(
    dit: WanDiT,
    *,
    variant: WanVariant,
    expert: Expert,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    network_args: Mapping[str, str],
    pose_frame: str | None,
    scale_rule: str | None = None,
    generator: torch.Generator | None = None,
) -> Network:
    """Put a new LoRA and a camera encoder on one expert, whose own parameters are frozen.

    Args:
        dit: the expert; its linears are replaced.
        variant: the task.
        expert: which expert it is.
        rank: of every adapter (--network_dim).
        alpha: strength (--network_alpha).
        dropout: share of the rank that a training step leaves out (--network_dropout).
        network_args: --network_args.
        pose_frame: "scene" or "first": the coordinates of the camera paths that it will see; written into its files.
        scale_rule: how their translations are scaled, likewise; None: "none".
        generator: CPU generator that draws the weights; None: the global one.

    Returns:
        The network, in training mode.

    Raises:
        InputError: an unknown network argument or value, a pattern that finds nothing, a rank, alpha or dropout out of
            range, a data set without cameras, or one whose pose frame a frozen adapter of the model does not know.
    """
    check_names(network_args, ARGUMENTS, module=MODULE)
    check_structure(rank, alpha, dropout)
    if pose_frame is None:
        raise InputError(
            f"--network_module {MODULE}: expected a data set with cameras, found none; name its camera_directory in "
            f"the dataset config, or train networks.lora"
        )
    injection = read_choice(network_args, "injection", tuple(INJECTIONS), default_injection(variant, pose_frame))
    settings = NetworkSettings(
        module=MODULE,
        task=variant.name,
        expert=expert,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        include=read_patterns(network_args, "include_patterns"),
        exclude=read_patterns(network_args, "exclude_patterns"),
        camera=read_camera_settings(
            network_args,
            injection=injection,
            defaults=INJECTIONS[injection].defaults,
            variant=variant,
            pose_frame=pose_frame,
            scale_rule=scale_rule or "none",
        ),
    )
    assert settings.camera is not None
    if variant.hears_camera and pose_frame == "scene" and not settings.camera.train_control_adapter:
        raise InputError(
            f'--task {variant.name}: its own camera adapter is frozen and knows poses of frame "first", found a data '
            f'set of pose frame "scene"; add --train_control_adapter, or set pose_frame = "first" in the dataset config'
        )
    camera_lr = read_positive(network_args, "camera_lr")
    adapters = build_adapters(dit, settings, generator=generator)
    ratio = read_positive(network_args, "loraplus_lr_ratio")
    network = _with_camera(
        dit, settings, adapters, variant, generator=generator, camera_lr=camera_lr, loraplus_lr_ratio=ratio
    )
    return attach(dit, network)


def load_network(
    dit: WanDiT,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    variant: WanVariant,
    expert: Expert,
    multiplier: float = 1.0,
) -> Network:
    """Put a saved LoRA on one expert, and rebuild the camera encoder that was trained with it.

    Args:
        dit: the expert; its linears are replaced.
        weights: of the LoRA file and of its camera file.
        metadata: of the LoRA file.
        variant: the task.
        expert: which expert it is.
        multiplier: strength of the LoRA in use; the camera encoder is used as it was trained.

    Returns:
        The network, frozen and in evaluation mode.

    Raises:
        InputError: a network of another task, expert or model, or weights that are not all there; the DiT is unchanged.
    """
    lora = {name: tensor for name, tensor in weights.items() if not name.startswith(CAMERA_PREFIXES)}
    camera = {name: tensor for name, tensor in weights.items() if name.startswith(CAMERA_PREFIXES)}
    settings = settings_from_metadata(metadata)
    if settings.camera is None:
        raise InputError("metadata: expected the injection of a network with a camera, found none")
    check_belongs(settings, variant, expert)
    adapters = adapters_from_weights(dit, lora)
    check_weights(lora, lora_shapes(dit, settings))
    network = _with_camera(dit, settings, adapters, variant, generator=torch.Generator())
    network.load_weights(lora | camera)
    return attach(dit, network, multiplier=multiplier).requires_grad_(False).eval()


def _with_camera(
    dit: WanDiT,
    settings: NetworkSettings,
    adapters: Mapping[str, LoRAAdapter],
    variant: WanVariant,
    *,
    generator: torch.Generator | None,
    camera_lr: float | None = None,
    loraplus_lr_ratio: float | None = None,
) -> Network:
    """The network of an expert, with a new camera mechanism if this expert is to hear the camera."""
    assert settings.camera is not None
    encoder, adapter = None, None
    branches: dict[int, CameraBranch] = {}
    if settings.camera.heard_by(settings.expert):
        encoder, branches = build_camera(settings.camera, variant, generator=generator, device=_device_of(dit))
        if settings.camera.train_control_adapter:
            adapter = deepcopy(dit.control_adapter).float()  # type: ignore[union-attr]
    rays = RaysEncoder(variant) if variant.hears_camera else None
    return Network(settings, adapters, encoder, branches, camera_lr, rays, adapter, loraplus_lr_ratio)


def _device_of(dit: WanDiT) -> torch.device:
    """Where the DiT takes its inputs; its blocks may lie elsewhere."""
    return dit.patch_embedding.weight.device
