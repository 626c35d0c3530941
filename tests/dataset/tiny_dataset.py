"""A small data set on disk: videos with a dot that a camera sees, captions, cameras, and the TOML that names them."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from camera.files.formats import write_ten
from camera.moves.trajectories import truck
from camera.path import CameraPath, inverse_poses
from core.files import read_safetensors, save_safetensors
from dataset.checksum import with_checksum
from dataset.clips import Clip, list_clips
from dataset.config import read_dataset_config
from dataset.video import write_video

POINT = torch.tensor([0.25, -0.1, 3.0], dtype=torch.float64)  # a known point of the scene
T, HEIGHT, WIDTH, FPS = 21, 64, 96, 16.0
DOT_RADIUS = 2.5
VAE, T5 = "sha256:vae", "sha256:t5"  # fingerprints of encoders


def project(path: CameraPath, point: Tensor = POINT) -> Tensor:
    """Pixel coordinates (x, y) of a scene point in every frame, [T, 2]."""
    homogeneous = torch.cat([point, torch.ones(1, dtype=torch.float64)])
    seen = (inverse_poses(path.c2w) @ homogeneous)[:, :3]
    pixels = torch.einsum("tij,tj->ti", path.K, seen)
    return pixels[:, :2] / pixels[:, 2:]


def dot_frames(path: CameraPath) -> Tensor:
    """What the camera sees of POINT: a soft white dot on black, uint8 [T, H, W, 3]."""
    x = torch.arange(path.width) + 0.5
    y = torch.arange(path.height) + 0.5
    centre = project(path)
    squared = (x - centre[:, :1])[:, None, :] ** 2 + (y - centre[:, 1:])[:, :, None] ** 2  # [T, H, W]
    return (255 * torch.exp(-squared / (2 * DOT_RADIUS**2))).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3)


def smooth_frames(num_frames: int = T, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Moving smooth colours, uint8 [T, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(3, generator=generator) * 6
    t = torch.arange(num_frames)[:, None, None, None] * 0.15
    y = torch.arange(height)[:, None, None] / height * 5
    x = torch.arange(width)[:, None] / width * 7
    return (127 + 100 * torch.sin(x + phase + t) * torch.cos(y - phase)).round().to(torch.uint8)


def camera_path(num_frames: int = T, height: int = HEIGHT, width: int = WIDTH) -> CameraPath:
    return truck(0.6, num_frames=num_frames, height=height, width=width, fov_degrees=70, fps=FPS)


@functools.cache
def dot_video(num_frames: int, height: int, width: int) -> bytes:
    """The mp4 of `dot_frames`, encoded once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dot.mp4"
        write_video(dot_frames(camera_path(num_frames, height, width)), file, FPS)
        return file.read_bytes()


@dataclass
class World:
    """The folder of a test's data set."""

    root: Path

    @property
    def videos(self) -> Path:
        return self.root / "videos"

    @property
    def cameras(self) -> Path:
        return self.root / "cameras"

    def add_video(self, name: str = "0000.mp4", num_frames: int = T, height: int = HEIGHT, width: int = WIDTH) -> Path:
        path = camera_path(num_frames, height, width)
        file = self.videos / name
        self.videos.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dot_video(num_frames, height, width))
        file.with_suffix(".txt").write_text(f"a dot in {file.stem}\n")
        self.cameras.mkdir(exist_ok=True)
        write_ten(path, self.cameras / f"{file.stem}.txt")
        return file

    def table(self, **keys: object) -> str:
        """A [[datasets]] table; None leaves a key out."""
        given = {
            "video_directory": str(self.videos),
            "camera_directory": str(self.cameras),
            "cache_directory": str(self.root / "cache"),
            "resolution": [64, 48],
            "target_frames": [17],
        } | keys
        if "frames_directory" in keys:
            given |= {"video_directory": None, "camera_directory": None}
        return "[[datasets]]\n" + "".join(f"{k} = {toml_value(v)}\n" for k, v in given.items() if v is not None)

    def toml(self, text: str | None = None, **keys: object) -> Path:
        file = self.root / "data.toml"
        file.write_text(self.table(**keys) if text is None else text)
        return file

    def clips(self, text: str | None = None, *, spatial_stride: int = 16, **keys: object) -> list[Clip]:
        return list_clips(read_dataset_config(self.toml(text, **keys)), spatial_stride=spatial_stride)


def toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, (int, float, list)) else f'"{value}"'


def latents(clip: Clip, seed: int = 0, channels: int = 16) -> Tensor:
    """What a VAE of stride 4x8x8 could give for a clip, [C, F, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (channels, (clip.num_frames - 1) // 4 + 1, clip.height // 8, clip.width // 8)
    return torch.randn(shape, generator=generator)


def edit(file: Path, tensors: dict[str, Tensor | None] | None = None, **metadata: str | None) -> None:
    """Write a cache file with some tensors or entries of the metadata exchanged, as if it were so on purpose: with a
    checksum that fits. None takes one out."""
    old_tensors, old_metadata = read_safetensors(file)
    new_tensors = {k: v for k, v in (old_tensors | (tensors or {})).items() if v is not None}
    new_metadata = {k: v for k, v in (old_metadata | metadata).items() if v is not None}
    save_safetensors(new_tensors, file, with_checksum(new_tensors, new_metadata))
