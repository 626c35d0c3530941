"""A small world on disk: a room filmed a few times, its cameras, and a TOML that names the embedded tiny model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import cache_camera
import cache_latents
import cache_text
import train_network
from camera.files.formats import write_ten
from dataset.video import write_video
from scenes.motion import film
from scenes.render import render
from scenes.scene import make_scene

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "assets" / "tiny-wan"
FRAMES, HEIGHT, WIDTH, NUM_CLIPS = 5, 32, 48, 3

TOML = """
[model]
task = "tiny"
ckpt_dir = "{tiny}"

[general]
resolution = [{width}, {height}]
batch_size = 2

[[datasets]]
video_directory = "{folder}/videos"
camera_directory = "{folder}/cameras"
cache_directory = "{folder}/cache"
target_frames = [{frames}]
pose_frame = "scene"
"""


@dataclass(frozen=True)
class World:
    """A folder with videos, cameras and dataset.toml; caches where `cached` made it."""

    folder: Path

    @property
    def toml(self) -> Path:
        return self.folder / "dataset.toml"

    @property
    def cache_files(self) -> list[Path]:
        return sorted((self.folder / "cache").glob("*"))

    def cache(self, **options) -> None:
        cache_latents.main(cache_latents.Options(dataset_config=self.toml, device="cpu", **options))
        cache_text.main(cache_text.Options(dataset_config=self.toml, device="cpu", **options))
        cache_camera.main(cache_camera.Options(dataset_config=self.toml, **options))

    def train(self, name: str, **options) -> Path:
        """Train into folder/name and return it."""
        defaults = {
            "mixed_precision": "no",
            "network_dim": 4,
            "network_alpha": 4.0,
            "network_args": ("injection=bias", "camera_hidden=16"),
            "optimizer_type": "AdamW",
            "learning_rate": 1e-2,
            "timestep_sampling": "shift",
            "discrete_flow_shift": 7.0,  # half of the mass above the boundary: both experts get steps
            "max_train_steps": 4,
            "device": "cpu",
            "seed": 3,
        }
        train_network.main(
            train_network.Options(
                dataset_config=self.toml, output_dir=self.folder / name, output_name="net", **(defaults | options)
            )
        )
        return self.folder / name


def write_world(folder: Path) -> World:
    scene = make_scene(5)
    for index in range(NUM_CLIPS):
        path = film(scene, index, num_frames=FRAMES, height=HEIGHT, width=WIDTH)
        write_video(render(scene, path), folder / f"videos/{index:04d}.mp4", fps=8)
        (folder / f"videos/{index:04d}.txt").write_text("a room with red walls and a blue ball")
        (folder / "cameras").mkdir(exist_ok=True)
        write_ten(path, folder / f"cameras/{index:04d}.txt")
    write_toml(folder)
    return World(folder)


def write_toml(folder: Path, tiny: Path = TINY) -> None:
    text = TOML.format(tiny=tiny, folder=folder, frames=FRAMES, height=HEIGHT, width=WIDTH)
    (folder / "dataset.toml").write_text(text)


@pytest.fixture(scope="session")
def cached_once(tmp_path_factory) -> World:
    world = write_world(tmp_path_factory.mktemp("world"))
    world.cache()
    return world


@pytest.fixture
def world(tmp_path, cached_once) -> World:
    """A world of the test's own, caches included, to break or to train in."""
    folder = tmp_path / "world"
    shutil.copytree(cached_once.folder, folder, copy_function=shutil.copy2)
    write_toml(folder)
    return World(folder)


@pytest.fixture(scope="session")
def trained_once(cached_once) -> Path:
    """Folder with net_high_noise.safetensors and net_low_noise.safetensors, trained for a few steps. Read only."""
    return cached_once.train("trained", max_train_steps=6)
