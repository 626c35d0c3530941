"""What decides a generated video: every setting from the user, else from the network's metadata, else from the task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from core.errors import InputError
from wan_ext.configs import WanVariant
from wan_ext.sampling import Solver


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every number that decides the video, wherever it came from."""

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    solver: Solver
    shift: float
    guidance_scale: float
    guidance_scale_high_noise: float
    camera_guidance: float
    boundary: float | None
    seed: int


FROM_METADATA = ("prompt", "height", "width", "num_frames", "fps")
"""Settings that a network's files name, because it was trained on such clips."""


def settle(
    given: Mapping[str, Any], *, variant: WanVariant, metadata: Mapping[str, str], network: str
) -> tuple[Settings, dict[str, str]]:
    """Each setting from what was given, else from the network's metadata, else from the task.

    Args:
        given: settings by name; None, or a name that is missing, is not given.
        variant: the task.
        metadata: of the network whose camera or LoRA is used; empty without one.
        network: its file's name, to say where a setting came from.

    Returns:
        The settings, and for each where it came from: "given", "from NETWORK" or "default of TASK".

    Raises:
        InputError: no prompt anywhere, or a number that cannot be filmed.
    """
    defaults: dict[str, Any] = {
        "prompt": "",
        "negative_prompt": variant.negative_prompt,
        "height": variant.height,
        "width": variant.width,
        "num_frames": variant.num_frames,
        "fps": variant.fps,
        "steps": variant.steps,
        "solver": "unipc",
        "shift": variant.shift,
        "guidance_scale": variant.guidance_scale,
        "guidance_scale_high_noise": variant.guidance_scale_high_noise or variant.guidance_scale,
        "camera_guidance": 1.0,
        "boundary": variant.boundary,
        "seed": 0,
    }
    values, sources = dict[str, Any](), dict[str, str]()
    for name in (field.name for field in fields(Settings)):
        if given.get(name) is not None:
            values[name], sources[name] = given[name], "given"
        elif name in FROM_METADATA and metadata.get(name):
            values[name], sources[name] = type(defaults[name])(metadata[name]), f"from {network}"
        else:
            values[name], sources[name] = defaults[name], f"default of {variant.name}"
    settings = Settings(**values)
    _require_sensible(settings, variant)
    return settings, sources


def leading_metadata(networks: Mapping[Path, Mapping[str, str]]) -> tuple[str, Mapping[str, str]]:
    """The network that names what is not given: the first with a camera, else the first.

    Args:
        networks: metadata by LoRA file, of both experts' files and of any further LoRAs.

    Returns:
        The name of its file and its metadata; "" and nothing without networks.

    Raises:
        InputError: two networks learnt cameras in different pose frames or scales; one path cannot serve both.
    """
    with_camera = {file: metadata for file, metadata in networks.items() if metadata.get("injection")}
    file, metadata = next(iter((with_camera or networks).items()), (Path(), {}))
    for key, label in (("pose_frame", "pose frame"), ("scale_rule", "scale rule")):
        for other, theirs in with_camera.items():
            if theirs.get(key) != metadata.get(key):
                raise InputError(
                    f"{other}: expected the {label} of {file.name}, {metadata.get(key)!r}, found {theirs.get(key)!r}; "
                    "one camera path cannot serve both, so generate with networks of one kind"
                )
    return file.name, metadata


def _require_sensible(settings: Settings, variant: WanVariant) -> None:
    if not settings.prompt:
        raise InputError("--prompt: not given, and the metadata of --network_weights names none")
    if settings.boundary != variant.boundary and (variant.boundary is None or not 0 < (settings.boundary or 0) < 1):
        raise InputError(
            f"--timestep_boundary {settings.boundary}: expected a number between 0 and 1, for a task of two experts"
        )
    stride = variant.spatial_stride
    if settings.height % stride or settings.width % stride or settings.height < stride or settings.width < stride:
        fit = " ".join(str(max(stride, round(size / stride) * stride)) for size in (settings.height, settings.width))
        raise InputError(
            f"video_size: height and width must be multiples of {stride}, found {settings.height} {settings.width}; "
            f"the nearest that fits is {fit}"
        )
    if settings.num_frames < 1 or settings.steps < 1:
        raise InputError(
            f"video_length and infer_steps: expected at least 1, found {settings.num_frames}, {settings.steps}"
        )
    if not 0 <= settings.camera_guidance < math.inf:
        raise InputError(f"--camera_guidance: expected a number of at least 0, found {settings.camera_guidance}")
