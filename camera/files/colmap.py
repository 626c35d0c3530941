"""COLMAP models, a folder of cameras, images and points, as text or binary: world-to-camera poses with OpenCV axes.

`images` has a quaternion (real part first) and a translation per image, world-to-camera; `cameras` has intrinsics in
pixels of its width and height, with the centre of the first pixel at (0.5, 0.5); `points3D`, where it is there, gives
the mean depth in front of the first camera. Where a folder holds a model both as .bin and .txt, .bin is read, as COLMAP
does. Only pinhole cameras are read: a model with distortion parameters must have zeros in them.

Source: COLMAP's documentation of its output formats.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from camera.files.colmap_binary import read_binary_model, write_binary_model
from camera.files.colmap_model import CAMERA_MODELS, NUM_FOCALS, Camera, Image, Model
from camera.files.colmap_text import read_text_model, text_notes, write_text_model
from camera.files.frame_names import frame_order
from camera.files.matrices import focal_and_centre, pinhole
from camera.files.path_notes import PathNotes, notes_of, path_with_notes
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath, inverse_poses
from core.errors import InputError, listing
from core.files import atomic_folder

_LENGTH_TOLERANCE = 1e-2  # of a quaternion; files with two decimals pass
MEMBERS = ("cameras", "images", "points3D", "frames", "rigs")  # files that belong to a model


def model_folder(folder: Path) -> Path | None:
    """The folder of the model: the given one, or the only one in `sparse`, or in a numbered folder; None without one.

    Raises:
        InputError: several models.
    """
    if is_model(folder):
        return folder
    inner = [folder / "sparse", *sorted((folder / "sparse").glob("*")), *sorted(folder.glob("[0-9]*"))]
    models = [each for each in inner if is_model(each)]
    if len(models) > 1:
        raise InputError(f"{folder}: expected one COLMAP model, found {listing(map(str, models))}; name one of them")
    return models[0] if models else None


def is_model(folder: Path) -> bool:
    """Whether a folder has the cameras and images of a model."""
    return any(all((folder / f"{name}.{kind}").is_file() for name in ("cameras", "images")) for kind in ("bin", "txt"))


def read_colmap(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """A path from a COLMAP model.

    Args:
        file: the folder of the model, or one with the model in `sparse/0`.
        settings: `name`, where given, is the folder of images whose poses are taken ("cam1" takes cam1/0001.png).
        frames: of the source; with names, the poses of exactly these images are taken.

    Returns:
        Poses in the order of the images' names, numbers in them by their value.

    Raises:
        InputError: no model, a damaged one, lens distortion, or images without a pose; names file and line or image.
    """
    folder = model_folder(file)
    if folder is None:
        found = "a folder without them" if file.is_dir() else "a file; name its folder" if file.exists() else "nothing"
        raise InputError(
            f"{file}: expected the folder of a COLMAP model, with cameras and images as .bin or .txt, found {found}"
        )
    is_binary = (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file()
    model = read_binary_model(folder) if is_binary else read_text_model(folder)
    images = model.images
    if settings.name is not None:
        images = [image for image in images if image.name.startswith(settings.name.rstrip("/") + "/")]
        if not images:
            folders = listing({image.name.rpartition("/")[0] or "no folder" for image in model.images})
            raise InputError(f"{folder}: expected images in the folder {settings.name!r}, found them in {folders}")
    if not images:
        raise InputError(f"{folder}: expected images with poses, found none; the reconstruction failed")
    order = frame_order([image.name for image in images], frames.names, file=folder)
    images = [images[index] for index in order]
    w2c = torch.eye(4, dtype=torch.float64).repeat(len(images), 1, 1)  # [T, 4, 4]
    quaternions = np.array([_quaternion(image) for image in images])
    w2c[:, :3, :3] = torch.from_numpy(Rotation.from_quat(quaternions).as_matrix())
    w2c[:, :3, 3] = torch.tensor([image.translation for image in images], dtype=torch.float64)
    rows = [_intrinsics(folder, model, image, frames) for image in images]
    K = pinhole(torch.tensor(rows, dtype=torch.float64))
    notes = PathNotes() if is_binary else text_notes(folder)
    if notes.mean_depth is None:
        notes = replace(notes, mean_depth=_mean_depth(model, images[0], w2c[0].numpy()))
    return path_with_notes(folder, inverse_poses(w2c), K, notes, frames)


def write_colmap(path: CameraPath, folder: Path, *, binary: bool = False) -> None:
    """Write any path as a COLMAP model without points, its images named frame_00000.png and so on.

    Args:
        path: a camera is written for each distinct K.
        folder: to be written; an old model in it is replaced.
        binary: .bin files, which have no place for the path's notes, instead of text.

    Raises:
        InputError: the folder holds something else than a model.
    """
    strangers = [file.name for file in folder.glob("*") if file.stem not in MEMBERS] if folder.is_dir() else []
    if strangers or folder.is_file():
        found = f"{listing(strangers)} in it" if strangers else "a file"
        raise InputError(
            f"{folder}: expected a new folder or a COLMAP model to replace, found {found}; name another one"
        )
    w2c = inverse_poses(path.c2w)
    quaternions = np.roll(Rotation.from_matrix(w2c[:, :3, :3].numpy()).as_quat(), 1, axis=-1).tolist()  # w first
    numbers: dict[tuple[float, ...], int] = {}
    images = []
    for index, (intrinsics, quaternion, pose) in enumerate(
        zip(focal_and_centre(path.K).tolist(), quaternions, w2c.tolist(), strict=True)
    ):
        number = numbers.setdefault(tuple(intrinsics), len(numbers) + 1)
        translation = tuple(row[3] for row in pose[:3])
        images.append(
            Image("", f"frame_{index:05d}.png", number, tuple(quaternion), translation, np.empty(0, np.int64))
        )
    cameras = {number: Camera("PINHOLE", path.width, path.height, row) for row, number in numbers.items()}
    model = Model(cameras, images, {})
    with atomic_folder(folder) as temporary:
        if binary:
            write_binary_model(model, temporary)
        else:
            write_text_model(model, notes_of(path), temporary)


def _quaternion(image: Image) -> tuple[float, ...]:
    """x y z w of an image's rotation."""
    w, x, y, z = image.quaternion
    length = float(np.linalg.norm(image.quaternion))
    if not abs(length - 1) < _LENGTH_TOLERANCE:
        raise InputError(f"{image.place}: expected a quaternion of length 1, found one of length {length:.4g}")
    return x, y, z, w


