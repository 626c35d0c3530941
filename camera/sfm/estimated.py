"""What is said of the camera of a clip: its path and how far to trust it, or why it cannot be found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from camera.path import CameraPath
from core.errors import InputError

# Frames are searched at this size at most: time grows with the pixels, and a path seldom needs finer points.
MAX_SIDE_PIXELS = 1024
# The confidence is full from these on; see `EstimatedPath`.
GOOD_ERROR_PIXELS, GOOD_OBSERVATIONS, GOOD_ANGLE_DEGREES = 1.0, 100, 2.0


class EstimateFailed(InputError):
    """The camera of a clip cannot be found; the message says what was found instead and what helps."""


@dataclass(frozen=True, kw_only=True)
class EstimatedPath:
    """The camera of a clip and how far to trust it.

    Args:
        path: pose frame "first". The unit of positions is arbitrary and another one for every clip; `path.mean_depth`
            is known unless the camera only turns.
        registered: frames whose camera was found; always all of them, since a clip with fewer fails.
        reprojection_error_pixels: mean distance between points as found and as predicted, in pixels of the frames.
        num_points: points of the scene that the path rests on; for a camera that only turns, matches between
            neighbouring frames.
        rotation_only: the camera turns on the spot: positions are exactly zero because the pictures show no parallax.
        confidence: from 0 to 1, the product of min(1, 1 / error in working pixels), min(1, points seen in the poorest
            frame / 100) and, unless rotation_only, min(1, median angle between the outermost rays of a point / 2
            degrees). Working pixels are those of the frame reduced to 1024 on its longer side. It grades the evidence
            and is no probability.
    """

    path: CameraPath
    registered: int
    reprojection_error_pixels: float
    num_points: int
    rotation_only: bool
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all frames share."""

    num_frames: int
    height: int
    width: int
    fps: float | None

    @property
    def pixel(self) -> float:
        """A working pixel in pixels of the frames: more than 1 where frames are reduced before the search."""
        return max(1.0, max(self.height, self.width) / MAX_SIDE_PIXELS)

    def intrinsics(self, focal: float) -> np.ndarray:
        """K in pixels, [3, 3]."""
        return np.array([[focal, 0, self.width / 2], [0, focal, self.height / 2], [0, 0, 1]])


def focal_of_fov(fov_degrees: float, width: int) -> float:
    """Focal length in pixels of a horizontal field of view, for a frame `width` pixels wide."""
    return width / 2 / math.tan(math.radians(fov_degrees) / 2)


def fov_of_focal(focal: float, width: int) -> float:
    """Horizontal field of view in degrees of a focal length in pixels."""
    return math.degrees(2 * math.atan(width / 2 / focal))


def confidence_of(error_pixels: float, observations: int, angle_degrees: float | None) -> float:
    """From 0 to 1; see `EstimatedPath`. The error is in working pixels, the angle None where the camera only turns."""
    confidence = min(1.0, GOOD_ERROR_PIXELS / max(error_pixels, 1e-9)) * min(1.0, observations / GOOD_OBSERVATIONS)
    return confidence if angle_degrees is None else confidence * min(1.0, angle_degrees / GOOD_ANGLE_DEGREES)


def camera_path(c2w: np.ndarray, shape: Shape, focal: float, *, mean_depth: float | None) -> CameraPath:
    """The path of poses [T, 4, 4] relative to the first, filmed with one focal length in pixels."""
    rotations = c2w[:, :3, :3]
    u, _, vt = np.linalg.svd(rotations)
    c2w[:, :3, :3] = u @ vt  # takes away the rounding of products
    K = torch.from_numpy(shape.intrinsics(focal)).expand(shape.num_frames, 3, 3).clone()
    return CameraPath(
        c2w=torch.from_numpy(c2w),
        K=K,
        height=shape.height,
        width=shape.width,
        fps=shape.fps,
        pose_frame="first",
        mean_depth=mean_depth,
    )
