"""Cameras of a data set in every format: found by name, read with the table's settings, stale when those change."""

import logging

import numpy as np
import pytest
import torch
from tiny_dataset import HEIGHT, WIDTH, T, camera_path, dot_frames

from camera.files.formats import write_camera
from core.errors import InputError
from dataset import cache
from dataset.cameras import read_clip_camera
from dataset.video import write_frames

FILES = {"re10k": ".txt", "nerf": ".json", "arrays": ".npz", "safetensors": ".safetensors", "colmap": "", "tum": ".txt"}


@pytest.mark.parametrize("format", FILES)
def test_the_camera_of_a_video_is_found_whatever_its_format(world, format):
    (world.cameras / "0000.txt").unlink()
    write_camera(camera_path(), world.cameras / f"0000{FILES[format]}", format=format)
    (clip,) = world.clips(pose_frame="scene", resolution=[WIDTH, HEIGHT])
    found = read_clip_camera(clip)
    torch.testing.assert_close(found.c2w, camera_path().c2w[: clip.num_frames], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.K, camera_path().K[: clip.num_frames], atol=1e-4, rtol=0)


def test_two_cameras_for_one_video_are_an_error_that_names_both(world):
    write_camera(camera_path(), world.cameras / "0000.json", format="nerf")
    with pytest.raises(InputError, match=r"camera_directory: .*0000\.txt and .*0000\.json"):
        world.clips()
    (world.cameras / "0000.txt").unlink()
    write_camera(camera_path(), world.cameras / "0000", format="colmap")
    with pytest.raises(InputError, match=r"0000\.json and .*0000;"):
        world.clips()


def test_the_settings_of_the_table_reach_the_reader(world):
    """lingbot's folder, whose direction, axes and size nothing records; here w2c, OpenGL axes, at twice the size."""
    (world.cameras / "0000.txt").unlink()
    path = camera_path()
    folder = world.cameras / "0000"
    folder.mkdir()
    opengl = path.c2w @ torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
    np.save(folder / "poses.npy", opengl.inverse().numpy())
    K = path.K.numpy()
    np.save(folder / "intrinsics.npy", 2 * np.stack([K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]], -1))
    keys = {"camera_direction": "w2c", "camera_axes": "opengl", "camera_size": [2 * WIDTH, 2 * HEIGHT]}
    for missing in keys:
        (clip,) = world.clips(**{name: value for name, value in keys.items() if name != missing})
        with pytest.raises(InputError, match=missing):
            read_clip_camera(clip)
    (clip,) = world.clips(pose_frame="scene", resolution=[WIDTH, HEIGHT], **keys)
    found = read_clip_camera(clip)
    torch.testing.assert_close(found.c2w, path.c2w[: clip.num_frames], atol=1e-9, rtol=0)
    torch.testing.assert_close(found.K, path.K[: clip.num_frames], atol=1e-9, rtol=0)


def test_a_cache_is_stale_when_a_setting_or_any_file_of_the_camera_changes(world):
    (world.cameras / "0000.txt").unlink()
    folder = world.cameras / "0000"
    folder.mkdir()
    np.save(folder / "poses.npy", camera_path().c2w.numpy())
    np.save(folder / "intrinsics.npy", np.array([60.0, 60, WIDTH / 2, HEIGHT / 2]))
    keys = {"camera_direction": "c2w", "camera_axes": "opencv", "camera_size": [WIDTH, HEIGHT]}
    (clip,) = world.clips(**keys)
    cache.write_camera(clip, read_clip_camera(clip))
    assert cache.problem(clip, "camera") is None
    for change, label in (
        ({"camera_direction": "w2c"}, "direction"),
        ({"camera_axes": "opengl"}, "axes"),
        ({"camera_size": [WIDTH, 2 * HEIGHT]}, "size"),
        ({"camera_format": "arrays"}, "format"),
        ({"camera_fov": 60}, "field of view"),
        ({"camera_name": "cam01"}, "another camera"),
    ):
        (other,) = world.clips(**{**keys, **change})
        assert label in (cache.problem(other, "camera") or "current")
    np.save(folder / "intrinsics.npy", np.array([61.0, 60, WIDTH / 2, HEIGHT / 2]))
    assert "camera file has changed" in (cache.problem(clip, "camera") or "current")


def test_images_of_a_model_are_the_frames_of_the_folder_by_name(world):
    """The model has the frames in another order than the folder, and one image more."""
    room = world.root / "room"
    write_frames(dot_frames(camera_path()), room / "frame_%05d.png")
    keys = {"frames_directory": room, "prompt": "x", "camera_params": world.root / "model", "target_frames": [T]}
    write_camera(camera_path(), world.root / "model", format="colmap")
    images = world.root / "model" / "images.txt"
    lines = images.read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    poses = [line for line in lines if ".png" in line]
    assert sorted(file.name for file in room.iterdir())[0] == poses[0].split()[-1]
    extra = poses[0].replace("frame_00000", "other_00000")
    images.write_text("\n".join([*head, *(line + "\n" for line in [extra, *reversed(poses)])]))
    (clip,) = world.clips(**keys)
    torch.testing.assert_close(read_clip_camera(clip).positions, camera_path().positions, atol=1e-9, rtol=0)
    images.write_text("\n".join([*head, *(line + "\n" for line in poses if "frame_00004" not in line)]))
    with pytest.raises(InputError, match=r"frame_00004\.png"):
        read_clip_camera(clip)


def test_pixels_that_are_not_square_are_a_warning_once_a_file(world, caplog):
    write_camera(camera_path(height=HEIGHT, width=2 * WIDTH), world.cameras / "0000.txt", format="re10k")
    clips = world.clips(target_frames=[5], frame_extraction="chunk")
    with caplog.at_level(logging.WARNING):
        for clip in clips:
            read_clip_camera(clip)
    assert [record.message.count("another aspect") for record in caplog.records] == [1]
