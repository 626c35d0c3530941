"""Cameras from the pictures alone: structure from motion with pycolmap, tuned for short clips of small frames.

Points are found in every frame and matched between frames near in time (camera/sfm/matching.py), and cameras and points
are solved for together (camera/sfm/reconstruction.py); a camera that only turns has no parallax and goes another way
(camera/sfm/turning.py). The result is known up to a similarity: where the world's origin is, which way is up and how
long a unit is cannot be seen in pictures. All runs on the CPU in one thread with fixed seeds, so a clip gives the same
path twice.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from camera.sfm.estimated import EstimatedPath, EstimateFailed, Shape, focal_of_fov, fov_of_focal
from camera.sfm.matching import find_matches, write_frames
from camera.sfm.reconstruction import MAPPERS, Mapper, moving_path, reconstruct
from camera.sfm.turning import find_parallax, median_motion, turning_path
from core.errors import InputError

__all__ = ["MAPPERS", "EstimateFailed", "EstimatedPath", "Mapper", "estimate_path", "estimator_version"]

ESTIMATOR = "1"  # of the settings here and in camera/sfm; a change that moves paths raises it

# Median distance in pixels. SIFT finds a point again to 0.1 to 0.3 pixels, in compressed video to 0.5.
STILL_PIXELS = 0.3  # matches that move less: the camera stands still
ROTATION_ONLY_PIXELS = 0.4  # matches that a rotation predicts to this: there is no parallax
GUESSED_FOV_DEGREES = 60.0  # where the search for an unknown focal length starts


def estimate_path(
    frames: Iterable[np.ndarray] | np.ndarray | torch.Tensor,
    *,
    fov_degrees: float | None = None,
    focal: float | None = None,
    fps: float | None = None,
    mapper: Mapper = "incremental",
    seed: int = 0,
    work: Path | None = None,
) -> EstimatedPath:
    """Find the camera of every frame of a clip.

    Costs 15 to 30 s on one busy core for 25 frames of 320x192, about half of it for finding and matching points.

    Args:
        frames: RGB, uint8, each [H, W, 3], at least 3 of one size; an array [T, H, W, 3], or what yields frames.
        fov_degrees: horizontal field of view where it is known; it is then kept. 0 < fov < 180.
        focal: the same as a focal length in pixels of these frames; not both.
            With neither, one focal length is estimated for the whole clip, which needs sideways motion and depth.
        fps: written into the path.
        mapper: "incremental" adds frame after frame; "global" (GLOMAP) solves for all at once.
        seed: of the random samples of robust fits, >= 0.
        work: folder for the temporary database; the system's where None. It is removed in every case.

    Returns:
        The path and the figures to judge it by. Pixels are square and the principal point is the frame's centre.

    Raises:
        EstimateFailed: too little texture, a cut, a camera that stands still, no parallax while the focal length is
            unknown, frames without a camera, several pieces.
        InputError: pycolmap is not installed, or an argument is out of range.

    Source: J. L. Schoenberger, J.-M. Frahm, "Structure-from-Motion Revisited", CVPR 2016; L. Pan et al., "Global
        Structure-from-Motion Revisited" (GLOMAP), ECCV 2024.
    """
    _check(fov_degrees=fov_degrees, focal=focal, mapper=mapper, seed=seed)
    pycolmap = _pycolmap()
    with _quiet(pycolmap), tempfile.TemporaryDirectory(prefix="estimate-", dir=work) as folder:
        height, width, num_frames = write_frames(frames, Path(folder) / "frames")
        known = focal is not None or fov_degrees is not None
        if focal is None:
            focal = focal_of_fov(fov_degrees or GUESSED_FOV_DEGREES, width)
        pycolmap.set_random_seed(seed)
        matches = find_matches(pycolmap, Path(folder), num_frames, focal, height, width, seed)
        shape = Shape(num_frames=num_frames, height=height, width=width, fps=fps)
        still = median_motion(matches)
        if still < STILL_PIXELS * shape.pixel:
            raise EstimateFailed(
                f"expected a camera that moves, found one that stands still: matched points move by {still:.2f} pixels "
                "at most; a clip without camera motion has no path to estimate, leave it out"
            )
        parallax, turning_focal = find_parallax(matches, shape, focal, known=known)
        if parallax < ROTATION_ONLY_PIXELS * shape.pixel:
            if not known:
                raise EstimateFailed(
                    f"expected parallax, found a camera that only turns (a rotation explains all matches to "
                    f"{parallax:.2f} pixels), from which the focal length cannot be told well; give the field of view "
                    f"(this motion fits one near {fov_of_focal(turning_focal, width):.0f} degrees)"
                )
            return turning_path(matches, shape, focal)
        reconstruction = reconstruct(pycolmap, Path(folder), num_frames, mapper, seed, focal_known=known)
        return moving_path(reconstruction, shape, focal_known=known, parallax=parallax)


def _check(*, fov_degrees: float | None, focal: float | None, mapper: str, seed: int) -> None:
    if fov_degrees is not None and focal is not None:
        raise InputError("estimate: expected a field of view or a focal length, found both; give one")
    if fov_degrees is not None and not 0 < fov_degrees < 180:
        raise InputError(f"estimate: expected a field of view between 0 and 180 degrees, found {fov_degrees}")
    if focal is not None and not 0 < focal < math.inf:
        raise InputError(f"estimate: expected a focal length above 0 pixels, found {focal}")
    if mapper not in MAPPERS:
        raise InputError(f"estimate: expected the mapper {' or '.join(MAPPERS)}, found {mapper!r}")
    if seed < 0:
        raise InputError(f"estimate: expected a seed of at least 0, found {seed}")


def estimator_version() -> str:
    """What paths depend on besides frames and arguments: our settings and the library. Raises InputError without it."""
    return f"{ESTIMATOR} pycolmap {_pycolmap().__version__}"


def _pycolmap() -> ModuleType:
    try:
        import pycolmap
    except ImportError:
        raise InputError(
            "estimating cameras needs pycolmap, which is not installed; run pip install '.[sfm]' in this folder"
        ) from None
    return pycolmap


@contextmanager
def _quiet(pycolmap: ModuleType) -> Iterator[None]:
    """Without the library's log, which reports every step; what fails is said by our own errors."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = 3
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before
