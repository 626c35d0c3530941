"""Pictures of a scene along a camera path, by casting one ray a sample against the room and its objects.

Everything is analytic (planes, spheres, boxes), so that cameras, depth and occlusion are exact, and vectorised over
the rays of as many frames as fit into a fixed budget.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from camera.path import CameraPath
from scenes.scene import Ball, Box, Paint, Scene
from scenes.textures import TextureAtlas, paint_texture

RAYS_AT_ONCE = 100_000
AMBIENT, DIFFUSE = 0.62, 0.42


def render(scene: Scene, path: CameraPath, *, supersample: int = 2) -> Tensor:
    """The video of a scene along a camera path.

    Args:
        scene: what is seen.
        path: cameras in the scene's own coordinates; its height and width are those of the video.
        supersample: samples along each side of a pixel.

    Returns:
        uint8 [T, height, width, 3] on the CPU.

    Raises:
        ValueError: the path is not in scene coordinates.
    """
    if path.pose_frame != "scene":
        raise ValueError(f"render needs a path in scene coordinates, found pose frame {path.pose_frame!r}")
    return Renderer(scene, path.height)(path, supersample=supersample)


class Renderer:
    """A scene with its textures made, for filming it several times.

    Args:
        scene: what is seen.
        height: the largest frame height that will be asked for; it decides how fine the textures are.
    """

    def __init__(self, scene: Scene, height: int) -> None:
        self.scene = scene
        sx, sy, sz = scene.size
        size = 256 if height <= 96 else 512 if height <= 288 else 1024
        surfaces: list[tuple[Paint, float, float]] = [(scene.walls[i], (sx, sz)[i % 2], sy) for i in range(4)]
        surfaces += [(scene.floor, sx, sz), (scene.ceiling, sx, sz)]
        for item in scene.objects:
            if isinstance(item, Ball):
                surfaces.append((item.paint, 2 * math.pi * item.radius, math.pi * item.radius))
            else:
                surfaces.append((item.paint, 2 * item.half_size[0], 2 * item.half_size[1]))
        self.extents = torch.tensor([(width + height) / 2 for _, width, height in surfaces])
        self.atlas = TextureAtlas(torch.stack([paint_texture(*surface, size) for surface in surfaces]))

    def __call__(self, path: CameraPath, *, supersample: int = 2) -> Tensor:
        """As `render`."""
        rays_a_frame = path.height * path.width * supersample**2
        step = max(1, RAYS_AT_ONCE // rays_a_frame)
        frames = [self._frames(path, start, start + step, supersample) for start in range(0, len(path), step)]
        return torch.cat(frames)

    def _frames(self, path: CameraPath, start: int, stop: int, supersample: int) -> Tensor:
        c2w, intrinsics = path.c2w[start:stop].float(), path.K[start:stop].float()
        count, height, width = len(c2w), path.height, path.width
        x = (torch.arange(width * supersample) + 0.5) / supersample
        y = (torch.arange(height * supersample) + 0.5) / supersample
        y, x = torch.meshgrid(y, x, indexing="ij")
        fx, fy = intrinsics[:, 0, 0, None, None], intrinsics[:, 1, 1, None, None]
        directions = torch.stack(
            [
                (x - intrinsics[:, 0, 2, None, None]) / fx,
                (y - intrinsics[:, 1, 2, None, None]) / fy,
                torch.ones(count, *x.shape),
            ],
            dim=-1,
        )  # [T, sH, sW, 3]
        directions = torch.nn.functional.normalize(directions, dim=-1)
        directions = torch.einsum("tij,thwj->thwi", c2w[:, :3, :3], directions)
        origins = c2w[:, None, None, :3, 3].expand_as(directions)
        pixel_angle = float(1 / (intrinsics[:, 0, 0].mean() * supersample))
        color = self._trace(origins.reshape(-1, 3), directions.reshape(-1, 3), pixel_angle)
        color = color.view(count, height, supersample, width, supersample, 3).mean(dim=(2, 4))
        return (color * 255).round().clamp(0, 255).to(torch.uint8)

    def _trace(self, origins: Tensor, directions: Tensor, pixel_angle: float) -> Tensor:
        """Colours [R, 3] of rays given by origins and unit directions [R, 3]."""
        scene = self.scene
        distance, normal, uv, surface = _hit_room(scene, origins, directions)
        for index, item in enumerate(scene.objects):
            hit = (
                _hit_ball(item, origins, directions) if isinstance(item, Ball) else _hit_box(item, origins, directions)
            )
            where, t, n, coordinates = hit
            nearer = t < distance[where]
            where = where[nearer]
            distance[where], normal[where], uv[where] = t[nearer], n[nearer], coordinates[nearer]
            surface[where] = 6 + index
        point = origins + distance[:, None] * directions
        slant = (directions * normal).sum(-1).abs().clamp(min=0.15)
        footprint = distance * pixel_angle / slant.sqrt() / self.extents[surface]
        return self.atlas.lookup(surface, uv, footprint) * self._light(point, normal, surface)[:, None]

    def _light(self, point: Tensor, normal: Tensor, surface: Tensor) -> Tensor:
        """Brightness [R]: ambient, lamp, darker edges of the room, soft shadows under the objects."""
        to_lamp = torch.tensor(self.scene.lamp) - point
        length = to_lamp.norm(dim=-1)
        lambert = ((to_lamp * normal).sum(-1) / length).clamp(min=0)
        light = AMBIENT + DIFFUSE * lambert * (1.5 / (1 + 0.12 * length**2)).clamp(max=1.2)
        half = torch.tensor([self.scene.size[0] / 2, self.scene.size[1] / 2, self.scene.size[2] / 2])
        middle = torch.tensor([0.0, -self.scene.size[1] / 2, 0.0])
        to_walls = half - (point - middle).abs()  # [R, 3]
        corner = to_walls.topk(2, dim=-1, largest=False).values[:, 1].clamp(min=0)  # 0 where two walls meet
        in_room = surface < 6
        light = light * torch.where(in_room, 1 - 0.22 * torch.exp(-corner / 0.25), 1.0)
        on_floor = (surface == 4).nonzero()[:, 0]
        shadow = torch.ones(len(on_floor))
        for item in self.scene.objects:
            offset = point[on_floor][:, ::2] - torch.tensor([item.center[0], item.center[2]])
            shadow = shadow * (1 - 0.45 * torch.exp(-((offset.norm(dim=-1) / (1.15 * item.radius)) ** 4)))
        light[on_floor] = light[on_floor] * shadow
        return light


def _hit_room(scene: Scene, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where rays from inside leave the room: distance [R], inward normal [R, 3], uv [R, 2], surface number [R]."""
    sx, sy, sz = scene.size
    low, high = torch.tensor([-sx / 2, -sy, -sz / 2]), torch.tensor([sx / 2, 0.0, sz / 2])
    positive = directions > 0
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    exits = (torch.where(positive, high, low) - origins) / safe
    exits = torch.where(directions.abs() < 1e-9, torch.full_like(exits, math.inf), exits)
    distance, axis = exits.min(dim=-1)
    side = positive.gather(1, axis[:, None])[:, 0]
    #                 x: left 3, right 1   y: ceiling 5, floor 4   z: near 2, far 0
    numbers = torch.tensor([[3, 1], [5, 4], [2, 0]])
    surface = numbers[axis, side.long()]
    normal = torch.zeros_like(directions)
    normal.scatter_(1, axis[:, None], torch.where(side, -1.0, 1.0)[:, None])
    unit = ((origins + distance[:, None] * directions - low) / (high - low)).clamp(0, 1)
    u = torch.where(axis == 0, unit[:, 2], unit[:, 0])
    v = torch.where(axis == 1, unit[:, 2], unit[:, 1])
    return distance, normal, torch.stack([u, v], dim=-1), surface


