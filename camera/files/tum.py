"""TUM trajectories: `timestamp tx ty tz qx qy qz qw`, one line a frame, camera to world.

The position is the camera's; the quaternion, real part last, turns camera axes into world axes, and the camera's axes
are OpenCV's. There are no intrinsics.

Source: the file formats of the TUM RGB-D benchmark.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from scipy.spatial.transform import Rotation

from camera.files.number_lines import Line, content_lines, no_rows, number_text, read_lines, read_rows
from camera.files.path_notes import comment_lines, comment_notes, notes_of, path_with_notes
from camera.files.poses_only import fov_intrinsics, fov_of
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath
from core.files import atomic_path

COLUMNS = 8
LAYOUT = "timestamp, tx ty tz, qx qy qz qw"

_LENGTH_TOLERANCE = 1e-2  # of a quaternion; files with two decimals pass


def read_tum(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """A path from a TUM trajectory. Timestamps must grow and are not used: the video has its own clock.

    Args:
        file: text.
        settings: fov_degrees and fov_axis count, because the file has no intrinsics.
        frames: of the source.

    Raises:
        InputError: names the file and the line.
    """
    lines = read_lines(file)
    content = content_lines(lines)
    rows = read_rows(content, COLUMNS, LAYOUT, _check_row)
    if not rows:
        raise no_rows(file)
    for line, before, after in zip(content[1:], rows, rows[1:], strict=False):
        if not before[0] < after[0]:
            raise line.error(
                f"expected timestamps that grow, found {after[0]:.15g} after {before[0]:.15g}; sort the lines"
            )
    numbers = torch.tensor(rows, dtype=torch.float64)  # [T, 8]
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)  # [T, 4, 4]
    c2w[:, :3, :3] = torch.from_numpy(Rotation.from_quat(numbers[:, 4:].numpy()).as_matrix())
    c2w[:, :3, 3] = numbers[:, 1:4]
    notes = comment_notes(lines)
    return path_with_notes(file, c2w, fov_intrinsics(file, settings, notes, frames, len(rows)), notes, frames)


def write_tum(path: CameraPath, file: Path) -> None:
    """Write a path as a TUM trajectory, with 15 digits. Comments keep its notes and its horizontal field of view.

    Args:
        path: of one field of view. Timestamps are seconds by its fps, or frame numbers where it has none.
        file: to be written.

    Raises:
        InputError: intrinsics that one field of view cannot say.
    """
    notes = replace(notes_of(path), fov_degrees=fov_of(path, file))
    quaternions = Rotation.from_matrix(path.rotations.numpy()).as_quat().tolist()
    rows = []
    for index, (position, quaternion) in enumerate(zip(path.positions.tolist(), quaternions, strict=True)):
        rows.append(" ".join(map(number_text, [index / (path.fps or 1), *position, *quaternion])))
    header = ["# timestamp tx ty tz qx qy qz qw", *comment_lines(notes)]
    with atomic_path(file) as temporary:
        temporary.write_text("\n".join([*header, *rows]) + "\n", encoding="utf-8")


def _check_row(line: Line, row: list[float]) -> None:
    length = math.hypot(*row[4:])
    if not abs(length - 1) < _LENGTH_TOLERANCE:
        raise line.error(
            f"expected a quaternion qx qy qz qw of length 1 in columns 5 to 8, found one of length {length:.4g}"
        )
