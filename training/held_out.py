"""Clips held out of training, whose cameras the networks film again and again while they train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from camera.path import CameraPath
from core.errors import InputError
from dataset.batches import TrainingSet
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from evaluation.filming import FilmingExpert
from evaluation.rooms import read_rooms, rooms_beside
from evaluation.validation import CameraValidation, HeldOutClip
from wan_ext.configs import Expert, WanVariant


def held_out_clips(dataset_config: Path, training_set: TrainingSet, variant: WanVariant) -> list[HeldOutClip]:
    """The clips of a data set as validation wants them; every cache is verified.

    Args:
        dataset_config: TOML of the held-out clips.
        training_set: what is trained on; pose frame, scale rule, VAE and text encoder must be the same.
        variant: the task.

    Raises:
        InputError: nothing trained hears a camera; caches are missing, stale, or in another pose frame or scale.
    """
    if training_set.pose_frame is None:
        raise InputError("--validate_camera_every: the network that is trained hears no camera; leave it out")
    held_out = TrainingSet(
        list_clips(
            read_dataset_config(dataset_config),
            spatial_stride=variant.spatial_stride,
            temporal_stride=variant.vae.stride[0],
        ),
        need_camera=True,
        vae=training_set.vae,
        text_encoder=training_set.text_encoder,
        latent_channels=variant.vae.z_dim,
        context_width=variant.dit.text_dim,
        condition_channels=variant.dit.condition_channels,
        image_context=variant.image_encoder is not None,
    )
    found, expected = (held_out.pose_frame, held_out.scale_rule), (training_set.pose_frame, training_set.scale_rule)
    if found != expected:
        raise InputError(
            f"{dataset_config}: expected pose frame and scale of the training data, {expected}, found {found}"
        )
    return [_held_out_clip(held_out, index, variant) for index in range(len(held_out.clips))]


def _held_out_clip(held_out: TrainingSet, index: int, variant: WanVariant) -> HeldOutClip:
    clip, batch = held_out.clips[index], held_out.load([index])
    assert batch.c2w is not None and batch.K is not None
    rooms = rooms_beside(clip.source.parent)
    knows_first = variant.image_conditioning in ("first_frame", "channels_and_first_frame")
    return HeldOutClip(
        name=f"{index:03d}_{clip.source.stem}",
        asked=CameraPath(
            c2w=batch.c2w[0],
            K=batch.K[0],
            height=batch.height,
            width=batch.width,
            fps=clip.fps,
            pose_frame=held_out.pose_frame,  # type: ignore[arg-type]  # one of the two, from CameraPath itself
            scale_rule=held_out.scale_rule or "none",
        ),
        context=batch.context,
        condition=batch.condition,
        image_context=batch.image_context,
        first_latents=batch.latents[:, :, :1] if knows_first else None,
        room=None if rooms is None else read_rooms(rooms).get(clip.source.stem),
    )


def validate(validation: CameraValidation, filming: Mapping[Expert, FilmingExpert], *, step: int) -> dict[str, float]:
    """Film, measure and say the result of one step: curves for the tracker, none where it failed."""
    try:
        curves = validation(filming, step)
    except Exception as error:  # hours of training do not end because a measurement of it does
        tqdm.write(f"validation at step {step} failed: {type(error).__name__}: {error}")
        return {}
    words = ", ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in curves.items())
    tqdm.write(f"validation at step {step}: {words}")
    return curves
