"""Every file in dataset-toml/ becomes clips with frames, captions and cameras, on data laid out as the file says."""

import json
from pathlib import Path

import pytest
from tiny_dataset import World, camera_path, dot_frames

from dataset.cameras import read_clip_camera
from dataset.clip_frames import read_clip
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from dataset.video import write_frames

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "dataset-toml").glob("*.toml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.name)
def test_an_example_gives_clips(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rendered = World(tmp_path / "rendered")
    rendered.add_video("0000.mp4")
    rendered.add_video("0001.mp4")
    write_frames(dot_frames(camera_path()), tmp_path / "rendered" / "frames" / "%05d.png")
    write_frames(dot_frames(camera_path())[::8], tmp_path / "rendered" / "images" / "%05d.png")
    for image in (tmp_path / "rendered" / "images").glob("*.png"):
        image.with_suffix(".txt").write_text("a dot")
    videos = sorted((tmp_path / "rendered" / "videos").glob("*.mp4"))
    (tmp_path / "rendered" / "list.jsonl").write_text(
        "".join(
            json.dumps({"video_path": str(x), "caption": "a dot", "camera": f"rendered/cameras/{x.stem}.txt"}) + "\n"
            for x in videos
        )
    )
    clips = list_clips(read_dataset_config(example), spatial_stride=16)
    assert clips
    for clip in clips:
        frames, _ = read_clip(clip)
        assert len(frames) == clip.num_frames and clip.caption
        if clip.num_frames > 1:
            assert len(read_clip_camera(clip)) == clip.num_frames


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
