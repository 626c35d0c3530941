"""`--network_module networks.lora_camera`: LoRA and a camera encoder, trained together.

--network_args injection=plucker|bias  how the camera enters (see networks/camera_encoders.py)
               camera_lr=1e-3          learning rate of the encoder; that of the LoRA if not given
               camera_hidden=512       width of the encoder
               include_patterns=...    which linears get a LoRA, by regular expressions over their names
               exclude_patterns=...
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from core.errors import InputError
from networks.arguments import check_names, read_choice, read_int, read_patterns, read_positive
from networks.camera_encoders import INJECTIONS, CameraEncoder
from networks.network import (
    CAMERA_PREFIX,
    CameraSettings,
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

MODULE = "networks.lora_camera"
NEEDS_CAMERA = True
ARGUMENTS = ("injection", "camera_lr", "camera_hidden", "include_patterns", "exclude_patterns")
DEFAULT_INJECTION = "plucker"
DEFAULT_HIDDEN = 512


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
            range, or a data set without cameras.
    """
    check_names(network_args, ARGUMENTS, module=MODULE)
    check_structure(rank, alpha, dropout)
    if pose_frame is None:
        raise InputError(
            f"--network_module {MODULE}: expected a data set with cameras, found none; name its camera_directory in "
            f"the dataset config, or train networks.lora"
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
        camera=CameraSettings(
            injection=read_choice(network_args, "injection", tuple(INJECTIONS), DEFAULT_INJECTION),
            hidden=read_int(network_args, "camera_hidden", DEFAULT_HIDDEN),
            pose_frame=pose_frame,
            scale_rule=scale_rule or "none",
        ),
    )
    camera_lr = read_positive(network_args, "camera_lr")
    adapters = build_adapters(dit, settings, generator=generator)
    encoder = build_encoder(settings, variant, device=_device_of(dit), generator=generator)
    return attach(dit, Network(settings, adapters, encoder, camera_lr))


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
    lora = {name: tensor for name, tensor in weights.items() if not name.startswith(CAMERA_PREFIX)}
    camera = {name: tensor for name, tensor in weights.items() if name.startswith(CAMERA_PREFIX)}
    settings = settings_from_metadata(metadata)
    if settings.camera is None or settings.camera.injection not in INJECTIONS:
        raise InputError(
            f"metadata: expected injection {' or '.join(INJECTIONS)}, found {metadata.get('injection', 'none')}; the "
            f"file comes from another version of this trainer"
        )
    check_belongs(settings, variant, expert)
    adapters = adapters_from_weights(dit, lora)
    check_weights(lora, lora_shapes(dit, settings))
    encoder = build_encoder(settings, variant, device=_device_of(dit), generator=torch.Generator())
    network = Network(settings, adapters, encoder)
    network.load_weights(lora | camera)
    return attach(dit, network, multiplier=multiplier).requires_grad_(False).eval()


def build_encoder(
    settings: NetworkSettings,
    variant: WanVariant,
    *,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> CameraEncoder:
    """A new camera encoder as the settings describe it."""
    assert settings.camera is not None
    encoder_class = INJECTIONS[settings.camera.injection]
    return encoder_class(variant, hidden=settings.camera.hidden, generator=generator, device=device)


def _device_of(dit: WanDiT) -> torch.device:
    """Where the DiT takes its inputs; its blocks may lie elsewhere."""
    return dit.patch_embedding.weight.device
