"""What is trained on one expert: LoRA adapters, perhaps a camera mechanism, and what a file has to say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from core.errors import InputError, listing
from networks.lora_linear import (
    LoRAAdapter,
    block_linears,
    inject_lora,
    merge_lora,
    remove_lora,
    select_linears,
)
from networks.mechanisms.features import CameraEncoder
from networks.mechanisms.registry import INJECTIONS
from networks.mechanisms.settings import CameraSettings, camera_settings_from_metadata
from wan_ext.condition import CameraBranch, CameraCondition
from wan_ext.configs import Expert, WanVariant
from wan_ext.control_adapter import PREFIX as ADAPTER_PREFIX
from wan_ext.control_adapter import ControlAdapter
from wan_ext.dit import SelfAttention, WanDiT

LORA_PREFIX = "diffusion_model."
ENCODER_PREFIX, BRANCH_PREFIX = CameraEncoder.prefix, "camera_branches."
CAMERA_PREFIXES = (ENCODER_PREFIX, BRANCH_PREFIX, ADAPTER_PREFIX)
DOWN, UP, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The structure of a network: two networks with equal settings take each other's weights."""

    module: str
    task: str
    expert: Expert
    rank: int
    alpha: float
    dropout: float = 0.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    camera: CameraSettings | None = None

    def metadata(self) -> dict[str, str]:
        """The settings as safetensors metadata: the keys of sd-scripts and ModelSpec where they have one, and ours."""
        args: dict[str, object] = {}
        if self.include:
            args["include_patterns"] = list(self.include)
        if self.exclude:
            args["exclude_patterns"] = list(self.exclude)
        ours = {"task": self.task, "expert": self.expert}
        if self.camera:
            args |= self.camera.arguments()
            ours |= self.camera.metadata()
        return ours | {
            "ss_network_module": self.module,
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.alpha),
            "ss_network_dropout": str(self.dropout),
            "ss_network_args": json.dumps(args),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"wan-{self.task}/lora",
            "modelspec.implementation": "wan-camera-trainer",
        }


def settings_from_metadata(metadata: Mapping[str, str]) -> NetworkSettings:
    """The inverse of `NetworkSettings.metadata`.

    Raises:
        InputError: a key is missing or cannot be read.
    """
    try:
        args = json.loads(metadata["ss_network_args"])
        camera = camera_settings_from_metadata(metadata, injections=INJECTIONS)
        return NetworkSettings(
            module=metadata["ss_network_module"],
            task=metadata["task"],
            expert="high" if metadata["expert"] == "high" else "low",
            rank=int(metadata["ss_network_dim"]),
            alpha=float(metadata["ss_network_alpha"]),
            dropout=float(metadata["ss_network_dropout"]),
            include=tuple(args.get("include_patterns", ())),
            exclude=tuple(args.get("exclude_patterns", ())),
            camera=camera,
        )
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"metadata: expected those of a network saved by this trainer, cannot read {error}") from None


