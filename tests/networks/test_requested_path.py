"""The path a user asks for: a file or words, one of them, in the conventions of the network that hears it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camera.files.formats import write_re10k, write_ten
from camera.files.settings import CameraFileSettings
from camera.moves.text import make_path
from camera.moves.trajectories import smooth_random_path
from camera.scale import apply_scale
from core.errors import InputError
from networks.requested_path import CameraRequest, requested_path, unused
from networks.video_settings import settle
from wan_ext.configs import get_variant

FIRST = {"injection": "bias", "pose_frame": "first", "scale_rule": "none"}
SCENE = FIRST | {"pose_frame": "scene"}
SETTINGS, _ = settle(
    {"prompt": "x", "height": 32, "width": 48, "num_frames": 9, "fps": 8},
    variant=get_variant("tiny"),
    metadata={},
    network="",
)
PATH = smooth_random_path(
    seed=1, num_frames=7, height=32, width=48, position_low=(-1, -0.5, -1), position_high=(1, 0.5, 1)
)


def ask(metadata=FIRST, network="net.safetensors", settings=SETTINGS, **request):
    return requested_path(CameraRequest(**request), settings, metadata, network=network)


@pytest.fixture
def file(tmp_path) -> Path:
    """A camera file that does not say which pose frame it is in."""
    target = tmp_path / "path.txt"
    write_ten(PATH, target)
    target.write_text("\n".join(line for line in target.read_text().splitlines() if "pose_frame" not in line))
    return target


def test_nothing_asked_nothing_given():
    assert ask() is None
    assert ask(metadata={}, network="") is None


def test_a_file_gives_a_path_of_its_own_length_and_of_the_videos_size(file):
    path = ask(file=file)
    assert (len(path), path.height, path.width, path.fps, path.pose_frame) == (7, 32, 48, 8, "first")
    torch.testing.assert_close(path.c2w, PATH.relative_to_first().c2w)
    torch.testing.assert_close(ask(SCENE, file=file).c2w, PATH.c2w)
    assert len(ask(file=file, num_frames=7)) == 7
    with pytest.raises(InputError, match=r"path\.txt: .*5 frames of --video_length, found 7 poses"):
        ask(file=file, num_frames=5)


def test_words_give_a_path_of_the_videos_length():
    path = ask(moves="orbit 60deg", fov_degrees=40.0)
    assert len(path) == 9 and float(path.fov_degrees()[0]) == pytest.approx(40)
    expected = make_path("orbit 60deg", num_frames=9, height=32, width=48, fov_degrees=40.0, fps=8)
    assert torch.equal(path.c2w, expected.c2w)


def test_the_seed_of_the_video_is_that_of_the_hand(tmp_path):
    one, again, other = (ask(moves="handheld", settings=replace(SETTINGS, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.c2w, again.c2w)
    assert not torch.equal(one.c2w, other.c2w)


def test_every_way_to_a_path_goes_through_the_networks_rule(file):
    metadata = FIRST | {"scale_rule": "max_norm"}
    for path in (ask(metadata, moves="truck right 3"), ask(metadata, file=file)):
        assert path.scale_rule == "max_norm"
        assert float(path.positions.norm(dim=-1).max()) == pytest.approx(1)
    by_depth = ask(FIRST | {"scale_rule": "mean_depth"}, file=file, mean_depth=4.0)
    torch.testing.assert_close(by_depth.positions * 4, PATH.relative_to_first().positions)


def test_what_the_user_says_about_the_file_is_used(file):
    text = file.read_text()
    file.write_text("\n".join(line for line in text.splitlines() if "fov_axis" not in line))
    wide = ask(file=file, file_settings=CameraFileSettings(fov_axis="vertical")).K[0, 0, 0]
    assert float(wide / ask(file=file).K[0, 0, 0]) == pytest.approx(32 / 48)


@pytest.mark.parametrize("write", [write_ten, write_re10k])
def test_a_file_that_names_its_pose_frame_is_held_to_it(tmp_path, write):
    scene, first = tmp_path / "scene.txt", tmp_path / "first.txt"
    write(PATH, scene)
    write(PATH.relative_to_first(), first)
    torch.testing.assert_close(ask(FIRST, file=first).c2w, PATH.relative_to_first().c2w)
    torch.testing.assert_close(ask(SCENE, file=scene).c2w, PATH.c2w)
    for metadata, wrong, advice in ((FIRST, scene, r"camera_path\.py convert"), (SCENE, first, "cannot be converted")):
        with pytest.raises(InputError, match=rf"{wrong.name}.*{advice}"):
            ask(metadata, file=wrong)


def test_a_file_that_names_its_scale_is_held_to_it(tmp_path):
    write_ten(apply_scale(PATH.relative_to_first(), "metric:2"), tmp_path / "a.txt")
    doubled = ask(FIRST | {"scale_rule": "metric:2"}, file=tmp_path / "a.txt")
    torch.testing.assert_close(doubled.positions, 2 * PATH.relative_to_first().positions)
    with pytest.raises(InputError, match=r"a\.txt.*scaled by metric:2 already"):
        ask(FIRST, file=tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"network": "", "metadata": {}, "moves": "pan right 10deg"}, "--camera_path.*network_weights"),
        ({"metadata": {"prompt": "x"}, "moves": "pan right 10deg"}, "net.safetensors: has no camera encoder"),
        ({"metadata": SCENE, "moves": "pan right 10deg"}, "--camera_path: .*pose frame .first.*--camera_params"),
        ({"moves": "pann right 10deg"}, "pan"),
        ({"moves": "pan right 10deg", "file": Path("x.txt")}, "expected one camera path, found two"),
        ({"file": Path("nowhere.txt")}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_followed_is_named(change, named):
    with pytest.raises(InputError, match=named):
        ask(**change)


@pytest.mark.parametrize(
    ("request_", "settings", "metadata", "named"),
    [
        (CameraRequest(), {}, FIRST, "camera encoder is not used"),
        (CameraRequest(), {"camera_guidance": 2.0}, {}, "--camera_guidance does nothing"),
        (CameraRequest(moves="pan"), {"camera_guidance": 2.0}, FIRST, "without camera_dropout"),
        (CameraRequest(moves="pan"), {"camera_guidance": 0.0}, FIRST, "without camera_dropout"),
        (CameraRequest(file=Path("x"), fov_degrees=50.0), {}, FIRST, "--fov"),
        (CameraRequest(moves="pan", file_settings=CameraFileSettings(name="a")), {}, FIRST, "camera file"),
        (CameraRequest(moves="pan", mean_depth=2.0), {}, FIRST, "--camera_depth"),
    ],
)
def test_what_does_nothing_is_said(request_, settings, metadata, named):
    (note,) = unused(request_, replace(SETTINGS, **settings), metadata)
    assert named in note


@pytest.mark.parametrize(
    ("request_", "settings", "metadata"),
    [
        (CameraRequest(), {}, {}),
        (CameraRequest(moves="pan", fov_degrees=50.0), {}, FIRST),
        (CameraRequest(file=Path("x"), file_settings=CameraFileSettings(name="a")), {}, FIRST),
        (CameraRequest(moves="pan"), {"camera_guidance": 2.0}, FIRST | {"camera_dropout": "0.1"}),
        (CameraRequest(moves="pan", mean_depth=2.0), {}, FIRST | {"scale_rule": "mean_depth"}),
    ],
)
def test_what_does_something_is_not_complained_about(request_, settings, metadata):
    assert unused(request_, replace(SETTINGS, **settings), metadata) == []
