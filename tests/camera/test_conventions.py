"""A path reaches a network in the pose frame and scale it learnt, or not at all."""

from dataclasses import replace

import pytest
import torch

from camera.conventions import in_conventions
from camera.moves.trajectories import smooth_random_path
from camera.path import CameraPath
from camera.scale import apply_scale
from core.errors import InputError


def scene_path() -> CameraPath:
    return smooth_random_path(
        seed=1, num_frames=9, height=40, width=64, position_low=(-1, -0.5, -1), position_high=(1, 0.5, 1)
    )


def adapted(path: CameraPath, **change) -> CameraPath:
    return in_conventions(
        path, **({"name": "p.txt", "declared": None, "pose_frame": "first", "scale_rule": "none"} | change)
    )


def test_a_file_that_says_nothing_is_what_the_network_learnt():
    path = scene_path()
    assert torch.equal(adapted(path, pose_frame="scene").c2w, path.c2w)
    assert torch.equal(adapted(path).c2w, path.relative_to_first().c2w)


def test_a_file_that_agrees_is_taken():
    path = scene_path()
    assert torch.equal(adapted(path, pose_frame="scene", declared="scene").c2w, path.c2w)
    motion = path.relative_to_first()
    torch.testing.assert_close(adapted(motion, declared="first").c2w, motion.c2w)


@pytest.mark.parametrize(
    ("declared", "learnt", "advice"),
    [
        ("scene", "first", "python tools/camera_path.py convert p.txt OUTPUT --pose_frame first"),
        ("first", "scene", "give the poses from which it was made"),
    ],
)
def test_pose_frames_are_never_mixed(declared, learnt, advice):
    path = scene_path() if declared == "scene" else scene_path().relative_to_first()
    with pytest.raises(InputError) as caught:
        adapted(path, declared=declared, pose_frame=learnt)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f'p.txt: expected pose frame "{learnt}"')
    assert f'found pose frame "{declared}"' in line and advice in line


def test_the_rule_acts_on_the_relative_path():
    path = scene_path()
    expected = apply_scale(path.relative_to_first(), "max_norm")
    torch.testing.assert_close(adapted(path, scale_rule="max_norm").c2w, expected.c2w)
    assert float(adapted(path, scale_rule="max_norm").positions.norm(dim=-1).max()) == pytest.approx(1)
    in_place = adapted(path, pose_frame="scene", scale_rule="metric:0.01")
    torch.testing.assert_close(in_place.positions, path.positions / 100)


def test_a_path_scaled_by_another_rule_is_refused_and_by_the_same_is_not():
    scaled = apply_scale(scene_path().relative_to_first(), "max_norm")
    torch.testing.assert_close(adapted(scaled, declared="first", scale_rule="max_norm").c2w, scaled.c2w)
    for rule in ("none", "metric:2", "first_step"):
        with pytest.raises(
            InputError, match=rf"p\.txt: the network learnt .*rule {rule}: .*scaled by max_norm already"
        ):
            adapted(scaled, declared="first", scale_rule=rule)


def test_the_depth_comes_from_the_file_or_from_the_user_who_goes_before_it():
    path = scene_path()
    with pytest.raises(InputError, match="mean depth is known"):
        adapted(path, scale_rule="mean_depth")
    in_file = adapted(replace(path, mean_depth=4.0), scale_rule="mean_depth")
    named = adapted(path, scale_rule="mean_depth", mean_depth=4.0)
    assert torch.equal(in_file.c2w, named.c2w)
    torch.testing.assert_close(named.positions * 4, path.relative_to_first().positions)
    overruled = adapted(replace(path, mean_depth=4.0), scale_rule="mean_depth", mean_depth=8.0)
    torch.testing.assert_close(overruled.positions * 2, named.positions)
