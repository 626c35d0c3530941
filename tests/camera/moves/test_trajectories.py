"""Laws of the motions: a pan only turns, a truck only moves, an orbit keeps its point, a random path its bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from camera.moves.trajectories import dolly, orbit, pan, poses, smooth_random_path, truck
from camera.path import rotation_error

FRAME = {"num_frames": 9, "height": 32, "width": 48}


def project(path_c2w: Tensor, K: Tensor, point: Tensor) -> Tensor:
    """Pixels (x, y) of a world point in every frame, [T, 2]."""
    in_camera = torch.linalg.inv(path_c2w) @ torch.cat([point, point.new_ones(1)])  # [T, 4]
    pixels = torch.einsum("tij,tj->ti", K, in_camera[:, :3])
    return pixels[:, :2] / pixels[:, 2:]


def test_pan_right_turns_and_the_picture_runs_to_the_left() -> None:
    path = pan(30, **FRAME)
    assert torch.equal(path.positions, torch.zeros(9, 3, dtype=torch.float64))
    pixels = project(path.c2w, path.K, torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64))
    assert (pixels[:, 0].diff() < 0).all()
    forward = path.rotations[-1, :, 2]
    torch.testing.assert_close(
        torch.rad2deg(torch.atan2(forward[0], forward[2])), torch.tensor(30.0, dtype=torch.float64)
    )


def test_truck_right_moves_and_near_things_run_faster_than_far_ones() -> None:
    path = truck(1.5, **FRAME)
    assert torch.equal(path.rotations, torch.eye(3, dtype=torch.float64).expand(9, 3, 3))
    torch.testing.assert_close(path.positions[-1], torch.tensor([1.5, 0, 0], dtype=torch.float64))
    near, far = (project(path.c2w, path.K, torch.tensor([0.0, 0.0, z], dtype=torch.float64))[:, 0] for z in (3.0, 9.0))
    assert (near.diff() < far.diff()).all() and (far.diff() < 0).all()


def test_dolly_in_makes_things_larger() -> None:
    path = dolly(2.0, **FRAME)
    torch.testing.assert_close(path.positions[-1], torch.tensor([0, 0, 2.0], dtype=torch.float64))
    pixels = project(path.c2w, path.K, torch.tensor([0.5, 0.5, 4.0], dtype=torch.float64))
    assert (pixels.diff(dim=0) > 0).all()


@pytest.mark.parametrize("degrees", [90.0, -40.0])
def test_orbit_keeps_its_point_in_the_centre_and_its_distance(degrees: float) -> None:
    start = poses(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), pan(25, **FRAME).rotations[-1:])[0]
    path = orbit(degrees, radius=2.0, start=start, **FRAME)
    torch.testing.assert_close(path.c2w[0], start)
    point = start[:3, 3] + 2.0 * start[:3, 2]
    torch.testing.assert_close((path.positions - point).norm(dim=-1), torch.full((9,), 2.0, dtype=torch.float64))
    centre = torch.tensor([24.0, 16.0], dtype=torch.float64).expand(9, 2)
    torch.testing.assert_close(project(path.c2w, path.K, point), centre)
    sideways = (torch.linalg.inv(start) @ path.c2w)[1:, 0, 3]
    assert ((sideways > 0) == (degrees > 0)).all()


@pytest.mark.parametrize("seed", range(8))
def test_random_path_stays_inside_its_bounds(seed: int) -> None:
    low, high = torch.tensor([-1.0, -0.2, 0.0]), torch.tensor([1.0, 0.3, 0.5])
    path = smooth_random_path(
        seed=seed,
        num_frames=33,
        height=32,
        width=48,
        position_low=low.tolist(),
        position_high=high.tolist(),
        yaw_degrees=(-20, 40),
        pitch_degrees=(-5, 15),
    )
    assert (path.positions >= low).all() and (path.positions <= high).all()
    forward, right = path.rotations[:, :, 2], path.rotations[:, :, 0]
    yaw = torch.rad2deg(torch.atan2(forward[:, 0], forward[:, 2]))
    pitch = torch.rad2deg(torch.asin(-forward[:, 1]))
    assert yaw.min() >= -20 - 1e-9 and yaw.max() <= 40 + 1e-9
    assert pitch.min() >= -5 - 1e-9 and pitch.max() <= 15 + 1e-9
    assert right[:, 1].abs().max() < 1e-12  # no roll
    assert (rotation_error(path.rotations) < 1e-12).all()
    speed = path.positions.diff(dim=0)
    assert speed.diff(dim=0).norm(dim=-1).max() < 0.5 * speed.norm(dim=-1).max()  # smooth: no jump between frames


def test_random_path_is_a_function_of_its_seed() -> None:
    bounds = {"position_low": (-1, -1, -1), "position_high": (1, 1, 1)}
    first, again, other = (smooth_random_path(seed=seed, **FRAME, **bounds) for seed in (3, 3, 4))
    assert torch.equal(first.c2w, again.c2w)
    assert (first.c2w - other.c2w).abs().max() > 0.1


def test_random_path_looks_at_its_point() -> None:
    point = torch.tensor([0.5, 0.2, 3.0], dtype=torch.float64)
    path = smooth_random_path(
        seed=1,
        position_low=(-1, -1, -1),
        position_high=(1, 1, 1),
        yaw_degrees=(0, 0),
        pitch_degrees=(0, 0),
        look_at=point.tolist(),
        **FRAME,
    )
    centre = torch.tensor([24.0, 16.0], dtype=torch.float64).expand(9, 2)
    torch.testing.assert_close(project(path.c2w, path.K, point), centre)


def test_random_path_refuses_bounds_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="bounds"):
        smooth_random_path(seed=0, position_low=(1, 0, 0), position_high=(0, 1, 1), **FRAME)
