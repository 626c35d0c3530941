"""The law of geometry: the camera cached with a clip projects a scene point onto its pixel of the cached frames."""

import pytest
import torch
from tiny_dataset import FPS, HEIGHT, WIDTH, T, camera_path, dot_frames, project

from camera.files.formats import write_re10k, write_ten
from core.errors import InputError
from dataset.cameras import read_clip_camera
from dataset.clip_frames import read_clip
from dataset.video import write_frames


def dot_centres(frames):
    """Centre of brightness of every frame, (x, y) with pixel centres at +0.5, [T, 2]."""
    light = frames.double().mean(-1)
    light = (light - 20).clamp(min=0)  # codec noise far from the dot carries no weight
    x = torch.arange(frames.shape[2], dtype=torch.float64) + 0.5
    y = torch.arange(frames.shape[1], dtype=torch.float64) + 0.5
    total = light.sum((1, 2))
    return torch.stack([(light * x).sum((1, 2)) / total, (light * y[:, None]).sum((1, 2)) / total], -1)


SETTINGS = [
    {"resolution": [96, 64]},  # untouched
    {"resolution": [64, 64]},  # sides cut off
    {"resolution": [96, 48]},  # top and bottom cut off
    {"resolution": [48, 32]},  # reduced
    {"resolution": [160, 112]},  # enlarged, odd factors
    {"resolution": [112, 96], "enable_bucket": True},
    {"resolution": [64, 48], "target_fps": 8, "target_frames": [9]},
    {"resolution": [64, 48], "target_frames": [9], "frame_extraction": "uniform", "frame_sample": 3},
    {"resolution": [64, 48], "target_frames": [5], "frame_extraction": "chunk", "target_fps": 11},
    {"resolution": [64, 48], "target_frames": [5], "frame_extraction": "slide", "frame_stride": 3},
    {"resolution": [64, 48], "target_frames": None, "frame_extraction": "full"},
]


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
@pytest.mark.parametrize("source", ["video", "frames"])
@pytest.mark.parametrize("write_camera_file", [write_ten, write_re10k])
def test_the_camera_projects_a_point_onto_its_pixel(world, keys, source, write_camera_file):
    camera_file = world.cameras / "0000.txt"
    write_camera_file(camera_path(), camera_file)
    if source == "frames":
        write_frames(dot_frames(camera_path()), world.root / "room" / "%03d.png")
        keys = keys | {"frames_directory": world.root / "room", "prompt": "x", "camera_params": camera_file}
        keys |= {"source_fps": 16, "target_fps": keys.get("target_fps", 16)}
    clips = world.clips(pose_frame="scene", **keys)
    for clip in clips:
        frames, crop = read_clip(clip)
        path = read_clip_camera(clip)
        assert len(path) == len(frames) == clip.num_frames
        assert (path.height, path.width) == tuple(frames.shape[1:3]) == (crop.height, crop.width)
        assert path.fps == clip.fps
        error = (dot_centres(frames) - project(path)).norm(dim=-1)
        assert error.max() < (0.15 if source == "video" else 0.06)


def test_crop_numbers_alone_say_where_a_pixel_goes(world):
    """The same law without a camera: source pixel -> resized / source -> minus (left, top)."""
    write_frames(dot_frames(camera_path()), world.root / "room" / "%03d.png")
    (clip,) = world.clips(frames_directory=world.root / "room", prompt="x", target_frames=[21], resolution=[64, 80])
    frames, crop = read_clip(clip)
    x, y = dot_centres(dot_frames(camera_path())).unbind(-1)
    expected = torch.stack(
        [
            x * crop.resized_width / crop.source_width - crop.left,
            y * crop.resized_height / crop.source_height - crop.top,
        ],
        -1,
    )
    inside = (expected[:, 0] > 8) & (expected[:, 0] < crop.width - 8)  # the dot is whole
    assert inside.sum() > 5
    assert (dot_centres(frames) - expected)[inside].abs().max() < 0.06


def test_pose_frame_first_is_relative_to_the_first_frame_of_the_clip(world):
    clips = world.clips(pose_frame="first", target_frames=[5], frame_extraction="slide", frame_stride=8)
    whole = camera_path()
    for clip in clips:
        path = read_clip_camera(clip)
        assert path.pose_frame == "first"
        assert torch.equal(path.c2w[0], torch.eye(4, dtype=torch.float64))
        first = clip.frame_indices[0]
        moved = whole.positions[list(clip.frame_indices)] - whole.positions[first]
        assert torch.allclose(path.positions, moved, atol=1e-9)
    scene = world.clips(pose_frame="scene", target_frames=[5], frame_extraction="slide", frame_stride=8)
    assert torch.allclose(read_clip_camera(scene[1]).positions, whole.positions[8:13], atol=1e-9)


def test_the_axis_of_the_field_of_view_is_the_tables(world):
    text = (world.cameras / "0000.txt").read_text()
    (world.cameras / "0000.txt").write_text("\n".join(line for line in text.splitlines() if "fov_axis" not in line))
    (horizontal,), (vertical,) = world.clips(resolution=[96, 64]), world.clips(resolution=[96, 64], fov_axis="vertical")
    ratio = read_clip_camera(vertical).K[0, 0, 0] / read_clip_camera(horizontal).K[0, 0, 0]
    assert float(ratio) == pytest.approx(HEIGHT / WIDTH)


@pytest.mark.parametrize("difference", [-1, 1])
def test_another_number_of_poses_than_frames_is_an_error(world, difference):
    write_ten(camera_path(T + difference), world.cameras / "0000.txt")
    (clip,) = world.clips()
    with pytest.raises(InputError, match=rf"0000\.txt.*{T} frames of .*0000\.mp4, found {T + difference}"):
        read_clip_camera(clip)


def test_a_clip_without_a_camera_says_which_key_to_set(world):
    (clip,) = world.clips(camera_directory=None)
    with pytest.raises(InputError, match="camera_directory"):
        read_clip_camera(clip)


def test_the_wrong_format_is_an_error_with_the_file(world):
    (clip,) = world.clips(camera_format="re10k")
    with pytest.raises(InputError, match=r"0000\.txt"):
        read_clip_camera(clip)


def test_the_frame_rate_of_the_clip_is_the_paths(world):
    (clip,) = world.clips(target_fps=8, target_frames=[9])
    assert read_clip_camera(clip).fps == 8 == FPS / 2
