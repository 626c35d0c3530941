"""Laws of lists and images: a list gives the clips of a folder, every flaw has its line, names never collide."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_dataset import World, smooth_frames

from core.errors import InputError
from dataset.clip_frames import read_clip
from dataset.clips import Clip
from dataset.video import probe


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def write_list(world: World, entries: list[object]) -> Path:
    file = world.root / "list.jsonl"
    file.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return file


def listed(world: World, entries: list[object], **keys: object) -> list[Clip]:
    file = write_list(world, entries)
    return world.clips(video_directory=None, camera_directory=None, video_jsonl_file=str(file), **keys)


def entry(video: Path, **keys: object) -> dict[str, object]:
    return {"video_path": str(video), "caption": f"a dot in {video.stem}"} | keys


def save_image(file: Path, seed: int = 0, orientation: int | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(smooth_frames(1, 48, 64, seed)[0].numpy())
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(file, exif=exif)
    file.with_suffix(".txt").write_text("colours")
    return file


def test_a_list_gives_the_clips_of_the_folder(world):
    videos = [world.add_video(f"000{number}.mp4") for number in range(2)]
    folder = world.clips()
    clips = listed(world, [entry(video, camera=str(world.cameras / f"{video.stem}.txt")) for video in videos])
    for ours, theirs in zip(folder, clips, strict=True):
        assert (ours.source, ours.caption, ours.frame_indices, ours.crop) == (
            theirs.source,
            theirs.caption,
            theirs.frame_indices,
            theirs.crop,
        )
        assert ours.camera is not None and theirs.camera is not None
        assert (ours.camera.path, ours.camera.settings) == (theirs.camera.path, theirs.camera.settings)


def test_files_of_one_name_in_two_folders_are_two_clips(world):
    first = world.add_video("0000.mp4")
    second = world.root / "more" / "0000.mp4"
    second.parent.mkdir()
    second.write_bytes(first.read_bytes())
    clips = listed(world, [entry(first), entry(second)])
    assert len(clips) == 2
    assert len({clip.latent_cache for clip in clips} | {clip.text_cache for clip in clips}) == 4


def test_names_do_not_depend_on_the_other_lines(world):
    first, second = world.add_video("0000.mp4"), world.add_video("0001.mp4")
    both = {clip.source: clip.latent_cache for clip in listed(world, [entry(second), entry(first)])}
    (alone,) = listed(world, ["", entry(first), "  "])  # blank lines are no mistakes
    assert both[first] == alone.latent_cache


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["expected lines", "found none"]),
        (["{"], ["line 1", "JSON"]),
        (["", "[1]"], ["line 2", "JSON object"]),
        ([{"caption": "a"}], ["line 1 video_path", "None"]),
        ([{"video_path": "nowhere.mp4", "caption": "a"}], ["line 1 video_path", "nowhere.mp4", "nothing"]),
        ([{"video_path": "VIDEO"}], ["line 1 caption", "None"]),
        ([{"video_path": "VIDEO", "caption": 3}], ["line 1 caption", "3"]),
        ([{"video_path": "VIDEO", "caption": "a", "camra": "b"}], ["line 1", "'camra'", "did you mean 'camera'"]),
        ([{"video_path": "VIDEO", "caption": "a", "control_path": "b"}], ["line 1 control_path", "remove it"]),
        ([{"video_path": "VIDEO", "caption": "a", "camera": "nowhere.txt"}], ["line 1 camera", "nowhere.txt"]),
        ([{"video_path": "VIDEO", "caption": "a"}] * 2, ["line 2", "in line 1 too"]),
        (
            [{"video_path": "VIDEO", "caption": "a"}, {"video_path": "OTHER", "caption": "a", "camera": "CAMERA"}],
            ["line 1", "every line or in none", "1 of 2"],
        ),
    ],
)
def test_every_flaw_of_a_list_has_its_line(world, lines, words):
    names = {
        "VIDEO": world.add_video("0000.mp4"),
        "OTHER": world.add_video("0001.mp4"),
        "CAMERA": world.cameras / "0000.txt",
    }
    lines = [
        line
        if isinstance(line, str)
        else {key: str(names.get(value, value)) if value in names else value for key, value in line.items()}
        for line in lines
    ]
    with pytest.raises(InputError) as caught:
        listed(world, lines)
    message = str(caught.value)
    assert "\n" not in message and "list.jsonl" in message
    for word in words:
        assert word in message


def test_a_list_that_is_not_there(world):
    with pytest.raises(InputError, match="expected a list at .*gone.jsonl, found nothing"):
        world.clips(video_directory=None, camera_directory=None, video_jsonl_file=str(world.root / "gone.jsonl"))


def images(world: World, **keys: object) -> list[Clip]:
    given = {"video_directory": None, "camera_directory": None, "target_frames": None, "resolution": [64, 48]}
    return world.clips(**given | {"image_directory": str(world.root / "images")} | keys)


def test_images_are_clips_of_one_frame(world):
    files = [save_image(world.root / "images" / f"{n}.png", n) for n in range(3)]
    clips = images(world)
    assert [clip.source for clip in clips] == files and {clip.num_frames for clip in clips} == {1}
    for clip, file in zip(clips, files, strict=True):
        frames, _ = read_clip(clip)
        assert np.array_equal(frames[0].numpy(), np.array(Image.open(file)))
        assert clip.camera is None and clip.caption == "colours" and clip.fps is None


def test_a_list_of_images(world):
    file = save_image(world.root / "images" / "0.png")
    lines = write_list(world, [{"image_path": str(file), "caption": "colours"}])
    (clip,) = images(world, image_directory=None, image_jsonl_file=str(lines))
    (other,) = images(world)
    assert (clip.source, clip.caption, clip.crop) == (other.source, other.caption, other.crop)


def test_photos_stand_upright(world):
    """Orientation 6 of the camera: the stored picture is turned by a quarter."""
    save_image(world.root / "images" / "0.jpg", orientation=6)
    info = probe(world.root / "images" / "0.jpg")
    assert (info.height, info.width) == (64, 48)
    (clip,) = images(world, resolution=[48, 64])
    frames, _ = read_clip(clip)
    stored = np.array(Image.open(world.root / "images" / "0.jpg"))
    assert np.array_equal(frames[0].numpy(), np.rot90(stored, -1))


def test_an_image_without_a_caption_is_named(world):
    save_image(world.root / "images" / "0.png").with_suffix(".txt").unlink()
    with pytest.raises(InputError, match="a caption beside every image, missing: .*0.txt"):
        images(world)
