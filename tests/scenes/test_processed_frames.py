"""What happens to frames happens to their path: a scene rendered along the processed path shows the processed frames.

A room is filmed at full size; the data set reads, samples, resizes and crops those frames and their camera file; the
room is then rendered again, at the final size, along the path that came out. Both agree up to the blur of resampling,
and a path that is one pixel or one frame off does not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from camera.files.formats import write_re10k
from camera.path import CameraPath
from dataset.buckets import Crop
from dataset.cameras import read_clip_camera
from dataset.clip_frames import read_clip
from dataset.clips import Clip, list_clips
from dataset.config import read_dataset_config
from dataset.video import write_frames
from scenes.motion import film
from scenes.render import Renderer
from scenes.scene import make_scene

HEIGHT, WIDTH, T, FPS = 64, 96, 13, 24
INNER = (slice(None), slice(3, -3), slice(3, -3))  # at the border a resampler repeats pixels

CASES = {
    "as it is": {"resolution": [96, 64], "target_frames": [5]},
    "sides cut off": {"resolution": [64, 64], "target_frames": [5], "frame_extraction": "chunk"},
    "reduced, top and bottom cut off, every third frame": {
        "resolution": [64, 32],
        "target_frames": [5],
        "target_fps": 8,
    },
    "enlarged": {"resolution": [112, 80], "target_frames": [5]},
    "an odd rate, from the end": {"resolution": [48, 48], "target_frames": [5], "target_fps": 11}
    | {"frame_extraction": "slide", "frame_stride": 1},
    "poses at 10 a second": {"resolution": [80, 64], "target_frames": [9], "camera_fps": 10},
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> tuple[Renderer, CameraPath, Path]:
    """A room, a path whose lens is off-centre and zooms, and a folder with what it sees."""
    renderer = Renderer(make_scene(5), HEIGHT)
    path = film(renderer.scene, 2, num_frames=T, height=HEIGHT, width=WIDTH, fps=FPS, move="orbit")
    K = path.K.clone()
    K[:, 0, 2] += 5.3
    K[:, 1, 2] -= 3.1
    K[:, :2, :2] *= torch.linspace(1, 1.15, T, dtype=torch.float64)[:, None, None]
    path = replace(path, K=K)
    folder = tmp_path_factory.mktemp("room")
    write_frames(renderer(path), folder / "frames" / "%03d.png")
    return renderer, path, folder


def clips_of(folder: Path, path: CameraPath, **keys) -> list[Clip]:
    """The clips of a data set of these frames and a camera file, which has poses at camera_fps where that is given."""
    ticks = torch.arange(0, T - 1 + 1e-9, FPS / keys.get("camera_fps", FPS), dtype=torch.float64)
    write_re10k(path.resampled(ticks), folder / "camera.txt")
    table = {
        "frames_directory": str(folder / "frames"),
        "camera_params": str(folder / "camera.txt"),
        "prompt": "a room",
    }
    table |= {"cache_directory": str(folder / "cache"), "source_fps": FPS, "target_fps": FPS} | keys
    toml = folder / "data.toml"
    toml.write_text("[[datasets]]\n" + "".join(f"{key} = {value!r}\n" for key, value in table.items()))
    return list_clips(read_dataset_config(toml), spatial_stride=16)


def difference(one: Tensor, other: Tensor) -> float:
    """Mean difference of two videos in grey levels, borders left out."""
    return float((one[INNER].float() - other[INNER].float()).abs().mean())


def shifted(path: CameraPath, *, right: float = 0.0, down: float = 0.0) -> CameraPath:
    """The path with its principal point some pixels elsewhere."""
    shift = torch.zeros(3, 3, dtype=torch.float64)
    shift[0, 2], shift[1, 2] = right, down
    return replace(path, K=path.K + shift)


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_rendering_the_processed_path_shows_the_processed_frames(room, keys):
    renderer, path, folder = room
    for clip in clips_of(folder, path, **keys):
        frames, _ = read_clip(clip)
        processed = read_clip_camera(clip)
        blur = difference(renderer(processed), frames)
        assert blur < 3.5
        later = replace(clip, frame_indices=tuple(min(index + 1, T - 1) for index in clip.frame_indices))
        for wrong in (shifted(processed, right=1), shifted(processed, down=-1), read_clip_camera(later)):
            assert difference(renderer(wrong), frames) > 1.6 * blur + 1


def test_off_centre_crops_of_a_stretched_frame(room):
    """Crops that no data set makes: another scale along each side, cut at a corner, far from the centre."""
    renderer, path, folder = room
    (clip, *_) = clips_of(folder, path, resolution=[96, 64], target_frames=[5])
    for resized, (top, left, height, width) in (((64, 96), (20, 37, 40, 48)), ((48, 100), (0, 52, 40, 48))):
        crop = Crop(
            source_height=HEIGHT,
            source_width=WIDTH,
            resized_height=resized[0],
            resized_width=resized[1],
            top=top,
            left=left,
            height=height,
            width=width,
        )
        cut = replace(clip, crop=crop)
        frames, _ = read_clip(cut)
        processed = read_clip_camera(cut)
        blur = difference(renderer(processed), frames)
        assert blur < 3.5
        for wrong in (shifted(processed, right=-1), shifted(processed, down=1)):
            assert difference(renderer(wrong), frames) > 1.6 * blur + 1
