"""A data set's scale rule and its cameras' own rate: from the TOML through the cache to what a network is told."""

from dataclasses import replace

import pytest
import torch
from tiny_dataset import FPS, VAE, T, camera_path, dot_frames, edit, latents, project

from camera.files.formats import write_ten
from camera.scale import apply_scale
from core.errors import InputError
from core.files import read_safetensors
from dataset import cache
from dataset.batches import TrainingSet
from dataset.cameras import read_clip_camera
from dataset.clip_frames import read_clip
from dataset.config import read_dataset_config
from dataset.video import write_frames

SLIDE = {"target_frames": [5], "frame_extraction": "slide", "frame_stride": 6}


@pytest.mark.parametrize("rule", ["none", "max_norm", "first_step", "metric:0.01"])
def test_the_rule_acts_on_the_relative_path_of_every_clip(world, rule):
    clips, unscaled = world.clips(camera_scale=rule, **SLIDE), world.clips(**SLIDE)
    assert len(clips) == 3
    for clip, other in zip(clips, unscaled, strict=True):
        path = read_clip_camera(clip)
        assert path.scale_rule == rule
        part = camera_path().frames(clip.frame_indices).relative_to_first()
        torch.testing.assert_close(path.positions, apply_scale(part, rule).positions, atol=1e-9, rtol=0)
        assert torch.equal(path.K, read_clip_camera(other).K)  # a length has nothing to do with the lens


def test_the_cache_gives_the_scaled_path_back_and_another_rule_makes_it_stale(world):
    (clip,) = world.clips(camera_scale="max_norm")
    path = replace(read_clip_camera(clip), mean_depth=1.5)
    cache.write_camera(clip, path)
    again = cache.read_camera(clip)
    assert torch.equal(again.c2w, path.c2w)
    assert (again.scale_rule, again.mean_depth, again.pose_frame) == ("max_norm", 1.5, "first")
    assert read_safetensors(clip.camera_cache)[1]["scale_rule"] == "max_norm"
    for keys in ({}, {"camera_scale": "first_step"}, {"camera_scale": "max_norm", "camera_fps": 16.0}):
        (other,) = world.clips(**keys)
        flaw = cache.problem(other, "camera")
        assert flaw and ("another scale rule" in flaw or "another rate of the camera file" in flaw)
        assert "cache_camera.py" in flaw


def test_a_path_that_is_not_what_the_table_asks_for_makes_no_current_cache(world):
    (clip,) = world.clips()
    path = read_clip_camera(clip)
    for change, label in (({"scale_rule": "metric:2"}, "another scale rule"), ({"pose_frame": "scene"}, "pose frame")):
        cache.write_camera(clip, replace(path, **change))
        assert label in (cache.problem(clip, "camera") or "")


def test_a_cache_from_before_the_rule_was_recorded_is_refused(world):
    (clip,) = world.clips()
    cache.write_camera(clip, read_clip_camera(clip))
    edit(clip.camera_cache, version="1")
    assert "another version" in (cache.problem(clip, "camera") or "")


def test_a_network_is_told_one_rule(world):
    world.add_video("b.mp4")
    tables = [world.table(camera_scale="max_norm"), world.table(cache_directory=world.root / "two")]
    for text, rule in ((tables[0], "max_norm"), (tables[1], "none")):
        clips = world.clips(text)
        for clip in clips:
            cache.write_latents(clip, latents(clip), encoder=VAE, crop=clip.crop)
            cache.write_text(clip, torch.ones(3, 8), encoder="t5")
            cache.write_camera(clip, read_clip_camera(clip))
        assert TrainingSet(clips, need_camera=True).scale_rule == rule
        assert TrainingSet(clips, need_camera=False).scale_rule is None
    with pytest.raises(InputError, match=r'camera_scale: .*"max_norm" \(.*"none" \('):
        TrainingSet(world.clips("".join(tables)), need_camera=True)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"camera_scale": "max_nrom"}, "camera_scale: .*max_norm"),
        ({"camera_scale": "metric"}, "metric:FACTOR"),
        ({"camera_scale": 2}, "camera_scale"),
        ({"camera_scale": "max_norm", "pose_frame": "scene"}, "coordinates of its own"),
        ({"camera_scale": "max_norm", "camera_directory": None}, "does nothing without camera_directory"),
        ({"camera_fps": 0}, "camera_fps"),
        ({"camera_fps": 8.0, "camera_directory": None}, "does nothing without camera_directory"),
        ({"frames_directory": "x", "prompt": "x", "camera_params": "y", "camera_fps": 8}, "source_fps as well"),
    ],
)
def test_a_key_that_cannot_be_is_named(world, keys, named):
    with pytest.raises(InputError, match=named):
        read_dataset_config(world.toml(**keys))


