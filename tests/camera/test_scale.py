"""Laws of scale rules: what becomes 1, what a rule forgets, what it never touches, and what is never scaled twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from camera.moves.trajectories import pan, smooth_random_path
from camera.path import CameraPath
from camera.scale import apply_scale, in_scale, parse_scale_rule
from core.errors import InputError

RULES = ("max_norm", "first_step", "metric:0.01", "mean_depth")


def scene_path(seed: int = 0) -> CameraPath:
    path = smooth_random_path(
        seed=seed, num_frames=9, height=40, width=64, position_low=(-1, -0.5, -1), position_high=(1, 0.5, 1)
    )
    return replace(path, mean_depth=2.5)


def first_path(seed: int = 0) -> CameraPath:
    return scene_path(seed).relative_to_first()


def enlarged(path: CameraPath, factor: float) -> CameraPath:
    """The same film in another unit of length."""
    c2w = path.c2w.clone()
    c2w[:, :3, 3] *= factor
    return replace(path, c2w=c2w, mean_depth=path.mean_depth * factor)


def test_what_becomes_one():
    there = first_path()
    path = there.frames([*range(9), 4, 2])  # the largest distance is not that of the last frame
    assert float(apply_scale(path, "max_norm").positions.norm(dim=-1).max()) == pytest.approx(1)
    assert float(apply_scale(path, "first_step").positions[1].norm()) == pytest.approx(1)
    assert apply_scale(path, "mean_depth").mean_depth == pytest.approx(1)
    torch.testing.assert_close(apply_scale(path, "metric:0.01").positions, path.positions / 100)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_touches_only_the_length_of_translations(rule):
    path = first_path()
    scaled = apply_scale(path, rule)
    assert scaled.scale_rule == rule and scaled.pose_frame == "first"
    assert torch.equal(scaled.rotations, path.rotations) and torch.equal(scaled.K, path.K)
    factor = scaled.positions[5] / path.positions[5]
    torch.testing.assert_close(scaled.positions, path.positions * factor[0])
    assert scaled.mean_depth == pytest.approx(2.5 * float(factor[0]))


@pytest.mark.parametrize("rule", ["max_norm", "first_step", "mean_depth"])
@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_the_unit_that_a_path_came_in_is_forgotten(rule, factor):
    one, other = apply_scale(first_path(), rule), apply_scale(enlarged(first_path(), factor), rule)
    torch.testing.assert_close(one.c2w, other.c2w)


def test_first_step_looks_past_frames_that_stand_still():
    path = first_path()
    late = replace(path, c2w=torch.cat([path.c2w[:1].expand(3, 4, 4), path.c2w[1:]]), K=path.K[:1].expand(11, 3, 3))
    assert float(apply_scale(late, "first_step").positions[3].norm()) == pytest.approx(1)


@pytest.mark.parametrize("rule", ["max_norm", "first_step"])
def test_a_camera_that_only_turns_keeps_its_place_even_through_rounding(rule):
    turn = pan(30, num_frames=9, height=40, width=64)
    away = turn.c2w.clone()
    away[:, :3, 3] = torch.tensor([103.7, -11.3, 1e3 / 7], dtype=torch.float64)
    away[4:, :3, 3] += 1e-13  # as after any arithmetic at this distance
    path = replace(turn, c2w=away, pose_frame="scene").relative_to_first()
    scaled = apply_scale(path, rule)
    assert scaled.scale_rule == rule
    assert scaled.positions.abs().max() < 1e-9


def test_metric_factors_and_none():
    path = scene_path()
    assert apply_scale(path, "none") is path
    torch.testing.assert_close(apply_scale(path, "metric:2").positions, 2 * path.positions)
    torch.testing.assert_close(apply_scale(path, "mean_depth").positions, path.positions / 2.5)


@pytest.mark.parametrize("rule", ["max_norm", "first_step"])
def test_clips_of_one_place_never_get_scales_of_their_own(rule):
    with pytest.raises(InputError, match='pose frame "scene".*metric:FACTOR'):
        apply_scale(scene_path(), rule)


@pytest.mark.parametrize("rule", [*RULES, "none"])
def test_nothing_is_scaled_twice(rule):
    with pytest.raises(InputError, match="scaled by metric:3 already"):
        apply_scale(apply_scale(first_path(), "metric:3"), rule)


def test_mean_depth_needs_a_depth():
    with pytest.raises(InputError, match="mean depth is known"):
        apply_scale(replace(first_path(), mean_depth=None), "mean_depth")
    for depth in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="mean depth above 0"):
            replace(first_path(), mean_depth=depth)


@pytest.mark.parametrize("rule", RULES)
def test_a_file_that_says_it_is_scaled_is_taken_as_it_is(rule):
    scaled = apply_scale(first_path(), rule)
    torch.testing.assert_close(in_scale(scaled, rule).c2w, scaled.c2w)
    torch.testing.assert_close(in_scale(first_path(), rule).c2w, scaled.c2w)
    other = "metric:5" if rule != "metric:5" else "max_norm"
    with pytest.raises(InputError, match=f"scaled by {rule} already"):
        in_scale(scaled, other)
    with pytest.raises(InputError, match=f"scaled by {rule} already"):
        in_scale(scaled, "none")


@pytest.mark.parametrize("rule", RULES)
def test_a_part_of_a_scaled_file_is_the_scaled_part_of_the_file(rule):
    whole = first_path()
    part = in_scale(apply_scale(whole, rule).frames(range(3, 8)), rule)
    torch.testing.assert_close(part.c2w, apply_scale(whole.frames(range(3, 8)), rule).c2w)


@pytest.mark.parametrize(
    ("text", "rule"),
    [("none", "none"), (" max_norm ", "max_norm"), ("metric:0.010", "metric:0.01"), ("metric:1e-2", "metric:0.01")],
)
def test_a_rule_has_one_spelling(text, rule):
    assert parse_scale_rule(text) == rule
    assert parse_scale_rule(rule) == rule


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_nrom", "did you mean 'max_norm'"),
        ("metric", "metric:FACTOR"),
        ("metric:", "factor above 0"),
        ("metric:-1", "factor above 0"),
        ("metric:nan", "factor above 0"),
        ("metric:inf", "factor above 0"),
        ("max_norm:2", "expected one of"),
        ("metric:FACTOR", "factor above 0"),
        ("", "expected one of"),
    ],
)
def test_an_unknown_rule_is_named(text, named):
    with pytest.raises(InputError, match=named):
        parse_scale_rule(text)