def _hit_ball(ball: Ball, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rays that meet a ball: their numbers [M], distance [M], normal [M, 3], uv [M, 2] (longitude, latitude)."""
    offset = origins - torch.tensor(ball.center)
    b = (offset * directions).sum(-1)
    discriminant = b**2 - (offset**2).sum(-1) + ball.radius**2
    where = ((discriminant > 0) & (b < 0)).nonzero()[:, 0]
    distance = -b[where] - discriminant[where].sqrt()
    where, distance = where[distance > 1e-4], distance[distance > 1e-4]
    normal = (offset[where] + distance[:, None] * directions[where]) / ball.radius
    u = torch.atan2(normal[:, 2], normal[:, 0]) / (2 * math.pi) + 0.5
    v = torch.asin(normal[:, 1].clamp(-1, 1)) / math.pi + 0.5
    return where, distance, normal, torch.stack([u, v], dim=-1)


def _hit_box(box: Box, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rays that meet a box from outside: as `_hit_ball`, uv on the face that is met."""
    cos, sin = math.cos(box.yaw), math.sin(box.yaw)
    turn = torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])  # local -> world
    half = torch.tensor(box.half_size)
    local_origin = (origins - torch.tensor(box.center)) @ turn
    local_direction = directions @ turn
    safe = torch.where(local_direction.abs() < 1e-9, torch.full_like(local_direction, 1e-9), local_direction)
    one, two = (-half - local_origin) / safe, (half - local_origin) / safe
    entry, axis = torch.minimum(one, two).max(dim=-1)
    leave = torch.maximum(one, two).min(dim=-1).values
    where = ((entry < leave) & (entry > 1e-4)).nonzero()[:, 0]
    distance, axis = entry[where], axis[where]
    point = local_origin[where] + distance[:, None] * local_direction[where]
    normal = torch.zeros_like(point)
    sign = -local_direction[where].gather(1, axis[:, None]).sign()
    normal.scatter_(1, axis[:, None], sign)
    unit = ((point / half + 1) / 2).clamp(0, 1)
    u = torch.where(axis == 0, unit[:, 2], unit[:, 0])
    v = torch.where(axis == 1, unit[:, 2], unit[:, 1])
    return where, distance, normal @ turn.T, torch.stack([u, v], dim=-1)
