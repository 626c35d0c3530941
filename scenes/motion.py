"""How a scene is filmed: smooth camera paths that stay inside the room and clear of its objects."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from camera.path import CameraPath
from scenes.scene import Scene

MOVES = ("orbit", "pan", "truck", "dolly", "pedestal", "wander")
WALL_CLEARANCE, OBJECT_CLEARANCE = 0.45, 0.4  # metres


def film(
    scene: Scene,
    seed: int,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float = 8.0,
    move: str | Sequence[str] = MOVES,
) -> CameraPath:
    """A camera path through a scene, the same for the same seed at every frame size.

    Args:
        scene: the room and the objects to keep clear of.
        seed: draws the move, where it starts, how far it goes.
        num_frames: T; the whole move is spread over them.
        height: frame height, pixels.
        width: frame width, pixels; the scene's field of view is across it.
        fps: frames per second written into the path.
        move: one of `MOVES`, or several of which the seed draws one.

    Returns:
        A path in scene coordinates.
    """
    rng = random.Random(f"film {scene.seed} {seed}")
    for _ in range(1000):
        drawn = move if isinstance(move, str) else rng.choice(move)
        position, target = _move(rng, scene, drawn, num_frames)
        if is_clear(scene, position):
            break
    else:
        raise RuntimeError(f"no clear path in scene {scene.seed} for seed {seed}")
    focal = width / 2 / math.tan(math.radians(scene.fov) / 2)
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
    return CameraPath(
        c2w=look_at(position, target),
        K=intrinsics.expand(num_frames, 3, 3).clone(),
        height=height,
        width=width,
        fps=fps,
    )


def look_at(position: Tensor, target: Tensor) -> Tensor:
    """Level cameras at `position` that look at `target`, both [T, 3]; c2w [T, 4, 4], x right, y down, z forward."""
    forward = torch.nn.functional.normalize(target - position, dim=-1)
    down = torch.tensor([0.0, 1.0, 0.0], dtype=position.dtype).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(down, forward), dim=-1)
    c2w = torch.eye(4, dtype=position.dtype).repeat(len(position), 1, 1)
    c2w[:, :3, 0], c2w[:, :3, 1], c2w[:, :3, 2] = right, torch.linalg.cross(forward, right), forward
    c2w[:, :3, 3] = position
    return c2w


def _move(rng: random.Random, scene: Scene, move: str, num_frames: int) -> tuple[Tensor, Tensor]:
    """Positions and targets, float64 [T, 3]: a start on a ring around the middle, looking inwards, then the move."""
    time = torch.linspace(0, 1, num_frames, dtype=torch.float64)
    ease = time * time * (3 - 2 * time) if rng.random() < 0.5 else time
    angle = rng.uniform(0, 2 * math.pi)
    radius = rng.uniform(1.3, min(scene.size[0], scene.size[2]) / 2 - WALL_CLEARANCE)
    eye_height = rng.uniform(0.9, 1.6)
    start = torch.tensor([radius * math.cos(angle), -eye_height, radius * math.sin(angle)], dtype=torch.float64)
    focus = torch.tensor([rng.uniform(-0.6, 0.6), -rng.uniform(0.4, 1.0), rng.uniform(-0.6, 0.6)], dtype=torch.float64)
    forward = torch.nn.functional.normalize((focus - start) * torch.tensor([1.0, 0.0, 1.0]), dim=0)
    sideways = torch.stack([forward[2], forward[1] * 0, -forward[0]])
    amount = rng.uniform(0.4, 1.0) * rng.choice((-1, 1))
    position, target = start.expand(num_frames, 3).clone(), focus.expand(num_frames, 3).clone()
    if move == "orbit":
        turned = angle + 0.8 * amount * ease
        position[:, 0], position[:, 2] = radius * turned.cos(), radius * turned.sin()
    elif move == "pan":
        turned = 0.8 * amount * (ease - 0.5)
        reach = focus - start
        target[:, 0] = start[0] + reach[0] * turned.cos() - reach[2] * turned.sin()
        target[:, 2] = start[2] + reach[0] * turned.sin() + reach[2] * turned.cos()
    elif move == "truck":
        shift = (1.2 * amount * (ease - 0.5))[:, None] * sideways
        position, target = position + shift, target + shift
    elif move == "dolly":
        shift = (1.1 * amount * (ease - 0.5))[:, None] * forward
        position, target = position + shift, target + shift
    elif move == "pedestal":
        position[:, 1] = (position[:, 1] + 0.9 * amount * (ease - 0.5)).clamp(-scene.size[1] + 0.4, -0.4)
    else:  # wander: a bend through a third point while the gaze drifts
        ends = [torch.tensor([rng.uniform(-0.6, 0.6) for _ in range(3)], dtype=torch.float64) for _ in range(3)]
        weight = [(1 - ease) ** 2, 2 * ease * (1 - ease), ease**2]
        scale = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
        position = start + sum(w[:, None] * end * scale for w, end in zip(weight, ends, strict=True))
        drift = torch.tensor([rng.uniform(-0.7, 0.7), rng.uniform(-0.2, 0.2), rng.uniform(-0.7, 0.7)])
        target = target + ease[:, None] * drift
    return position, target


def is_clear(scene: Scene, position: Tensor) -> bool:
    """Whether cameras at these places, [T, 3], keep their distance from walls, floor, ceiling and objects."""
    sx, sy, sz = scene.size
    room = torch.tensor([sx / 2 - WALL_CLEARANCE, 0.0, sz / 2 - WALL_CLEARANCE], dtype=torch.float64)
    if bool((position[:, [0, 2]].abs() > room[[0, 2]]).any()):
        return False
    if bool((position[:, 1] > -0.35).any() or (position[:, 1] < -sy + 0.3).any()):
        return False
    for item in scene.objects:
        offset = position[:, [0, 2]] - torch.tensor([item.center[0], item.center[2]], dtype=torch.float64)
        if float(offset.norm(dim=-1).min()) < item.radius + OBJECT_CLEARANCE:
            return False
    return True
