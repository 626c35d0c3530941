"""NumPy and safetensors files of poses and intrinsics, whose conventions are recorded in the file or named by the user.

Such files come from many programs (lingbot, ViPE, VGGT, DUSt3R, Depth-Anything-3, OmniCam, RealCam-Vid) and look alike:
the same [N, 4, 4] may be camera-to-world or world-to-camera, with y down or y up. Nothing of that is guessed. A name
that says it (c2w, w2c, ...) counts as recorded; so do entries `direction` and `axes`, which the writers here leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camera.files.matrices import (
    LARGEST_FOCAL,
    SMALLEST_PIXEL_FOCAL,
    frame_places,
    pinhole,
    pixel_intrinsics,
    poses_from_matrices,
)
from camera.files.path_notes import PathNotes, path_with_notes
from camera.files.poses_only import fov_intrinsics
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath
from core.errors import InputError, listing

POSE_NAMES: dict[str, str | None] = {  # name of the matrices -> the direction that it says
    "c2w": "c2w",
    "cam2world": "c2w",
    "cam_c2w": "c2w",
    "w2c": "w2c",
    "world2cam": "w2c",
    "extrinsics": None,
    "extrinsic": None,
    "poses": None,
    "pose": None,
    "im_poses": None,
    "camera_poses": None,
    "data": None,  # of ViPE
}
INTRINSICS_NAMES = ("intrinsics", "intrinsic", "K")
FOCAL_NAMES = ("focals", "focal", "im_focals")
CENTRE_NAMES = ("principal_points", "pp", "im_pp")
INDEX_NAMES = ("inds", "frame_indices")


def path_from_arrays(
    file: Path,
    arrays: Mapping[str, Tensor],
    notes: PathNotes,
    settings: CameraFileSettings,
    frames: SourceFrames,
    *,
    normalised: bool,
) -> CameraPath:
    """A path from named arrays.

    Args:
        file: for errors.
        arrays: float64; poses [T, 3 or 4, 4] under a name of `POSE_NAMES`, and intrinsics [4], [T, 4], [3, 3] or
            [T, 3, 3], or focal lengths [T]. Leading sides of length 1 of poses [1, T, ...] are dropped.
        notes: of the file.
        settings: direction, axes, size and fov_degrees count where the file does not say them.
        frames: of the source.
        normalised: whether intrinsics are divided by the frame's width and height, instead of in pixels.

    Raises:
        InputError: something is missing, contradicts the file, or is wrong; names the file and the array or frame.
    """
    name = _one_of(file, arrays, POSE_NAMES, "poses")
    if name is None:
        raise InputError(
            f"{file}: expected poses under one of the names {', '.join(POSE_NAMES)}, found "
            f"{listing(arrays) if arrays else 'nothing'}; rename the array"
        )
    poses = arrays[name]
    while poses.ndim > 3 and len(poses) == 1:
        poses = poses[0]
    if poses.ndim != 3 or poses.shape[1:] not in ((4, 4), (3, 4)) or len(poses) == 0:
        raise InputError(
            f"{file} {name}: expected matrices [frames, 4, 4] or [frames, 3, 4], found {[*arrays[name].shape]}"
        )
    _require_all_frames(file, arrays, len(poses))
    direction = _stated(file, "direction", POSE_NAMES[name], notes.direction, settings.direction)
    axes = _stated(file, "axes", notes.axes, settings.axes)
    c2w = poses_from_matrices(
        poses,
        direction="w2c" if direction == "w2c" else "c2w",
        axes=axes,  # type: ignore[arg-type]  # one of the names that settings and notes let through
        where=frame_places(file, len(poses), name),
    )
    return path_with_notes(
        file, c2w, _intrinsics(file, arrays, notes, settings, frames, len(poses), normalised), notes, frames
    )


def _stated(file: Path, what: str, *sources: str | None) -> str:
    """What file and user agree on."""
    said = [source for source in sources if source is not None]
    if not said:
        known = "c2w or w2c" if what == "direction" else "opencv, opengl, pytorch3d or unreal"
        raise InputError(
            f"{file}: expected the {what} of its matrices, which numbers do not show, found none recorded; set "
            f"camera_{what} in the TOML (--camera_{what} as a flag) to {known}"
        )
    if len(set(said)) > 1:
        raise InputError(
            f"{file}: expected one {what} of its matrices, found {said[0]} recorded in the file and {said[-1]} as "
            f"well; leave camera_{what} out, or mend the file"
        )
    return said[0]


def _intrinsics(
    file: Path,
    arrays: Mapping[str, Tensor],
    notes: PathNotes,
    settings: CameraFileSettings,
    frames: SourceFrames,
    num_frames: int,
    normalised: bool,
) -> Tensor:
    """K [T, 3, 3] in pixels of the source's frames."""
    name = _one_of(file, arrays, INTRINSICS_NAMES, "intrinsics") or _one_of(file, arrays, FOCAL_NAMES, "focal lengths")
    if name is None:
        return fov_intrinsics(file, settings, notes, frames, num_frames)
    if settings.fov_degrees is not None:
        raise InputError(f"{file}: camera_fov does nothing, because the file has intrinsics ({name}); leave it out")
    is_focal = name in FOCAL_NAMES
    in_pixels = not normalised or name == "K" or is_focal
    size = _size(file, notes, settings, name) if in_pixels else (1, 1)
    numbers = _focals(file, arrays, name, size) if is_focal else _four_numbers(file, name, arrays[name])
    if len(numbers) not in (1, num_frames):
        raise InputError(
            f"{file} {name}: expected intrinsics of {num_frames} frames, or one for all, found {len(numbers)}"
        )
    focals = numbers[:, :2]
    if not numbers.isfinite().all() or not (focals > 0).all():
        raise InputError(f"{file} {name}: expected finite numbers and focal lengths above 0, found {focals.min():g}")
    if in_pixels and focals.max() < SMALLEST_PIXEL_FOCAL:
        raise InputError(
            f"{file} {name}: expected focal lengths in pixels, found {focals.max():g}, which looks divided by the "
            "frame's size; multiply fx and cx by the width, fy and cy by the height"
        )
    if not in_pixels and focals.max() > LARGEST_FOCAL:
        raise InputError(
            f"{file} {name}: expected focal lengths divided by the frame's width and height, found {focals.max():g}, "
            "which looks like pixels; divide fx and cx by the width, fy and cy by the height"
        )
    K = pixel_intrinsics(numbers, height=frames.height / size[0], width=frames.width / size[1])
    return K.expand(num_frames, 3, 3).clone()


