"""tools/dataset.py: a TOML it begins runs, a problem ends with code 2, a picture shows what was encoded."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from core.errors import InputError
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from dataset.video import write_frames, write_video
from tests.dataset.tiny_dataset import World, camera_path, dot_frames, smooth_frames

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("dataset_tool", ROOT / "tools" / "dataset.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["dataset_tool"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path)
    world.add_video("a.mp4")
    world.add_video("b.mp4")
    return world


def begin(tool, source: Path, **options) -> list:
    """The clips of the TOML that `new` writes."""
    output = Path("new.toml")
    tool.main(tool.New(**{"source": source, "output": output, "task": "tiny"} | options))
    return list_clips(read_dataset_config(output), spatial_stride=16)


def test_a_toml_for_videos_runs(tool, world):
    clips = begin(tool, world.videos, cameras=world.cameras)
    assert [clip.source.name for clip in clips] == ["a.mp4", "b.mp4"]
    assert all(clip.num_frames % 4 == 1 and clip.camera is not None for clip in clips)


def test_a_toml_for_a_list_runs(tool, world):
    lines = [{"video_path": str(world.videos / name), "caption": "a dot"} for name in ("a.mp4", "b.mp4")]
    Path("list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(begin(tool, Path("list.jsonl"))) == 2


def test_a_toml_for_a_scene_runs(tool, world):
    write_frames(dot_frames(camera_path()), "frames/%05d.png")
    (clip,) = begin(tool, Path("frames"), prompt='a "dot" \u00e4', cameras=world.cameras / "a.txt")
    assert clip.caption == 'a "dot" \u00e4' and clip.camera is not None
    with pytest.raises(InputError, match="--prompt"):
        begin(tool, Path("frames"), overwrite=True)


def test_fast_videos_are_sampled_at_the_rate_of_the_task(tool, world):
    write_video(smooth_frames(61), world.videos / "a.mp4", 30)
    (world.videos / "b.mp4").unlink()
    (clip,) = begin(tool, world.videos)
    assert clip.fps == 8 and clip.num_frames == 13  # 61 frames are 16 at 8 a second


def test_a_toml_that_is_there_stays(tool, world):
    begin(tool, world.videos)
    before = Path("new.toml").read_text()
    with pytest.raises(InputError, match="--overwrite"):
        begin(tool, world.videos)
    assert Path("new.toml").read_text() == before


def test_problems_end_with_code_2_and_are_all_printed(world):
    toml = world.toml()
    toml.write_text('[model]\ntask = "tiny"\n' + toml.read_text())
    command = [sys.executable, str(ROOT / "tools" / "dataset.py"), "check", str(toml)]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0 and "2 clips" in good.stdout
    (world.videos / "a.txt").unlink()
    (world.cameras / "b.txt").write_text("nonsense")
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    assert len([line for line in bad.stdout.splitlines() if line.startswith("problem: ")]) == 2


def test_the_picture_shows_the_clip(tool, tmp_path, world):
    import cache_camera
    import cache_latents

    toml = world.toml(resolution=[96, 64])
    toml.write_text(f'[model]\ntask = "tiny"\nckpt_dir = "{ROOT}/assets/tiny-wan"\n' + toml.read_text())
    cache_latents.main(cache_latents.Options(dataset_config=toml, device="cpu"))
    cache_camera.main(cache_camera.Options(dataset_config=toml))
    tool.main(tool.Show(dataset_config=toml, clip=1, output=tmp_path / "clip.png", device="cpu"))
    with Image.open(tmp_path / "clip.png") as picture:
        assert picture.width > 7 * 96 and picture.height > 2 * 64
        colours = picture.convert("RGB").getcolors(2**24)
    assert colours is not None and len(colours) > 1000
    assert not list(tmp_path.glob(".*.png"))
    with pytest.raises(InputError, match="--clip: expected 0 to 1, found 2"):
        tool.main(tool.Show(dataset_config=toml, clip=2, output=tmp_path / "clip.png", device="cpu"))
