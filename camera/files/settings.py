"""How a camera file is to be read: its format, and what the file itself may leave unsaid. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from core.errors import InputError, nearest

CameraFormat = Literal[
    "auto", "ten", "re10k", "comfy", "tum", "recammaster", "nerf", "colmap", "arrays", "safetensors", "tagged"
]
FovAxis = Literal["horizontal", "vertical"]
Direction = Literal["c2w", "w2c"]
Axes = Literal["opencv", "opengl", "pytorch3d", "unreal"]

CAMERA_FORMATS: tuple[CameraFormat, ...] = get_args(CameraFormat)
FOV_AXES: tuple[FovAxis, ...] = get_args(FovAxis)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
AXES: tuple[Axes, ...] = get_args(Axes)
CAMERA_SUFFIXES = (".txt", ".json", ".npy", ".npz", ".safetensors")  # of camera files that belong to a video

KEYS = {  # setting -> key in a dataset TOML, and flag
    "format": "camera_format",
    "direction": "camera_direction",
    "axes": "camera_axes",
    "fov_degrees": "camera_fov",
    "name": "camera_name",
    "size": "camera_size",
    "fov_axis": "fov_axis",
}


@dataclass(frozen=True, kw_only=True)
class CameraFileSettings:
    """What the user says about a camera file. docs/cameras.md tells which format needs which of it.

    Args:
        format: a name of docs/cameras.md, or "auto" to recognise it from the content.
        fov_axis: the side of the frame that a field of view spans, in a 10-number file and in `fov_degrees`.
        direction: "c2w" or "w2c": what matrices without a fixed direction map (arrays, safetensors).
        axes: "opencv" (right, down, forward), "opengl" (right, up, backward), "pytorch3d" (left, up, forward) or
            "unreal" (forward, right, up): the camera's axes in matrices without fixed ones (arrays, safetensors).
        fov_degrees: field of view of files that hold poses only, between 0 and 180.
        name: which camera of a file with several; in a COLMAP model, the folder of its images.
        size: height and width in pixels that intrinsics in pixels belong to, where the file does not say it.

    Raises:
        InputError: an unknown name, or a number out of range.
    """

    format: CameraFormat = "auto"
    fov_axis: FovAxis = "horizontal"
    direction: Direction | None = None
    axes: Axes | None = None
    fov_degrees: float | None = None
    name: str | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _require_known("camera format", self.format, CAMERA_FORMATS)
        _require_known("fov_axis", self.fov_axis, FOV_AXES)
        if self.direction is not None:
            _require_known("camera direction", self.direction, DIRECTIONS)
        if self.axes is not None:
            _require_known("camera axes", self.axes, AXES)
        if self.fov_degrees is not None and not 0 < self.fov_degrees < 180:
            raise InputError(f"camera field of view: expected between 0 and 180 degrees, found {self.fov_degrees:g}")
        if self.name is not None and not self.name.strip():
            raise InputError("camera name: expected the name of a camera, found nothing")
        if self.size is not None and not all(0 < side < math.inf for side in self.size):
            raise InputError(f"camera size: expected a height and a width in pixels, found {self.size}")


@dataclass(frozen=True, kw_only=True)
class SourceFrames:
    """The frames that a camera file has poses for: those of the video or folder itself, before any resize or crop.

    Args:
        height: pixels.
        width: pixels.
        fps: frames per second; None takes what the file says, if it does.
        names: of the image files, in order, where the frames are files: formats that name images are matched by them.
        count: how many they are, for a format that describes a motion in seconds; None: as many as the motion lasts.
    """

    height: int
    width: int
    fps: float | None = None
    names: tuple[str, ...] | None = None
    count: int | None = None


def _require_known(what: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise InputError(f"{what}: expected {' or '.join(known)}, found {found!r}{nearest(found, known)}")
