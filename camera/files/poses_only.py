"""Files that hold poses and no intrinsics: the field of view is the user's, or a note that the writer left in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from camera.files.path_notes import PathNotes
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath, intrinsics_from_fov
from core.errors import InputError

_TOLERANCE = 1e-6  # of a focal length or a frame's side: what counts as constant, square and centred


def fov_intrinsics(
    file: Path, settings: CameraFileSettings, notes: PathNotes, frames: SourceFrames, num_frames: int
) -> Tensor:
    """K [T, 3, 3] in pixels: square pixels, a centred camera, one field of view.

    Args:
        file: for errors.
        settings: `fov_degrees` along `fov_axis`.
        notes: of the file; its `fov_degrees` is horizontal.
        frames: of the source.
        num_frames: T.

    Raises:
        InputError: nobody says the field of view, or file and user disagree.
    """
    fov, axis = settings.fov_degrees, settings.fov_axis
    if notes.fov_degrees is not None:
        if fov is not None:
            raise InputError(
                f"{file}: expected one field of view, found {notes.fov_degrees:g} degrees in the file and {fov:g} as "
                "camera_fov; leave camera_fov out"
            )
        fov, axis = notes.fov_degrees, "horizontal"
    if fov is None:
        raise InputError(
            f"{file}: expected a field of view, found poses only; give it in degrees as camera_fov in the "
            "TOML (--camera_fov as a flag), and fov_axis if it is vertical"
        )
    angles = torch.full((num_frames,), fov, dtype=torch.float64)
    return intrinsics_from_fov(angles, height=frames.height, width=frames.width, axis=axis)


def fov_of(path: CameraPath, file: Path) -> float:
    """The horizontal field of view in degrees of a path that a file without intrinsics can hold.

    Raises:
        InputError: intrinsics that change, pixels that are not square, or a camera that is not centred.
    """
    fx, fy, cx, cy = path.K[:, 0, 0], path.K[:, 1, 1], path.K[:, 0, 2], path.K[:, 1, 2]
    off_centre = torch.maximum((cx / path.width - 0.5).abs(), (cy / path.height - 0.5).abs())
    changing = (fx / fx[0] - 1).abs()
    misfit = torch.stack([(fy / fx - 1).abs(), off_centre, changing]).amax(0) > _TOLERANCE  # [T]
    if misfit.any():
        frame = int(misfit.nonzero()[0])
        raise InputError(
            f"{file}: expected one field of view, square pixels and a centred camera, because this format holds poses "
            f"only, found fx {fx[frame]:.6g}, fy {fy[frame]:.6g}, cx {cx[frame]:.6g}, cy {cy[frame]:.6g} in frame "
            f"{frame} of {path.height}x{path.width}; write it as nerf or colmap instead"
        )
    return float(path.fov_degrees()[0])
