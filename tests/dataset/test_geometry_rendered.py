"""Where the cached cameras say that known points of a scene are, there the cached frames show them.

A room with small balls hung into it at known places is filmed twice, the balls white and brown. What differs between
the two videos is the balls alone, so their middles are measured in the pixels that come back out of the latent cache,
whatever was done to the frames on the way; the camera cache's path projects the known places onto the same pixels.
Both agree within half a pixel of the source, for every mode of extraction, rate, bucket and crop. (The autoencoder here
loses nothing: a real one blurs, and where its blur lies is no question of geometry.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from camera.files.formats import write_re10k
from camera.path import CameraPath, inverse_poses
from dataset import cache
from dataset.buckets import Crop
from dataset.cameras import read_clip_camera
from dataset.clip_frames import read_clip
from dataset.clips import Clip, list_clips
from dataset.config import read_dataset_config
from dataset.video import write_frames
from scenes.motion import look_at
from scenes.render import Renderer
from scenes.scene import Ball, Paint, make_scene

HEIGHT, WIDTH, T, FPS = 64, 112, 25, 24
RADIUS = 0.06  # metres: some 1.5 pixels of the source
HALF = 0.5  # of a pixel of the source
POINTS = torch.tensor(
    [[x, y, z] for x, y, z in [(-0.9, -1.7, 0.6), (-0.3, -0.9, 0.2), (0.2, -1.6, 1.0), (0.5, -1.15, 0.0)]]
    + [[0.95, -0.8, 0.8], [-0.75, -1.2, 1.3], [0.0, -1.25, 0.5], [1.2, -1.6, 0.9]],
    dtype=torch.float64,
)  # [N, 3]
UNEVEN = [*np.arange(0, 0.5, 1 / 25), *np.arange(0.5, 1.01, 1 / 12)]  # seconds: a phone that slows down in the dark


def filmed(ticks: Tensor) -> CameraPath:
    """A turn past the balls that begins fast, with a lens off its centre that zooms, at these shares of the way."""
    way = (1.6 * ticks - 0.6 * ticks**2)[:, None]
    start, end = (torch.tensor(place, dtype=torch.float64) for place in ([-0.9, -1.5, -1.6], [0.8, -1.0, -1.4]))
    left, right = (torch.tensor(place, dtype=torch.float64) for place in ([-0.3, -1.35, 0.6], [0.35, -1.2, 0.6]))
    K = torch.zeros(len(ticks), 3, 3, dtype=torch.float64)
    K[:, 0, 0] = K[:, 1, 1] = 70 + 12 * ticks
    K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = WIDTH / 2 + 4.3, HEIGHT / 2 - 3.1, 1
    c2w = look_at(start + way * (end - start), left + way * (right - left))
    return CameraPath(c2w=c2w, K=K, height=HEIGHT, width=WIDTH, fps=FPS)


def write_at(frames: Tensor, times: list[float], file: Path) -> None:
    """A video whose frames are shown at these seconds."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "6", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(frames.numpy(), times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@dataclass(frozen=True)
class Film:
    """What was filmed, with white and with brown balls, and from where."""

    folder: Path
    source: Path
    brown: Path
    path: CameraPath  # of every frame of the source


@pytest.fixture(scope="module")
def renderers() -> tuple[Renderer, Renderer]:
    """The room with white balls and with brown ones."""

    def renderer(color: str) -> Renderer:
        paint = Paint(color=color, pattern="plain", seed=1)
        balls = tuple(Ball(center=tuple(point), radius=RADIUS, paint=paint) for point in POINTS.tolist())
        return Renderer(replace(make_scene(5), objects=balls), HEIGHT)

    return renderer("white"), renderer("brown")


@pytest.fixture(scope="module")
def frames(renderers, tmp_path_factory) -> Film:
    """At an even rate, as folders of frames."""
    path = filmed(torch.linspace(0, 1, T, dtype=torch.float64))
    folder = tmp_path_factory.mktemp("frames")
    for renderer, name in zip(renderers, ("white", "brown"), strict=True):
        write_frames(renderer(path), folder / name / "%03d.png")
    return Film(folder, folder / "white", folder / "brown", path)


@pytest.fixture(scope="module")
def uneven(renderers, tmp_path_factory) -> Film:
    """At an uneven rate, as videos."""
    path = filmed(torch.tensor(UNEVEN, dtype=torch.float64))
    folder = tmp_path_factory.mktemp("uneven")
    files = [folder / name / "a.mp4" for name in ("white", "brown")]
    for renderer, file in zip(renderers, files, strict=True):
        file.parent.mkdir()
        write_at(renderer(path), UNEVEN, file)
    files[0].with_suffix(".txt").write_text("a room")
    return Film(folder, *files, path)