class Network(nn.Module):
    """LoRA adapters on one expert, and the camera mechanism that was trained with them.

    The adapters stand in the DiT too, inside its LoRALinears, and so do the camera's branches, at its attentions: that
    is where they act. This module owns what is trained, so `.parameters()` holds no frozen weight, and `.train()`,
    `.eval()` and `.to()` act on both places.

    Args:
        settings: the structure.
        adapters: by the name of the linear that each is on.
        camera_encoder: what turns poses into what the DiT is told; None: this expert hears no camera.
        camera_branches: by the number of the block that each stands in.
        camera_lr: learning rate of encoder and branches; None: that of the LoRA.
        loraplus_lr_ratio: learning rate of the LoRA's `up` over that of its `down`; None: they share one group.
        rays_encoder: what a Wan-Fun model's own adapter is told; None: the model has none.
        control_adapter: what stands in the place of that adapter, to be trained; None: it stays as it is.
    """

    def __init__(
        self,
        settings: NetworkSettings,
        adapters: Mapping[str, LoRAAdapter],
        camera_encoder: CameraEncoder | None = None,
        camera_branches: Mapping[int, CameraBranch] | None = None,
        camera_lr: float | None = None,
        rays_encoder: CameraEncoder | None = None,
        control_adapter: ControlAdapter | None = None,
        loraplus_lr_ratio: float | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.adapters = nn.ModuleDict({name.replace(".", "/"): lora for name, lora in adapters.items()})
        self.camera_encoder = camera_encoder
        branches = {str(block): branch for block, branch in (camera_branches or {}).items()}
        self.camera_branches = nn.ModuleDict(branches)
        self.camera_lr = camera_lr
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.rays_encoder = rays_encoder
        self.control_adapter = control_adapter
        self.replaced_adapter: list[ControlAdapter] = []  # a list, so that it is no part of what is trained

    @property
    def named_adapters(self) -> dict[str, LoRAAdapter]:
        """Adapters by the name of the linear that each is on."""
        return {key.replace("/", "."): lora for key, lora in self.adapters.items()}  # type: ignore[misc]

    @property
    def hears_camera(self) -> bool:
        """Whether `encode_camera` gives the DiT anything: a mechanism of this network's, or a Wan-Fun model's own."""
        return self.camera_encoder is not None or self.rays_encoder is not None

    def encode_camera(
        self, c2w: Tensor, K: Tensor, height: int, width: int, *, keep: Tensor | None = None
    ) -> CameraCondition | None:
        """What the DiT is told of the camera.

        Args:
            c2w: camera-to-world poses of every video frame, [B, T, 4, 4], T = 4 (F - 1) + 1.
            K: intrinsics in pixels of the frame, [B, T, 3, 3].
            height: of the frame, pixels.
            width: of the frame, pixels.
            keep: 0 where a clip's camera is dropped, as `draw_keep` says; None: all are heard. [B]

        Returns:
            None from a network without camera.
        """
        if not self.hears_camera:
            return None
        condition = CameraCondition()
        if self.camera_encoder is not None:
            condition = self.camera_encoder(c2w, K, height, width)
        if self.rays_encoder is not None:
            condition = replace(condition, rays=self.rays_encoder(c2w, K, height, width).rays)
        return condition if keep is None else replace(condition, keep=keep.to(c2w.device))

    def draw_keep(self, num_clips: int, generator: torch.Generator) -> Tensor | None:
        """Which clips of a training step hear their camera, as camera_dropout says; None: all. float32 [B]"""
        camera = self.settings.camera
        if camera is None or camera.dropout == 0:
            return None
        return (torch.rand(num_clips, generator=generator) >= camera.dropout).float()

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """Groups for an optimizer, each with a "name" for logs: "high_lora", "high_lora_up", "high_camera".

        The LoRA is one group, or with LoRA+ two: `down`, and `up` at loraplus_lr_ratio times the rate.

        Source: LoRA+ (arXiv 2402.12354): with one rate for both, one of them is too slow in wide layers.
        """
        expert = self.settings.expert
        groups = [{"name": f"{expert}_lora", "params": list(self.adapters.parameters()), "lr": learning_rate}]
        if self.loraplus_lr_ratio is not None:
            ups = [lora.up for lora in self.named_adapters.values()]
            groups[0]["params"] = [lora.down for lora in self.named_adapters.values()]
            groups.append({"name": f"{expert}_lora_up", "params": ups, "lr": learning_rate * self.loraplus_lr_ratio})
        parts = (self.camera_encoder, self.camera_branches, self.control_adapter)
        parameters = [parameter for part in parts if part is not None for parameter in part.parameters()]
        if parameters:
            camera_lr = learning_rate if self.camera_lr is None else self.camera_lr
            groups.append({"name": f"{expert}_camera", "params": parameters, "lr": camera_lr})
        return groups

    def lora_state(self) -> dict[str, Tensor]:
        """The LoRA under the names that ComfyUI and diffusers load: diffusion_model.<linear>.lora_A.weight, ..."""
        state: dict[str, Tensor] = {}
        for name, lora in self.named_adapters.items():
            state[f"{LORA_PREFIX}{name}.{DOWN}"] = lora.down.detach()
            state[f"{LORA_PREFIX}{name}.{UP}"] = lora.up.detach()
            state[f"{LORA_PREFIX}{name}.{ALPHA}"] = torch.tensor(float(lora.alpha))
        return state

    def camera_state(self) -> dict[str, Tensor]:
        """The camera under camera_encoder.*, camera_branches.<block>.* and control_adapter.*; empty without one."""
        encoder_prefix = ENCODER_PREFIX if self.camera_encoder is None else self.camera_encoder.prefix
        parts = (
            (encoder_prefix, self.camera_encoder),
            (BRANCH_PREFIX, self.camera_branches),
            (ADAPTER_PREFIX, self.control_adapter),
        )
        return {
            f"{prefix}{name}": tensor.detach()
            for prefix, part in parts
            if part is not None
            for name, tensor in part.state_dict().items()
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights, as `lora_state` and `camera_state` name them, into this network.

        Raises:
            InputError: a name or shape that is not this network's; nothing is changed then.
        """
        own = self.lora_state() | self.camera_state()
        check_weights(weights, {name: tensor.shape for name, tensor in own.items()})
        changed = [name for name in own if name.endswith(f".{ALPHA}") and weights[name].item() != own[name].item()]
        if changed:
            raise InputError(
                f"{changed[0]}: expected alpha {own[changed[0]].item():g}, found {weights[changed[0]].item():g}"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])  # the state shares its memory with the parameters

    def metadata(self) -> dict[str, str]:
        """The structure as safetensors metadata."""
        return self.settings.metadata()

    def remove(self, dit: WanDiT) -> None:
        """Take everything out of the DiT, which is then what it was before."""
        remove_lora(dit, self.named_adapters)
        for attention in self.seams(dit):
            attention.camera = None
        if self.replaced_adapter:
            dit.control_adapter = self.replaced_adapter.pop().to(_device_of(dit.patch_embedding))

    def merge(self, dit: nn.Module) -> None:
        """Add the LoRA to the DiT's weights and take it out; the camera stays, it is no sum with weights.

        Raises:
            InputError: the weights are in 8 bits.
        """
        merge_lora(dit, self.named_adapters)

    def seams(self, dit: nn.Module) -> list[SelfAttention]:
        """The attentions of a DiT at which this network's branches stand, in the order of the branches."""
        if not self.camera_branches:
            return []
        assert self.settings.camera is not None
        seam = INJECTIONS[self.settings.camera.injection].seam
        return [dit.get_submodule(f"blocks.{block}.{seam}") for block in self.camera_branches]  # type: ignore[misc]


def build_adapters(
    dit: nn.Module, settings: NetworkSettings, *, generator: torch.Generator | None = None
) -> dict[str, LoRAAdapter]:
    """New adapters for the linears that the settings name; the DiT is not changed."""
    linears = block_linears(dit)
    return {
        name: LoRAAdapter.new(
            in_features,
            out_features,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            generator=generator,
            device=_device_of(linears[name]),
        )
        for name, (out_features, in_features) in target_sizes(dit, settings).items()
    }


def target_sizes(dit: nn.Module, settings: NetworkSettings) -> dict[str, tuple[int, int]]:
    """The linears that the settings put a LoRA on: (out_features, in_features) by name."""
    linears = block_linears(dit)
    names = select_linears(dit, include=settings.include, exclude=settings.exclude)
    return {name: _size(linears[name]) for name in names}


def lora_shapes(dit: nn.Module, settings: NetworkSettings) -> dict[str, torch.Size]:
    """Names and shapes of the file that the settings give on a DiT: what `Network.lora_state` holds."""
    shapes: dict[str, torch.Size] = {}
    for name, (out_features, in_features) in target_sizes(dit, settings).items():
        shapes[f"{LORA_PREFIX}{name}.{DOWN}"] = torch.Size((settings.rank, in_features))
        shapes[f"{LORA_PREFIX}{name}.{UP}"] = torch.Size((out_features, settings.rank))
        shapes[f"{LORA_PREFIX}{name}.{ALPHA}"] = torch.Size(())
    return shapes


def adapters_from_weights(dit: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, LoRAAdapter]:
    """The adapters of a file, checked against the DiT, which is not changed. Ranks and alphas are the file's.

    Args:
        dit: the model that they go on.
        weights: diffusion_model.<linear>.lora_A.weight, .lora_B.weight and, where alpha is not the rank, .alpha.

    Raises:
        InputError: a key of another kind, a linear that the DiT does not have, half a pair, or another shape.
    """
    linears = block_linears(dit)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        name, suffix = _split_key(key)
        parts.setdefault(name, {})[suffix] = tensor
    if not parts:
        raise InputError(f"expected keys {LORA_PREFIX}<linear>.{DOWN}, found no tensor")
    unknown = [name for name in parts if name not in linears]
    if unknown:
        raise InputError(
            f"expected a LoRA for this model, found one of another: the model has no linear {listing(unknown, 3)} "
            f"(it has {len(linears)}, up to {list(linears)[-1]})"
        )
    adapters: dict[str, LoRAAdapter] = {}
    for name in (name for name in linears if name in parts):
        missing = [suffix for suffix in (DOWN, UP) if suffix not in parts[name]]
        if missing:
            raise InputError(f"{LORA_PREFIX}{name}: expected {DOWN} and {UP}, found no {missing[0]}")
        down, up = parts[name][DOWN], parts[name][UP]
        rank = down.shape[0] if down.ndim == 2 else 0
        size = _size(linears[name])
        if rank == 0 or down.shape != (rank, size[1]) or up.shape != (size[0], rank):
            raise InputError(
                f"{LORA_PREFIX}{name}: expected {DOWN} [rank, {size[1]}] and {UP} [{size[0]}, rank] of this model, "
                f"found {[*down.shape]} and {[*up.shape]}; the LoRA belongs to another model"
            )
        given = parts[name].get(ALPHA)
        if given is not None and (given.numel() != 1 or not 0 < float(given) < float("inf")):
            raise InputError(f"{LORA_PREFIX}{name}.{ALPHA}: expected one number above 0, found {given.tolist()}")
        alpha = float(rank) if given is None else float(given)
        device = _device_of(linears[name])
        adapters[name] = LoRAAdapter(down.to(device, torch.float32), up.to(device, torch.float32), alpha=alpha)
    return adapters


def attach(dit: WanDiT, network: Network, *, multiplier: float = 1.0) -> Network:
    """Freeze the DiT, put the network's LoRA, branches and camera adapter into it and return the network.

    Raises:
        InputError: another network's branches stand there already; the DiT is unchanged then.
    """
    seams = network.seams(dit)
    if any(attention.camera is not None for attention in seams):
        raise InputError(
            "expected at most one network that hears the camera inside the blocks, found two; leave one out"
        )
    dit.requires_grad_(False)
    inject_lora(dit, network.named_adapters, multiplier=multiplier)
    for attention, branch in zip(seams, network.camera_branches.values(), strict=True):
        attention.camera = branch  # type: ignore[assignment]
    if network.control_adapter is not None:
        assert dit.control_adapter is not None
        network.replaced_adapter.append(dit.control_adapter.to("cpu"))  # for `remove`; not where memory is short
        dit.control_adapter = network.control_adapter
    network.requires_grad_(True)
    return network


def check_structure(rank: int, alpha: float, dropout: float) -> None:
    """Refuse a rank, alpha or dropout that no LoRA can have. Raises InputError."""
    if rank < 1:
        raise InputError(f"--network_dim: expected a rank of at least 1, found {rank}")
    if not 0 < alpha < float("inf"):
        raise InputError(f"--network_alpha: expected a number above 0, found {alpha}")
    if not 0 <= dropout < 1:
        raise InputError(f"--network_dropout: expected a share from 0 to below 1, found {dropout}")


def check_belongs(settings: NetworkSettings, variant: WanVariant, expert: Expert) -> None:
    """Refuse a network that was trained on another task or on the other expert. Raises InputError."""
    if settings.task != variant.name:
        raise InputError(
            f"expected a network of task {variant.name}, found one of task {settings.task}; give --task "
            f"{settings.task} or another network"
        )
    if settings.expert != expert:
        raise InputError(
            f"expected a network of the {expert}-noise expert, found one of the {settings.expert}-noise expert; give "
            f"the file that ends in _{expert}_noise"
        )


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Refuse weights whose names or shapes are not the expected ones. Raises InputError."""
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unexpected:
        lists = [
            f"{listing(names, 3)} {word}" for names, word in ((missing, "missing"), (unexpected, "unexpected")) if names
        ]
        raise InputError(
            f"expected the {len(expected)} weights of this network, found {len(found)}: {'; '.join(lists)}"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise InputError(f"{name}: expected shape {[*shape]}, found {[*found[name].shape]}")


def _split_key(key: str) -> tuple[str, str]:
    for suffix in (DOWN, UP, ALPHA):
        if key.startswith(LORA_PREFIX) and key.endswith(f".{suffix}"):
            return key[len(LORA_PREFIX) : -len(suffix) - 1], suffix
    raise InputError(
        f"{key}: unexpected key; expected {LORA_PREFIX}<linear>.{DOWN}, .{UP} or .{ALPHA}, the names of ComfyUI"
    )


def _device_of(linear: nn.Module) -> torch.device:
    return next(tensor.device for tensor in (*linear.parameters(), *linear.buffers()))


def _size(linear: nn.Module) -> tuple[int, int]:
    return linear.out_features, linear.in_features  # type: ignore[return-value]
