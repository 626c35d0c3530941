"""What is wrong with a path is named with its frame, and what films can do is not called wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.spatial.transform import Rotation

from camera.moves.presets import PRESETS
from camera.moves.text import make_path
from camera.moves.trajectories import smooth_random_path
from camera.path import CameraPath, intrinsics_from_fov
from camera.plausible import implausible, turn_between


def make(text: str, num_frames: int = 49, **options: object) -> CameraPath:
    return make_path(text, **{"num_frames": num_frames, "height": 48, "width": 80, "fps": 16, **options})  # type: ignore[arg-type]


GOOD = [
    "pan right 30deg",
    "orbit 360deg radius 2",
    "hold 1s; dolly in 1 1s; hold 1s",
    "dolly in 1 10frames; hold; dolly out 3 10frames; hold 10frames",
    "truck right 1 ease-in-out; truck left 1 ease-in; pan 60deg ease-out",
    "zoom in 3x; hold; zoom out 3x",
    "dolly zoom in 0.8",
    "handheld 1deg 0.05",
    "hold with handheld",
    "orbit 90deg; dolly in 0.5; hold 1s",
    "at 20%: right 1 ease-in-out; at 60%: in 1 pan 40deg; at 100%: up 1",
]


@pytest.mark.parametrize("text", [*GOOD, *(f"preset {name}" for name in PRESETS if name != "comfy:Static")])
def test_what_a_camera_does_is_plausible(text: str) -> None:
    assert implausible(make(text)) == []


@pytest.mark.parametrize("seed", range(5))
def test_random_paths_are_plausible(seed: int) -> None:
    path = smooth_random_path(
        seed=seed, num_frames=33, height=48, width=80, position_low=(-1, -1, -1), position_high=(1, 1, 1)
    )
    assert implausible(path) == []


def with_pose(path: CameraPath, frames: slice, change: torch.Tensor) -> CameraPath:
    c2w = path.c2w.clone()
    c2w[frames] = c2w[frames] @ change
    return replace(path, c2w=c2w, pose_frame="scene")


@pytest.mark.parametrize("text", ["orbit 40deg radius 2", "hold; dolly in 1"])
@pytest.mark.parametrize("frame", [1, 20, 48])
def test_a_jump_is_named_with_its_frame(text: str, frame: int) -> None:
    far = torch.eye(4, dtype=torch.float64)
    far[0, 3] = 0.9
    (warning,) = implausible(with_pose(make(text), slice(frame, None), far))
    assert warning.startswith(f"frame {frame}: jumps; moves 0.9") and f"from frame {frame - 1}" in warning


def test_a_single_wrong_frame_is_named_going_and_coming_back() -> None:
    far = torch.eye(4, dtype=torch.float64)
    far[0, 3] = 0.9
    warnings = implausible(with_pose(make("orbit 40deg radius 2"), slice(20, 21), far))
    assert [warning.split(":")[0] for warning in warnings] == ["frame 20", "frame 21"]


def test_a_turn_that_jumps_and_one_that_flips_differ() -> None:
    for degrees, says in ((30.0, "jumps; turns 30"), (180.0, "flips, 180 degrees from frame 19")):
        change = torch.eye(4, dtype=torch.float64)
        change[:3, :3] = torch.from_numpy(Rotation.from_euler("z", degrees, degrees=True).as_matrix())
        (warning,) = implausible(with_pose(make("dolly in 1"), slice(20, None), change))
        assert warning.startswith(f"frame 20: {says}")


@pytest.mark.parametrize(("degrees", "says"), [(2.0, "sees 2 degrees"), (175.0, "sees 175 degrees")])
def test_an_odd_angle_of_view_is_named_once(degrees: float, says: str) -> None:
    path = make("dolly in 1")
    K = path.K.clone()
    K[30:] = intrinsics_from_fov(torch.tensor(degrees, dtype=torch.float64), height=48, width=80)
    warnings = [warning for warning in implausible(replace(path, K=K)) if "horizontal" in warning]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"frame 30: {says} (horizontal), outside 5 to 170, and so do 18 more")


def test_an_angle_of_view_that_jumps_is_named() -> None:
    path = make("dolly in 1")
    K = path.K.clone()
    K[30:, [0, 1], [0, 1]] *= 1.5
    (warning,) = implausible(replace(path, K=K))
    assert warning.startswith("frame 30: jumps; changes its angle of view")


@pytest.mark.parametrize("text", ["hold", "preset comfy:Static", "pan 0deg"])
def test_a_path_that_stands_still_is_named(text: str) -> None:
    assert implausible(make(text)) == ["frames 0 to 48: nothing moves, all are the camera of frame 0"]
    assert implausible(make(text, num_frames=1)) == []


def test_many_jumps_are_not_all_listed() -> None:
    path = make("dolly in 1", num_frames=161)
    far = torch.eye(4, dtype=torch.float64)
    far[0, 3] = 0.9
    for frame in range(10, 160, 10):
        path = with_pose(path, slice(frame, None), far)
    warnings = implausible(path)
    assert len(warnings) == 6 and warnings[-1] == "10 more frames of that kind"


def test_warnings_do_not_depend_on_where_a_path_stands_or_on_its_unit() -> None:
    far = torch.eye(4, dtype=torch.float64)
    far[0, 3] = 0.9
    path = with_pose(make("orbit 40deg radius 2"), slice(20, None), far)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.from_numpy(Rotation.from_rotvec([0.3, -1, 2]).as_matrix())
    pose[:3, 3] = torch.tensor([5.0, -3, 8])
    moved = replace(path, c2w=pose @ path.c2w)
    scaled = moved.c2w.clone()
    scaled[:, :3, 3] *= 100
    for other in (moved, replace(moved, c2w=scaled)):
        assert [warning.split(";")[0] for warning in implausible(other)] == ["frame 20: jumps"]


def test_turn_between_is_the_angle() -> None:
    for degrees in (0.0, 1e-6, 1.0, 90.0, 179.999, 180.0):
        turned = torch.from_numpy(Rotation.from_rotvec([0.6 * degrees, 0, 0.8 * degrees], degrees=True).as_matrix())
        found = turn_between(torch.eye(3, dtype=torch.float64), turned)
        torch.testing.assert_close(found, torch.tensor(degrees, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def turned(degrees: float) -> torch.Tensor:
    change = torch.eye(4, dtype=torch.float64)
    change[:3, :3] = torch.from_numpy(Rotation.from_euler("z", degrees, degrees=True).as_matrix())
    return change


@pytest.mark.parametrize(("degrees", "says"), [(85.0, "jumps; turns 85"), (95.0, "flips, 95 degrees")])
def test_a_turn_of_more_than_a_quarter_is_a_flip(degrees: float, says: str) -> None:
    (warning,) = implausible(with_pose(make("dolly in 1"), slice(20, None), turned(degrees)))
    assert warning.startswith(f"frame 20: {says}")


def test_a_step_too_small_to_see_is_no_jump() -> None:
    """Below a hundredth of the way that the camera goes, or below a degree, also where it stood still before."""
    near = torch.eye(4, dtype=torch.float64)
    near[0, 3] = 0.005
    for change in (near, turned(0.5)):
        assert implausible(with_pose(make("hold 1s; dolly in 1 1s; hold 1s"), slice(8, None), change)) == []


def test_an_odd_view_along_the_other_side_is_named_and_five_findings_are_all_listed() -> None:
    path = make("dolly in 1", num_frames=161)
    K = path.K.clone()
    K[:, 1, 1] *= 40
    assert any("(vertical), outside 5 to 170" in warning for warning in implausible(replace(path, K=K)))
    far = torch.eye(4, dtype=torch.float64)
    far[0, 3] = 0.9
    for frame in range(10, 60, 10):
        path = with_pose(path, slice(frame, None), far)
    assert [warning.split(":")[0] for warning in implausible(path)] == [f"frame {frame}" for frame in range(10, 60, 10)]
