"""Cameras between the frames of a path: rotations by SLERP, positions and focal lengths by a monotone cubic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from core.errors import InputError

_BEYOND = 1e-6  # frames; room for rounding in times that were computed from seconds
_HALF_TURN = 1e-6  # radians short of 180 degrees; no direction can be told from a turn this near to it


def interpolate(c2w: Tensor, K: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Poses and intrinsics at times between the frames, equal to the given ones at the frames themselves.

    Between two frames the camera turns at constant speed about one axis (SLERP), so it always holds a rotation.
    Each coordinate of the position and each intrinsic follows a piecewise cubic that never leaves the interval between
    its two neighbours (PCHIP): no overshoot where a camera stops, no focal length below zero, and steps of equal length
    stay steps of equal length.

    Args:
        c2w: camera-to-world poses, float64 [T, 4, 4].
        K: intrinsics, float64 [T, 3, 3].
        times: frame positions, 0 <= time <= T - 1, [N]; 2.5 lies halfway between frames 2 and 3.

    Returns:
        c2w float64 [N, 4, 4] and K float64 [N, 3, 3].

    Raises:
        InputError: a time outside the path, or a half turn from one frame to the next, which has no direction.

    Source:
        Shoemake, "Animating rotation with quaternion curves" (1985); Fritsch and Butland, "A method for constructing
        local monotone piecewise cubic interpolants" (1984).
    """
    last = len(c2w) - 1
    times = times.to(torch.float64)
    outside = ~((times >= -_BEYOND) & (times <= last + _BEYOND))  # NaN is outside too
    if outside.any():
        raise InputError(
            f"camera path: expected times within its frames 0 to {last}, found {float(times[outside][0]):g}"
        )
    times = times.clamp(0, last)
    before = times.floor().long()
    is_frame = times == before
    poses, intrinsics = c2w[before].clone(), K[before].clone()  # exact at frames, not only to rounding
    if is_frame.all():
        return poses, intrinsics
    from scipy.spatial.transform import Rotation, Slerp  # here: training without such times needs no scipy

    knots, between = np.arange(len(c2w)), times[~is_frame].numpy()
    rotations = Rotation.from_matrix(c2w[:, :3, :3].numpy())
    turns = (rotations[:-1].inv() * rotations[1:]).magnitude()  # [T - 1] radians
    needed = torch.zeros(last, dtype=torch.bool)
    needed[before[~is_frame]] = True
    half_turns = torch.from_numpy(turns > np.pi - _HALF_TURN) & needed
    if half_turns.any():
        frame = int(half_turns.nonzero()[0])
        raise InputError(
            f"camera path: expected less than half a turn between two frames, found one between frames {frame} and "
            f"{frame + 1}, which may go either way; give a pose between them"
        )
    poses[~is_frame, :3, :3] = torch.from_numpy(Slerp(knots, rotations)(between).as_matrix())
    poses[~is_frame, :3, 3] = _pchip(knots, c2w[:, :3, 3], between)
    for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)):
        intrinsics[~is_frame, row, column] = _pchip(knots, K[:, row, column], between)
    return poses, intrinsics


def _pchip(knots: np.ndarray, values: Tensor, times: np.ndarray) -> Tensor:
    from scipy.interpolate import PchipInterpolator

    return torch.from_numpy(PchipInterpolator(knots, values.numpy(), axis=0)(times))