def _four_numbers(file: Path, name: str, intrinsics: Tensor) -> Tensor:
    """fx fy cx cy, [1 or T, 4]."""
    while intrinsics.ndim > 3 and len(intrinsics) == 1:
        intrinsics = intrinsics[0]
    if intrinsics.ndim == 1 and len(intrinsics) == 4:
        return intrinsics[None]
    if intrinsics.ndim == 2 and intrinsics.shape[1] == 4:
        return intrinsics
    if intrinsics.shape == (3, 3):
        intrinsics = intrinsics[None]
    if intrinsics.ndim != 3 or intrinsics.shape[1:] != (3, 3):
        raise InputError(
            f"{file} {name}: expected fx fy cx cy [4] or [frames, 4], or matrices [3, 3] or [frames, 3, 3], found "
            f"{[*intrinsics.shape]}"
        )
    numbers = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1], intrinsics[:, 0, 2], intrinsics[:, 1, 2]], -1)
    if not torch.allclose(pinhole(numbers), intrinsics, rtol=0, atol=1e-6):
        raise InputError(f"{file} {name}: expected matrices [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], found others")
    return numbers


def _focals(file: Path, arrays: Mapping[str, Tensor], name: str, size: tuple[int, int]) -> Tensor:
    """fx fy cx cy of focal lengths in pixels, [1 or T, 4]; centred unless principal points are there."""
    focals = arrays[name].reshape(-1, 1)
    if arrays[name].numel() != max(arrays[name].shape, default=1):
        raise InputError(
            f"{file} {name}: expected one focal length for each frame, found shape {[*arrays[name].shape]}"
        )
    centre_name = _one_of(file, arrays, CENTRE_NAMES, "principal points")
    centre = torch.tensor([[size[1] / 2, size[0] / 2]], dtype=torch.float64)
    if centre_name is not None:
        centre = arrays[centre_name].reshape(-1, arrays[centre_name].shape[-1]) if arrays[centre_name].ndim else centre
        if centre.shape[1] != 2 or len(centre) not in (1, len(focals)):
            raise InputError(f"{file} {centre_name}: expected [frames, 2], found {[*arrays[centre_name].shape]}")
    return torch.cat([focals, focals, centre.expand(len(focals), 2)], -1)


def _size(file: Path, notes: PathNotes, settings: CameraFileSettings, name: str) -> tuple[int, int]:
    """Height and width that intrinsics in pixels belong to."""
    recorded = None if notes.height is None or notes.width is None else (notes.height, notes.width)
    if recorded is not None and settings.size not in (None, recorded):
        assert settings.size is not None
        raise InputError(
            f"{file} {name}: expected one size of the frames that it belongs to, found {recorded[1]}x{recorded[0]} in "
            f"the file and {settings.size[1]}x{settings.size[0]} as camera_size; leave camera_size out"
        )
    size = recorded or settings.size
    if size is None:
        raise InputError(
            f"{file} {name}: expected the size of the frames that these pixels belong to, found none "
            "recorded; set camera_size in the TOML to [width, height] (--camera_size HEIGHT WIDTH as a flag)"
        )
    return size


def _one_of(file: Path, arrays: Mapping[str, Any], names: Mapping[str, Any] | tuple[str, ...], what: str) -> str | None:
    """The only one of these names that is there; None without any."""
    found = [name for name in names if name in arrays]
    if len(found) > 1:
        raise InputError(f"{file}: expected one array of {what}, found {' and '.join(found)}; keep one")
    return found[0] if found else None


def _require_all_frames(file: Path, arrays: Mapping[str, Tensor], num_frames: int) -> None:
    """Where the file numbers its frames, they must be 0, 1, 2, ...: a gap would shift every later pose."""
    name = _one_of(file, arrays, INDEX_NAMES, "frame numbers")
    if name is None:
        return
    numbers = arrays[name].flatten().tolist()
    if numbers != list(range(num_frames)):
        missing = sorted(set(range(num_frames)) - set(numbers))
        raise InputError(
            f"{file} {name}: expected the frames 0 to {num_frames - 1} in order, one for each pose, found "
            f"{len(numbers)} numbers{f', without {missing[0]}' if missing else ' in another order'}"
        )


def with_conventions(notes: PathNotes, path: CameraPath, direction: str) -> PathNotes:
    """The notes of a path as its arrays are written here: OpenCV axes, and the size that pixels belong to."""
    return replace(notes, direction=direction, axes="opencv", height=path.height, width=path.width)
