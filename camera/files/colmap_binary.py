"""COLMAP's binary files: cameras.bin, images.bin, points3D.bin. Little-endian, no padding, a count in front.

cameras.bin   uint64 count; each: uint32 id, int32 model, uint64 width, uint64 height, float64 parameters...
images.bin    uint64 count; each: uint32 id, float64 qw qx qy qz tx ty tz, uint32 camera, name ended by a zero byte,
              uint64 count of points; each: float64 x y, int64 point (-1: none)
points3D.bin  uint64 count; each: uint64 id, float64 x y z, uint8 r g b, float64 error, uint64 length of the track;
              each: uint32 image, uint32 index
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from camera.files.colmap_model import CAMERA_MODELS, Camera, Image, Model
from core.errors import InputError

_NAMES = {number: (name, num_parameters) for name, (number, num_parameters) in CAMERA_MODELS.items()}
_POINT = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<i8")])


class _Reader:
    """Takes values off the front of a file and names it when it ends too early."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise InputError(f"{file}: expected a file of a COLMAP model, found nothing")
        self.file, self.data, self.position = file, file.read_bytes(), 0

    def take(self, layout: str, what: str) -> tuple[Any, ...]:
        """The next values, in the layout of the struct module."""
        data = self.take_bytes(struct.calcsize("<" + layout), what)
        return struct.unpack("<" + layout, data)

    def take_bytes(self, count: int, what: str) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.position:
            raise InputError(
                f"{self.file}: expected {count} bytes of {what} at byte {self.position}, found the end of the file "
                f"after {len(self.data) - self.position}; it is cut off or damaged, write it again"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def take_name(self, what: str) -> str:
        """Text up to a zero byte."""
        end = self.data.find(b"\0", self.position)
        text = self.take_bytes((len(self.data) if end < 0 else end) + 1 - self.position, what)[:-1]
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise InputError(
                f"{self.file}: expected {what} in UTF-8, found {text[:40]!r}; the file is damaged"
            ) from None

    def finish(self) -> None:
        """Refuse bytes that are left over."""
        if self.position != len(self.data):
            raise InputError(
                f"{self.file}: expected the end of the file at byte {self.position}, found "
                f"{len(self.data) - self.position} more; it is damaged or of another version, write it again"
            )

    def finite(self, numbers: tuple[float, ...], what: str) -> tuple[float, ...]:
        """The numbers, none of them NaN or infinite."""
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"{self.file}: expected finite numbers as {what}, found {numbers}; the file is damaged")
        return numbers


def read_binary_model(folder: Path) -> Model:
    """The model in a folder. points3D.bin may be missing.

    Raises:
        InputError: names the file and what of it is missing or damaged.
    """
    reader = _Reader(folder / "cameras.bin")
    cameras: dict[int, Camera] = {}
    for index in range(reader.take("Q", "a count of cameras")[0]):
        number, model, width, height = reader.take("IiQQ", f"camera {index}")
        if model not in _NAMES:
            raise InputError(
                f"{reader.file}: expected a camera model with a number from 0 to {max(_NAMES)}, found {model} in "
                f"camera {number}; the file is damaged, or of a newer COLMAP"
            )
        name, num_parameters = _NAMES[model]
        parameters = reader.finite(reader.take(f"{num_parameters}d", f"camera {number}"), f"camera {number}")
        cameras[number] = Camera(name, width, height, parameters)
    reader.finish()
    points: dict[int, tuple[float, float, float]] = {}
    if (folder / "points3D.bin").is_file():
        points = _read_points(_Reader(folder / "points3D.bin"))
    return Model(cameras, _read_images(_Reader(folder / "images.bin")), points)


def write_binary_model(model: Model, folder: Path) -> None:
    """Write the three files into a folder. They have no place for a path's notes."""
    numbers = {name: number for name, (number, _) in CAMERA_MODELS.items()}
    cameras = [struct.pack("<Q", len(model.cameras))]
    for number, camera in model.cameras.items():
        cameras.append(struct.pack("<IiQQ", number, numbers[camera.model], camera.width, camera.height))
        cameras.append(struct.pack(f"<{len(camera.parameters)}d", *camera.parameters))
    images = [struct.pack("<Q", len(model.images))]
    for number, image in enumerate(model.images, start=1):
        images.append(struct.pack("<I7dI", number, *image.quaternion, *image.translation, image.camera))
        images.append(image.name.encode() + b"\0" + struct.pack("<Q", 0))
    for name, parts in (("cameras", cameras), ("images", images), ("points3D", [struct.pack("<Q", 0)])):
        (folder / f"{name}.bin").write_bytes(b"".join(parts))


def _read_images(reader: _Reader) -> list[Image]:
    images = []
    for index in range(reader.take("Q", "a count of images")[0]):
        number, *numbers, camera = reader.take("I7dI", f"image {index}")
        name = reader.take_name(f"the name of image {number}")
        place = f"{reader.file} image {name}"
        pose = reader.finite(tuple(numbers), f"the pose of image {name}")
        (num_points,) = reader.take("Q", f"points of image {name}")
        points = np.frombuffer(reader.take_bytes(num_points * _POINT.itemsize, f"points of image {name}"), _POINT)
        images.append(Image(place, name, camera, pose[:4], pose[4:], points["point"]))
    reader.finish()
    return images


def _read_points(reader: _Reader) -> dict[int, tuple[float, float, float]]:
    points = {}
    for index in range(reader.take("Q", "a count of points")[0]):
        number, x, y, z, *_, length = reader.take("Q3d3BdQ", f"point {index}")
        reader.finite((x, y, z), f"the position of point {number}")
        reader.take_bytes(length * 8, f"the track of point {number}")
        points[number] = (x, y, z)
    reader.finish()
    return points
