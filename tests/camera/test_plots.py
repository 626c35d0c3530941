"""A plot is a PNG for one path or several, moving or not, and its pyramids open towards what the camera sees."""

from __future__ import annotations

from pathlib import Path

import torch

from camera.moves.text import make_path
from camera.moves.trajectories import dolly, pan, smooth_random_path
from camera.path import CameraPath
from camera.plots import frustum, plot_path, time_panels, turn_degrees

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


def test_curves_are_those_of_the_path_in_seconds() -> None:
    path = make_path("dolly in 2 + pan 40deg", num_frames=17, height=32, width=48, fps=8)
    panels = {panel.label.split("\n")[0]: panel for panel in time_panels({"dolly": path})}
    assert list(panels) == ["right", "up", "forward", "turned", "speed", "turning"]
    assert all(panel.time_unit == "seconds" for panel in panels.values())
    for name, values in {
        "right": [0.0] * 17,
        "forward": [index / 8 for index in range(17)],
        "speed": [1.0] * 16,
    }.items():
        ((times, found),) = panels[name].curves
        torch.testing.assert_close(torch.tensor(found), torch.tensor(values))
        assert len(times) == len(found)
    torch.testing.assert_close(torch.tensor(panels["turning"].curves[0][1]), torch.full((16,), 20.0))
    assert panels["speed"].curves[0][0][:2] == [1 / 16, 3 / 16]  # between the frames


def test_the_angle_of_view_is_drawn_where_it_changes_and_time_is_frames_where_one_path_has_no_clock() -> None:
    zoom = make_path("zoom to 30deg", num_frames=5, height=32, width=48)
    panels = {
        panel.label.split("\n")[0]: panel for panel in time_panels({"zoom": zoom, "pan": pan(30, fps=8, **FRAME)})
    }
    assert "sees" in panels and panels["sees"].time_unit == "frame"
    torch.testing.assert_close(torch.tensor(panels["sees"].curves[0][1])[[0, -1]], torch.tensor([60.0, 30.0]))
