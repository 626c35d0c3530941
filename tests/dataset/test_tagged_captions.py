"""Captions with camera tags: the camera is what the tags say of the clip's frames, the caption has no tags."""

import pytest
import torch
from tiny_dataset import FPS, HEIGHT, WIDTH, T

from camera.moves.tagged_text import read_tagged
from core.errors import InputError
from dataset.cameras import read_clip_camera

TAGS = (
    "<starttime>0.25</starttime> <endtime>1.25</endtime> <speed>high</speed> <direction>rightup45</direction> "
    "<rotate>clockwise 10</rotate> <sep>"
)
KEYS = {"camera_format": "tagged", "pose_frame": "first"}


def tagged(world, tags: str = TAGS) -> None:
    caption = world.add_video().with_suffix(".txt")
    caption.write_text(f"Object: a white dot ; Camera: {tags}\n")


def test_captions_are_cameras_of_the_chosen_frames_and_lose_their_tags(world):
    tagged(world)
    (clip,) = world.clips(
        **KEYS, camera_directory=str(world.videos), resolution=[96, 64], target_frames=[5], target_fps=8
    )
    assert clip.caption == "a white dot"
    expected = read_tagged(TAGS, fps=FPS, height=HEIGHT, width=WIDTH, num_frames=T).frames(clip.frame_indices, fps=8)
    found = read_clip_camera(clip)
    torch.testing.assert_close(found.c2w, expected.c2w, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.K, expected.K, atol=1e-9, rtol=0)
    assert found.pose_frame == "first" and (found.c2w[-1] - found.c2w[0]).abs().max() > 0.05


def test_a_motion_is_no_place(world):
    tagged(world)
    (clip,) = world.clips(**KEYS | {"pose_frame": "scene"}, camera_directory=str(world.videos))
    with pytest.raises(InputError, match='pose frame "first"'):
        read_clip_camera(clip)


def test_tags_beyond_the_video_name_the_file_and_the_segment(world):
    tagged(world, TAGS.replace("1.25", "9"))
    (clip,) = world.clips(**KEYS, camera_directory=str(world.videos))
    with pytest.raises(InputError, match=r"0000\.txt: tagged camera text, segment 1: .*found 9 s"):
        read_clip_camera(clip)


def test_a_caption_without_tags_stays_as_it_is(world):
    world.add_video().with_suffix(".txt").write_text("  Object lessons; a <b>bold</b> dot \n")
    (clip,) = world.clips()
    assert clip.caption == "Object lessons; a <b>bold</b> dot"
