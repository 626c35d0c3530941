"""Textures: lookups are exact at texels, averages over large pixels, continuous between."""

import pytest
import torch

from scenes.scene import COLORS, OBJECT_PATTERNS, Paint
from scenes.textures import TextureAtlas, paint_texture


@pytest.fixture
def textures():
    return torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0))


def test_lookup_at_a_texel_centre_is_that_texel(textures):
    atlas = TextureAtlas(textures)
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    uv = (torch.stack([column, row], dim=-1).reshape(-1, 2) + 0.5) / 16
    for number in range(3):
        found = atlas.lookup(torch.full((256,), number), uv, torch.zeros(256))
        torch.testing.assert_close(found, textures[number].reshape(-1, 3))


def test_a_pixel_that_covers_the_texture_sees_its_mean(textures):
    found = TextureAtlas(textures).lookup(torch.tensor([2]), torch.tensor([[0.3, 0.7]]), torch.tensor([1.0]))
    torch.testing.assert_close(found[0], textures[2].mean((0, 1)), atol=2e-3, rtol=0)


def test_footprint_blends_between_levels(textures):
    atlas = TextureAtlas(textures)
    footprint = torch.linspace(1 / 16, 1 / 2, 200)
    found = atlas.lookup(torch.zeros(200, dtype=torch.long), torch.full((200, 2), 0.4), footprint)
    assert (found[1:] - found[:-1]).abs().max() < 0.05


@pytest.mark.parametrize("pattern", OBJECT_PATTERNS)
def test_a_painted_surface_has_its_colour_and_is_the_same_picture_at_every_size(pattern):
    paint = Paint(color="teal", pattern=pattern, seed=4)
    small, large = (paint_texture(paint, 3.0, 1.5, size) for size in (64, 256))
    assert small.min() >= 0 and small.max() <= 1
    base = torch.tensor(COLORS["teal"])
    assert (large.mean((0, 1)) - base).abs().max() < 0.35
    reduced = torch.nn.functional.avg_pool2d(large.permute(2, 0, 1)[None], 4)[0].permute(1, 2, 0)
    assert (reduced - small).abs().mean() < 0.05
