"""Camera files of ReCamMaster and SynCamMaster: JSON of matrices in Unreal's conventions, several cameras a file.

    {"frame0": {"cam01": "[r r r 0] [r r r 0] [r r r 0] [x y z 1] ", "cam02": ...}, "frame1": ...}

Each matrix is camera-to-world for **row vectors**: its first three rows are the camera's forward, right and up axes in
the world, the fourth is its position in **centimetres**. Unreal's world is left-handed with z up; it is read into a
right-handed one (x right, y down, z forward) in metres. There are no intrinsics: the data sets name the focal length in
the folder (18, 24, 35 or 50 mm on a sensor 23.76 mm wide).

Source: the published data loaders of ReCamMaster (arXiv 2503.11647) and SynCamMaster (arXiv 2412.07760).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camera.files.json_files import NOTES_KEY, json_notes, matrix, read_json, write_json
from camera.files.matrices import from_opencv, poses_from_matrices
from camera.files.number_lines import number_text
from camera.files.path_notes import notes_of, path_with_notes
from camera.files.poses_only import fov_intrinsics, fov_of
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath
from core.errors import InputError, listing, nearest

CENTIMETRES = 100.0  # in a metre

_FRAME = re.compile(r"frame(\d{1,9})")
_ROW = re.compile(r"\s*\[([^\[\]]*)\]\s*")


def is_recammaster(content: dict[str, Any]) -> bool:
    """Whether an object has a key like frame0."""
    return any(_FRAME.fullmatch(key) for key in content)


def read_recammaster(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """The path of one camera of a file.

    Args:
        file: JSON.
        settings: `name` chooses the camera where there are several; fov_degrees and fov_axis count.
        frames: of the source.

    Raises:
        InputError: names the file, the frame and the camera.
    """
    content = read_json(file)
    notes = json_notes(content, file)
    tables = _frame_tables(file, content)
    name = _camera_name(file, tables[0], settings.name)
    matrices, where = [], []
    for index, table in enumerate(tables):
        where.append(f"{file} frame{index} {name}")
        if name not in table:
            raise InputError(f"{where[-1]}: expected a matrix of this camera in every frame, found none")
        matrices.append(_row_vector_matrix(table[name], where[-1]))
    poses = torch.stack(matrices).mT.clone()  # [T, 4, 4], for column vectors
    poses[:, :3, 3] /= CENTIMETRES
    c2w = poses_from_matrices(poses, direction="c2w", axes="unreal", where=where)
    return path_with_notes(file, c2w, fov_intrinsics(file, settings, notes, frames, len(c2w)), notes, frames)


def write_recammaster(path: CameraPath, file: Path) -> None:
    """Write a path as the camera "cam01", with 15 digits; `camera_path` keeps its notes and field of view.

    Args:
        path: of one field of view, positions in metres.
        file: to be written.

    Raises:
        InputError: intrinsics that one field of view cannot say.
    """
    notes = replace(notes_of(path), fov_degrees=fov_of(path, file))
    poses = from_opencv(path.c2w, "unreal")
    poses[:, :3, 3] *= CENTIMETRES
    content: dict[str, Any] = {}
    for index, rows in enumerate(poses.mT.tolist()):
        text = " ".join(f"[{' '.join(map(number_text, row))}]" for row in rows)
        content[f"frame{index}"] = {"cam01": text + " "}
    write_json(content | {NOTES_KEY: notes.texts()}, file)


def _frame_tables(file: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The cameras of each frame, in order; every number from 0 on must be there."""
    numbers: dict[int, str] = {}
    for key in content:
        found = _FRAME.fullmatch(key)
        if found is None and key != NOTES_KEY:
            raise InputError(f"{file}: expected the keys frame0, frame1, ..., found {key!r}")
        if found is not None and numbers.setdefault(int(found[1]), key) != key:
            raise InputError(f"{file}: expected every frame once, found {numbers[int(found[1])]} and {key}")
    missing = [f"frame{number}" for number in range(len(numbers)) if number not in numbers]
    if missing or not numbers:
        raise InputError(
            f"{file}: expected the keys frame0, frame1, ... without a gap, found none for "
            f"{listing(missing or ['frame0'])}"
        )
    tables = [content[numbers[number]] for number in range(len(numbers))]
    for number, table in enumerate(tables):
        if not isinstance(table, dict) or not table:
            raise InputError(
                f"{file} frame{number}: expected an object with a matrix for each camera, found {table!r:.60}"
            )
    return tables


def _camera_name(file: Path, table: dict[str, Any], name: str | None) -> str:
    if name is None and len(table) > 1:
        raise InputError(
            f"{file}: expected one camera, found {listing(table)}; choose one with camera_name in the TOML "
            "(--camera_name as a flag)"
        )
    if name is not None and name not in table:
        raise InputError(f"{file}: expected the camera {name!r}, found {listing(table)}{nearest(name, table)}")
    return name or next(iter(table))


def _row_vector_matrix(value: object, where: str) -> Tensor:
    """A matrix in the file's own form, [4, 4] for row vectors."""
    if isinstance(value, str):
        rows: list[list[float]] = []
        end = 0
        for row in _ROW.finditer(value):
            if row.start() != end:
                break
            end = row.end()
            try:
                rows.append([float(word) for word in row[1].split()])
            except ValueError:
                raise InputError(f"{where}: expected numbers in brackets, found [{row[1][:40]}]") from None
        if end != len(value):
            raise InputError(
                f"{where}: expected four rows [a b c d] in one text, found {value[end : end + 40]!r} after {len(rows)}"
            )
        value = rows
    found = matrix(value, where)
    if found.isfinite().all() and (found[:, 3] - torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)).abs().max() > 1e-6:
        raise InputError(
            f"{where}: expected a last column of 0 0 0 1 (row vectors, the position in the last row), found "
            f"{' '.join(f'{entry:.4g}' for entry in found[:, 3].tolist())}; transpose the matrix"
        )
    return found
