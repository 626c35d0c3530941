"""Laws of the clip list: it follows from the TOML and its files alone, and what is missing is named."""

import dataclasses
import logging

import pytest
from tiny_dataset import smooth_frames

from core.errors import InputError
from dataset.clip_frames import read_clip
from dataset.video import write_frames, write_video


def test_a_clip_knows_its_frames_size_caption_and_files(world):
    (clip,) = world.clips(batch_size=2, num_repeats=3)
    assert clip.source == world.videos / "0000.mp4"
    assert clip.frame_indices == tuple(range(17)) and clip.num_source_frames == 21 and clip.fps == 16
    assert (clip.height, clip.width) == (48, 64)
    assert clip.caption == "a dot in 0000"
    assert clip.camera.path == world.cameras / "0000.txt"
    assert (clip.batch_size, clip.num_repeats) == (2, 3)
    assert {clip.latent_cache.parent, clip.text_cache.parent, clip.camera_cache.parent} == {world.root / "cache"}
    frames, crop = read_clip(clip)
    assert frames.shape == (17, 48, 64, 3) and crop == clip.crop


def test_the_list_does_not_depend_on_what_lies_in_the_cache_folder(world):
    before = world.clips()
    (world.root / "cache").mkdir()
    (world.root / "cache" / "9999.mp4_00000-017_0064x0048_latents.safetensors").write_bytes(b"old")
    assert world.clips() == before


def test_clips_are_in_the_order_of_names_and_frames(world):
    world.add_video("b.mp4")
    world.add_video("a.mp4")
    clips = world.clips(target_frames=[9, 5], frame_extraction="slide", frame_stride=6)
    found = [(clip.source.name, clip.num_frames, clip.frame_indices[0]) for clip in clips]
    windows = [(5, 0), (5, 6), (5, 12), (9, 0), (9, 6), (9, 12)]
    assert found == [(name, *window) for name in ("0000.mp4", "a.mp4", "b.mp4") for window in windows]


def test_no_two_clips_share_a_latent_or_camera_cache(world):
    write_video(smooth_frames(21), world.videos / "0000.mov", 16)  # the stem of 0000.mp4
    second = world.table(cache_directory=world.root / "cache2", frame_extraction="chunk", target_frames=[5, 9])
    clips = world.clips(world.table(frame_extraction="uniform", frame_sample=3, target_frames=[5, 9]) + second)
    assert len(clips) == 2 * (2 * 3) + 2 * (4 + 2)
    for name in ("key", "latent_cache", "camera_cache"):
        assert len({getattr(clip, name) for clip in clips}) == len(clips)
    assert len({clip.text_cache for clip in clips}) == 4  # two sources, two cache directories


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"target_fps": 8}, [0, 2, 4, 6, 8]),
        ({"source_fps": 32}, [0, 2, 4, 6, 8]),
        ({"source_fps": 32, "target_fps": 32}, [0, 1, 2, 3, 4]),
        ({"target_fps": 16.1}, [0, 1, 2, 3, 4]),
    ],
)
def test_frames_are_sampled_at_the_rate_wanted(world, keys, expected):
    (clip,) = world.clips(target_frames=[5], **keys)
    assert clip.frame_indices == tuple(expected)
    step = expected[1] - expected[0]
    assert clip.fps == pytest.approx(keys.get("source_fps", 16) / step)


def test_windows_are_cut_from_sampled_frames(world):
    clips = world.clips(target_frames=[5], target_fps=8, frame_extraction="chunk")
    assert [clip.frame_indices for clip in clips] == [(0, 2, 4, 6, 8), (10, 12, 14, 16, 18)]


def test_lengths_are_rounded_down_and_said_so(world, caplog):
    with caplog.at_level(logging.WARNING):
        (clip,) = world.clips(target_frames=[20, 18])
    assert clip.num_frames == 17
    assert "target_frames: 20" in caplog.text and "using 17" in caplog.text
    (clip,) = world.clips(target_frames=None, frame_extraction="full")
    assert clip.num_frames == 21
    (clip,) = world.clips(target_frames=None, frame_extraction="full", max_frames=13)
    assert clip.num_frames == 13


def test_a_video_too_short_is_left_out_and_said_so(world, caplog):
    world.add_video("short.mp4", num_frames=7)
    with caplog.at_level(logging.WARNING):
        clips = world.clips()
    assert [clip.source.name for clip in clips] == ["0000.mp4"]
    assert "short.mp4" in caplog.text and "7 frames" in caplog.text and "17" in caplog.text


