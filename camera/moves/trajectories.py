"""Camera motions for programs: a smooth random path inside a box, and single moves from any starting camera.

A pan turns the camera, a truck moves it sideways. World axes are those of an OpenCV camera that stands level: x right,
y down, z forward. Yaw is positive to the right, pitch is positive upwards. Every move starts at `start` and goes at
constant speed. Chains, easing, key frames and all other moves are in camera/moves/text.py, as text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation
from torch import Tensor

from camera.moves.rig import Dolly, Move, Orbit, Pan, Segment, Truck, follow
from camera.path import CameraPath, intrinsics_from_fov

_SPLINE_DEGREE = 3


def smooth_random_path(
    *,
    seed: int,
    num_frames: int,
    height: int,
    width: int,
    position_low: Sequence[float],
    position_high: Sequence[float],
    yaw_degrees: tuple[float, float] = (-30.0, 30.0),
    pitch_degrees: tuple[float, float] = (-10.0, 10.0),
    look_at: Sequence[float] | None = None,
    fov_degrees: float = 60.0,
    num_controls: int = 5,
    fps: float | None = None,
) -> CameraPath:
    """A random path that stays inside its bounds: cubic B-splines whose control values are drawn uniformly within them.

    A B-spline lies in the convex hull of its control values, so no frame leaves the bounds by more than rounding.

    Args:
        seed: the same seed gives the same path.
        num_frames: T.
        height: pixels of the frame.
        width: pixels of the frame.
        position_low: smallest x, y, z of the camera.
        position_high: largest x, y, z of the camera.
        yaw_degrees: (lowest, highest) yaw from the look direction, positive to the right.
        pitch_degrees: (lowest, highest) pitch from the look direction, positive upwards.
        look_at: point x, y, z that the look direction points to from wherever the camera is; None: world z.
        fov_degrees: horizontal field of view.
        num_controls: control values of the spline, at least 4; more bend the path more often.
        fps: frames per second.

    Returns:
        A path in pose frame "scene", without roll.
    """
    low = np.array([*position_low, yaw_degrees[0], pitch_degrees[0]], dtype=np.float64)
    high = np.array([*position_high, yaw_degrees[1], pitch_degrees[1]], dtype=np.float64)
    if low.shape != (5,) or high.shape != (5,) or (low > high).any():
        raise ValueError(f"expected three position bounds and ordered limits, found {low} to {high}")
    if num_controls <= _SPLINE_DEGREE:
        raise ValueError(f"expected at least {_SPLINE_DEGREE + 1} control values, found {num_controls}")
    controls = np.random.default_rng(seed).uniform(low, high, (num_controls, 5))
    inner_knots = np.linspace(0, 1, num_controls - _SPLINE_DEGREE + 1)
    knots = np.pad(inner_knots, _SPLINE_DEGREE, mode="edge")
    values = BSpline(knots, controls, _SPLINE_DEGREE)(np.linspace(0, 1, num_frames))  # [T, 5]
    positions, yaw, pitch = values[:, :3], values[:, 3], values[:, 4]
    if look_at is not None:
        towards = np.asarray(look_at, dtype=np.float64) - positions  # [T, 3]
        yaw = yaw + np.rad2deg(np.unwrap(np.arctan2(towards[:, 0], towards[:, 2])))
        pitch = pitch + np.rad2deg(np.arctan2(-towards[:, 1], np.hypot(towards[:, 0], towards[:, 2])))
    c2w = poses(torch.from_numpy(positions), level_rotations(yaw, pitch))
    return _path(c2w, height=height, width=width, fov_degrees=fov_degrees, fps=fps)


def pan(
    degrees: float,
    *,
    num_frames: int,
    height: int,
    width: int,
    start: Tensor | None = None,
    fov_degrees: float = 60.0,
    fps: float | None = None,
) -> CameraPath:
    """Turn on the spot to the right (positive) or to the left: the position does not change.

    Args:
        degrees: angle of the last frame to the first.
        num_frames: T.
        height: pixels of the frame.
        width: pixels of the frame.
        start: c2w of the first frame, [4, 4]; None: the identity.
        fov_degrees: horizontal field of view.
        fps: frames per second.

    Returns:
        A path in pose frame "scene".
    """
    motion = _steady(Pan(degrees=degrees), num_frames)
    return _path(motion, height=height, width=width, fov_degrees=fov_degrees, fps=fps, start=start)


def truck(
    distance: float,
    *,
    num_frames: int,
    height: int,
    width: int,
    start: Tensor | None = None,
    fov_degrees: float = 60.0,
    fps: float | None = None,
) -> CameraPath:
    """Move sideways to the right (positive) or to the left without turning. Other tools call this a pan.

    Args:
        distance: from the first frame to the last, in units of the scene.
        num_frames: T.
        height: pixels of the frame.
        width: pixels of the frame.
        start: c2w of the first frame, [4, 4]; None: the identity.
        fov_degrees: horizontal field of view.
        fps: frames per second.

    Returns:
        A path in pose frame "scene".
    """
    motion = _steady(Truck(distance=distance), num_frames)
    return _path(motion, height=height, width=width, fov_degrees=fov_degrees, fps=fps, start=start)


def dolly(
    distance: float,
    *,
    num_frames: int,
    height: int,
    width: int,
    start: Tensor | None = None,
    fov_degrees: float = 60.0,
    fps: float | None = None,
) -> CameraPath:
    """Move forwards (positive) or backwards without turning. Other tools call this a zoom; the focal length stays.

    Args:
        distance: from the first frame to the last, in units of the scene.
        num_frames: T.
        height: pixels of the frame.
        width: pixels of the frame.
        start: c2w of the first frame, [4, 4]; None: the identity.
        fov_degrees: horizontal field of view.
        fps: frames per second.

    Returns:
        A path in pose frame "scene".
    """
    motion = _steady(Dolly(distance=distance), num_frames)
    return _path(motion, height=height, width=width, fov_degrees=fov_degrees, fps=fps, start=start)


def orbit(
    degrees: float,
    *,
    radius: float,
    num_frames: int,
    height: int,
    width: int,
    start: Tensor | None = None,
    fov_degrees: float = 60.0,
    fps: float | None = None,
) -> CameraPath:
    """Circle round the point `radius` straight ahead of the first camera and keep looking at it.

    Args:
        degrees: angle of the arc; positive: the camera moves to its right (and so turns to its left).
        radius: distance to the point, in units of the scene.
        num_frames: T.
        height: pixels of the frame.
        width: pixels of the frame.
        start: c2w of the first frame, [4, 4]; None: the identity.
        fov_degrees: horizontal field of view.
        fps: frames per second.

    Returns:
        A path in pose frame "scene".
    """
    motion = _steady(Orbit(degrees=degrees, radius=radius), num_frames)
    return _path(motion, height=height, width=width, fov_degrees=fov_degrees, fps=fps, start=start)


def level_rotations(yaw_degrees: np.ndarray, pitch_degrees: np.ndarray) -> Tensor:
    """Camera-to-world rotations of a camera without roll.

    Args:
        yaw_degrees: positive to the right, [T].
        pitch_degrees: positive upwards, [T].

    Returns:
        [T, 3, 3] float64.
    """
    angles = np.stack([yaw_degrees, pitch_degrees], -1)  # [T, 2]
    return torch.from_numpy(Rotation.from_euler("YX", angles, degrees=True).as_matrix())


def poses(positions: Tensor, rotations: Tensor) -> Tensor:
    """Poses c2w from camera centres [T, 3] and camera-to-world rotations [T, 3, 3]: [T, 4, 4] float64."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(positions), 1, 1)
    c2w[:, :3, :3] = rotations
    c2w[:, :3, 3] = positions
    return c2w


def _steady(move: Move, num_frames: int) -> Tensor:
    """The poses of one move from the identity, at constant speed over all frames, [T, 4, 4]."""
    whole = Segment(moves=(move,), start=0.0, end=max(num_frames - 1.0, 1.0))
    return follow([whole], num_frames=num_frames).c2w()


def _path(
    motion: Tensor, *, height: int, width: int, fov_degrees: float, fps: float | None, start: Tensor | None = None
) -> CameraPath:
    c2w = motion if start is None else start.to(torch.float64) @ motion  # [T, 4, 4]
    fov = torch.full((len(c2w),), fov_degrees, dtype=torch.float64)
    K = intrinsics_from_fov(fov, height=height, width=width)
    return CameraPath(c2w=c2w, K=K, height=height, width=width, fps=fps)
