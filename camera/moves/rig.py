"""What moves do to a camera: pan, tilt, roll, truck, pedestal, dolly, orbit, arc, spiral, zoom, dolly zoom, hand-held.

Moves of one segment happen at once, segments one after another, each from where the one before it ended, in continuous
time. Axes are those of the first camera: x right, y down, z forward; its vertical is the vertical of all moves, so that
a pan after a tilt keeps the horizon level, as a tripod does. Right, up, clockwise and inwards are positive.

Moves at once are a rig: the orbit carries the track, the track carries the head, the head carries the hand. They are
applied in that order, whatever the order in which they are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from camera.moves.easing import Ease, eased
from camera.moves.handheld import sway

_UP = np.array([0.0, -1.0, 0.0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Rig:
    """Where the camera is at n moments: positions [n, 3], c2w rotations [n, 3, 3], focal length over the first [n]."""

    position: np.ndarray
    rotation: np.ndarray
    focal: np.ndarray

    def last(self, count: int = 1) -> Rig:
        """The last moment, `count` times."""
        return Rig(
            position=np.repeat(self.position[-1:], count, 0),
            rotation=np.repeat(self.rotation[-1:], count, 0),
            focal=np.repeat(self.focal[-1:], count, 0),
        )

    def c2w(self) -> Tensor:
        """The cameras as poses, [n, 4, 4] float64."""
        c2w = torch.eye(4, dtype=torch.float64).repeat(len(self.position), 1, 1)
        c2w[:, :3, :3] = torch.from_numpy(self.rotation)
        c2w[:, :3, 3] = torch.from_numpy(self.position)
        return c2w

    def ahead(self, distance: float | np.ndarray) -> np.ndarray:
        """The points at a distance on the lines of sight, [n, 3]."""
        return self.position + np.reshape(distance, (-1, 1)) * self.rotation[:, :, 2]

    def aimed_at(self, points: np.ndarray) -> Rig:
        """The same cameras turned by the smallest angle that brings points [n, 3] into their lines of sight."""
        forward = self.rotation[:, :, 2]
        towards = points - self.position
        towards = towards / np.linalg.norm(towards, axis=1, keepdims=True)
        axis = np.cross(forward, towards)
        sine, cosine = np.linalg.norm(axis, axis=1, keepdims=True), (forward * towards).sum(1, keepdims=True)
        turn = axis / np.where(sine > 0, sine, 1) * np.arctan2(sine, cosine)  # [n, 3]
        return replace(self, rotation=Rotation.from_rotvec(turn).as_matrix() @ self.rotation)


@dataclass(frozen=True, kw_only=True)
class Move:
    """A motion that starts from any camera; the base of all moves below."""

    ease: Ease = "linear"

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        """The rig after this move.

        Args:
            rig: the cameras that the move acts on, at n moments.
            done: share of the move that is done at each moment, 0 to 1, [n].
            frames: time of each moment in frames since the first frame of the path, [n]; the last is the first moment
                of the segment.
        """
        return rig


class Hold(Move):
    """Nothing moves."""


@dataclass(frozen=True, kw_only=True)
class Pan(Move):
    """Turn about the vertical, on the spot; positive to the right."""

    degrees: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        return replace(rig, rotation=turns("y", self.degrees * done) @ rig.rotation)


@dataclass(frozen=True, kw_only=True)
class Tilt(Move):
    """Turn about the camera's own right axis, on the spot; positive upwards."""

    degrees: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        return replace(rig, rotation=rig.rotation @ turns("x", self.degrees * done))


@dataclass(frozen=True, kw_only=True)
class Roll(Move):
    """Turn about the line of sight; positive: the camera turns clockwise, and so the picture anti-clockwise."""

    degrees: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        return replace(rig, rotation=rig.rotation @ turns("z", self.degrees * done))


@dataclass(frozen=True, kw_only=True)
class Truck(Move):
    """Move along the camera's right axis without turning; positive to the right."""

    distance: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        return replace(rig, position=rig.position + self.distance * done[:, None] * rig.rotation[:, :, 0])


@dataclass(frozen=True, kw_only=True)
class Pedestal(Move):
    """Move along the vertical without turning; positive upwards."""

    distance: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        return replace(rig, position=rig.position + self.distance * done[:, None] * _UP)


@dataclass(frozen=True, kw_only=True)
class Dolly(Move):
    """Move along the line of sight without turning; positive inwards."""

    distance: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        return replace(rig, position=rig.ahead(self.distance * done))


@dataclass(frozen=True, kw_only=True)
class Orbit(Move):
    """Circle the point `radius` straight ahead and keep looking at it; positive: the camera moves to its right.

    The circle lies level: it goes round the vertical through the point.
    """

    degrees: float
    radius: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        centre, turn = rig.ahead(self.radius), turns("y", -self.degrees * done)
        position = centre + np.einsum("nij,nj->ni", turn, rig.position - centre)
        return replace(rig, position=position, rotation=turn @ rig.rotation)


