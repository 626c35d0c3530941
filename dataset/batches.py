"""Batches from caches: which clips go together in which order, and the tensors of one batch.

The order is a function of (seed, epoch, rank, world_size) alone, and which captions are dropped one of the batch's
generator. A run that resumes in the middle of an epoch computes
the same list and starts further down in it; nothing about the order is stored.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError
from core.randomness import generator_for, seed_of
from dataset import cache
from dataset.clips import Clip, without_caption


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clips of one size, ready for the model. B clips of T frames."""

    keys: tuple[str, ...]
    latents: Tensor  # [B, C, F, H, W] float32
    context: Tensor  # [B, S, D] bfloat16, zero-padded to the longest caption of the batch
    c2w: Tensor | None  # [B, T, 4, 4] float64
    K: Tensor | None  # [B, T, 3, 3] float64, in pixels of height x width
    height: int  # of the video frames
    width: int
    condition: Tensor | None  # [B, Cc, F, H, W] float32
    image_context: Tensor | None  # [B, tokens, width] float32

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


class TrainingSet:
    """The clips of a config with all their caches, verified on construction and read one batch at a time.

    Args:
        clips: from `list_clips`.
        need_camera: whether every clip must have a camera cache, and batches have c2w and K; `pose_frame` and
            `scale_rule` then say in which coordinates.
        vae: fingerprint that every latent cache must name as its encoder; None: any, but one and the same for all.
        text_encoder: the same for text caches.
        latent_channels: C that the model takes; None: any.
        context_width: D that the model takes; None: any.
        condition_channels: channels of the first-frame condition that the model takes; 0: it takes none.
        image_context: whether the model needs CLIP features.

    Raises:
        InputError: a cache is missing, damaged or not current, or the data sets do not go together; the message names
            the first such clip, says how many there are, and which command to run.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        need_camera: bool,
        vae: str | None = None,
        text_encoder: str | None = None,
        latent_channels: int | None = None,
        context_width: int | None = None,
        condition_channels: int = 0,
        image_context: bool = False,
    ) -> None:
        self.clips = tuple(clips)
        self.need_camera, self.image_context = need_camera, image_context
        self.condition_channels = condition_channels
        self.pose_frame: str | None = None
        self.scale_rule: str | None = None
        if need_camera:
            self.pose_frame, self.scale_rule = _common_camera(self.clips)
        self.vae = vae or cache.cached_encoder(self.clips[0], "latents")
        self.text_encoder = text_encoder or cache.cached_encoder(self.clips[0], "text")
        flaws = [flaw for clip in self.clips if (flaw := self._flaw(clip, latent_channels, context_width))]
        if flaws:
            raise InputError(flaws[0] + (f" ({len(flaws)} of {len(self.clips)} clips)" if len(flaws) > 1 else ""))
        kinds: tuple[cache.Kind, ...] = ("latents", "camera") if need_camera else ("latents",)
        self._verified = {  # what stands there now: sources need not be compared again, nor be there
            cache.cache_path(clip, kind): cache.recorded_checksum(clip, kind) for clip in self.clips for kind in kinds
        }

    def batches(self, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, ...]]:
        """The batches of one process in one epoch, as positions in `clips`.

        Within an epoch each clip stands num_repeats * weight times in the batches of all processes together; of a
        fraction, that share of the clips of each size (rounded up, others in every epoch) stands there once more, so
        that epochs are equally long. A batch holds clips of one data set and one size, batch_size of them or, at the
        end of a size, fewer. All processes get equally many batches, as their gradients are averaged step by step:
        where the number of batches does not divide by world_size, the first ones of the epoch's order are given a
        second time, at most world_size - 1.

        Args:
            seed: of the run.
            epoch: from 0.
            rank: this process, 0 <= rank < world_size.
            world_size: number of processes.

        Returns:
            Groups of positions, in the order to train them.
        """
        groups = self._groups(seed, epoch)
        missing = -len(groups) % world_size
        groups += [groups[number % len(groups)] for number in range(missing)]
        return groups[rank::world_size]

    def in_order(self, *, seed: int, first: int, count: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The batches of one process, epoch after epoch, with the captions of some clips dropped.

        Args:
            seed: of the run.
            first: number of the first batch wanted, counted from the start of the run.
            count: of batches.
            rank: this process.
            world_size: number of processes.

        Yields:
            Batches, each read when it is asked for.
        """
        per_epoch = len(self.batches(seed=seed, epoch=0, rank=rank, world_size=world_size))
        epoch, groups = -1, []
        for number in range(first, first + count):
            if number // per_epoch != epoch:
                epoch = number // per_epoch
                groups = self.batches(seed=seed, epoch=epoch, rank=rank, world_size=world_size)
            group = groups[number % per_epoch]
            chance = generator_for(seed, "caption_dropout", number, rank)
            yield self.load(group, dropped=self.draw_dropped(group, chance))

    def draw_dropped(self, group: Sequence[int], generator: torch.Generator) -> tuple[bool, ...]:
        """For each clip of a group, whether this once it is trained with the empty caption."""
        shares = torch.tensor([self.clips[index].caption_dropout for index in group])
        return tuple((torch.rand(len(group), generator=generator) < shares).tolist())

    def load(self, group: Sequence[int], *, dropped: Sequence[bool] = ()) -> Batch:
        """Read the caches of one group from `batches`.

        Args:
            group: positions in `clips`.
            dropped: of `draw_dropped`; none: all clips keep their captions.

        Raises:
            InputError: a cache has been damaged or exchanged since it was verified, or holds a NaN or an infinity.
        """
        clips = [self.clips[index] for index in group]
        dropped = dropped or (False,) * len(clips)
        videos = [
            cache.read_latents(
                clip,
                encoder=self.vae,
                condition_channels=self.condition_channels,
                image_context=self.image_context,
                verified=self._verified[clip.latent_cache],
            )
            for clip in clips
        ]
        paths = [
            cache.read_camera(clip, verified=self._verified[clip.camera_cache]) for clip in clips if self.need_camera
        ]
        spoken = [without_caption(clip) if drop else clip for clip, drop in zip(clips, dropped, strict=True)]
        contexts = [cache.read_text(clip, encoder=self.text_encoder) for clip in spoken]
        return Batch(
            keys=tuple(clip.key for clip in clips),
            latents=torch.stack([video.latents for video in videos]),  # [B, C, F, H, W]
            context=torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True),  # [B, S, D]
            c2w=torch.stack([path.c2w for path in paths]) if paths else None,  # [B, T, 4, 4]
            K=torch.stack([path.K for path in paths]) if paths else None,  # [B, T, 3, 3]
            height=clips[0].height,
            width=clips[0].width,
            condition=_stacked([video.condition for video in videos]),
            image_context=_stacked([video.image_context for video in videos]),
        )

    def _groups(self, seed: int, epoch: int) -> list[tuple[int, ...]]:
        """All batches of an epoch, in the order that the processes share out."""
        generator = random.Random(seed_of(seed, "batches", epoch))
        chance = random.Random(seed_of(seed, "weights", epoch))
        buckets: dict[tuple[int, ...], list[int]] = {}
        for index, clip in enumerate(self.clips):
            buckets.setdefault((clip.dataset, clip.num_frames, clip.height, clip.width), []).append(index)
        groups = []
        for clips in buckets.values():
            share, times = math.modf(self.clips[clips[0]].num_repeats * self.clips[clips[0]].weight)
            bucket = [index for index in clips for _ in range(int(times))]
            bucket += chance.sample(clips, math.ceil(share * len(clips)))
            generator.shuffle(bucket)
            size = self.clips[bucket[0]].batch_size
            groups += [tuple(bucket[start : start + size]) for start in range(0, len(bucket), size)]
        generator.shuffle(groups)
        return groups

    def _flaw(self, clip: Clip, latent_channels: int | None, context_width: int | None) -> str | None:
        """The first reason why a clip cannot be trained on."""
        flaw = cache.problem(
            clip,
            "latents",
            encoder=self.vae,
            condition_channels=self.condition_channels,
            image_context=self.image_context,
        ) or cache.problem(clip, "text", encoder=self.text_encoder)
        if flaw is None and clip.caption_dropout:
            flaw = cache.problem(without_caption(clip), "text", encoder=self.text_encoder)
        if flaw is None and self.need_camera:
            flaw = cache.problem(clip, "camera")
        if flaw is not None:
            return flaw
        channels = cache.cached_shape(clip, "latents", "latents")[0]
        width = cache.cached_shape(clip, "text", "context")[1]
        if latent_channels not in (None, channels):
            return (
                f"{clip.key}: {clip.latent_cache}: another VAE: expected latents of {latent_channels} channels for "
                f"this task, found {channels}; re-run cache_latents.py with the VAE of the task"
            )
        if context_width not in (None, width):
            return (
                f"{clip.key}: {clip.text_cache}: another text encoder: expected features of width {context_width} for "
                f"this task, found {width}; re-run cache_text.py with the text encoder of the task"
            )
        return None


def _common_camera(clips: Sequence[Clip]) -> tuple[str, str]:
    """The pose frame and the scale rule of all clips: a network learns one of each."""
    frames: dict[str, Clip] = {}
    rules: dict[str, Clip] = {}
    for clip in clips:
        if clip.camera is None:
            raise InputError(
                f"{clip.key}: expected a camera, because the network takes one, found none in the TOML; name "
                f"camera_directory (videos) or camera_params (frames) in its [[datasets]] table"
            )
        frames.setdefault(clip.camera.settings.pose_frame, clip)
        rules.setdefault(clip.camera.settings.scale, clip)
    for key, found in (("pose_frame", frames), ("camera_scale", rules)):
        if len(found) > 1:
            examples = " and ".join(f'"{value}" ({clip.key})' for value, clip in sorted(found.items()))
            raise InputError(
                f"{key}: expected one for all data sets, found {examples}; set the same in every [[datasets]] table "
                f"and re-run cache_camera.py"
            )
    return next(iter(frames)), next(iter(rules))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
