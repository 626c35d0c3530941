"""The tool pairs videos and paths, says what is missing in one line, and never drops a video."""

import json
from dataclasses import replace

import pytest
import torch

from camera.files.formats import write_ten
from core.errors import InputError
from dataset.video import write_video
from evaluation import estimators
from scenes.motion import film
from scenes.scene import make_scene
from tools import evaluate_camera

FRAMES, HEIGHT, WIDTH = 3, 16, 32


@pytest.fixture
def world(tmp_path):
    """Two videos with their paths in room 5; the videos show nothing."""
    for index in range(2):
        path = film(make_scene(5), index, num_frames=FRAMES, height=HEIGHT, width=WIDTH)
        (tmp_path / "cameras").mkdir(exist_ok=True)
        write_ten(path, tmp_path / f"cameras/{index}.txt")
        write_video(torch.zeros(FRAMES, HEIGHT, WIDTH, 3, dtype=torch.uint8), tmp_path / f"videos/{index}.mp4", 8)
    (tmp_path / "videos/0.txt").write_text("a caption")
    scenes = [{"name": str(index), "scene": 5} for index in range(2)]
    (tmp_path / "scenes.json").write_text(json.dumps(scenes))
    return tmp_path


def options_for(world, **changes):
    options = evaluate_camera.Options(
        videos=world / "videos", paths=world / "cameras", estimator="render", no_plots=True, output=world / "out"
    )
    return replace(options, **changes)


class Unrendered:
    """A renderer without textures."""

    def __init__(self, scene, height) -> None:
        self.scene = scene


class Knowing:
    """A stand-in for the alignment that knows video 0's path and sees nothing in the others."""

    def __init__(self, renderer) -> None:
        assert renderer.scene.seed == 5
        self.asked = [0, 1]

    def recover(self, frames, *, K, start):
        path = film(make_scene(5), 0, num_frames=FRAMES, height=HEIGHT, width=WIDTH)
        return path.c2w, 0.1 if self.asked.pop(0) == 0 else 0.9


def test_every_video_has_a_row(world, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_camera, "PathFinder", Knowing)
    monkeypatch.setattr(evaluate_camera, "Renderer", Unrendered)
    evaluate_camera.main(options_for(world))
    content = json.loads((world / "out/camera.json").read_text())
    assert [video["name"] for video in content["videos"]] == ["0", "1"]
    assert content["videos"][0]["errors"]["trans_err_mean"] < 1e-6
    assert content["videos"][1]["errors"] is None
    assert content["summary"]["failed"] == 1
    assert content["pose_frame"] == "scene"
    shown = capsys.readouterr().out
    assert "2 videos, 1 failed" in shown
    assert "from nowhere" in shown


def test_a_known_start_reaches_the_alignment(world, monkeypatch):
    starts = []

    class Asked(Knowing):
        def recover(self, frames, *, K, start):
            starts.append(start)
            return super().recover(frames, K=K, start=start)

    monkeypatch.setattr(evaluate_camera, "PathFinder", Asked)
    monkeypatch.setattr(evaluate_camera, "Renderer", Unrendered)
    evaluate_camera.main(options_for(world, known_start=True, pose_frame="first"))
    expected = film(make_scene(5), 0, num_frames=FRAMES, height=HEIGHT, width=WIDTH).c2w[0]
    torch.testing.assert_close(starts[0], expected)


def test_sfm_needs_its_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycolmap", None)
    with pytest.raises(InputError, match="sfm"):
        estimators.SfmEstimator()


def lose_path(world):
    (world / "cameras/1.txt").unlink()


def lose_video(world):
    (world / "videos/1.mp4").unlink()


def second_path(world):
    (world / "cameras/1.json").write_text("{}")


def shorten(world):
    file = world / "cameras/1.txt"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))


def declare_first(world):
    path = film(make_scene(5), 1, num_frames=FRAMES, height=HEIGHT, width=WIDTH)
    write_ten(path.relative_to_first(), world / "cameras/1.txt")


def lose_scene(world):
    (world / "scenes.json").write_text('[{"name": "0", "scene": 5}]')


def lose_scenes(world):
    (world / "scenes.json").unlink()


def break_scenes(world):
    (world / "scenes.json").write_text('{"name": 1}')


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (lose_path, {}, "found none for 1"),
        (lose_video, {}, "found none for 1"),
        (second_path, {}, "found 1.json, 1.txt"),
        (shorten, {}, "frames \\(3\\), found 2"),
        (declare_first, {}, "relative to its first frame"),
        (declare_first, {"pose_frame": "first", "known_start": True}, "relative to its first frame"),
        (lose_scene, {}, "found none for 1"),
        (lose_scenes, {}, "--scene"),
        (break_scenes, {}, "scenes.json"),
        (None, {"estimator": "sfm", "scene": 5}, "--scene"),
        (None, {"estimator": "sfm", "pose_frame": "scene"}, "give first"),
        (None, {"scale": "max"}, "--scale max"),
    ],
)
def test_one_clear_line(world, monkeypatch, change, options, named):
    def never(renderer):
        raise AssertionError("estimation has begun")

    monkeypatch.setattr(evaluate_camera, "PathFinder", never)
    if change is not None:
        change(world)
    with pytest.raises(InputError, match=named) as caught:
        evaluate_camera.main(options_for(world, **options))
    assert "\n" not in str(caught.value)
    assert not (world / "out").exists()
