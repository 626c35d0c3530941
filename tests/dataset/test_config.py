"""Laws of the dataset TOML: what is written is read, and every mistake is named with its file, table and key."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camera.files.formats import FORMATS
from core.errors import InputError
from dataset.config import MODEL_KEYS, FramesDataset, ImageDataset, VideoDataset, read_dataset_config
from dataset.keys import ELSEWHERE, KEYS

VIDEOS = '[[datasets]]\nvideo_directory = "v"\ntarget_frames = [17]\n'
FRAMES = '[[datasets]]\nframes_directory = "f"\ntarget_frames = [17]\nprompt = "a room"\n'

IMAGES = '[[datasets]]\nimage_directory = "i"\n'
LIST = "[[datasets]]\nvideo_jsonl_file = 'v.jsonl'\ntarget_frames = [17]\ncache_directory = 'c'\n"


def read(tmp_path, text):
    file = tmp_path / "data.toml"
    file.write_text(text)
    return read_dataset_config(file)


def error(tmp_path, text):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "data.toml") in message
    return message


def test_every_key_arrives(tmp_path):
    config = read(
        tmp_path,
        """
        [model]
        task = "t2v-A14B"
        ckpt_dir = "wan"
        [general]
        resolution = [832, 480]
        caption_extension = ".caption"
        batch_size = 2
        enable_bucket = true
        bucket_no_upscale = true
        [[datasets]]
        video_directory = "v"
        cache_directory = "c"
        camera_directory = "k"
        camera_format = "re10k"
        fov_axis = "vertical"
        pose_frame = "scene"
        num_repeats = 3
        batch_size = 4
        target_frames = [17, 49]
        frame_extraction = "slide"
        frame_stride = 7
        source_fps = 30
        target_fps = 24.0
        [[datasets]]
        frames_directory = "f"
        camera_params = "f.txt"
        prompt = "a room"
        frame_extraction = "full"
        max_frames = 81
        resolution = 512
        """,
    )
    videos, scene = config.datasets
    assert dict(config.model) == {"task": "t2v-A14B", "ckpt_dir": "wan"}
    assert isinstance(videos, VideoDataset) and isinstance(scene, FramesDataset)
    assert (videos.folder, videos.cache_directory, videos.camera_directory) == (Path("v"), Path("c"), Path("k"))
    assert (videos.height, videos.width) == (480, 832)  # width comes first in the TOML, height everywhere else
    assert (videos.caption_extension, videos.num_repeats, videos.batch_size) == (".caption", 3, 4)
    assert (videos.enable_bucket, videos.bucket_no_upscale) == (True, True)
    assert (videos.camera.format, videos.camera.fov_axis, videos.camera.pose_frame) == ("re10k", "vertical", "scene")
    assert (videos.target_frames, videos.frame_extraction, videos.frame_stride) == ((17, 49), "slide", 7)
    assert (videos.source_fps, videos.target_fps) == (30.0, 24.0)
    assert (scene.folder, scene.camera_params, scene.prompt) == (Path("f"), Path("f.txt"), "a room")
    assert (scene.height, scene.width, scene.max_frames, scene.batch_size) == (512, 512, 81, 2)


def test_defaults(tmp_path):
    videos, scene = read(tmp_path, VIDEOS + FRAMES).datasets
    assert (videos.height, videos.width, videos.batch_size, videos.num_repeats) == (544, 960, 1, 1)
    assert (videos.cache_directory, videos.caption_extension, videos.camera_directory) == (Path("v"), ".txt", None)
    assert (videos.frame_extraction, videos.enable_bucket, videos.target_fps) == ("head", False, None)
    assert videos.camera.pose_frame == "first" and scene.camera.pose_frame == "scene"


def test_lists_and_images(tmp_path):
    images, videos, listed = read(
        tmp_path,
        """
        [general]
        caption_extension = ".caption"
        caption_dropout = 0.1
        [[datasets]]
        image_directory = "i"
        weight = 0.5
        [[datasets]]
        video_jsonl_file = "v.jsonl"
        cache_directory = "c"
        target_frames = [17]
        pose_frame = "scene"
        [[datasets]]
        image_jsonl_file = "i.jsonl"
        cache_directory = "d"
        caption_dropout = 0.0
        """,
    ).datasets
    assert isinstance(images, ImageDataset) and isinstance(videos, VideoDataset) and isinstance(listed, ImageDataset)
    assert (images.folder, images.jsonl_file, images.cache_directory) == (Path("i"), None, Path("i"))
    assert (images.weight, videos.weight, images.caption_dropout, listed.caption_dropout) == (0.5, 1.0, 0.1, 0.0)
    assert (videos.folder, videos.jsonl_file, videos.camera.pose_frame) == (None, Path("v.jsonl"), "scene")
    assert (listed.folder, listed.jsonl_file) == (None, Path("i.jsonl"))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_keys_of_other_models_say_why_they_stand_for_nothing(tmp_path, name):
    assert ELSEWHERE[name] in error(tmp_path, IMAGES + f"{name} = true\n")


def test_source_fps_alone_asks_for_the_rate_that_wan_knows(tmp_path):
    def target(keys):
        return read(tmp_path, VIDEOS + keys).datasets[0].target_fps

    assert (target("source_fps = 30"), target("source_fps = 8"), target("source_fps = 30\ntarget_fps = 24")) == (
        16,
        8,
        24,
    )


def test_home_folder_and_byte_order_mark(tmp_path):
    (tmp_path / "data.toml").write_text(VIDEOS.replace('"v"', '"~/v"'), encoding="utf-8-sig")
    assert read_dataset_config(tmp_path / "data.toml").datasets[0].folder == Path.home() / "v"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[general]\nresoluton = [832, 480]\n" + VIDEOS, ["[general]", "'resoluton'", "'resolution'"]),
        (VIDEOS + "frame_extracton = 'head'\n", ["[[datasets]] 1", "'frame_extracton'", "'frame_extraction'"]),
        (VIDEOS + FRAMES + "promt = 'x'\n", ["[[datasets]] 2", "'promt'", "'prompt'"]),
        ("[modle]\ntask = 'x'\n" + VIDEOS, ["'modle'", "'model'"]),
        ("[model]\nvea = 'x'\n" + VIDEOS, ["[model]", "'vea'", "'vae'"]),
        ("[model]\nvae = 3\n" + VIDEOS, ["[model] vae", "text", "3"]),
        ("[general]\ntarget_frames = [17]\n" + VIDEOS, ["[general]", "target_frames", "[[datasets]]"]),
        ("resolution = 512\n" + VIDEOS, ["top level", "resolution", "[general]"]),
        (VIDEOS + "prompt = 'x'\n", ["'prompt'", "frames_directory"]),
        (FRAMES + "camera_directory = 'x'\n", ["'camera_directory'", "video_directory"]),
        (VIDEOS + "batch_size = '2'\n", ["batch_size", "whole number", "'2'"]),
        (VIDEOS + "batch_size = true\n", ["batch_size", "whole number", "True"]),
        (VIDEOS + "num_repeats = 0\n", ["num_repeats", "at least 1", "0"]),
        (VIDEOS + "resolution = [832]\n", ["resolution", "[width, height]", "[832]"]),
        (VIDEOS + "resolution = true\n", ["resolution", "True"]),
        (VIDEOS + "enable_bucket = 1\n", ["enable_bucket", "true or false", "1"]),
        (VIDEOS + "source_fps = 0.0\n", ["source_fps", "above 0"]),
        (VIDEOS + "target_fps = nan\n", ["target_fps", "above 0"]),
        (VIDEOS + "caption_extension = 'txt'\n", ["caption_extension", "dot", "'txt'"]),
        (VIDEOS + "frame_extraction = 'heads'\n", ["frame_extraction", '"uniform"', "'heads'", "did you mean 'head'"]),
        (VIDEOS + "camera_directory = 'k'\npose_frame = 'last'\n", ["pose_frame", '"scene"', "'last'"]),
        (VIDEOS.replace("[17]", "[]"), ["target_frames", "[49]"]),
        (VIDEOS.replace("[17]", "[17, 0]"), ["target_frames", "at least 1"]),
        (VIDEOS.replace("target_frames = [17]\n", ""), ["target_frames", "not given"]),
        (FRAMES.replace('prompt = "a room"\n', ""), ["prompt", "not given"]),
        (FRAMES + "target_fps = 16\n", ["target_fps", "source_fps"]),
        (VIDEOS + "frame_extraction = 'full'\n", ["target_frames", "does nothing", "max_frames"]),
        (VIDEOS + "frame_stride = 2\n", ["frame_stride", "does nothing", '"slide"']),
        (VIDEOS + "frame_sample = 2\n", ["frame_sample", "does nothing", '"uniform"']),
        (VIDEOS + "max_frames = 81\n", ["max_frames", "does nothing", '"full"']),
        (VIDEOS + "fov_axis = 'vertical'\n", ["fov_axis", "camera_directory"]),
        (FRAMES + "camera_format = 'ten'\n", ["camera_format", "camera_params"]),
        (VIDEOS + "bucket_no_upscale = true\n", ["bucket_no_upscale", "enable_bucket"]),
        ("[general]\nbucket_no_upscale = true\n" + VIDEOS, ["bucket_no_upscale", "enable_bucket"]),
        (VIDEOS + "camera_directory = 'v'\n", ["camera_directory", "captions"]),
        (VIDEOS + 'frames_directory = "f"\n', ["found video_directory and frames_directory"]),
        ("[[datasets]]\nvideo_directry = 'v'\n", ["found none", "'video_directry'", "'video_directory'"]),
        (VIDEOS + "caption_dropout = 1\n", ["caption_dropout", "below 1"]),
        (VIDEOS + "weight = 0\n", ["weight", "above 0"]),
        (VIDEOS + "control_directory = 'c'\n", ["control_directory", "control video", "remove it"]),
        (IMAGES + "target_frames = [17]\n", ["'target_frames'", "video_directory or video_jsonl_file"]),
        (IMAGES + "camera_directory = 'k'\n", ["'camera_directory'", "video_directory"]),
        (LIST.replace("cache_directory = 'c'\n", ""), ["cache_directory", "not given", "video_jsonl_file"]),
        (LIST + "caption_extension = '.txt'\n", ["caption_extension", "does nothing", "lines"]),
        (LIST + "camera_directory = 'k'\n", ["camera_directory", "does nothing", '"camera"']),
        ("[general]\nbatch_size = 1\n", ["[[datasets]]", "none"]),
        ("datasets = 3\n", ["[[datasets]]"]),
        ("datasets = [3]\n", ["[[datasets]] 1", "table"]),
        ("general = 3\n" + VIDEOS, ["[general]", "table"]),
        (VIDEOS + VIDEOS, ["[[datasets]] 2", "cache_directory", "[[datasets]] 1"]),
        (VIDEOS + FRAMES + 'cache_directory = "../x/v"\n', ["unparsed"]),
        ("[[datasets]\n", ["TOML"]),
        ("[[datasets]]\nvideo_directory = v\n", ["line 2"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, parts, monkeypatch):
    if parts == ["unparsed"]:  # one cache directory written in two ways
        (tmp_path / "x").mkdir()
        monkeypatch.chdir(tmp_path / "x")
        parts = ["[[datasets]] 2", "cache_directory", "[[datasets]] 1"]
    message = error(tmp_path, text)
    for part in parts:
        assert part in message


def test_a_missing_file_and_a_file_that_is_no_text(tmp_path):
    with pytest.raises(InputError, match="nothing"):
        read_dataset_config(tmp_path / "data.toml")
    with pytest.raises(InputError, match="a folder"):
        read_dataset_config(tmp_path)
    (tmp_path / "data.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_dataset_config(tmp_path / "data.toml")


@given(st.text(alphabet="[]{}=\"\\'#.,abc_ 0\n\t", max_size=60))
def test_no_text_breaks_the_reader(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("toml") / "data.toml"
    file.write_text(VIDEOS + text)
    try:
        read_dataset_config(file)
    except InputError as problem:
        assert str(file) in str(problem)


def test_the_camera_formats_are_those_of_the_readers():
    for name in ("auto", *FORMATS):
        assert KEYS["camera_format"].read(name) == name
    with pytest.raises(ValueError):
        KEYS["camera_format"].read("colmapp")


def test_reading_a_config_imports_no_torch():
    code = "import sys, dataset.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [*KEYS, *MODEL_KEYS])
def test_every_key_is_in_the_documentation_with_its_default(name):
    rows = [line for line in (ROOT / "docs/datasets.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"{name} has no row, or more than one, in docs/datasets.md"
    default = KEYS[name].default if name in KEYS else None
    if name == "resolution":
        default = [default[1], default[0]]
    if default is not None:
        shown = json.dumps(default)  # of these values TOML's notation
        assert f"| `{shown}` |" in rows[0]
