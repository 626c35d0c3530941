"""Rendered clips that the tiny model learns from, kept on disk in shards and in memory as bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from core.files import read_safetensors, save_safetensors
from scenes.motion import film
from scenes.render import Renderer
from scenes.scene import caption, make_scene

HEIGHT, WIDTH, NUM_FRAMES, FPS = 64, 96, 17, 8.0
FIRST_TRAINING_SCENE = 1000  # scenes below are for evaluation and for the demo: no stage ever sees them
CLIPS_A_SCENE, SCENES_A_SHARD = 3, 50


def scene_clips(seed: int, count: int) -> Tensor:
    """The first `count` clips of a scene, uint8 [count, T, H, W, 3]."""
    scene = make_scene(seed)
    renderer = Renderer(scene, HEIGHT)
    paths = [film(scene, index, num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH, fps=FPS) for index in range(count)]
    return torch.stack([renderer(path) for path in paths])


def training_clips(folder: Path, num_scenes: int, *, render: bool = True) -> tuple[Tensor, list[str]]:
    """The clips of the training scenes and their captions; shards that are missing are rendered first.

    Args:
        folder: where the shards lie.
        num_scenes: how many scenes, rounded up to whole shards.
        render: False takes the leading shards that are there and renders none.

    Returns:
        uint8 [N, T, H, W, 3] and N captions.
    """
    clips: list[Tensor] = []
    captions: list[str] = []
    num_shards = -(-num_scenes // SCENES_A_SHARD)
    for shard in tqdm(range(num_shards), desc="clips", unit="shard", disable=not render):
        seeds = range(
            FIRST_TRAINING_SCENE + shard * SCENES_A_SHARD, FIRST_TRAINING_SCENE + (shard + 1) * SCENES_A_SHARD
        )
        file = folder / f"clips_{shard:03d}.safetensors"
        if not file.exists():
            if not render:
                break
            rendered = torch.cat([scene_clips(seed, CLIPS_A_SCENE) for seed in seeds])
            folder.mkdir(parents=True, exist_ok=True)
            save_safetensors({"clips": rendered}, file, {"first_scene": str(seeds[0])})
        clips.append(read_safetensors(file)[0]["clips"])
        captions += [caption(make_scene(seed)) for seed in seeds for _ in range(CLIPS_A_SCENE)]
    return torch.cat(clips), captions


def held_out_clips(num_scenes: int = 16) -> tuple[Tensor, list[str]]:
    """One clip of each of the first scenes, none of which is a training scene; as `training_clips`."""
    clips = torch.cat([scene_clips(seed, 1) for seed in range(num_scenes)])
    return clips, [caption(make_scene(seed)) for seed in range(num_scenes)]


def to_video(clips: Tensor) -> Tensor:
    """uint8 [N, T, H, W, 3] -> float32 [N, 3, T, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip, both [N, ...] in [-1, 1]; returns [N]."""
    error = ((video.clamp(-1, 1) - reference) / 2).square().flatten(1).mean(dim=1)
    return -10 * error.log10()
