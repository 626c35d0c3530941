"""RealEstate10K and CameraCtrl .txt files: a header line, then 19 numbers a frame.

`timestamp fx fy cx cy 0 0` and the 3x4 world-to-camera matrix row by row, OpenCV axes; fx and cx are divided by the
frame's width, fy and cy by its height. The header is the clip's address, any other text, a blank line, or missing.

Source: the data set's own description (RealEstate10K, "camera trajectories") and CameraCtrl (arXiv 2404.02101).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from camera.files.matrices import (
    FILE_ROTATION_TOLERANCE,
    LARGEST_FOCAL,
    nearest_rotations,
    normalised_intrinsics,
    pixel_intrinsics,
)
from camera.files.number_lines import Line, content_lines, is_number, no_rows, number_text, read_lines, read_rows
from camera.files.path_notes import comment_lines, comment_notes, notes_of, path_with_notes
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath, inverse_poses, rotation_error
from core.files import atomic_path

COLUMNS = 19
LAYOUT = "timestamp, fx fy cx cy divided by the frame size, 0 0, 3x4 world-to-camera matrix"


def without_header(lines: list[Line]) -> list[Line]:
    """The content lines after the header, which can only be line 1: a single word, or text that is no row of 19."""
    content = content_lines(lines)
    if not content or content[0].number != 1:
        return content
    words = re.split(r"[,\s]+", content[0].text.partition("#")[0].strip())
    is_header = len(words) == 1 or (len(words) != COLUMNS and not is_number(words[0]))
    return content[1:] if is_header else content


def read_re10k(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """A path from a RealEstate10K file. Timestamps are not used: the video has its own clock.

    Args:
        file: text, header included.
        settings: nothing of them is left open by the format.
        frames: of the video.

    Raises:
        InputError: names the file and the line.
    """
    lines = read_lines(file)
    rows = read_rows(without_header(lines), COLUMNS, LAYOUT, _check_row)
    if not rows:
        raise no_rows(file)
    numbers = torch.tensor(rows, dtype=torch.float64)  # [T, 19]
    w2c = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)  # [T, 4, 4]
    w2c[:, :3] = numbers[:, 7:].reshape(-1, 3, 4)
    w2c[:, :3, :3] = nearest_rotations(w2c[:, :3, :3])  # takes away the rounding of printed digits
    K = pixel_intrinsics(numbers[:, 1:5], height=frames.height, width=frames.width)
    return path_with_notes(file, inverse_poses(w2c), K, comment_notes(lines), frames)


def write_re10k(path: CameraPath, file: Path | str, *, header: str = "") -> None:
    """Write a path as a RealEstate10K file, with 15 digits.

    Args:
        path: any pinhole path. Timestamps are microseconds by its fps, all 0 where it has none.
        file: to be written.
        header: the first line, for instance the clip's address. The notes of the path (pose frame, scale rule, fps,
            mean depth) follow it as comments in the same line, which other readers of the format skip.
    """
    K = normalised_intrinsics(path)  # [T, 4]
    w2c = inverse_poses(path.c2w)[:, :3].flatten(1)  # [T, 12]
    rows = []
    for index, (intrinsics, pose) in enumerate(zip(K.tolist(), w2c.tolist(), strict=True)):
        timestamp = round(index * 1e6 / path.fps) if path.fps else 0
        rows.append(" ".join([str(timestamp), *map(number_text, intrinsics), "0 0", *map(number_text, pose)]))
    first_line = " ".join([*header.split(), *comment_lines(notes_of(path))])
    with atomic_path(file) as temporary:
        temporary.write_text("\n".join([first_line, *rows]) + "\n", encoding="utf-8")


def check_intrinsics_columns(line: Line, row: list[float]) -> None:
    """Refuse columns 2 to 7 that are no normalised intrinsics without distortion; ComfyUI's rows have the same.

    Raises:
        InputError: names the line.
    """
    if min(row[1:3]) <= 0:
        raise line.error(f"expected positive focal lengths in columns 2 and 3, found {row[1]:g} and {row[2]:g}")
    if max(row[1:3]) > LARGEST_FOCAL:
        raise line.error(
            f"expected focal lengths divided by the frame's width and height in columns 2 and 3, found {row[1]:g} and "
            f"{row[2]:g}, which look like pixels; divide columns 2 and 4 by the width, 3 and 5 by the height"
        )
    if row[5] or row[6]:
        raise line.error(
            f"expected 0 0 in columns 6 and 7, found {row[5]:g} {row[6]:g}; lens distortion is not "
            "supported, undistort the frames first"
        )


def _check_row(line: Line, row: list[float]) -> None:
    check_intrinsics_columns(line, row)
    rotation = torch.tensor(row[7:], dtype=torch.float64).reshape(3, 4)[:, :3]
    if not rotation_error(rotation) < FILE_ROTATION_TOLERANCE:
        raise line.error(
            "expected a 3x4 world-to-camera matrix, row by row, in columns 8 to 19, found a 3x3 part that is no "
            f"rotation (determinant {torch.linalg.det(rotation):.4g} where 1 is expected)"
        )
