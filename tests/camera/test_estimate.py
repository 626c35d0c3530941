"""camera/estimate.py: the camera of a rendered clip is found again; a clip that shows none is refused with a reason."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from camera.estimate import EstimateFailed, estimate_path
from camera.path import inverse_poses
from core.errors import InputError
from scenes.motion import film
from scenes.render import render
from scenes.scene import make_scene

HEIGHT, WIDTH, FRAMES = 128, 192, 9
EXTRA = "cameras from video need the extra sfm: pip install '.[sfm]'"


def film_room(move: str, num_frames: int):
    path = film(make_scene(203), 3, num_frames=num_frames, height=HEIGHT, width=WIDTH, move=move)
    return path, render(make_scene(203), path)


@pytest.fixture(scope="module")
def wander():
    return film_room("wander", FRAMES)


@pytest.fixture(scope="module")
def pan():
    return film_room("pan", 4)


@pytest.fixture(scope="module")
def found(wander):
    pytest.importorskip("pycolmap", reason=EXTRA)
    path, frames = wander
    return estimate_path(frames, focal=float(path.K[0, 0, 0]), fps=8.0)


def degrees_between(one: torch.Tensor, two: torch.Tensor) -> np.ndarray:
    """Angles between rotations [T, 3, 3]."""
    return np.degrees(Rotation.from_matrix((one.mT @ two).numpy()).magnitude())


def errors(found, asked) -> tuple[float, float]:
    """Largest rotation error in degrees, and largest position error as a part of the path, both relative to frame 0."""
    asked = asked.relative_to_first()
    a, b = found.positions, asked.positions
    scale = (a * b).sum() / (a * a).sum()
    length = b.diff(dim=0).norm(dim=-1).sum()
    turned = degrees_between(found.rotations, asked.rotations).max()
    return float(turned), float((scale * a - b).norm(dim=-1).max() / length)


def test_the_camera_of_a_rendering_is_found(found, wander):
    path, _ = wander
    rotation, position = errors(found.path, path)
    assert rotation < 0.5 and position < 0.03
    torch.testing.assert_close(found.path.K, path.K)
    assert (found.path.height, found.path.width, found.path.fps) == (HEIGHT, WIDTH, 8.0)
    assert found.path.pose_frame == "first" and found.path.scale_rule == "none"
    assert found.registered == len(found.path) == FRAMES
    assert not found.rotation_only
    assert found.reprojection_error_pixels < 0.5 and found.num_points > 100
    assert 0.3 < found.confidence <= 1


def test_mean_depth_is_in_the_units_of_the_positions(found, wander):
    path, _ = wander
    moved, asked = found.path.positions, path.relative_to_first().positions
    unit = float((asked * asked).sum() / (moved * asked).sum())  # metres
    assert 1.0 < found.path.mean_depth * unit < max(make_scene(203).size)


def test_a_clip_gives_the_same_path_twice(found, wander):
    path, frames = wander
    again = estimate_path((frame.numpy() for frame in frames), focal=float(path.K[0, 0, 0]), fps=8.0)
    assert torch.equal(again.path.c2w, found.path.c2w)
    assert replace(again, path=found.path) == found


def test_frames_backwards_are_the_motion_backwards(found, wander):
    path, frames = wander
    back = estimate_path(frames.flip(0), focal=float(path.K[0, 0, 0]))
    forward = found.path.c2w.flip(0)
    expected = inverse_poses(forward[:1]) @ forward
    assert degrees_between(back.path.rotations, expected[:, :3, :3]).max() < 0.5
    a, b = back.path.positions, expected[:, :3, 3]
    scale = (a * b).sum() / (a * a).sum()
    assert scale > 0
    assert (scale * a - b).norm(dim=-1).max() < 0.03 * b.diff(dim=0).norm(dim=-1).sum()


def test_an_unknown_focal_length_is_found(wander):
    pytest.importorskip("pycolmap", reason=EXTRA)
    path, frames = wander
    estimate = estimate_path(frames).path
    assert float(estimate.K[0, 0, 0] / path.K[0, 0, 0]) == pytest.approx(1, abs=0.1)
    assert (estimate.K == estimate.K[0]).all()
    assert errors(estimate, path)[0] < 2


def test_a_camera_that_only_turns_stays_where_it_is(pan):
    pytest.importorskip("pycolmap", reason=EXTRA)
    path, frames = pan
    found = estimate_path(frames, fov_degrees=float(path.fov_degrees()[0]))
    assert found.rotation_only
    assert (found.path.positions == 0).all() and found.path.mean_depth is None
    assert degrees_between(found.path.rotations, path.relative_to_first().rotations).max() < 0.2
    with pytest.raises(EstimateFailed, match="only turns.*give the field of view"):
        estimate_path(frames)


def static(wander):
    return wander[1][:1].repeat(6, 1, 1, 1)


def noise(_):
    return torch.randint(0, 256, (6, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def plain(_):
    return torch.full((6, HEIGHT, WIDTH, 3), 90, dtype=torch.uint8)


def cut(wander):
    other = render(make_scene(40), film(make_scene(40), 0, num_frames=3, height=HEIGHT, width=WIDTH, move="truck"))
    return torch.cat([wander[1][:4], other])


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (static, "stands still.*leave it out"),
        (noise, "no two frames with enough points in common"),
        (plain, "points to follow in a frame, found 0; the pictures are too plain"),
        (cut, "expected one shot, found 1 break.*frames 3 and 4"),
        (lambda wander: wander[1][:2], "at least 3 frames, found 2"),
    ],
)
def test_a_clip_that_shows_no_camera_is_refused(wander, frames, reason):
    pytest.importorskip("pycolmap", reason=EXTRA)
    with pytest.raises(EstimateFailed, match=reason):
        estimate_path(frames(wander), fov_degrees=60)


def test_nothing_is_printed_and_nothing_is_left(wander, tmp_path, capfd):
    pytest.importorskip("pycolmap", reason=EXTRA)
    with pytest.raises(EstimateFailed):
        estimate_path(static(wander), fov_degrees=60, work=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_without_pycolmap_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(InputError, match=r"needs pycolmap.*pip install '\.\[sfm\]'"):
        estimate_path(plain(None), fov_degrees=60)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"fov_degrees": 60, "focal": 100.0}, "found both"),
        ({"fov_degrees": 180}, "between 0 and 180"),
        ({"focal": float("nan")}, "above 0 pixels"),
        ({"mapper": "glomap"}, "incremental or global"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, reason):
    with pytest.raises(InputError, match=reason):
        estimate_path(plain(None), **arguments)
