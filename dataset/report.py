"""What a data set is made of and everything that is wrong with it, found without loading a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from camera.plausible import implausible
from core.errors import InputError
from dataset import cache
from dataset.cameras import read_clip_camera
from dataset.clips import Clip, list_clips, without_caption
from dataset.config import DatasetConfig

TOKENS_PER_WORD = 1.4  # of an English caption in umT5's vocabulary, to estimate what it will weigh


@dataclass(frozen=True, kw_only=True)
class ClipReport:
    """One clip and the state of its caches: None where a cache is current, else why it is not."""

    clip: Clip
    latents: str | None
    text: str | None
    camera: str | None
    """None too where the data set has no cameras."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """All clips of a config, and what is wrong."""

    clips: tuple[ClipReport, ...]
    problems: tuple[str, ...]
    """What will stop a command, one line each."""
    warnings: tuple[str, ...]
    """What a person should look at."""
    bytes_to_write: int
    """Of the caches that are missing or not current."""
    pixels_to_encode: int
    """Of all frames whose latents are missing or not current."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What the model of a task makes of a clip, for sizes and for what makes a cache stale."""

    spatial_stride: int  # pixels of a token's side
    temporal_stride: int
    latent_stride: int  # pixels of a latent's side
    latent_channels: int
    condition_channels: int
    image_context: bool
    context_width: int
    vae: str | None  # fingerprints of the files, where they are known
    text_encoder: str | None


def report(config: DatasetConfig, encoders: Encoders) -> DatasetReport:
    """Look at everything: sources, captions, cameras, caches.

    Args:
        config: from `read_dataset_config`.
        encoders: of the task that it is for.
    """
    problems: list[str] = []
    warnings: list[str] = []
    clips = list_clips(
        config,
        spatial_stride=encoders.spatial_stride,
        temporal_stride=encoders.temporal_stride,
        on_problem=lambda problem: problems.append(str(problem)),
    )
    for clip in clips:
        if not clip.caption.strip():
            warnings.append(f"{clip.key}: its caption is empty ({clip.source})")
        if clip.camera is not None and not clip.camera.settings.estimate:
            try:
                warnings += [f"{clip.camera.path}: {finding}" for finding in implausible(read_clip_camera(clip))]
            except InputError as problem:
                problems.append(str(problem))
    reports = tuple(_clip_report(clip, encoders) for clip in clips)
    return DatasetReport(
        clips=reports,
        problems=tuple(dict.fromkeys(problems)),
        warnings=tuple(dict.fromkeys(warnings)),
        bytes_to_write=sum(_missing_bytes(each, encoders) for each in reports),
        pixels_to_encode=sum(_pixels(each.clip) for each in reports if each.latents is not None),
    )


def _clip_report(clip: Clip, encoders: Encoders) -> ClipReport:
    def state(problem: Callable[[], str | None]) -> str | None:
        try:
            return problem()
        except InputError as error:
            return str(error)

    text = state(lambda: cache.problem(clip, "text", encoder=encoders.text_encoder))
    if text is None and clip.caption_dropout:
        text = state(lambda: cache.problem(without_caption(clip), "text", encoder=encoders.text_encoder))
    return ClipReport(
        clip=clip,
        latents=state(
            lambda: cache.problem(
                clip,
                "latents",
                encoder=encoders.vae,
                condition_channels=encoders.condition_channels,
                image_context=encoders.image_context,
            )
        ),
        text=text,
        camera=None if clip.camera is None else state(lambda: cache.problem(clip, "camera")),
    )


def _missing_bytes(report: ClipReport, encoders: Encoders) -> int:
    clip = report.clip
    frames = (clip.num_frames - 1) // encoders.temporal_stride + 1
    positions = frames * (clip.height // encoders.latent_stride) * (clip.width // encoders.latent_stride)
    total = 0
    if report.latents is not None:
        total += positions * (encoders.latent_channels + encoders.condition_channels) * 4
    if report.text is not None:
        total += math.ceil(len(clip.caption.split()) * TOKENS_PER_WORD + 1) * encoders.context_width * 2
    if report.camera is not None:
        total += clip.num_frames * (16 + 9) * 8
    return total


def _pixels(clip: Clip) -> int:
    return clip.num_frames * clip.height * clip.width


def as_json(found: DatasetReport) -> Mapping[str, object]:
    """The report as plain values."""
    return {
        "clips": [
            {
                "name": each.clip.name,
                "source": str(each.clip.source),
                "frames": each.clip.num_frames,
                "fps": each.clip.fps,
                "height": each.clip.height,
                "width": each.clip.width,
                "caption": each.clip.caption,
                "camera": None if each.clip.camera is None else str(each.clip.camera.path),
                "caches": {"latents": each.latents, "text": each.text, "camera": each.camera},
            }
            for each in found.clips
        ],
        "problems": list(found.problems),
        "warnings": list(found.warnings),
        "bytes_to_write": found.bytes_to_write,
        "pixels_to_encode": found.pixels_to_encode,
    }
