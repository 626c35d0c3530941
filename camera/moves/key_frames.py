"""Key frames: where the camera stands and looks at some times, and how it gets from each to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from camera.moves.easing import Ease, eased
from camera.moves.rig import Rig, turns


@dataclass(frozen=True, kw_only=True)
class KeyFrame:
    """A camera at one time, in the axes of the camera that a path starts from.

    Args:
        frame: time in frames since the first frame; need not be whole.
        right: position, in units; negative to the left.
        up: position.
        forward: position.
        pan: angle about the vertical in degrees, positive to the right. Angles are not taken modulo 360: from 0 to 720
            the camera turns twice.
        tilt: degrees upwards.
        roll: degrees clockwise.
        focal: focal length over that of the first frame.
        ease: of the way from the key frame before to this one.
    """

    frame: float
    right: float = 0.0
    up: float = 0.0
    forward: float = 0.0
    pan: float = 0.0
    tilt: float = 0.0
    roll: float = 0.0
    focal: float = 1.0
    ease: Ease = "linear"


def follow_key_frames(keys: Sequence[KeyFrame], *, num_frames: int) -> Rig:
    """The cameras between key frames; before the first and after the last the camera stands still.

    Positions and angles go straight from one key frame to the next, focal lengths in equal ratios, all at the speed of
    the key frame's easing.

    Args:
        keys: at least one, in the order of time, no two at the same time.
        num_frames: T.

    Returns:
        The cameras of all frames, in the axes of the camera that the key frames are relative to.
    """
    values = np.array(
        [[key.right, -key.up, key.forward, key.pan, key.tilt, key.roll, np.log(key.focal)] for key in keys]
    )  # [keys, 7]
    times = np.array([key.frame for key in keys])
    frames = np.arange(num_frames, dtype=np.float64)
    found = np.repeat(values[:1], num_frames, 0)  # [T, 7]
    for index in range(1, len(keys)):
        since = frames >= times[index - 1]
        progress = np.minimum((frames[since] - times[index - 1]) / (times[index] - times[index - 1]), 1)
        done = eased(progress, keys[index].ease)[:, None]
        found[since] = (1 - done) * values[index - 1] + done * values[index]
    pan, tilt, roll = found[:, 3:6].T
    return Rig(
        position=found[:, :3], rotation=turns("y", pan) @ turns("x", tilt) @ turns("z", roll), focal=np.exp(found[:, 6])
    )
