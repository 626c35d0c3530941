"""What a COLMAP model says, whichever way it is written: cameras, images, points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CAMERA_MODELS: dict[str, tuple[int, int]] = {  # name -> number in binary files, how many parameters
    "SIMPLE_PINHOLE": (0, 3),
    "PINHOLE": (1, 4),
    "SIMPLE_RADIAL": (2, 4),
    "RADIAL": (3, 5),
    "OPENCV": (4, 8),
    "OPENCV_FISHEYE": (5, 8),
    "FULL_OPENCV": (6, 12),
    "FOV": (7, 5),
    "SIMPLE_RADIAL_FISHEYE": (8, 4),
    "RADIAL_FISHEYE": (9, 5),
    "THIN_PRISM_FISHEYE": (10, 12),
    "RAD_TAN_THIN_PRISM_FISHEYE": (11, 16),
    "SIMPLE_DIVISION": (12, 4),
    "DIVISION": (13, 5),
    "SIMPLE_FISHEYE": (14, 3),
    "FISHEYE": (15, 4),
    "EUCM": (16, 6),
    "EQUIRECTANGULAR": (17, 2),
}
NUM_FOCALS = {  # models that are pinholes when their distortion is zero -> focal lengths before cx and cy
    "SIMPLE_PINHOLE": 1,
    "PINHOLE": 2,
    "SIMPLE_RADIAL": 1,
    "RADIAL": 1,
    "OPENCV": 2,
    "FULL_OPENCV": 2,
}


@dataclass(frozen=True)
class Camera:
    """Intrinsics that images share.

    Args:
        model: a name of `CAMERA_MODELS`, or one that this program does not know.
        width: pixels.
        height: pixels.
        parameters: in the model's order: focal lengths, centre, distortion.
    """

    model: str
    width: int
    height: int
    parameters: tuple[float, ...]


@dataclass(frozen=True)
class Image:
    """One image that has a pose.

    Args:
        place: where it stands, for errors.
        name: of its file, in the folder of images.
        camera: the number of its camera.
        quaternion: w x y z of the world-to-camera rotation.
        translation: of the world-to-camera transform.
        points: numbers of the 3-D points that it sees, int64 [N].
    """

    place: str
    name: str
    camera: int
    quaternion: tuple[float, ...]
    translation: tuple[float, ...]
    points: np.ndarray


@dataclass(frozen=True)
class Model:
    """A whole reconstruction.

    Args:
        cameras: by number.
        images: in the file's order.
        points: position of each 3-D point by its number; empty where the model has none.
    """

    cameras: dict[int, Camera]
    images: list[Image]
    points: dict[int, tuple[float, float, float]]