@pytest.mark.parametrize("camera_fps", [8.0, 5.0, 48.0])
def test_poses_of_another_rate_belong_to_the_frames_at_their_times(world, camera_fps):
    """The dot moves at constant speed, so a path of any rate says exactly where it is at every frame."""
    num_poses = int(20 / FPS * camera_fps) + 1
    share = (num_poses - 1) / camera_fps * FPS / 20  # of the move: the last pose stands before the last frame
    whole = camera_path()
    start, end = whole.positions[0], whole.positions[-1]
    c2w = whole.c2w[:1].repeat(num_poses, 1, 1)
    weights = torch.linspace(0, share, num_poses, dtype=torch.float64)[:, None]
    c2w[:, :3, 3] = start + weights * (end - start)
    write_ten(replace(whole, c2w=c2w, K=whole.K[:1].repeat(num_poses, 1, 1)), world.cameras / "0000.txt")
    (clip,) = world.clips(pose_frame="scene", camera_fps=camera_fps, target_fps=8, target_frames=[9])
    path = read_clip_camera(clip)
    torch.testing.assert_close(path.c2w, whole.c2w[list(clip.frame_indices)], atol=1e-9, rtol=0)
    assert path.fps == 8


def test_the_same_rate_named_is_the_rate_unnamed(world):
    (named,), (unnamed,) = world.clips(camera_fps=FPS), world.clips()
    assert torch.equal(read_clip_camera(named).c2w, read_clip_camera(unnamed).c2w)


def test_frames_after_the_last_pose_are_named(world):
    write_ten(camera_path(8), world.cameras / "0000.txt")  # at 8 a second: up to 0.875 s, which is frame 14
    (clip,) = world.clips(camera_fps=8.0)
    with pytest.raises(InputError, match=r"0000\.txt: .*frame 16 .*1\.000 s, found 8 that end at 0\.875 s"):
        read_clip_camera(clip)
    assert len(read_clip_camera(world.clips(camera_fps=8.0, target_frames=[13])[0])) == 13


def test_the_true_rate_of_the_source_counts(world):
    """source_fps corrects what the video says; poses are looked up at the corrected times."""
    write_ten(camera_path(11), world.cameras / "0000.txt")
    write_frames(dot_frames(camera_path()), world.root / "room" / "%03d.png")
    room = {"frames_directory": world.root / "room", "prompt": "x", "camera_params": world.cameras / "0000.txt"}
    (clip,) = world.clips(**room, source_fps=30, target_fps=30, camera_fps=15, target_frames=[T], resolution=[96, 64])
    path, (frames, _) = read_clip_camera(clip), read_clip(clip)
    light = frames.double().mean(-1)
    columns = torch.arange(96, dtype=torch.float64) + 0.5
    found = (light * columns).sum((1, 2)) / light.sum((1, 2))
    assert (found - project(path)[:, 0]).abs().max() < 0.1


def test_a_file_that_holds_a_motion_is_not_taken_for_places(world):
    write_ten(camera_path().relative_to_first(), world.cameras / "0000.txt")
    (place,), (motion,) = world.clips(pose_frame="scene"), world.clips(pose_frame="first")
    with pytest.raises(InputError, match=r"0000\.txt: .*pose frame \"first\".*set pose_frame = \"first\""):
        read_clip_camera(place)
    assert read_clip_camera(motion).pose_frame == "first"


def test_a_file_that_says_how_it_is_scaled_is_not_scaled_again(world):
    whole = camera_path().relative_to_first()
    write_ten(apply_scale(whole, "metric:0.5"), world.cameras / "0000.txt")
    (clip,) = world.clips(camera_scale="metric:0.5")
    torch.testing.assert_close(read_clip_camera(clip).positions, whole.positions[:17] / 2)
    for rule in ("none", "max_norm"):
        with pytest.raises(InputError, match=r"0000\.txt: .*scaled by metric:0\.5 already"):
            read_clip_camera(world.clips(camera_scale=rule)[0])
