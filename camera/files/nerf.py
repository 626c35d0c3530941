"""NeRF and nerfstudio `transforms.json`: camera-to-world matrices with OpenGL axes (x right, y up, z backward).

    {"camera_angle_x": 0.69, "frames": [{"file_path": "./train/r_0", "transform_matrix": [[...], ...]}, ...]}

Intrinsics are `camera_angle_x` (the horizontal field of view in radians; `camera_angle_y` the vertical one), or `fl_x`,
`fl_y`, `cx`, `cy` in pixels of a `w` x `h` frame, for all frames or for each. Lens distortion is not supported. The
world stays as it is; only the camera's axes turn. Frames are ordered by `file_path`.

Source: the data format of NeRF's synthetic scenes, and nerfstudio's description of its data conventions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from camera.files.frame_names import frame_order
from camera.files.json_files import NOTES_KEY, json_notes, matrix, number, read_json, write_json
from camera.files.matrices import focal_and_centre, from_opencv, pinhole, poses_from_matrices
from camera.files.path_notes import notes_of, path_with_notes
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath
from core.errors import InputError, nearest

FILE_NAME = "transforms.json"
PINHOLE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
INTRINSICS = ("camera_angle_x", "camera_angle_y", "fl_x", "fl_y", "cx", "cy", "w", "h")


def is_nerf(content: Mapping[str, Any]) -> bool:
    """Whether an object has a list of frames, or is missing only that from a transforms.json."""
    return "frames" in content or "camera_angle_x" in content


def read_nerf(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """A path from a transforms.json.

    Args:
        file: JSON, or a folder with a transforms.json.
        settings: nothing of them is left open by the format.
        frames: of the source; with names, the poses of exactly these images are taken.

    Raises:
        InputError: names the file and the frame.
    """
    file = file / FILE_NAME if file.is_dir() else file
    content = read_json(file)
    entries = content.get("frames")
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{file} frames: expected a list of frames, found {'an empty one' if entries == [] else 'none'}"
        )
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{file} frame {index}: expected an object, found {entry!r:.60}")
        if "transform_matrix" not in entry:
            raise InputError(
                f"{file} frame {index}: expected the key 'transform_matrix', found none"
                f"{nearest('transform_matrix', entry)}"
            )
    where = [f"{file} frame {index}{_name_in_brackets(entry)}" for index, entry in enumerate(entries)]
    order = _order(file, entries, frames)
    entries, where = [entries[index] for index in order], [where[index] for index in order]
    matrices = torch.stack(
        [matrix(each["transform_matrix"], place) for each, place in zip(entries, where, strict=True)]
    )
    c2w = poses_from_matrices(matrices, direction="c2w", axes="opengl", where=where)
    rows = [_intrinsics({**content, **entry}, frames, place) for entry, place in zip(entries, where, strict=True)]
    K = pinhole(torch.tensor(rows, dtype=torch.float64))  # [T, 3, 3]
    return path_with_notes(file, c2w, K, json_notes(content, file), frames)


def write_nerf(path: CameraPath, file: Path) -> None:
    """Write any path as a transforms.json with frames named frame_00000.png and so on; `camera_path` keeps its notes.

    Intrinsics stand at the top where all frames share them, else in every frame.
    """
    numbers = focal_and_centre(path.K).tolist()
    rows = [dict(zip(("fl_x", "fl_y", "cx", "cy"), row, strict=True)) for row in numbers]
    shared = rows[0] if all(row == rows[0] for row in rows) else {}
    frames = [
        {"file_path": f"frame_{index:05d}.png", **({} if shared else row), "transform_matrix": pose}
        for index, (row, pose) in enumerate(zip(rows, from_opencv(path.c2w, "opengl").tolist(), strict=True))
    ]
    header = {"camera_model": "PINHOLE", "w": path.width, "h": path.height, **shared}
    write_json({**header, NOTES_KEY: notes_of(path).texts(), "frames": frames}, file)


def _name_in_brackets(entry: Mapping[str, Any]) -> str:
    return f" ({entry['file_path']})" if isinstance(entry.get("file_path"), str) else ""


def _order(file: Path, entries: list[dict[str, Any]], frames: SourceFrames) -> list[int]:
    names = [entry.get("file_path") for entry in entries]
    if all(name is None for name in names):
        return list(range(len(entries)))  # a path that was made and has no images: the list is the order
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise InputError(f"{file} frame {index}: expected file_path as text, found {name!r:.60}")
    return frame_order([name.removeprefix("./") for name in names if name is not None], frames.names, file=file)


def _intrinsics(entry: Mapping[str, Any], frames: SourceFrames, where: str) -> list[float]:
    """fx, fy, cx, cy of one frame in pixels of the source's frames."""
    model = entry.get("camera_model", "PINHOLE")
    if model not in PINHOLE_MODELS or entry.get("is_fisheye"):
        name = "is_fisheye" if model in PINHOLE_MODELS else f"camera_model {model!r:.40}"
        raise InputError(f"{where}: expected a pinhole camera, found {name}; undistort the frames first")
    for key in DISTORTION:
        if key in entry and number(entry[key], f"{where} {key}") != 0:
            raise InputError(
                f"{where} {key}: expected 0, found {number(entry[key], where):g}; lens distortion is not supported, "
                "undistort the frames first"
            )
    given = {key: number(entry[key], f"{where} {key}") for key in INTRINSICS if key in entry}
    for key, value in given.items():
        largest = math.pi if key.startswith("camera_angle") else math.inf
        if key not in ("cx", "cy") and not 0 < value < largest or not math.isfinite(value):
            bound = " radians below pi" if largest == math.pi else ""
            raise InputError(f"{where} {key}: expected a number above 0{bound}, found {value:g}")
    in_pixels = [key for key in ("fl_x", "fl_y", "cx", "cy") if key in given]
    if in_pixels and not {"w", "h"} <= set(given):
        raise InputError(
            f"{where} {in_pixels[0]}: expected w and h, the size in pixels that it belongs to, found "
            f"{'only one of them' if {'w', 'h'} & set(given) else 'neither'}; add both"
        )
    width, height = given.get("w", frames.width), given.get("h", frames.height)
    fx = given.get("fl_x") or _focal(given.get("camera_angle_x"), width)
    fy = given.get("fl_y") or _focal(given.get("camera_angle_y"), height) or fx  # square pixels unless it says more
    fx = fx or fy
    if fx is None or fy is None:
        raise InputError(f"{where}: expected fl_x (with w and h) or camera_angle_x, found neither; add one")
    across, down = frames.width / width, frames.height / height
    cx, cy = given.get("cx", width / 2), given.get("cy", height / 2)
    return [fx * across, fy * down, cx * across, cy * down]


def _focal(angle: float | None, size: float) -> float | None:
    return None if angle is None else size / (2 * math.tan(angle / 2))