def test_a_scene_of_frames(world):
    write_frames(smooth_frames(9), world.root / "room" / "%d.png")
    (clip,) = world.clips(
        frames_directory=world.root / "room",
        camera_params=world.cameras / "0000.txt",
        prompt="a room",
        target_frames=[9],
        source_fps=8,
    )
    assert (clip.caption, clip.fps, clip.num_frames) == ("a room", 8, 9)
    assert clip.camera.settings.pose_frame == "scene"
    frames, _ = read_clip(clip)
    assert frames.shape == (9, 48, 64, 3)


def test_buckets_keep_the_aspect_of_each_video(world):
    world.add_video("tall.mp4", height=128, width=64)
    wide, tall = world.clips(resolution=[64, 64], enable_bucket=True)
    assert (wide.height, wide.width) == (48, 80) and (tall.height, tall.width) == (80, 48)
    for clip in (wide, tall):
        assert read_clip(clip)[0].shape == (17, clip.height, clip.width, 3)
    (small,) = world.clips(
        resolution=[640, 640], enable_bucket=True, bucket_no_upscale=True, target_frames=[21], source_fps=16
    )[:1]
    assert (small.height, small.width) == (64, 96)


def refusal(world, *args, **keys):
    with pytest.raises(InputError) as caught:
        world.clips(*args, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_captions_are_all_named(world):
    for name in ("a", "b"):
        world.add_video(f"{name}.mp4")
        (world.videos / f"{name}.txt").unlink()
    message = refusal(world)
    assert "a.txt" in message and "b.txt" in message and "0000.txt" not in message
    assert "cap" in refusal(world, caption_extension=".cap")


def test_a_missing_camera_file_is_named(world):
    (world.cameras / "0000.txt").unlink()
    message = refusal(world)
    assert "camera" in message and "0000.txt" in message
    write_frames(smooth_frames(5), world.root / "room" / "%d.png")
    message = refusal(world, frames_directory=world.root / "room", camera_params=world.root / "no.txt", prompt="x")
    assert "camera_params" in message and "no.txt" in message


def test_folders_that_are_missing_or_hold_no_videos(world):
    message = refusal(world, video_directory=world.root / "nowhere")
    assert "video_directory" in message and "nowhere" in message and "nothing" in message
    (world.root / "empty").mkdir()
    message = refusal(world, video_directory=world.root / "empty")
    assert "expected videos" in message and "empty" in message
    assert "nowhere" in refusal(world, frames_directory=world.root / "nowhere", prompt="x")


def test_an_empty_data_set_is_an_error(world):
    assert "at least one clip" in refusal(world, target_frames=[81])


@pytest.mark.parametrize("stride", [16, 32])
def test_sizes_must_fit_the_patch_grid(world, stride):
    message = refusal(world, resolution=[100, 70], spatial_stride=stride)
    assert "resolution" in message and f"multiples of {stride}" in message and "100x70" in message
    assert world.clips(resolution=[100, 70], enable_bucket=True, spatial_stride=stride)[0].width % stride == 0


def test_frames_are_never_repeated_for_a_higher_rate(world):
    message = refusal(world, target_fps=24)
    assert "target_fps" in message and "0000.mp4" in message and "16" in message


def test_a_source_without_a_bucket_is_named(world):
    message = refusal(world, resolution=[8, 8], enable_bucket=True)
    assert "0000.mp4" in message and "96x64" in message


def test_an_undecodable_video_is_named(world):
    (world.videos / "0000.mp4").write_bytes(b"x" * 1000)
    assert "0000.mp4" in refusal(world)


def test_a_caption_that_is_no_text_is_named(world):
    (world.videos / "0000.txt").write_bytes(b"\xff\xfe\xfa")
    assert "0000.txt" in refusal(world)


def test_frames_of_another_size_than_the_first_are_named(world):
    files = write_frames(smooth_frames(5), world.root / "room" / "%d.png")
    (clip,) = world.clips(frames_directory=world.root / "room", prompt="x", target_frames=[5])
    (other,) = write_frames(smooth_frames(1, height=32), world.root / "other" / "%d.png")
    other.replace(files[3])
    with pytest.raises(InputError, match="96x32 in frame 3"):
        read_clip(clip)


def test_clips_are_values(world):
    (clip,) = world.clips()
    assert clip == dataclasses.replace(clip) and hash(clip) == hash(dataclasses.replace(clip))
