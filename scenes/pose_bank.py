"""Small pictures of a room from everywhere in it: where to start when nothing says where a camera stands.

The room is looked at from a grid of positions, each with one panorama, from which level views in all directions are
cut. A picture is then compared with all of them at once. Made once for a room and a lens: 130,000 views, a few seconds
and about 90 MB.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scenes.render import Renderer

ROWS, COLUMNS = 6, 9  # of a small picture
SPACING, HEIGHT_SPACING = 0.5, 0.5  # metres between positions, at most
WALL_CLEARANCE, FLOOR_CLEARANCE, OBJECT_CLEARANCE = 0.3, 0.4, 0.2  # metres
CELL_DEGREES = 5  # of a panorama
YAW_STEP_DEGREES = 10
PITCHES_DEGREES = (-20, -10, 0, 10, 20, 30, 40, 50)  # downwards is positive
LIGHTNESS_WEIGHT = 0.5  # a mean colour is less certain than the differences within a picture


class PoseBank:
    """Views of a room, to be searched for those that look like a picture.

    Args:
        renderer: of the room.
        K: intrinsics in pixels of height x width, [3, 3].
        height: of the pictures that are looked for, pixels.
        width: pixels.
    """

    def __init__(self, renderer: Renderer, K: Tensor, *, height: int, width: int) -> None:
        positions = standing_places(renderer)  # [P, 3]
        top = min(PITCHES_DEGREES) - 45
        rows, columns = (135 + 2 * CELL_DEGREES - top) // CELL_DEGREES, 360 // CELL_DEGREES
        panoramas = _panoramas(renderer, positions, top, rows, columns)  # [P, rows, columns, 3]
        y, x = torch.meshgrid(torch.arange(ROWS) + 0.5, torch.arange(COLUMNS) + 0.5, indexing="ij")
        x = (x * width / COLUMNS - K[0, 2]) / K[0, 0]
        y = (y * height / ROWS - K[1, 2]) / K[1, 1]
        through = torch.stack([x, y, torch.ones_like(x)], -1)  # [ROWS, COLUMNS, 3]
        views, rotations = [], []
        for pitch in PITCHES_DEGREES:
            directions = torch.nn.functional.normalize(through @ level_rotation(0, pitch).to(through).T, dim=-1)
            down = torch.rad2deg(torch.asin(directions[..., 1]))
            right = torch.rad2deg(torch.atan2(directions[..., 0], directions[..., 2]))
            row = ((down - top) / CELL_DEGREES).floor().long().clamp(0, rows - 1)
            for yaw in range(0, 360, YAW_STEP_DEGREES):
                column = ((right + yaw) / CELL_DEGREES).floor().long() % columns
                views.append(panoramas[:, row, column].flatten(1))  # [P, D]
                rotations.append(level_rotation(yaw, pitch))
        self.views = _without_lightness(torch.stack(views, 1).flatten(0, 1))  # [P * directions, D]
        self._norms = self.views.square().sum(-1)
        self._positions, self._rotations = positions.double(), torch.stack(rotations)

    def nearest(self, pictures: Tensor, count: int) -> Tensor:
        """The poses whose views look most like each picture.

        Args:
            pictures: [N, height, width, 3] in [0, 1].
            count: poses a picture; no two of them stand at neighbouring places with neighbouring directions.

        Returns:
            c2w, float64 [N, count, 4, 4], the best first.
        """
        small = F.adaptive_avg_pool2d(pictures.permute(0, 3, 1, 2), (ROWS, COLUMNS)).permute(0, 2, 3, 1)
        wanted = _without_lightness(small.flatten(1))  # [N, D]
        errors = self._norms - 2 * wanted @ self.views.T  # [N, M], up to a constant
        return torch.stack([self._distinct(error.topk(20 * count, largest=False).indices, count) for error in errors])

    def _distinct(self, candidates: Tensor, count: int) -> Tensor:
        """The first `count` of the candidates that are no neighbours of one another, [count, 4, 4]."""
        c2w = torch.eye(4, dtype=torch.float64).repeat(len(candidates), 1, 1)
        c2w[:, :3, :3] = self._rotations[candidates % len(self._rotations)]
        c2w[:, :3, 3] = self._positions[candidates // len(self._rotations)]
        forward, position = c2w[:, :3, 2], c2w[:, :3, 3]
        near = (torch.cdist(position, position) < 1.5 * SPACING) & (
            forward @ forward.T > math.cos(math.radians(1.5 * YAW_STEP_DEGREES))
        )
        kept: list[int] = []
        for index in range(len(candidates)):
            if not near[index, kept].any():
                kept.append(index)
        rest = [index for index in range(len(candidates)) if index not in kept]
        return c2w[(kept + rest)[:count]]


def level_rotation(yaw_degrees: float, pitch_degrees: float) -> Tensor:
    """Camera-to-world rotation of a level camera, [3, 3]: yaw to the right from +z, pitch downwards."""
    yaw, pitch = math.radians(yaw_degrees), math.radians(pitch_degrees)
    right = torch.tensor([math.cos(yaw), 0.0, -math.sin(yaw)], dtype=torch.float64)
    forward = torch.tensor(
        [math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)], dtype=torch.float64
    )
    return torch.stack([right, torch.linalg.cross(forward, right), forward], -1)


def standing_places(renderer: Renderer) -> Tensor:
    """A grid of positions in the room, clear of its objects and walls, float32 [P, 3]."""
    scene = renderer.scene
    sx, sy, sz = scene.size

    def axis(low: float, high: float, spacing: float) -> Tensor:
        return torch.linspace(low, high, math.ceil((high - low) / spacing) + 1)

    reach_x, reach_z = sx / 2 - WALL_CLEARANCE, sz / 2 - WALL_CLEARANCE
    grid = torch.cartesian_prod(
        axis(-reach_x, reach_x, SPACING),
        axis(FLOOR_CLEARANCE - sy, -FLOOR_CLEARANCE, HEIGHT_SPACING),
        axis(-reach_z, reach_z, SPACING),
    )
    clear = torch.ones(len(grid), dtype=torch.bool)
    for item in scene.objects:
        clear &= (grid - torch.tensor(item.center)).norm(dim=-1) > item.radius + OBJECT_CLEARANCE
    return grid[clear]


def _panoramas(renderer: Renderer, positions: Tensor, top: int, rows: int, columns: int) -> Tensor:
    """Everything around each position from `top` degrees downwards, slightly blurred, [P, rows, columns, 3]."""
    down = torch.deg2rad(top + CELL_DEGREES * (torch.arange(rows) + 0.5)).clamp(-math.pi / 2, math.pi / 2)
    right = torch.deg2rad(CELL_DEGREES * (torch.arange(columns) + 0.5))
    down, right = torch.meshgrid(down, right, indexing="ij")
    directions = torch.stack([down.cos() * right.sin(), down.sin(), down.cos() * right.cos()], -1).reshape(-1, 3)
    origins = positions[:, None].expand(-1, len(directions), -1).reshape(-1, 3)
    angle = math.radians(CELL_DEGREES)
    colors = torch.cat(
        [
            renderer.cast(some, directions.repeat(len(some) // len(directions), 1), angle)[0]
            for some in origins.split(64 * len(directions))
        ]
    )
    pictures = colors.view(len(positions), rows, columns, 3).permute(0, 3, 1, 2)
    pictures = F.pad(F.pad(pictures, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1), mode="replicate")
    return F.avg_pool2d(pictures, 3, stride=1).permute(0, 2, 3, 1)


def _without_lightness(pictures: Tensor) -> Tensor:
    """Pictures [M, rows * columns * 3] with part of their mean colour taken away."""
    channels = pictures.unflatten(-1, (-1, 3))
    return (channels - (1 - LIGHTNESS_WEIGHT) * channels.mean(1, keepdim=True)).flatten(1)
