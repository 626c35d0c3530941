"""Procedural textures and their lookup without aliasing.

Each paint becomes a square picture: a pattern of two shades times a grain with octaves from metres down to
centimetres. The fine grain gives structure from motion its corners at a few hundred pixels; a small frame averages it
away, because pictures are looked up through a pyramid at the size that one pixel covers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scenes.scene import COLORS, Paint

# wavelength in metres -> relative brightness of the grain at that wavelength (one standard deviation)
GRAIN = {1.5: 0.030, 0.6: 0.022, 0.25: 0.022, 0.1: 0.03, 0.05: 0.06, 0.025: 0.10, 0.0125: 0.10}


def paint_texture(paint: Paint, width: float, height: float, size: int) -> Tensor:
    """The picture of a painted surface.

    Args:
        paint: colour, pattern and grain.
        width: extent of the surface along u, metres.
        height: extent along v (downwards), metres.
        size: pixels of each side.

    Returns:
        [size, size, 3] in [0, 1], row = v, column = u.
    """
    base = torch.tensor(COLORS[paint.color])
    shade, strength = _second_shade(base, paint.pattern)
    fine = (torch.arange(2 * size) + 0.5) / (2 * size)
    v, u = torch.meshgrid(fine * height, fine * width, indexing="ij")
    mask = _pattern(paint, u, v, width, height)
    mask = F.avg_pool2d(mask[None, None], 2)[0, 0] * strength  # [size, size]
    color = base + mask[..., None] * (shade - base)
    return (color * (1 + _grain(paint.seed, width, height, size)[..., None])).clamp(0, 1)


def _second_shade(base: Tensor, pattern: str) -> tuple[Tensor, float]:
    light = base.mean() < 0.62
    target = torch.ones(3) if light else torch.zeros(3)
    strength = {"plain": 0.0, "carpeted": 0.0, "brick": 0.30, "wooden": 0.22, "tiled": 0.28, "spotted": 0.6}
    return target, strength.get(pattern, 0.36) * (1.0 if light else 0.75)


def _pattern(paint: Paint, u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    """Where the second shade lies, 0 to 1. Periods divide the extents, so that a wrapped texture has no seam."""

    def cells(extent: float, period: float) -> float:
        return extent / max(2 * round(extent / (2 * period)), 2)

    object_like = min(width, height) < 2.0
    name = paint.pattern
    if name == "striped":
        return ((u / cells(width, 0.30 if object_like else 0.5)).floor() % 2).float()
    if name == "checkered":
        side = 0.30 if object_like else 0.7
        return (((u / cells(width, side)).floor() + (v / cells(height, side)).floor()) % 2).float()
    if name == "spotted":
        pu, pv = cells(width, 0.36), cells(height, 0.36)
        return (((u / pu) % 1 - 0.5) ** 2 + ((v / pv) % 1 - 0.5) ** 2 < 0.3**2).float()
    if name == "tiled":
        pu, pv = cells(width, 0.6), cells(height, 0.6)
        return (((u / pu) % 1 < 0.09) | ((v / pv) % 1 < 0.09)).float()
    if name == "brick":
        pu, pv = cells(width, 0.7), cells(height, 0.3)
        row = (v / pv).floor()
        return ((((u / pu) + 0.5 * (row % 2)) % 1 < 0.08) | ((v / pv) % 1 < 0.18)).float()
    if name == "wooden":
        generator = torch.Generator().manual_seed(paint.seed)
        planks = cells(width, 0.35)
        shades = torch.rand(math.ceil(width / planks) + 1, generator=generator)
        return shades[(u / planks).floor().long().clamp(0, len(shades) - 1)]
    return torch.zeros_like(u)


def _grain(seed: int, width: float, height: float, size: int) -> Tensor:
    """Sum of smooth random fields, [size, size]; octaves finer than two texels are left out."""
    total = torch.zeros(size, size)
    for index, (wavelength, amplitude) in enumerate(GRAIN.items()):
        rows, columns = (max(math.ceil(2 * extent / wavelength), 2) for extent in (height, width))
        if max(rows, columns) > size:
            break
        generator = torch.Generator().manual_seed((seed + 7919 * index) % 2**31)
        field = torch.randn(1, 1, rows + 2, columns + 2, generator=generator)
        field = F.interpolate(field, size=(size, size), mode="bicubic", align_corners=False)
        total += amplitude * field[0, 0]
    return total


class TextureAtlas:
    """Square textures of one size with their pyramids, looked up together by surface number.

    Args:
        textures: [N, S, S, 3], S a power of two.
    """

    def __init__(self, textures: Tensor) -> None:
        self.size = textures.shape[1]
        self.levels = int(math.log2(self.size)) + 1
        level = textures.permute(0, 3, 1, 2)  # [N, 3, S, S]
        flat, offsets, start = [], [], 0
        for _ in range(self.levels):
            texels = level.permute(0, 2, 3, 1).reshape(-1, 3)
            flat.append(texels)
            offsets.append(start)
            start += len(texels)
            level = F.avg_pool2d(level, 2) if level.shape[-1] > 1 else level
        self.texels = torch.cat(flat)  # [all texels, 3]
        self.offsets = torch.tensor(offsets, device=textures.device)

    def lookup(self, surface: Tensor, uv: Tensor, footprint: Tensor) -> Tensor:
        """Colours at texture coordinates, averaged over the size that a pixel covers (trilinear).

        Args:
            surface: [R] texture numbers.
            uv: [R, 2] in [0, 1], u along the columns.
            footprint: [R] side of the pixel's image on the texture, as a fraction of the texture.

        Returns:
            [R, 3]
        """
        level = (footprint * self.size).clamp(min=1.0).log2().clamp(max=self.levels - 1.001)
        lower = level.floor().long()
        return torch.lerp(
            self._bilinear(surface, uv, lower), self._bilinear(surface, uv, lower + 1), (level - lower)[:, None]
        )

    def _bilinear(self, surface: Tensor, uv: Tensor, level: Tensor) -> Tensor:
        side = self.size >> level  # [R]
        position = uv * side[:, None] - 0.5
        corner = position.floor()
        weight = position - corner
        last = side - 1
        x0 = corner[:, 0].long().clamp_min(0).minimum(last)
        y0 = corner[:, 1].long().clamp_min(0).minimum(last)
        x1 = (corner[:, 0].long() + 1).clamp_min(0).minimum(last)
        y1 = (corner[:, 1].long() + 1).clamp_min(0).minimum(last)
        start = self.offsets[level] + surface * side * side
        wx, wy = weight[:, :1], weight[:, 1:]
        top = torch.lerp(self.texels[start + y0 * side + x0], self.texels[start + y0 * side + x1], wx)
        bottom = torch.lerp(self.texels[start + y1 * side + x0], self.texels[start + y1 * side + x1], wx)
        return torch.lerp(top, bottom, wy)
