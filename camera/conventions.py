"""A camera path brought into the pose frame and the scale that a network learnt, or refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace

from camera.path import CameraPath, PoseFrame
from camera.scale import in_scale
from core.errors import InputError


def in_conventions(
    path: CameraPath,
    *,
    name: str,
    declared: PoseFrame | None,
    pose_frame: str,
    scale_rule: str,
    mean_depth: float | None = None,
) -> CameraPath:
    """The path as a network hears it. What a file says of itself is never overruled.

    Args:
        path: as its file gives it.
        name: of the file, for messages.
        declared: the pose frame that the file itself names; None where it names none. It is then taken to hold what the
            network learnt: coordinates of the place, or a motion whose start does not matter.
        pose_frame: that the network learnt, "scene" or "first".
        scale_rule: that the network learnt.
        mean_depth: in units of the path, for the rule mean_depth; goes before what the file says. None: the file's.

    Returns:
        The path in this pose frame and scale.

    Raises:
        InputError: the file names another pose frame or is scaled by another rule, or the rule needs a mean depth that
            nobody named; says what to do.
    """
    if declared not in (None, pose_frame):
        if pose_frame == "first":
            raise InputError(
                f'{name}: expected pose frame "first", a motion from wherever it starts, which is what the network '
                f'learnt, found pose frame "scene", coordinates of one place; convert it: python tools/camera_path.py '
                f"convert {name} OUTPUT --pose_frame first"
            )
        raise InputError(
            f'{name}: expected pose frame "scene", the coordinates of the place that the network learnt, found pose '
            f'frame "first", a motion that does not say where it starts and cannot be converted; give the poses from '
            "which it was made, in that place's coordinates"
        )
    if mean_depth is not None:
        path = replace(path, mean_depth=mean_depth)
    if pose_frame == "first":
        path = path.relative_to_first()
    try:
        return in_scale(path, scale_rule)
    except InputError as error:
        raise InputError(f"{name}: the network learnt positions under scale rule {scale_rule}: {error}") from None
