"""Step 1: encode every clip of a dataset config into VAE latents.

    python cache_latents.py --dataset_config x.toml
    python cache_latents.py --dataset_config x.toml --task t2v-A14B --vae Wan2.1_VAE.pth --skip_existing

    accelerate launch --num_processes 4 cache_latents.py ...      clips divided among processes, one on each device

One safetensors file per clip, named in the clip's cache directory, with what it was made from written inside.
For image-to-video tasks the first frame's condition (and CLIP features, Wan2.1) is encoded with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset_config: Path
    """Dataset TOML; its [model] table may name the task and the model's files."""
    task: str | None = None
    """t2v-A14B, i2v-A14B, ti2v-5B, t2v-1.3B, t2v-14B, i2v-14B, t2i-14B, tiny, tiny-i2v,
    fun-camera-A14B, fun-camera-5B, fun-camera-1.3B or fun-camera-14B."""
    ckpt_dir: Path | None = None
    """Folder in the layout that Wan's authors publish."""
    vae: Path | None = None
    """VAE checkpoint (.pth or .safetensors)."""
    clip: Path | None = None
    """CLIP checkpoint; Wan2.1 I2V only."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder. float32 is what the official code uses."""
    device: str | None = None
    """Default: cuda where there is one, else cpu."""
    batch_size: int = 1
    """Clips of one size that are encoded together; more pays on a GPU for small clips."""
    num_workers: int = 2
    """Threads that decode videos ahead of the encoder. Memory holds two clips and one for each of them."""
    skip_existing: bool = False
    """Leave caches alone that are current: same clip, same crop, same encoder.
    What is not is written again, and the reason is said."""
    verify: bool = False
    """As --skip_existing, and read every cache whole: a damaged one is written again."""
    prune: bool = False
    """Remove caches that belong to no clip of the config. They are named otherwise."""
    keep_cache: bool = False
    """Keep caches that belong to no clip: the default."""
    reuse_musubi_caches: bool = False
    """Take over latents that musubi-tuner has left in the cache directories, where they fit; encode the others. Of each
    data set and size one clip is encoded all the same, and must agree."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from core.errors import InputError
from core.files import fingerprint
from core.model_files import resolve_model
from core.processes import this_process
from dataset import cache
from dataset.buckets import Crop
from dataset.caching import Todo, find_todo, prune_wanted, say, say_reused, tidy
from dataset.clip_frames import read_clip, read_clips
from dataset.clips import Clip, list_clips
from dataset.config import read_dataset_config
from dataset.musubi_caches import reuse_latents
from dataset.prefetch import run_ahead
from wan_ext.condition import encode_first_frame
from wan_ext.configs import get_variant
from wan_ext.image_encoder import load_image_encoder
from wan_ext.vae import load_vae


def main(options: Options) -> None:
    for name in ("batch_size", "num_workers"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected at least 1, found {getattr(options, name)}")
    config = read_dataset_config(options.dataset_config)
    flags = {"task": options.task, "ckpt_dir": options.ckpt_dir, "vae": options.vae, "clip": options.clip}
    files = resolve_model(flags, table=config.model, table_source=options.dataset_config, needs=("vae",))
    variant = get_variant(files.task)
    process = this_process()
    device = torch.device(options.device or (f"cuda:{process.local_rank}" if torch.cuda.is_available() else "cpu"))
    clips = list_clips(config, spatial_stride=variant.spatial_stride, temporal_stride=variant.vae.stride[0])

    encoder = fingerprint(files.vae)
    needs: dict[str, Any] = {
        "condition_channels": variant.dit.condition_channels,
        "image_context": variant.image_encoder is not None,
    }

    def problem(clip: Clip) -> str | None:
        flaw = cache.problem(clip, "latents", encoder=encoder, **needs)
        return cache.damage(clip, "latents") if options.verify and flaw is None else flaw

    tidy(clips, "latents", prune=prune_wanted(options.prune, options.keep_cache), process=process)
    skip = options.skip_existing or options.verify
    todo = find_todo(clips, problem, kind="latents", skip_existing=skip, process=process)
    say(todo, what="clips", process=process)
    if not todo.mine and not todo.others:
        return

    vae = load_vae(files.vae, variant.vae, dtype=getattr(torch, options.vae_dtype), device=device)
    clip_encoder = None
    if variant.image_encoder is not None:
        files = resolve_model(flags, table=config.model, table_source=options.dataset_config, needs=("vae", "clip"))
        clip_encoder = load_image_encoder(files.clip, variant.image_encoder, device=device)

    def encode(frames: list[Tensor]) -> list[cache.Latents]:
        """Clips of one size, each uint8 [T, H, W, 3]."""
        together = frames[0][None] if len(frames) == 1 else torch.stack(frames)  # a view, or a copy
        video = rearrange(together.to(device), "b t h w c -> b c t h w")  # uint8
        encoded = []
        for place, latents in enumerate(vae.encode(video).cpu()):
            first = video[place, :, 0].float().div_(127.5).sub_(1)  # [3, H, W] in [-1, 1]
            condition = image_context = None
            if variant.dit.condition_channels:
                condition = encode_first_frame(vae.encode, first, video.shape[2], variant).cpu()  # [Cc, F, h, w]
            if clip_encoder is not None:
                image_context = clip_encoder.encode(first[None])[0].cpu()  # [257, 1280]
            encoded.append(cache.Latents(latents=latents, condition=condition, image_context=image_context))
        return encoded

    if options.reuse_musubi_caches:
        stride, height, width = variant.vae.stride
        reused = reuse_latents(
            todo.mine,
            lambda frames: encode([frames])[0],
            all_clips=clips,
            encoder=encoder,
            shape=lambda clip: (
                variant.vae.z_dim,
                (clip.num_frames - 1) // stride + 1,
                clip.height // height,
                clip.width // width,
            ),
            **needs,
        )
        say_reused(reused, what="clips")
        todo = replace(todo, mine=reused.left)
        if not todo.mine and not todo.others:
            return

    started, pixels = time.perf_counter(), 0
    progress = tqdm(total=len(todo.mine), desc="latents", unit="clip", disable=not process.is_main)
    for batch in batches_of(todo, options.batch_size, threads=options.num_workers):
        for (clip, _), found in zip(batch, encode([frames for _, frames in batch]), strict=True):
            cache.write_latents(
                clip,
                found.latents,
                condition=found.condition,
                image_context=found.image_context,
                encoder=encoder,
                crop=clip.crop,
            )
            pixels += clip.num_frames * clip.height * clip.width
            progress.update()
    progress.close()
    if pixels:
        print(f"encoded at {pixels / 1e6 / (time.perf_counter() - started):.3g} megapixels a second")


def batches_of(todo: Todo, batch_size: int, *, threads: int) -> Iterator[list[tuple[Clip, Tensor]]]:
    """Clips of one size with their frames, decoded ahead of the encoder, several clips of one video in one pass."""
    sources: dict[tuple[Path, Crop], list[Clip]] = {}
    for clip in todo.mine:
        sources.setdefault((clip.source, clip.crop), []).append(clip)
    waiting: dict[tuple[int, ...], list[tuple[Clip, Tensor]]] = {}
    for clip, frames in run_ahead([partial(read_clips, clips) for clips in sources.values()], threads=threads, depth=1):
        batch = waiting.setdefault(frames.shape, [])
        batch.append((clip, frames))
        if len(batch) == batch_size:
            yield waiting.pop(frames.shape)
    yield from waiting.values()
    for clip in todo.left():
        yield [(clip, read_clip(clip)[0])]


if __name__ == "__main__":
    run(main, OPTIONS)