def _intrinsics(folder: Path, model: Model, image: Image, frames: SourceFrames) -> list[float]:
    """fx, fy, cx, cy of an image in pixels of the source's frames."""
    camera = model.cameras.get(image.camera)
    if camera is None:
        raise InputError(f"{image.place}: expected a camera {image.camera} in {folder}, found none of this number")
    where = f"{image.place}, camera {image.camera}"
    if camera.model not in NUM_FOCALS:
        raise InputError(f"{where}: expected a pinhole camera, found {camera.model}; undistort the images with COLMAP")
    if len(camera.parameters) != CAMERA_MODELS[camera.model][1]:
        raise InputError(
            f"{where}: expected {CAMERA_MODELS[camera.model][1]} parameters of {camera.model}, found "
            f"{len(camera.parameters)}"
        )
    num_focals = NUM_FOCALS[camera.model]
    if min(camera.parameters[:num_focals]) <= 0 or min(camera.width, camera.height) < 1:
        raise InputError(
            f"{where}: expected a size and focal lengths above 0, found {camera.width}x{camera.height} and "
            f"{' '.join(f'{focal:g}' for focal in camera.parameters[:num_focals])}"
        )
    distortion = camera.parameters[num_focals + 2 :]
    if any(distortion):
        raise InputError(
            f"{where}: expected no lens distortion, found {camera.model} with "
            f"{' '.join(f'{number:g}' for number in distortion)}; undistort the images with COLMAP"
        )
    fx, fy = camera.parameters[0], camera.parameters[num_focals - 1]
    cx, cy = camera.parameters[num_focals : num_focals + 2]
    across, down = frames.width / camera.width, frames.height / camera.height
    return [fx * across, fy * down, cx * across, cy * down]


def _mean_depth(model: Model, image: Image, w2c: np.ndarray) -> float | None:
    """Mean distance along its forward axis of the points that an image sees; None where the model has none of them."""
    seen = [model.points[number] for number in image.points.tolist() if number in model.points]
    if not seen:
        return None
    depth = float((np.array(seen) @ w2c[2, :3] + w2c[2, 3]).mean())
    return depth if depth > 0 else None
