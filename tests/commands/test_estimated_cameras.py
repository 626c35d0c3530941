"""cache_camera.py --estimate: cameras from the videos of a data set, what is said of each, and clips that have none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import cache_camera
from core.errors import InputError
from dataset import cache
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from dataset.video import write_video
from scenes.motion import film
from scenes.render import render
from scenes.scene import make_scene

pytest.importorskip("pycolmap", reason="cameras from video need the extra sfm: pip install '.[sfm]'")

HEIGHT, WIDTH, FRAMES = 128, 192, 7
TOML = """
[model]
task = "tiny"

[[datasets]]
video_directory = "{folder}/videos"
cache_directory = "{folder}/cache"
resolution = [96, 96]
target_frames = [5]
estimate_camera = true
{more}
"""


def clips_of(toml: Path):
    return list_clips(read_dataset_config(toml), spatial_stride=16)


def estimate(toml: Path, **options) -> None:
    cache_camera.main(cache_camera.Options(dataset_config=toml, estimate=True, **options))


def write_toml(folder: Path, more: str) -> Path:
    (folder / "data.toml").write_text(TOML.format(folder=folder, more=more))
    return folder / "data.toml"


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """A folder with a room filmed in motion, and a picture of it that stands still; the path that was filmed."""
    folder = tmp_path_factory.mktemp("filmed")
    scene = make_scene(203)
    path = film(scene, 3, num_frames=FRAMES, height=HEIGHT, width=WIDTH, move="wander")
    frames = render(scene, path)
    for name, pictures in (("moves", frames), ("stands", frames[:1].repeat(5, 1, 1, 1))):
        write_video(pictures, folder / f"videos/{name}.mp4", fps=8)
        (folder / f"videos/{name}.txt").write_text("a room")
    return folder, path


def test_cameras_from_videos_end_to_end(filmed, capsys):
    folder, asked = filmed
    more = f'camera_fov = {float(asked.fov_degrees()[0])}\ncamera_scale = "max_norm"'
    toml = write_toml(folder, more)
    with pytest.raises(InputError, match="1 of 2 clips have no camera.*exclude_clips = .*failed_cameras.txt"):
        estimate(toml, estimate_report=folder / "report.json")
    moves, stands = clips_of(toml)
    said = capsys.readouterr().out
    assert f"no camera: {stands.key}: expected a camera that moves" in said
    report = json.loads((folder / "report.json").read_text())
    assert "stands still" in report[stands.key]["failed"]
    assert report[moves.key]["registered"] == report[moves.key]["frames"] == 5
    assert not stands.camera_cache.exists()

    # The cached path is that of the cropped frames: relative to the first, scaled, with the intrinsics of the crop.
    found = cache.read_camera(moves)
    truth = asked.frames(moves.frame_indices).relative_to_first()
    crop = moves.crop
    truth = truth.cropped(
        resized_height=crop.resized_height,
        resized_width=crop.resized_width,
        top=crop.top,
        left=crop.left,
        height=crop.height,
        width=crop.width,
    )
    torch.testing.assert_close(found.K, truth.K, rtol=1e-6, atol=1e-6)
    turned = Rotation.from_matrix((found.rotations.mT @ truth.rotations).numpy()).magnitude()
    assert np.degrees(turned).max() < 1
    assert float(found.positions.norm(dim=-1).max()) == pytest.approx(1)
    moved = truth.positions / truth.positions.norm(dim=-1).max()
    assert (found.positions - moved).norm(dim=-1).max() < 0.1

    # What is current is left alone; another estimator makes it stale for this command, and for no other.
    written = moves.camera_cache.read_bytes()
    with pytest.raises(InputError, match="1 of 2 clips"):
        estimate(toml, skip_existing=True)
    assert moves.camera_cache.read_bytes() == written
    assert not cache.is_current(moves, "camera", encoder="another")
    assert cache.is_current(moves, "camera")

    # The list of failures is what exclude_clips reads; the clip is then gone for every command.
    listed = folder / "cache/failed_cameras.txt"
    toml = write_toml(folder, f'{more}\nexclude_clips = "{listed}"')
    assert [clip.name for clip in clips_of(toml)] == [moves.name]
    estimate(toml, skip_existing=True)
    assert stands.name in listed.read_text()

    # A camera that is estimated is not taken for one that was read, nor one of another field of view.
    toml = write_toml(folder, 'camera_fov = 33.0\ncamera_scale = "max_norm"')
    assert "another field of view" in (cache.problem(clips_of(toml)[0], "camera") or "")
    assert "cache_camera.py --estimate" in (cache.problem(clips_of(toml)[0], "camera") or "")


def test_flags_that_would_do_nothing_are_refused(filmed):
    folder, _ = filmed
    toml = write_toml(folder, "")
    with pytest.raises(InputError, match="no camera file to read.*--estimate"):
        cache_camera.main(cache_camera.Options(dataset_config=toml))
    toml.write_text(toml.read_text().replace("estimate_camera = true", ""))
    with pytest.raises(InputError, match="--estimate finds the cameras.*estimate_camera = true.*found none"):
        estimate(toml)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ('pose_frame = "scene"', 'pose_frame: expected "first"'),
        ('camera_format = "ten"', "camera_format: does nothing with estimate_camera"),
        ("camera_fps = 8", "camera_fps: does nothing with estimate_camera"),
        ('fov_axis = "vertical"', "fov_axis: does nothing without camera_fov"),
        ('camera_directory = "videos"', "estimate_camera: cameras come from camera_directory or from the frames"),
        ('exclude_clips = "nothing.txt"', "nothing.txt: expected a list of clips"),
    ],
)
def test_keys_that_do_not_go_together_are_named(filmed, more, reason):
    folder, _ = filmed
    with pytest.raises(InputError, match=reason):
        clips_of(write_toml(folder, more))


def test_an_exclusion_that_names_no_clip_is_found(filmed, tmp_path):
    folder, _ = filmed
    listed = tmp_path / "without.txt"
    listed.write_text("# by hand\nmoves.mp4_00000-005  # too dark\nmove.mp4_00000-005\n")
    toml = write_toml(folder, f'exclude_clips = "{listed}"')
    with pytest.raises(InputError, match="line 3: expected a clip.*did you mean 'moves.mp4_00000-005'"):
        clips_of(toml)
    listed.write_text("moves.mp4_00000-005  # too dark\n")
    assert [clip.name for clip in clips_of(toml)] == ["stands.mp4_00000-005"]