def clips_of(film: Film, poses: CameraPath, **keys: object) -> list[Clip]:
    """The clips of a data set of this film with this camera file."""
    table: dict[str, object] = {"cache_directory": str(film.folder / "cache")}
    if film.source.is_dir():
        table |= {"frames_directory": str(film.source), "prompt": "a room", "source_fps": FPS, "target_fps": FPS}
        table |= {"camera_params": str(film.folder / "camera.txt")}
        write_re10k(poses, film.folder / "camera.txt")
    else:
        table |= {"video_directory": str(film.source.parent), "camera_directory": str(film.folder / "cameras")}
        write_re10k(poses, film.folder / "cameras" / "a.txt")
    toml = film.folder / "data.toml"
    lines = [f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for k, v in (table | keys).items()]
    toml.write_text("[[datasets]]\n" + "".join(lines))
    return list_clips(read_dataset_config(toml), spatial_stride=16)


def to_latents(frames: Tensor) -> Tensor:
    """What an autoencoder that loses nothing makes of uint8 [4f + 1, H, W, 3]: [768, f + 1, H / 8, W / 8]."""
    video = torch.cat([frames[:1].expand(3, -1, -1, -1), frames]).float()
    count, height, width, _ = video.shape
    blocks = video.view(count // 4, 4, height // 8, 8, width // 8, 8, 3)
    return blocks.permute(1, 3, 5, 6, 0, 2, 4).reshape(-1, count // 4, height // 8, width // 8)


def from_latents(latents: Tensor) -> Tensor:
    """The frames, float [T, H, W, 3]."""
    _, count, height, width = latents.shape
    video = latents.view(4, 8, 8, 3, count, height, width).permute(4, 0, 5, 1, 6, 2, 3)
    return video.reshape(count * 4, height * 8, width * 8, 3)[3:]


def cached_frames(clip: Clip) -> Tensor:
    """The frames of a clip as they come back from its latent cache, float [T, H, W, 3]."""
    pixels, crop = read_clip(clip)
    cache.write_latents(clip, to_latents(pixels), encoder="sha256:lossless", crop=crop)
    return from_latents(cache.read_latents(clip).latents)


def cached_camera(clip: Clip) -> CameraPath:
    cache.write_camera(clip, read_clip_camera(clip))
    return cache.read_camera(clip)


def project(path: CameraPath, points: Tensor) -> Tensor:
    """Pixels (x, y) of points in every frame, [T, N, 2]."""
    homogeneous = torch.cat([points, torch.ones(len(points), 1, dtype=torch.float64)], 1)
    seen = torch.einsum("tij,nj->tni", inverse_poses(path.c2w)[:, :3], homogeneous)
    pixels = torch.einsum("tij,tnj->tni", path.K, seen)
    return pixels[..., :2] / pixels[..., 2:]


def measured(difference: Tensor, near: Tensor, reach: float) -> Tensor:
    """The middle of what differs within `reach` pixels of a place, (x, y); NaN where nothing does."""
    x, y = torch.arange(difference.shape[1]) + 0.5, torch.arange(difference.shape[0])[:, None] + 0.5
    inside = ((x - near[0]) ** 2 + (y - near[1]) ** 2) < reach**2
    weight = (difference * inside).clamp(max=120).double()  # the whole ball counts, not its bright side
    total = weight.sum()
    return torch.stack([(weight * x).sum(), (weight * y).sum()]) / (total if total > 200 else torch.nan)


def errors(film: Film, clip: Clip, path: CameraPath) -> Tensor:
    """How far balls are from where the path projects them, in pixels of the source, one number for each that is seen
    whole and alone."""
    brown = replace(clip, source=film.brown, cache_directory=clip.cache_directory / "brown")
    difference = (cached_frames(clip) - cached_frames(brown)).abs().sum(-1)  # [T, H, W]
    scale = torch.tensor([clip.crop.resized_width / WIDTH, clip.crop.resized_height / HEIGHT], dtype=torch.float64)
    points = POINTS
    if path.pose_frame == "first":
        points = project_into(film.path.c2w[clip.frame_indices[0]], points)
    factor = 2.0 if path.scale_rule == "metric:2" else 1.0
    places = project(path, points * factor)  # [T, N, 2]
    reach = 4.5 * float(scale.max())
    size = torch.tensor([clip.width, clip.height])
    found = []
    for frame, pixels in zip(difference, places, strict=True):
        alone = torch.cdist(pixels, pixels).fill_diagonal_(torch.inf).amin(1) > 2 * reach
        whole = ((pixels > reach) & (pixels < size - reach)).all(1)
        chosen = pixels[alone & whole]
        assert len(chosen) >= 1, "no ball to measure"
        found += [((measured(frame, pixel, reach) - pixel) / scale).norm() for pixel in chosen]
    return torch.stack(found)


def project_into(c2w: Tensor, points: Tensor) -> Tensor:
    """Points of the scene in the coordinates of a camera, [N, 3]."""
    return (points - c2w[:3, 3]) @ c2w[:3, :3]


def agrees(film: Film, clips: list[Clip]) -> None:
    assert clips
    for clip in clips:
        found = errors(film, clip, cached_camera(clip))
        assert found.isfinite().all() and found.max() < HALF, (clip.name, float(found.max()), clip.crop)


SIZES = {
    "as it is": {"resolution": [112, 64]},
    "sides cut off": {"resolution": [64, 64]},
    "top and bottom cut off": {"resolution": [80, 32]},
    "enlarged": {"resolution": [144, 96]},
    "a larger bucket": {"resolution": [96, 96], "enable_bucket": True},  # 128x64
    "a smaller bucket": {"resolution": [80, 64], "enable_bucket": True, "bucket_no_upscale": True},  # 96x48
}
MODES = {
    "head": {"frame_extraction": "head", "target_frames": [5, 9]},
    "chunk": {"frame_extraction": "chunk", "target_frames": [5], "target_fps": 12},
    "slide": {"frame_extraction": "slide", "frame_stride": 5, "target_frames": [9]},
    "uniform": {"frame_extraction": "uniform", "frame_sample": 3, "target_frames": [5], "target_fps": 11},
    "full": {"frame_extraction": "full", "max_frames": 21, "target_fps": 8},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_size(frames: Film, mode: str, size: str) -> None:
    place = {"pose_frame": "first", "camera_scale": "metric:2"} if mode in ("slide", "full") else {}
    agrees(frames, clips_of(frames, frames.path, **MODES[mode], **SIZES[size], **place))


@pytest.mark.parametrize("mode", MODES)
def test_poses_at_a_rate_of_their_own(frames: Film, mode: str) -> None:
    poses = filmed(torch.arange(0, 31, dtype=torch.float64) / 30)
    keys = {**MODES[mode], "camera_fps": 30, "resolution": [96, 64]}
    agrees(frames, clips_of(frames, poses, **keys))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("own_rate", [False, True])
def test_frames_at_an_uneven_rate(uneven: Film, mode: str, own_rate: bool) -> None:
    """Frames are taken by their times; a pose for each, or poses of a tracker's own even clock."""
    keys = {"target_fps": 10, **MODES[mode], "resolution": [96, 48], "pose_frame": "scene"}
    if keys["target_fps"] in (11, 12):
        keys["target_fps"] = 9
    poses = uneven.path
    if own_rate:
        keys["camera_fps"] = 30
        poses = filmed(torch.arange(0, 31, dtype=torch.float64) / 30)
    agrees(uneven, clips_of(uneven, poses, **keys))


CROPS = {
    "stretched sideways, cut at a corner": ((64, 140), (16, 60, 48, 80)),
    "stretched upright, cut at the other": ((100, 112), (4, 0, 64, 96)),
    "reduced": ((48, 90), (8, 20, 40, 56)),
}


def off_centre(film: Film, resized: tuple[int, int], cut: tuple[int, int, int, int]) -> Clip:
    """A clip with a crop that no data set makes."""
    (clip, *_) = clips_of(film, film.path, resolution=[112, 64], target_frames=[9])
    top, left, height, width = cut
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
    return replace(clip, crop=crop)


@pytest.mark.parametrize("name", CROPS)
def test_crops_off_the_centre(frames: Film, name: str) -> None:
    agrees(frames, [off_centre(frames, *CROPS[name])])


MISTAKES: dict[str, Callable[[CameraPath, Clip], CameraPath]] = {
    "one pixel to the right": lambda path, clip: moved(path, 1.0, 0.0),
    "one pixel up": lambda path, clip: moved(path, 0.0, -1.0),
    "pixel centres at whole numbers": lambda path, clip: moved(path, -0.5, -0.5),
    "one frame late": lambda path, clip: read_clip_camera(
        replace(clip, frame_indices=tuple(index + 1 for index in clip.frame_indices))
    ),
    "no crop": lambda path, clip: moved(path, float(clip.crop.left), float(clip.crop.top)),
}


def moved(path: CameraPath, right: float, down: float) -> CameraPath:
    shift = torch.zeros(3, 3, dtype=torch.float64)
    shift[0, 2], shift[1, 2] = right, down
    return replace(path, K=path.K + shift)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_measure_sees_mistakes(frames: Film, mistake: str) -> None:
    clip = off_centre(frames, *CROPS["stretched upright, cut at the other"])
    if mistake == "no crop":
        clip = off_centre(frames, (80, 140), (9, 12, 64, 112))
    found = errors(frames, clip, MISTAKES[mistake](cached_camera(clip), clip))
    assert not (found.isfinite().all() and found.max() < HALF)
