"""ComfyUI's camera list as a text file: 23 numbers a frame.

The first seven columns are those of RealEstate10K, `timestamp fx fy cx cy 0 0` with fx and cx divided by the frame's
width, fy and cy by its height. Sixteen follow: the 4x4 **camera-to-world** matrix row by row, OpenCV axes. (The rows of
RealEstate10K are world-to-camera; the two differ in nothing else.)

Source: ComfyUI's nodes for camera trajectories, which hand such rows from the trajectory to the video model.
"""

from __future__ import annotations

from pathlib import Path

import torch

from camera.files.matrices import normalised_intrinsics, pixel_intrinsics, poses_from_matrices
from camera.files.number_lines import content_lines, no_rows, number_text, read_lines, read_rows
from camera.files.path_notes import comment_lines, comment_notes, notes_of, path_with_notes
from camera.files.re10k import check_intrinsics_columns
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath
from core.files import atomic_path

COLUMNS = 23
LAYOUT = "timestamp, fx fy cx cy divided by the frame size, 0 0, 4x4 camera-to-world matrix"


def read_comfy(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """A path from a file of 23 numbers a line.

    Args:
        file: text.
        settings: nothing of them is left open by the format.
        frames: of the source.

    Raises:
        InputError: names the file and the line.
    """
    lines = read_lines(file)
    content = content_lines(lines)
    rows = read_rows(content, COLUMNS, LAYOUT, check_intrinsics_columns)
    if not rows:
        raise no_rows(file)
    numbers = torch.tensor(rows, dtype=torch.float64)  # [T, 23]
    where = [f"{file} line {line.number}" for line in content]
    c2w = poses_from_matrices(numbers[:, 7:].reshape(-1, 4, 4), direction="c2w", axes="opencv", where=where)
    K = pixel_intrinsics(numbers[:, 1:5], height=frames.height, width=frames.width)
    return path_with_notes(file, c2w, K, comment_notes(lines), frames)


def write_comfy(path: CameraPath, file: Path) -> None:
    """Write a path as 23 numbers a line, with 15 digits; comments keep the path's notes. Timestamps are 0."""
    rows = []
    for intrinsics, pose in zip(normalised_intrinsics(path).tolist(), path.c2w.flatten(1).tolist(), strict=True):
        rows.append(" ".join(["0", *map(number_text, intrinsics), "0 0", *map(number_text, pose)]))
    with atomic_path(file) as temporary:
        temporary.write_text("\n".join([*comment_lines(notes_of(path)), *rows]) + "\n", encoding="utf-8")
