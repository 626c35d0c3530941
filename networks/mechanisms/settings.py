"""What is chosen of a camera mechanism: read from `--network_args`, written into files and read back.

    injection=NAME        which mechanism
    camera_hidden=512     width of the encoder's hidden layers
    camera_rank=64        width of what each block reads of the camera; ray_attention: width of its attention
    camera_rank=full      self_attention: a full matrix after it instead of a product of two
    camera_blocks=0-19    the blocks that hear the camera, counted from 0; all if not given
    camera_absolute=yes   ray_attention: also a term that knows where in the world each token looks from
    camera_experts=both   which experts hear the camera: high, low or both
    camera_dropout=0      share of the clips of a training step that do not hear their camera
    train_control_adapter=yes   Wan-Fun models: their own camera adapter is trained as well (--train_control_adapter)

A mechanism names the options that it uses; any other one given for it is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from core.errors import InputError, nearest
from networks.arguments import read_choice, read_int, read_range, read_share
from wan_ext.configs import Expert, WanVariant

Rank = int | Literal["full"]

SHARED_OPTIONS = ("injection", "camera_experts", "camera_dropout", "camera_lr", "train_control_adapter")
"""What every mechanism uses."""
OPTIONS = (*SHARED_OPTIONS, "camera_hidden", "camera_rank", "camera_blocks", "camera_absolute")
"""Everything about the camera that `--network_args` may say."""


@dataclass(frozen=True, kw_only=True)
class CameraSettings:
    """How a network hears of the camera, and in which coordinates. None: the mechanism has no such choice."""

    injection: str
    hidden: int | None = None
    """Width of the encoder's hidden layers."""
    rank: Rank | None = None
    """Width of what a block reads of the camera, or of its attention."""
    blocks: tuple[int, int] | None = None
    """First and last block that hears the camera."""
    absolute: bool | None = None
    """Whether relative attention is helped by a term in world coordinates."""
    experts: Literal["high", "low", "both"] = "both"
    """Which experts hear the camera."""
    dropout: float = 0.0
    """Share of the clips of a training step that do not hear their camera."""
    train_control_adapter: bool = False
    """Whether the adapter that a Wan-Fun model has of its own is trained; it is heard in any case."""
    pose_frame: str
    """"scene" or "first", as in CameraPath: a network that learnt one does not understand the other."""
    scale_rule: str = "none"
    """How the translations it learnt were scaled."""

    def heard_by(self, expert: Expert) -> bool:
        """Whether an expert has a part of the mechanism."""
        return self.experts in ("both", expert)

    @property
    def block_numbers(self) -> range:
        """The blocks that hear the camera, where the mechanism stands in blocks."""
        return range(0) if self.blocks is None else range(self.blocks[0], self.blocks[1] + 1)

    def arguments(self) -> dict[str, object]:
        """The settings as `--network_args` would name them."""
        given = {
            "injection": self.injection,
            "camera_hidden": self.hidden,
            "camera_rank": self.rank,
            "camera_blocks": None if self.blocks is None else "-".join(map(str, self.blocks)),
            "camera_absolute": None if self.absolute is None else ("yes" if self.absolute else "no"),
            "camera_experts": None if self.experts == "both" else self.experts,
            "camera_dropout": self.dropout or None,
            "train_control_adapter": "yes" if self.train_control_adapter else None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def metadata(self) -> dict[str, str]:
        """The settings as safetensors metadata."""
        given = {name: str(value) for name, value in self.arguments().items()}
        return given | {"pose_frame": self.pose_frame, "scale_rule": self.scale_rule}


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a mechanism takes where nothing is asked for; None: it has no such choice."""

    hidden: int | None = None
    rank: int | None = None
    in_blocks: bool = False
    """Whether the mechanism stands in blocks."""
    full_rank: bool = False
    """Whether camera_rank=full means something."""
    absolute: bool = False
    """Whether camera_absolute means something."""

    @property
    def options(self) -> tuple[str, ...]:
        """The names of `--network_args` that the mechanism uses."""
        own = {
            "camera_hidden": self.hidden is not None,
            "camera_rank": self.rank is not None,
            "camera_blocks": self.in_blocks,
            "camera_absolute": self.absolute,
        }
        return (*SHARED_OPTIONS, *(name for name, used in own.items() if used))


def read_camera_settings(
    network_args: Mapping[str, str],
    *,
    injection: str,
    defaults: Defaults,
    variant: WanVariant,
    pose_frame: str,
    scale_rule: str,
) -> CameraSettings:
    """The settings that `--network_args` ask for.

    Args:
        network_args: of the command line.
        injection: the mechanism.
        defaults: of the mechanism.
        variant: the task; says how many blocks and experts there are.
        pose_frame: of the data set.
        scale_rule: of the data set.

    Raises:
        InputError: an option that the mechanism does not use, or a value out of range.
    """
    for name in network_args:
        if name in OPTIONS and name not in defaults.options:
            raise InputError(
                f"network argument {name}: injection {injection} uses {', '.join(defaults.options)}, found {name}; "
                f"leave it out or choose another injection"
            )
    rank: Rank | None = None
    if defaults.full_rank and network_args.get("camera_rank") == "full":
        rank = "full"
    elif defaults.rank is not None:
        rank = read_int(network_args, "camera_rank", defaults.rank)
    absolute = None
    if defaults.absolute:
        usual = "yes" if pose_frame == "scene" else "no"
        absolute = read_choice(network_args, "camera_absolute", ("yes", "no"), usual) == "yes"
    hidden = defaults.hidden
    if hidden is not None:
        hidden = read_int(network_args, "camera_hidden", hidden)
        if absolute is False:
            if "camera_hidden" in network_args:
                raise InputError(
                    f"network argument camera_hidden: without camera_absolute=yes injection {injection} has no encoder "
                    f"that could be {hidden} wide; leave it out"
                )
            hidden = None
    last = variant.dit.num_layers - 1
    experts = read_choice(network_args, "camera_experts", ("high", "low", "both"), "both")
    if experts != "both" and experts not in variant.experts:
        raise InputError(f"network argument camera_experts: {variant.name} has one expert, called low; found {experts}")
    train_control_adapter = read_choice(network_args, "train_control_adapter", ("yes", "no"), "no") == "yes"
    if train_control_adapter and not variant.hears_camera:
        raise InputError(
            f"--train_control_adapter: expected a model with a camera adapter (Wan-Fun), found {variant.name}, which "
            f"has none; --network_args injection=plucker gives it a new one, which is always trained"
        )
    return CameraSettings(
        injection=injection,
        hidden=hidden,
        rank=rank,
        blocks=read_range(network_args, "camera_blocks", last=last) if defaults.in_blocks else None,
        absolute=absolute,
        experts=experts,  # type: ignore[arg-type]
        dropout=read_share(network_args, "camera_dropout"),
        train_control_adapter=train_control_adapter,
        pose_frame=pose_frame,
        scale_rule=scale_rule,
    )


def camera_settings_from_metadata(metadata: Mapping[str, str], *, injections: Collection[str]) -> CameraSettings | None:
    """The inverse of `CameraSettings.metadata`; None where the file knows no camera.

    Raises:
        InputError: a mechanism that this trainer does not have.
        KeyError, ValueError: metadata that it did not write.
    """
    if "injection" not in metadata:
        return None
    injection = metadata["injection"]
    if injection not in injections:
        raise InputError(
            f"metadata: expected injection {', '.join(injections)}, found {injection}"
            f"{nearest(injection, injections)}; the file comes from another version of this trainer"
        )
    rank, blocks = metadata.get("camera_rank"), metadata.get("camera_blocks")
    first_last = None if blocks is None else tuple(map(int, blocks.split("-")))
    return CameraSettings(
        injection=injection,
        hidden=int(metadata["camera_hidden"]) if "camera_hidden" in metadata else None,
        rank=rank if rank is None or rank == "full" else int(rank),  # type: ignore[arg-type]
        blocks=first_last,  # type: ignore[arg-type]
        absolute={"yes": True, "no": False}[metadata["camera_absolute"]] if "camera_absolute" in metadata else None,
        experts=metadata.get("camera_experts", "both"),  # type: ignore[arg-type]
        dropout=float(metadata.get("camera_dropout", 0)),
        train_control_adapter={"yes": True, "no": False}[metadata.get("train_control_adapter", "no")],
        pose_frame=metadata["pose_frame"],
        scale_rule=metadata["scale_rule"],
    )
