"""What looks wrong about a path that is well formed: jumps, flips, nothing that moves, an odd angle of view."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from camera.path import CameraPath

NARROWEST_DEGREES, WIDEST_DEGREES = 5.0, 170.0  # of a pinhole that films; beyond, a unit or an axis is mistaken
FLIP_DEGREES = 90.0  # from one frame to the next; no camera turns so fast, but a negated axis does
JUMP_RATIO = 8.0  # of a step to the steps around it
_NEIGHBOURS = 3  # steps on each side that a step is compared with
_SMALLEST_JUMP_DEGREES = 1.0
_SMALLEST_JUMP_SHARE = 0.01  # of the largest distance from the first camera
_STILL_DEGREES, _STILL_UNITS = 1e-3, 1e-6
_MAX_NAMED = 5  # findings of one kind


def implausible(path: CameraPath) -> list[str]:
    """Warnings about a path, each naming the frame (counted from 0) and the number; empty where nothing looks wrong.

    Poses that are no rotations and numbers that are not finite never get here: a CameraPath refuses them.

    Args:
        path: any path.
    """
    moved, turned = path.positions.diff(dim=0).norm(dim=-1), turn_between(path.rotations[:-1], path.rotations[1:])
    fov = path.fov_degrees("horizontal")
    extent = float((path.positions - path.positions[0]).norm(dim=-1).max())
    widened = fov.diff().abs()
    return [
        *_odd_views(path),
        *_short(_flips(turned)),
        *_short(_jumps(moved, "moves", " units", smallest=max(_SMALLEST_JUMP_SHARE * extent, _STILL_UNITS))),
        *_short(_jumps(turned.where(turned < FLIP_DEGREES, 0.0), "turns", " degrees", smallest=_SMALLEST_JUMP_DEGREES)),
        *_short(_jumps(widened, "changes its angle of view", " degrees", smallest=_SMALLEST_JUMP_DEGREES)),
        *_still(path, moved, turned, widened),
    ]


def turn_between(first: Tensor, second: Tensor) -> Tensor:
    """Angle between orientations in degrees, 0 to 180, [..., 3, 3] twice -> [...]; exact for small angles too."""
    relative = first.mT @ second
    axis = torch.stack(
        [
            relative[..., 2, 1] - relative[..., 1, 2],
            relative[..., 0, 2] - relative[..., 2, 0],
            relative[..., 1, 0] - relative[..., 0, 1],
        ],
        -1,
    )
    trace = relative.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.atan2(axis.norm(dim=-1), trace - 1))


def _odd_views(path: CameraPath) -> Iterator[str]:
    for axis in ("horizontal", "vertical"):
        fov = path.fov_degrees(axis)
        odd = (fov < NARROWEST_DEGREES) | (fov > WIDEST_DEGREES)
        if odd.any():
            frame = int(odd.nonzero()[0])
            yield (
                f"frame {frame}: sees {float(fov[frame]):.4g} degrees ({axis}), outside {NARROWEST_DEGREES:g} to "
                f"{WIDEST_DEGREES:g}{_more(int(odd.sum()) - 1)}"
            )


def _flips(turned: Tensor) -> list[str]:
    return [
        f"frame {step + 1}: flips, {float(turned[step]):.4g} degrees from frame {step}"
        for step in (turned > FLIP_DEGREES).nonzero()[:, 0].tolist()
    ]


def _jumps(steps: Tensor, verb: str, unit: str, *, smallest: float) -> list[str]:
    """Steps far above those before and those after them: where a motion starts or stops, one side is as fast."""
    found = []
    for step in (steps > smallest).nonzero()[:, 0].tolist():
        before = steps[max(step - _NEIGHBOURS, 0) : step]
        after = steps[step + 1 : step + 1 + _NEIGHBOURS]
        if len(before) + len(after) < _NEIGHBOURS:
            continue
        usual = max((float(side.median()) for side in (before, after) if len(side)), default=0.0)
        if float(steps[step]) > JUMP_RATIO * usual:
            found.append(
                f"frame {step + 1}: jumps; {verb} {float(steps[step]):.4g}{unit} from frame {step}, where frames near "
                f"do {usual:.4g}"
            )
    return found


def _still(path: CameraPath, moved: Tensor, turned: Tensor, widened: Tensor) -> Iterator[str]:
    is_still = len(path) > 1 and float(moved.max()) < _STILL_UNITS and float(turned.max()) < _STILL_DEGREES
    if is_still and float(widened.max()) < _STILL_DEGREES:
        yield f"frames 0 to {len(path) - 1}: nothing moves, all are the camera of frame 0"


def _short(findings: list[str]) -> list[str]:
    if len(findings) <= _MAX_NAMED:
        return findings
    return [*findings[:_MAX_NAMED], f"{len(findings) - _MAX_NAMED} more frames of that kind"]


def _more(count: int) -> str:
    return f", and so do {count} more frames" if count else ""
