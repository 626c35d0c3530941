"""tools/render_scenes.py: what it writes is what it filmed, the project reads it, and it goes on where it stopped."""

import json

import pytest
import torch

from camera.files.formats import read_camera
from core.errors import InputError
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from dataset.video import read_frames
from scenes.motion import film
from scenes.render import render
from scenes.scene import caption, make_scene
from tools.render_scenes import Options, main


def options_for(folder, **changes) -> Options:
    defaults = {"scenes": 2, "clips_per_scene": 2, "size": (48, 32), "frames": 5, "supersample": 1}
    return Options(output=folder, **(defaults | changes))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "rendered"
    main(options_for(folder))
    return folder


def test_cameras_and_captions_are_those_of_the_seeds(rendered):
    for clip in json.loads((rendered / "scenes.json").read_text()):
        scene = make_scene(clip["scene"])
        asked = film(scene, clip["path"], num_frames=5, height=32, width=48)
        found = read_camera(rendered / "cameras" / f"{clip['name']}.txt", height=32, width=48)
        torch.testing.assert_close(found.c2w, asked.c2w, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.K, asked.K, atol=1e-3, rtol=0)
        assert (rendered / "videos" / f"{clip['name']}.txt").read_text().strip() == caption(scene)


def test_a_video_is_its_rendering_but_for_compression(rendered):
    scene = make_scene(1)
    asked = render(scene, film(scene, 1, num_frames=5, height=32, width=48), supersample=1).float()
    found = read_frames(rendered / "videos" / "0003.mp4").float()
    assert (found - asked).abs().mean() < 6
    other = render(scene, film(scene, 0, num_frames=5, height=32, width=48), supersample=1).float()
    assert (found - other).abs().mean() > 12


def test_the_toml_is_a_data_set_of_all_clips(rendered):
    config = read_dataset_config(rendered / "dataset.toml")
    assert config.model["task"] == "tiny"
    assert len(list_clips(config, spatial_stride=16)) == 4


@pytest.mark.parametrize(("scenes", "frame"), [(1, "scene"), (2, "first")])
def test_one_room_keeps_its_own_coordinates(tmp_path, scenes, frame):
    main(options_for(tmp_path / "r", scenes=scenes, clips_per_scene=1, frames=1))
    assert f'pose_frame = "{frame}"' in (tmp_path / "r/dataset.toml").read_text()


def test_the_same_flags_go_on_after_an_interruption(rendered):
    videos = rendered / "videos"
    whole = (videos / "0002.mp4").read_bytes()
    (videos / "0002.mp4").unlink()
    kept = (videos / "0001.mp4").stat().st_mtime_ns
    main(options_for(rendered))
    assert (videos / "0002.mp4").read_bytes() == whole
    assert (videos / "0001.mp4").stat().st_mtime_ns == kept


def test_clips_of_other_flags_are_not_mixed(rendered):
    with pytest.raises(InputError, match="other flags"):
        main(options_for(rendered, frames=9))


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="other files"):
        main(options_for(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("wrong", [{"scenes": 0}, {"frames": 0}, {"fps": 0.0}, {"size": (47, 32)}, {"supersample": 0}])
def test_numbers_that_make_no_clip_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))}: expected"):
        main(options_for(tmp_path / "new", **wrong))
    assert not (tmp_path / "new").exists()
