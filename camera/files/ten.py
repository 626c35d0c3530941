"""The 10-number camera as a text file, one line a frame: camera/ten_numbers.py says what the numbers are.

The field of view is horizontal, unless the file has a comment line `# fov_axis: vertical` or the caller says so.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from camera.files.number_lines import Line, content_lines, no_rows, number_text, read_lines, read_rows
from camera.files.path_notes import comment_lines, comment_notes, notes_of, path_with_notes
from camera.files.settings import FOV_AXES, CameraFileSettings, SourceFrames
from camera.path import CameraPath, FovAxis
from camera.ten_numbers import from_ten_numbers, scaled_to_one, ten_numbers
from core.errors import InputError, nearest
from core.files import atomic_path

COLUMNS = 10
LAYOUT = "x y z, camera right axis, camera down axis, field of view in degrees"

_SMALLEST_LENGTH = 1e-9  # of a rotation vector
_SMALLEST_SINE = 1e-3  # of the angle between the two rotation vectors
_PINHOLE_TOLERANCE = 1e-6  # of a focal length or a frame's side: what counts as centred and square
_FOV_AXIS_COMMENT = re.compile(r"\s*#\s*fov_axis\s*[:=]\s*(\S+)\s*", re.IGNORECASE)


def read_ten(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """A path from a 10-number file.

    Args:
        file: text, comments included.
        settings: its fov_axis counts where the file itself does not say one.
        frames: of the video.

    Raises:
        InputError: names the file and the line.
    """
    lines = read_lines(file)
    rows = read_rows(content_lines(lines), COLUMNS, LAYOUT, _check_row)
    if not rows:
        raise no_rows(file)
    numbers = torch.tensor(rows, dtype=torch.float64)  # [T, 10]
    fov_axis = _fov_axis_of(lines) or settings.fov_axis
    c2w, K = from_ten_numbers(numbers, height=frames.height, width=frames.width, fov_axis=fov_axis)
    return path_with_notes(file, c2w, K, comment_notes(lines), frames)


def write_ten(path: CameraPath, file: Path | str) -> None:
    """Write a path as a 10-number file, with 15 digits. Comments keep its pose frame, scale rule, fps and mean depth.

    Args:
        path: square pixels and a centred principal point, as the format has one field of view and nothing else.
        file: to be written.

    Raises:
        InputError: the intrinsics do not fit the format.
    """
    fx, fy, cx, cy = path.K[:, 0, 0], path.K[:, 1, 1], path.K[:, 0, 2], path.K[:, 1, 2]
    off_centre = torch.maximum((cx / path.width - 0.5).abs(), (cy / path.height - 0.5).abs())
    misfit = torch.maximum((fy / fx - 1).abs(), off_centre) > _PINHOLE_TOLERANCE  # [T]
    if misfit.any():
        frame = int(misfit.nonzero()[0])
        raise InputError(
            f"{file}: expected square pixels and a centred camera, which is all that ten numbers can hold, found fx "
            f"{fx[frame]:.6g}, fy {fy[frame]:.6g}, cx {cx[frame]:.6g}, cy {cy[frame]:.6g} in frame {frame} of "
            f"{path.height}x{path.width}; write it as RealEstate10K instead"
        )
    header = ["# x y z  right_x right_y right_z  down_x down_y down_z  field_of_view_degrees", "# fov_axis: horizontal"]
    header += comment_lines(notes_of(path))
    rows = ten_numbers(path.c2w, path.K, path.width).tolist()
    text = "\n".join([*header, *(" ".join(map(number_text, row)) for row in rows)])
    with atomic_path(file) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _check_row(line: Line, row: list[float]) -> None:
    numbers = torch.tensor(row, dtype=torch.float64)
    right, down = numbers[3:6], numbers[6:9]
    for name, vector, columns in (("right", right, "4 to 6"), ("down", down, "7 to 9")):
        if vector.abs().max() < _SMALLEST_LENGTH:
            raise line.error(f"expected the camera's {name} axis in columns {columns}, found a zero vector")
    right, down = scaled_to_one(right), scaled_to_one(down)
    if torch.linalg.cross(right, down).norm() < _SMALLEST_SINE * right.norm() * down.norm():
        raise line.error("expected two axes at an angle in columns 4 to 9, found parallel ones, which give no rotation")
    if not 0 < row[9] < 180:
        raise line.error(f"expected a field of view between 0 and 180 degrees in column 10, found {row[9]:g}")


def _fov_axis_of(lines: list[Line]) -> FovAxis | None:
    """What the file's own comment says of its field of view; None where it says nothing."""
    stated: FovAxis | None = None
    for line in lines:
        comment = _FOV_AXIS_COMMENT.fullmatch(line.text)
        if comment is None:
            continue
        name = comment.group(1).lower()
        axis = next((axis for axis in FOV_AXES if axis == name), None)
        if axis is None:
            raise line.error(f"expected fov_axis horizontal or vertical, found {name!r}{nearest(name, FOV_AXES)}")
        if stated not in (None, axis):
            raise line.error(f"expected one fov_axis for the whole file, found {axis} after {stated}")
        stated = axis
    return stated
