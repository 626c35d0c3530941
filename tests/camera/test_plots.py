"""A plot is a PNG for one path or several, moving or not, and its pyramids open towards what the camera sees."""

from __future__ import annotations

from pathlib import Path

import torch

from camera.path import CameraPath
from camera.plots import frustum, plot_path, turn_degrees
from camera.trajectories import dolly, pan, smooth_random_path

FRAME = {"num_frames": 5, "height": 32, "width": 48}


def test_plots_one_path_several_and_one_that_stands_still(tmp_path: Path) -> None:
    random = smooth_random_path(seed=0, position_low=(-1, -1, -1), position_high=(1, 1, 1), fps=8, **FRAME)
    cases: dict[str, dict[str, CameraPath]] = {
        "one": {"asked": random},
        "several": {"asked": random, "generated": dolly(1.0, **FRAME)},
        "still": {"pan": pan(30, **FRAME)},
        "one frame": {"photo": pan(0, num_frames=1, height=32, width=48)},
    }
    for name, paths in cases.items():
        file = tmp_path / f"{name}.png"
        plot_path(paths, file)
        assert file.read_bytes().startswith(b"\x89PNG")


def test_frustum_starts_at_the_camera_and_its_corners_project_to_the_corners_of_the_frame() -> None:
    path = smooth_random_path(seed=2, position_low=(-1, -1, -1), position_high=(1, 1, 1), **FRAME)
    points = frustum(path, 3, depth=0.7)
    torch.testing.assert_close(points[0], path.positions[3])
    in_camera = (points[1:] - path.positions[3]) @ path.rotations[3]  # [4, 3]
    pixels = in_camera @ path.K[3].T
    corners = torch.tensor([[0, 0], [48, 0], [48, 32], [0, 32]], dtype=torch.float64)
    torch.testing.assert_close(pixels[:, :2] / pixels[:, 2:], corners, atol=1e-9, rtol=0)
    torch.testing.assert_close(in_camera[:, 2], torch.full((4,), 0.7, dtype=torch.float64))


def test_turn_is_the_angle_to_the_first_frame() -> None:
    torch.testing.assert_close(turn_degrees(pan(-170, **FRAME)), torch.linspace(0, 170, 5, dtype=torch.float64))
