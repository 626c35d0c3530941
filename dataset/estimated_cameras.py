"""The camera path of a clip without a camera file: structure from motion on its frames, then the same resize and crop.

The whole frames of the source are searched, before they are cropped, because the field of view and the centre of the
picture are those of the source; of a long video only the frames of the clip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from camera.estimate import EstimatedPath, Mapper, estimate_path, estimator_version
from camera.path import CameraPath
from camera.scale import apply_scale
from core.errors import InputError
from dataset.clips import Clip
from dataset.config import CameraSettings
from dataset.video import decode


@dataclass(frozen=True, kw_only=True)
class EstimatedClip:
    """A clip's path as it is cached, and the estimate behind it."""

    path: CameraPath
    estimate: EstimatedPath

    @property
    def figures(self) -> dict[str, object]:
        """How far to trust it, for reports; `fov_degrees` is the source's, from left to right."""
        return {
            "frames": len(self.path),
            "registered": self.estimate.registered,
            "reprojection_error_pixels": round(self.estimate.reprojection_error_pixels, 3),
            "points": self.estimate.num_points,
            "confidence": round(self.estimate.confidence, 3),
            "rotation_only": self.estimate.rotation_only,
            "fov_degrees": round(float(self.estimate.path.fov_degrees()[0]), 2),
        }


def estimator_name(mapper: Mapper, seed: int) -> str:
    """What an estimated cache depends on besides its source and the TOML."""
    return f"{estimator_version()} {mapper} seed {seed}"


def estimate_clip_camera(clip: Clip, *, mapper: Mapper = "incremental", seed: int = 0) -> EstimatedClip:
    """Find the camera of a clip in its frames.

    Args:
        clip: of a data set with estimate_camera = true.
        mapper: as of `estimate_path`.
        seed: as of `estimate_path`.

    Returns:
        T poses relative to the first frame, in the data set's scale, with intrinsics in pixels of the clip's size.

    Raises:
        EstimateFailed: the frames do not tell the camera.
        InputError: pycolmap is missing, or the source cannot be decoded.
    """
    assert clip.camera is not None and clip.camera.settings.estimate
    crop, settings = clip.crop, clip.camera.settings
    focal = _known_focal(settings, crop.source_height, crop.source_width)
    estimate = estimate_path(_frames(clip), focal=focal, fps=clip.fps, mapper=mapper, seed=seed)
    path = estimate.path.cropped(
        resized_height=crop.resized_height,
        resized_width=crop.resized_width,
        top=crop.top,
        left=crop.left,
        height=crop.height,
        width=crop.width,
    )
    # Positions of a camera that only turns are zero in every unit, also where no depth is known to scale by.
    scaled = replace(path, scale_rule=settings.scale) if estimate.rotation_only else apply_scale(path, settings.scale)
    return EstimatedClip(path=scaled, estimate=estimate)


def _frames(clip: Clip) -> Iterator[np.ndarray]:
    crop = clip.crop
    for number, frame in zip(clip.frame_indices, decode(clip.source, clip.frame_indices), strict=True):
        if frame.shape[:2] != (crop.source_height, crop.source_width):
            raise InputError(
                f"{clip.source}: expected {crop.source_width}x{crop.source_height} pixels in every frame, found "
                f"{frame.shape[1]}x{frame.shape[0]} in frame {number}; make all frames one size"
            )
        yield frame


def _known_focal(settings: CameraSettings, height: int, width: int) -> float | None:
    """Pixels, from the field of view in the TOML; None where it is not given."""
    if settings.fov_degrees is None:
        return None
    side = width if settings.fov_axis == "horizontal" else height
    return side / 2 / math.tan(math.radians(settings.fov_degrees) / 2)
