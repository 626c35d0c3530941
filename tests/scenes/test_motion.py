"""Camera paths through a room: inside, clear of objects, upright, smooth, the same at every frame size."""

import pytest
import torch

from scenes.motion import MOVES, OBJECT_CLEARANCE, WALL_CLEARANCE, film, look_at
from scenes.scene import make_scene


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("seed", range(6))
def test_a_path_stays_inside_and_clear(move, seed):
    scene = make_scene(seed)
    position = film(scene, seed, num_frames=17, height=64, width=96, move=move).c2w[:, :3, 3]
    assert (position[:, 0].abs() <= scene.size[0] / 2 - WALL_CLEARANCE).all()
    assert (position[:, 2].abs() <= scene.size[2] / 2 - WALL_CLEARANCE).all()
    assert ((position[:, 1] < 0) & (position[:, 1] > -scene.size[1])).all()
    for item in scene.objects:
        offset = position[:, [0, 2]] - torch.tensor([item.center[0], item.center[2]])
        assert offset.norm(dim=-1).min() >= item.radius + OBJECT_CLEARANCE


@pytest.mark.parametrize("move", MOVES)
def test_a_path_moves_smoothly_and_level(move):
    path = film(make_scene(1), 5, num_frames=33, height=64, width=96, move=move)
    assert path.c2w[:, 1, 0].abs().max() < 1e-9  # the camera's right axis is horizontal
    assert (path.c2w[:, 1, 1] > 0.5).all()  # its down axis points down
    assert (path.c2w[0] - path.c2w[-1]).abs().max() > 0.05
    steps = (path.c2w[1:] - path.c2w[:-1]).abs().amax((1, 2))
    assert steps.max() < 0.15


def test_the_same_seed_is_the_same_motion_at_every_frame_size():
    scene = make_scene(2)
    small = film(scene, 7, num_frames=17, height=64, width=96)
    large = film(scene, 7, num_frames=17, height=192, width=288)
    assert torch.equal(small.c2w, large.c2w)
    torch.testing.assert_close(large.K[:, :2], 3 * small.K[:, :2])
    assert not torch.equal(small.c2w, film(scene, 8, num_frames=17, height=64, width=96).c2w)


def test_look_at_puts_the_target_on_the_optical_axis():
    position = torch.tensor([[1.0, -1.2, 0.3]], dtype=torch.float64)
    target = torch.tensor([[-0.4, -0.5, 2.0]], dtype=torch.float64)
    c2w = look_at(position, target)[0]
    seen = c2w[:3, :3].T @ (target[0] - position[0])
    torch.testing.assert_close(seen[:2], torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert seen[2] > 0
    assert torch.linalg.det(c2w[:3, :3]) == pytest.approx(1.0)
