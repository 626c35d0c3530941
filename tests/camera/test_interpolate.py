"""Laws of cameras between frames: exact at frames, constant speed stays constant, always a rotation, no overshoot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from camera.moves.trajectories import orbit, pan, poses, smooth_random_path, truck
from camera.path import CameraPath, rotation_error
from core.errors import InputError

SIZE = {"height": 40, "width": 64}


def random_path(seed: int = 0, num_frames: int = 9, **more) -> CameraPath:
    bounds = {"position_low": (-1, -0.5, -1), "position_high": (1, 0.5, 1)}
    return smooth_random_path(seed=seed, num_frames=num_frames, fps=8, **bounds, **SIZE, **more)


def tumbling_path(num_frames: int = 12) -> CameraPath:
    """Nothing smooth about it: independent rotations and positions."""
    rotations = torch.from_numpy(Rotation.random(num_frames, random_state=1).as_matrix())
    positions = torch.randn(num_frames, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return replace(random_path(num_frames=num_frames), c2w=poses(positions, rotations))


def times_of(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("path", [random_path(), tumbling_path()], ids=["smooth", "tumbling"])
def test_at_the_frames_the_path_is_the_given_one_to_the_bit(path):
    for times in (torch.arange(len(path)), times_of(3, 0.5, 8, 3.25, 0)):
        sampled = path.resampled(times)
        at_frames = times == times.round()
        assert torch.equal(sampled.c2w[at_frames], path.c2w[times[at_frames].long()])
        assert torch.equal(sampled.K[at_frames], path.K[times[at_frames].long()])


def test_times_do_not_know_of_each_other():
    path, times = tumbling_path(), times_of(0.3, 7, 2.9, 10.01)
    together = path.resampled(times)
    for index, time in enumerate(times):
        assert torch.equal(path.resampled(time[None]).c2w[0], together.c2w[index])


def test_it_never_leaves_the_rotations_and_never_zooms_below_its_neighbours():
    path = tumbling_path()
    focal = times_of(5, 5, 5, 300, 300, 2, 2, 2, 80, 81, 82, 83)
    K = path.K.clone()
    K[:, 0, 0] = K[:, 1, 1] = focal
    times = torch.linspace(0, 11, 400, dtype=torch.float64)
    sampled = replace(path, K=K).resampled(times)
    assert (rotation_error(sampled.rotations) < 1e-12).all()
    before = times.floor().long().clamp(max=10)
    for values, found in ((focal[:, None], sampled.K[:, :1, 0]), (path.positions, sampled.positions)):
        low, high = torch.minimum(values[before], values[before + 1]), torch.maximum(values[before], values[before + 1])
        assert (found >= low - 1e-12).all() and (found <= high + 1e-12).all()


@pytest.mark.parametrize("factor", [0.25, 0.4, 1.7])
def test_constant_speed_stays_constant(factor):
    """A move made directly at another rate is the resampled one."""
    times = torch.arange(0, 20.01, factor, dtype=torch.float64)
    for move, amount in ((truck, 2.0), (pan, 75.0)):
        path = move(amount, num_frames=21, **SIZE)
        sampled = path.resampled(times)
        share = float(times[-1]) / 20  # the last tick need not fall on the last frame
        direct = move(amount * share, num_frames=len(times), **SIZE)
        torch.testing.assert_close(sampled.c2w, direct.c2w, atol=1e-12, rtol=0)


def test_turns_agree_with_the_quaternion_formula():
    """SLERP by hand: sin((1 - t) a) / sin a and sin(t a) / sin a of two unit quaternions at the angle a."""
    path = tumbling_path()
    one, two = Rotation.from_matrix(path.rotations[4:6].numpy()).as_quat()
    two = two if one @ two > 0 else -two
    angle, t = np.arccos(one @ two), 0.3
    expected = (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)
    found = Rotation.from_matrix(path.resampled(times_of(4.3)).rotations[0].numpy()).as_quat()
    assert abs(abs(found @ expected) - 1) < 1e-12


def test_smooth_paths_are_found_again_from_every_second_frame():
    path = orbit(60, radius=2.0, num_frames=41, **SIZE)
    half = path.frames(range(0, 41, 2))
    again = half.resampled(torch.arange(41) / 2)
    assert (again.positions - path.positions).norm(dim=-1).max() < 2e-3  # of a way of 2.1
    turn = again.rotations.mT @ path.rotations
    assert torch.rad2deg(torch.acos(((turn.diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2).clamp(-1, 1))).max() < 1e-5


def test_the_world_may_be_moved_before_or_after():
    path = random_path()
    turn = torch.from_numpy(Rotation.from_euler("y", 90, degrees=True).as_matrix())  # maps axes onto axes
    motion = poses(torch.tensor([[3.0, -7.0, 2.0]], dtype=torch.float64), turn[None])
    times = times_of(0.2, 3.7, 6.5)
    moved = replace(path, c2w=motion @ path.c2w).resampled(times)
    torch.testing.assert_close(moved.c2w, motion @ path.resampled(times).c2w, atol=1e-12, rtol=0)


def test_pose_frame_first_stays_relative_to_its_first_time():
    path = random_path().relative_to_first()
    sampled = path.resampled(times_of(2.5, 4, 7.5), fps=3)
    assert sampled.pose_frame == "first" and sampled.fps == 3
    assert torch.equal(sampled.c2w[0], torch.eye(4, dtype=torch.float64))
    from_start = path.resampled(times_of(0, 2.5, 4, 7.5))
    torch.testing.assert_close(
        sampled.c2w[2], torch.linalg.inv(from_start.c2w[1]) @ from_start.c2w[3], atol=1e-12, rtol=0
    )


def test_short_paths():
    one, two = random_path(num_frames=1), random_path(num_frames=2)
    assert torch.equal(one.resampled(times_of(0, 0)).c2w, one.c2w.expand(2, 4, 4))
    middle = two.resampled(times_of(0.5)).positions[0]
    torch.testing.assert_close(middle, two.positions.mean(0))


@pytest.mark.parametrize("time", [-0.1, 8.01, float("nan")])
def test_a_time_outside_the_path_is_refused(time):
    with pytest.raises(InputError, match=f"frames 0 to 8, found {time:g}"):
        random_path().resampled(times_of(0, time))


def test_rounding_of_seconds_is_not_outside():
    path = random_path()
    assert torch.equal(path.resampled(times_of(-1e-9, 8 + 1e-9)).c2w, path.c2w[[0, 8]])


def test_half_a_turn_has_no_direction_and_is_named_where_it_is_asked_for():
    path = replace(random_path(), c2w=random_path().c2w.clone())
    path.c2w[5, :3, :3] = path.c2w[4, :3, :3] @ torch.diag(times_of(-1, 1, -1))
    with pytest.raises(InputError, match="frames 4 and 5"):
        path.resampled(times_of(4.5))
    assert len(path.resampled(times_of(3.5, 4, 5))) == 3
