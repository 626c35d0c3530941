"""What the matches say before anything is reconstructed: whether the camera moves, or only turns, and then its path."""

from __future__ import annotations

import numpy as np

from camera.sfm.estimated import EstimatedPath, EstimateFailed, Shape, camera_path, confidence_of, focal_of_fov
from camera.sfm.matching import Matches
from camera.sfm.rotation_only import chain_rotations, fit_rotation, rotation_residual
from core.errors import listing


def median_motion(matches: list[Matches]) -> float:
    """How far points move, in pixels: the median of a pair, the largest of all pairs."""
    return max(float(np.median(np.linalg.norm(match.first - match.second, axis=1))) for match in matches)


def find_parallax(matches: list[Matches], shape: Shape, focal: float, *, known: bool) -> tuple[float, float]:
    """What the best rotation leaves unexplained, pixels (median of a pair, largest of all pairs), and its focal length.

    An unknown focal length is searched for, so that a camera that turns is not taken for one that moves.
    """
    focals = [focal] if known else [focal_of_fov(fov, shape.width) for fov in range(30, 105, 5)]
    parallax = {candidate: _unexplained(matches, shape.intrinsics(candidate)) for candidate in focals}
    best = min(parallax, key=lambda candidate: parallax[candidate])
    return parallax[best], best


def _unexplained(matches: list[Matches], K: np.ndarray) -> float:
    return max(
        float(np.median(rotation_residual(m.first, m.second, K, fit_rotation(m.first, m.second, K)))) for m in matches
    )


def turning_path(matches: list[Matches], shape: Shape, focal: float) -> EstimatedPath:
    """The path of a camera that turns on the spot: rotations between neighbours, chained."""
    K = shape.intrinsics(focal)
    steps = {match.i: match for match in matches if match.j == match.i + 1}
    missing = [str(t) for t in range(shape.num_frames - 1) if t not in steps]
    if missing:
        raise EstimateFailed(
            f"expected matches from each frame to the next of a camera that only turns, found none after frame "
            f"{listing(missing)}; take more frames a second, or leave the clip out"
        )
    ordered = [steps[t] for t in range(shape.num_frames - 1)]
    rotations = np.stack([fit_rotation(step.first, step.second, K) for step in ordered])
    errors = [
        rotation_residual(step.first, step.second, K, rotation)
        for step, rotation in zip(ordered, rotations, strict=True)
    ]
    c2w = np.tile(np.eye(4), (shape.num_frames, 1, 1))
    c2w[:, :3, :3] = chain_rotations(rotations)
    error = float(np.mean([np.median(error) for error in errors]))
    fewest = min(len(step.first) for step in ordered)
    return EstimatedPath(
        path=camera_path(c2w, shape, focal, mean_depth=None),
        registered=shape.num_frames,
        reprojection_error_pixels=error,
        num_points=sum(len(step.first) for step in ordered),
        rotation_only=True,
        confidence=confidence_of(error / shape.pixel, fewest, None),
    )
