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
        size = {"height": path.height, "width": path.width, "supersample": supersample}
        frames = [
            self.views(path.c2w[start : start + step], path.K[start : start + step], **size)[0]
            for start in range(0, len(path), step)
        ]
        return (torch.cat(frames) * 255).round().clamp(0, 255).to(torch.uint8)

    def views(self, c2w: Tensor, K: Tensor, *, height: int, width: int, supersample: int = 1) -> tuple[Tensor, Tensor]:
        """What cameras see, unrounded, and how far it is.

        Args:
            c2w: poses in scene coordinates, [N, 4, 4].
            K: intrinsics in pixels of height x width, [N, 3, 3].
            height: pixels.
            width: pixels.
            supersample: samples along each side of a pixel.

        Returns:
            Colours in [0, 1], float32 [N, height, width, 3], and depths along the cameras' z axis in metres,
            [N, height, width]; both are means over a pixel's samples.
        """
        c2w, K = c2w.float(), K.float()
        x = (torch.arange(width * supersample) + 0.5) / supersample
        y = (torch.arange(height * supersample) + 0.5) / supersample
        y, x = torch.meshgrid(y, x, indexing="ij")
        fx, fy = K[:, 0, 0, None, None], K[:, 1, 1, None, None]
        through = torch.stack(
            [
                (x - K[:, 0, 2, None, None]) / fx,
                (y - K[:, 1, 2, None, None]) / fy,
                torch.ones(len(c2w), *x.shape),
            ],
            dim=-1,
        )  # [N, sH, sW, 3], of depth 1
        length = through.norm(dim=-1)
        directions = torch.einsum("tij,thwj->thwi", c2w[:, :3, :3], through / length[..., None])
        origins = c2w[:, None, None, :3, 3].expand_as(directions)
        pixel_angle = float(1 / (K[:, 0, 0].mean() * supersample))
        color, distance = self.cast(origins.reshape(-1, 3), directions.reshape(-1, 3), pixel_angle)
        color = color.view(len(c2w), height, supersample, width, supersample, 3).mean(dim=(2, 4))
        depth = distance.view_as(length) / length
        return color, depth.view(len(c2w), height, supersample, width, supersample).mean(dim=(2, 4))

    def cast(self, origins: Tensor, directions: Tensor, pixel_angle: float) -> tuple[Tensor, Tensor]:
        """Where rays end.

        Args:
            origins: inside the room, [R, 3].
            directions: unit, [R, 3].
            pixel_angle: radians that a ray stands for.

        Returns:
            Colours [R, 3] in [0, 1] and distances [R] in metres.
        """
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
        color = self.atlas.lookup(surface, uv, footprint) * self._light(point, normal, surface)[:, None]
        return color, distance

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
