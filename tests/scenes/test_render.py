"""Pictures obey their cameras: points project where the path says, two views agree, sizes and chunks do not matter."""

from dataclasses import replace

import pytest
import torch

import scenes.render
from camera.path import CameraPath
from scenes.motion import film
from scenes.render import Renderer, render
from scenes.scene import Ball, Paint, make_scene


@pytest.fixture(scope="module")
def scene():
    return make_scene(4)


def project(path: CameraPath, frame: int, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel coordinates [N, 2] and depth [N] of world points [N, 3]."""
    local = (points - path.c2w[frame, :3, 3]) @ path.c2w[frame, :3, :3]
    pixels = local @ path.K[frame].T
    return pixels[:, :2] / pixels[:, 2:], local[:, 2]


def test_a_small_ball_appears_where_its_centre_projects(scene):
    center = (0.3, -1.0, 0.2)
    ball = Ball(center=center, radius=0.06, paint=Paint(color="teal", pattern="plain", seed=1))
    empty = replace(scene, objects=())
    path = film(empty, 3, num_frames=5, height=96, width=144, move="orbit")
    difference = (render(replace(scene, objects=(ball,)), path).float() - render(empty, path).float()).abs().sum(-1)
    for frame in range(5):
        (expected,), (depth,) = project(path, frame, torch.tensor([center], dtype=torch.float64))
        assert depth > 0
        weight = (difference[frame] > 20).double()
        weight[int(expected[1]) + 12 :] = 0  # its shadow on the floor is farther down
        rows, columns = torch.arange(96) + 0.5, torch.arange(144) + 0.5
        found = torch.stack([(weight.sum(0) * columns).sum(), (weight.sum(1) * rows).sum()]) / weight.sum()
        torch.testing.assert_close(found, expected, atol=0.5, rtol=0)


def test_two_views_of_a_wall_agree(scene):
    """The light does not depend on the viewer, so a point of a wall has one colour in all frames."""
    empty = replace(scene, objects=())
    path = film(empty, 1, num_frames=2, height=192, width=288, move="truck")
    video = render(empty, path, supersample=3).float() / 255
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(4000, 3, generator=generator, dtype=torch.float64) - 0.5) * torch.tensor(scene.size)
    points[:, 1] -= scene.size[1] / 2
    side = torch.randint(4, (4000,), generator=generator)
    points[side == 0, 2], points[side == 1, 2] = scene.size[2] / 2, -scene.size[2] / 2
    points[side == 2, 0], points[side == 3, 0] = scene.size[0] / 2, -scene.size[0] / 2
    (first, depth_one), (second, depth_two) = (project(path, frame, points) for frame in (0, 1))
    limit = torch.tensor([286, 190])
    seen = (depth_one > 0.3) & (depth_two > 0.3)
    for pixels in (first, second):
        seen &= ((pixels > 2) & (pixels < limit)).all(-1)
    assert seen.sum() > 100

    def colors(frame: int, pixels: torch.Tensor) -> torch.Tensor:
        grid = (2 * pixels[seen] / torch.tensor([288, 192]) - 1).float()[None, None]
        return torch.nn.functional.grid_sample(video[frame].permute(2, 0, 1)[None], grid, align_corners=False)[0, :, 0]

    one, two = colors(0, first), colors(1, second)
    assert (one - two).abs().mean() < 0.03
    shuffled = two[:, torch.randperm(two.shape[1], generator=generator)]
    assert (one - shuffled).abs().mean() > 0.06


def test_supersampling_is_the_mean_of_a_larger_picture(scene):
    small, large = (film(scene, 2, num_frames=2, height=height, width=3 * height // 2) for height in (32, 64))
    fine = render(scene, large, supersample=1).float().unflatten(1, (32, 2)).unflatten(3, (48, 2)).mean((2, 4))
    assert (fine - render(scene, small, supersample=2).float()).abs().max() <= 1.5


def test_frames_do_not_depend_on_each_other_or_on_the_chunks(scene, monkeypatch):
    path = film(scene, 6, num_frames=5, height=32, width=48)
    video = render(scene, path)
    assert torch.equal(render(scene, path.frames([3]))[0], video[3])
    monkeypatch.setattr(scenes.render, "RAYS_AT_ONCE", 1)
    assert torch.equal(render(scene, path), video)


def test_an_object_hides_what_is_behind_it_and_nothing_before_it(scene):
    front = Ball(center=(0.0, -1.0, 0.0), radius=0.3, paint=Paint(color="red", pattern="plain", seed=1))
    behind = Ball(center=(0.0, -1.0, 0.8), radius=0.2, paint=Paint(color="blue", pattern="plain", seed=1))
    c2w = torch.eye(4, dtype=torch.float64)[None].clone()
    c2w[0, :3, 3] = torch.tensor([0.0, -1.0, -1.5])
    intrinsics = torch.tensor([[[48.0, 0, 24], [0, 48.0, 16], [0, 0, 1]]], dtype=torch.float64)
    path = CameraPath(c2w=c2w, K=intrinsics, height=32, width=48)
    center = render(replace(scene, objects=(behind, front)), path)[0, 16, 24]
    assert center[0] > center[2]
    assert torch.equal(center, render(replace(scene, objects=(front, behind)), path)[0, 16, 24])


def test_paths_relative_to_the_first_frame_are_refused(scene):
    path = film(scene, 0, num_frames=2, height=32, width=48).relative_to_first()
    with pytest.raises(ValueError, match="scene coordinates"):
        render(scene, path)


def test_there_is_texture_for_structure_from_motion(scene):
    """At 320x192 neighbouring pixels differ where a small frame is smooth."""
    path = film(scene, 0, num_frames=1, height=192, width=320)
    picture = Renderer(scene, 192)(path)[0].float().mean(-1)
    busy = (picture[:, 1:] - picture[:, :-1]).abs()
    assert (busy > 8).float().mean() > 0.25