@dataclass(frozen=True, kw_only=True)
class OrbitUp(Move):
    """Circle over the point `radius` straight ahead and keep looking at it; positive: the camera rises."""

    degrees: float
    radius: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        turned = replace(rig, position=rig.ahead(self.radius), rotation=rig.rotation @ turns("x", -self.degrees * done))
        return replace(turned, position=turned.ahead(-self.radius))


@dataclass(frozen=True, kw_only=True)
class Arc(Move):
    """An orbit that also comes `closer` to its point and rises `higher`, and keeps looking at it."""

    degrees: float
    radius: float
    closer: float = 0.0
    higher: float = 0.0

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        centre = rig.ahead(self.radius)
        rig = Orbit(degrees=self.degrees, radius=self.radius).applied(rig, done, frames)
        rig = Dolly(distance=self.closer).applied(rig, done, frames)
        return Pedestal(distance=self.higher).applied(rig, done, frames).aimed_at(centre)


@dataclass(frozen=True, kw_only=True)
class Spiral(Move):
    """Wind out of the line of sight to `radius` while looking at the point `subject` ahead; positive: clockwise."""

    degrees: float
    radius: float
    subject: float
    closer: float = 0.0

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        point, angle = rig.ahead(self.subject), np.deg2rad(self.degrees) * done
        offset = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], 1) * self.radius  # right, down, forward
        offset[:, 2] = self.closer
        offset = np.einsum("nij,nj->ni", rig.rotation, offset * done[:, None])
        return replace(rig, position=rig.position + offset).aimed_at(point)


@dataclass(frozen=True, kw_only=True)
class Zoom(Move):
    """Multiply the focal length by `factor`, or bring it to `to_focal` times that of the first frame."""

    factor: float = 1.0
    to_focal: float | None = None

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        factor = self.factor if self.to_focal is None else self.to_focal / rig.focal
        return replace(rig, focal=rig.focal * factor**done)  # equal times, equal ratios: what eyes see as even


@dataclass(frozen=True, kw_only=True)
class DollyZoom(Move):
    """Dolly while zooming the other way, so that what stands `subject` ahead keeps its size in the picture."""

    distance: float
    subject: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        way = self.distance * done
        return replace(rig, position=rig.ahead(way), focal=rig.focal * (self.subject - way) / self.subject)


@dataclass(frozen=True, kw_only=True)
class HandHeld(Move):
    """Sway about each axis by `degrees` and along each axis by `distance`, both as root mean square over long times."""

    degrees: float
    distance: float
    seed: int
    fps: float

    def applied(self, rig: Rig, done: np.ndarray, frames: np.ndarray) -> Rig:
        noise = sway(frames / self.fps, seed=self.seed, fps=self.fps)  # [n, 6]
        noise = noise - noise[-1]  # nothing at the first moment, so that no joint jumps
        turn = Rotation.from_rotvec(np.deg2rad(self.degrees) * noise[:, :3]).as_matrix()
        shift = np.einsum("nij,nj->ni", rig.rotation, self.distance * noise[:, 3:])
        return replace(rig, position=rig.position + shift, rotation=rig.rotation @ turn)


CARRIED: tuple[type[Move], ...] = (
    *(Orbit, Arc, OrbitUp, Spiral),
    *(Truck, Pedestal, Dolly, DollyZoom),
    *(Pan, Tilt, Roll),
    *(Zoom, HandHeld, Hold),
)
"""The order in which moves at once are applied: what carries comes before what is carried."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Moves at once, between two times in frames since the first frame, start < end."""

    moves: tuple[Move, ...]
    start: float
    end: float


def follow(segments: Sequence[Segment], *, num_frames: int) -> Rig:
    """The cameras of a chain of segments; before, between and after them the camera stands still.

    Args:
        segments: in the order of time, none overlapping.
        num_frames: T.

    Returns:
        The cameras of all frames; the first one stands at the origin and looks along z.
    """
    start = Rig(position=np.zeros((1, 3)), rotation=np.eye(3)[None], focal=np.ones(1))
    result = start.last(num_frames)
    for segment in segments:
        since = np.arange(num_frames) >= segment.start
        moments = np.minimum(np.arange(num_frames)[since], segment.end)
        moments = np.append(moments, [segment.end, segment.start])
        reached = start.last(len(moments))
        progress = (moments - segment.start) / (segment.end - segment.start)
        for move in sorted(segment.moves, key=lambda move: CARRIED.index(type(move))):
            reached = move.applied(reached, eased(progress, move.ease), moments)
        result.position[since], result.rotation[since] = reached.position[:-2], reached.rotation[:-2]
        result.focal[since] = reached.focal[:-2]
        start = Rig(position=reached.position[-2:-1], rotation=reached.rotation[-2:-1], focal=reached.focal[-2:-1])
    return result


def turns(axis: str, degrees: np.ndarray) -> np.ndarray:
    """Rotations about "x" (positive: the view goes up), "y" (to the right) or "z" (clockwise), [n] -> [n, 3, 3]."""
    unit = np.eye(3)["xyz".index(axis)]
    return Rotation.from_rotvec(degrees[:, None] * unit, degrees=True).as_matrix()
