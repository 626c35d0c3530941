"""Caches of musubi-tuner, written here after their description: what fits is taken over, what is doubtful is not."""

import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_dataset import FPS, T5, VAE, T, World, smooth_frames

from core.errors import InputError
from core.files import read_safetensors_metadata
from dataset import cache
from dataset.buckets import cover_crop
from dataset.clip_frames import read_clip
from dataset.musubi_caches import area_resize, read_as_musubi, reuse_latents, reuse_text
from dataset.video import write_frames, write_video

STRIDE, CHANNELS, WIDTH = 8, 12, 6


def shape(clip):
    return (CHANNELS, (clip.num_frames - 1) // 4 + 1, clip.height // STRIDE, clip.width // STRIDE)


def encode(frames, gain=1.0):
    """A VAE's double: the mean colours of 1, 4, 4, ... frames over patches, mixed into channels."""
    pixels = frames.float().movedim(-1, 0)[None] / 127.5 - 1
    small = torch.nn.functional.avg_pool3d(pixels, (1, STRIDE, STRIDE))[0]  # [3, T, h, w]
    grouped = torch.cat([small[:, :1].repeat(1, 4, 1, 1), small[:, 1:]], dim=1).unflatten(1, (-1, 4))
    latents = gain * grouped.movedim(2, 1).flatten(0, 1)  # [12, F, h, w]
    return cache.Latents(latents=latents, condition=None, image_context=None)


def write_musubi(clip, latents=None, *, name=None, dtype=torch.bfloat16, extra=None, **metadata):
    """The latent file that musubi-tuner would have left for a clip of a video."""
    latents = encode(read_as_musubi(clip)).latents if latents is None else latents
    size = f"{clip.width:04d}x{clip.height:04d}"
    name = name or f"{clip.source.stem}_{clip.frame_indices[0]:05d}-{clip.num_frames:03d}_{size}_wan.safetensors"
    file = clip.cache_directory / name
    file.parent.mkdir(exist_ok=True)
    kind = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[dtype]
    entries = {
        "architecture": "wan",
        "width": str(clip.width),
        "height": str(clip.height),
        "format_version": "1.0.1",
        "frame_count": str(clip.num_frames),
    } | metadata
    key = f"latents_{'x'.join(map(str, latents.shape[1:]))}_{kind}"
    save_file({key: latents.to(dtype).contiguous(), **(extra or {})}, file, {k: v for k, v in entries.items() if v})
    return file


def reuse(clips, some=None, encoder=encode, condition_channels=0, image_context=False):
    return reuse_latents(
        some or clips,
        encoder,
        all_clips=clips,
        encoder=VAE,
        shape=shape,
        condition_channels=condition_channels,
        image_context=image_context,
    )


def refused(clips, **options):
    """The one reason for which the only clip is left."""
    found = reuse(clips, **options)
    assert not found.clips and len(found.left) == len(found.reasons) == len(clips)
    assert not any(clip.latent_cache.exists() for clip in found.left)
    return found.reasons[0]


def test_what_fits_becomes_a_cache_of_ours(world):
    world.add_video("0001.mp4", num_frames=25)
    clips = world.clips(target_frames=[5, 9], frame_extraction="chunk")
    files = {clip.key: write_musubi(clip) for clip in clips}
    found = reuse(clips)
    assert found.clips == tuple(clips) and len(clips) == 4 + 2 + 5 + 2 and not found.reasons
    for clip in clips:
        expected = encode(read_as_musubi(clip)).latents.to(torch.bfloat16).float()
        assert torch.equal(cache.read_latents(clip, encoder=VAE).latents, expected)
        assert read_safetensors_metadata(clip.latent_cache)["origin"] == str(files[clip.key])


def test_the_precision_is_the_one_stored(world):
    (clip,) = world.clips()
    write_musubi(clip, dtype=torch.float32)
    reuse([clip])
    assert torch.equal(cache.read_latents(clip).latents, encode(read_as_musubi(clip)).latents)


def test_one_clip_of_each_size_is_compared(world):
    clips = world.clips(target_frames=[5, 9], frame_extraction="chunk")
    for clip in clips:
        write_musubi(clip)
    lengths = []

    def noted(frames):
        lengths.append(len(frames))
        return encode(frames)

    reuse(clips, encoder=noted)
    assert sorted(lengths) == [5, 9]


@pytest.mark.parametrize("wrong", ["encoder", "crop", "rate"])
def test_another_vae_crop_or_rate_is_an_error_that_names_both(world, wrong):
    write_video(smooth_frames(T), world.videos / "0000.mp4", FPS)
    (clip,) = world.clips(target_frames=[5])
    if wrong == "encoder":
        file = write_musubi(clip, encode(read_as_musubi(clip), gain=1.2).latents)
    elif wrong == "crop":
        file = write_musubi(clip, encode(read_as_musubi(clip).roll(8, dims=2)).latents)
    else:
        (later,) = world.clips(target_frames=[17])
        file = write_musubi(clip, encode(read_clip(later)[0][::4]).latents)
    with pytest.raises(InputError) as error:
        reuse([clip])
    assert str(file) in str(error.value) and str(clip.source) in str(error.value)
    assert not clip.latent_cache.exists()


def test_images_are_named_by_their_own_size(tmp_path):
    frames = torch.randint(0, 256, (1, 70, 110, 3), dtype=torch.uint8)
    write_frames(frames, tmp_path / "images" / "a%d.png")
    (tmp_path / "images" / "a0.txt").write_text("noise")
    world = World(tmp_path)
    keys = {"image_directory": str(tmp_path / "images"), "cache_directory": str(tmp_path / "cache")}
    text = "[[datasets]]\n" + "".join(f'{key} = "{value}"\n' for key, value in keys.items()) + "resolution = [64, 48]\n"
    (clip,) = world.clips(text)
    write_musubi(clip, name="a0_0110x0070_wan.safetensors", width="110", height="70", frame_count="")
    assert reuse([clip]).clips == (clip,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "hunyuan_video"}, "architecture wan"),
        ({"format_version": "1.0.0"}, "format_version 1.0.1"),
        ({"frame_count": "21"}, "frame_count 17"),
        ({"width": "128"}, "128x48"),
        ({"extra": {"f_indices_int32": torch.zeros(2, dtype=torch.int32)}}, "f_indices_int32"),
        ({"extra": {"latents_5x6x8_float32": torch.zeros(12, 5, 6, 8)}}, "expected one of"),
        ({"extra": {"latents_image_5x6x9_float32": torch.zeros(16, 5, 6, 8)}}, "the size in its name"),
        ({"latents": torch.zeros(12, 5, 6, 10)}, r"\[12, 5, 6, 8\]"),
        ({"latents": torch.zeros(16, 5, 6, 8)}, r"\[12, 5, 6, 8\]"),
        ({"latents": torch.full((12, 5, 6, 8), torch.nan)}, "NaN"),
        ({"latents": torch.full((12, 5, 6, 8), torch.inf)}, "infinite"),
        ({"name": "0000_00001-017_0064x0048_wan.safetensors"}, "no cache of these frames"),
        ({"name": "0001_00000-017_0064x0048_wan.safetensors"}, "no cache of these frames"),
    ],
)
def test_what_does_not_fit_is_left_to_the_encoder(world, change, reason):
    clips = world.clips()
    write_musubi(clips[0], **change)
    assert re.search(reason, refused(clips))


def test_damage_is_left_to_the_encoder(world):
    clips = world.clips()
    file = write_musubi(clips[0])
    file.write_bytes(file.read_bytes()[:-8])
    assert "whole safetensors file" in refused(clips)


def test_of_two_candidates_none_is_taken(world):
    clips = world.clips()
    write_musubi(clips[0])
    write_musubi(clips[0], name="0000_00000-017_0096x0064_wan.safetensors")
    assert "expected one cache" in refused(clips)


def test_of_two_sources_with_one_file_none_is_served(world):
    (world.videos / "0000.mov").write_bytes((world.videos / "0000.mp4").read_bytes())
    clips = world.clips()
    assert len(clips) == 2
    write_musubi(clips[0])
    assert "0000.mov" in refused(clips)


def test_a_source_that_changed_later_is_encoded(world):
    clips = world.clips()
    file = write_musubi(clips[0])
    os.utime(file, ns=(0, clips[0].source.stat().st_mtime_ns - 1))
    assert "has changed since" in refused(clips)


def test_sampled_frames_are_encoded(world):
    clips = world.clips(target_fps=8, target_frames=[9])
    write_musubi(clips[0])
    assert "target_fps" in refused(clips)


def test_what_the_model_needs_must_be_in_the_file(world):
    (clip,) = world.clips()
    write_musubi(clip)
    assert "latents_image" in refused([clip], condition_channels=16)
    assert "clip" in refused([clip], image_context=True)
    condition, context = torch.randn(16, *shape(clip)[1:]), torch.randn(5, 7)
    size = "x".join(map(str, shape(clip)[1:]))
    extra = {f"latents_image_{size}_bfloat16": condition, "clip_bfloat16": context.half()}
    write_musubi(clip, extra=extra)
    assert "expected latents_image" in refused([clip], condition_channels=20)

    def ours(frames, sign=1.0):
        return cache.Latents(latents=encode(frames).latents, condition=sign * condition, image_context=context)

    with pytest.raises(InputError, match="first-frame channels"):
        reuse([clip], encoder=lambda frames: ours(frames, -1.0), condition_channels=16, image_context=True)
    reuse([clip], encoder=ours, condition_channels=16, image_context=True)
    found = cache.read_latents(clip, condition_channels=16, image_context=True)
    assert torch.equal(found.condition, condition) and torch.equal(found.image_context, context.half().float())


def test_no_cache_at_all_is_a_mistake(world):
    clips = world.clips()
    with pytest.raises(InputError, match="found none"):
        reuse(clips)
    with pytest.raises(InputError, match="found none"):
        reuse_text(clips, lambda caption: torch.zeros(2, WIDTH), all_clips=clips, encoder=T5, longest=9, width=WIDTH)


# ---- captions --------------------------------------------------------------------------------------------------------


def words(caption):
    generator = torch.Generator().manual_seed(len(caption))
    return torch.randn(len(caption.split()), WIDTH, generator=generator)


def write_musubi_text(clip, context=None, **metadata):
    entries = {"architecture": "wan", "caption1": clip.caption, "format_version": "1.0.1"} | metadata
    context = words(clip.caption) if context is None else context
    clip.cache_directory.mkdir(exist_ok=True)
    file = clip.cache_directory / f"{clip.source.stem}_wan_te.safetensors"
    save_file({"varlen_t5_bfloat16": context.to(torch.bfloat16)}, file, entries)
    return file


def take_text(clip, encoder=words):
    return reuse_text([clip], encoder, all_clips=[clip], encoder=T5, longest=9, width=WIDTH)


def test_captions_are_taken_over(world):
    (clip,) = world.clips()
    file = write_musubi_text(clip)
    assert take_text(clip).clips == (clip,)
    assert torch.equal(cache.read_text(clip, encoder=T5), words(clip.caption).to(torch.bfloat16))
    assert read_safetensors_metadata(clip.text_cache)["origin"] == str(file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"caption1": "a dot in 0001"}, "another caption"),
        ({"architecture": "flux"}, "architecture wan"),
        ({"context": torch.zeros(10, WIDTH)}, "expected features"),
        ({"context": torch.zeros(2, WIDTH + 1)}, "expected features"),
        ({"context": torch.full((2, WIDTH), torch.nan)}, "NaN"),
    ],
)
def test_captions_that_do_not_fit_are_left(world, change, reason):
    (clip,) = world.clips()
    write_musubi_text(clip, **change)
    found = take_text(clip)
    assert found.left == (clip,) and reason in found.reasons[0] and not clip.text_cache.exists()


@pytest.mark.parametrize("ours", [lambda caption: 1.5 * words(caption), lambda caption: words(caption + " again")])
def test_another_text_encoder_is_an_error(world, ours):
    (clip,) = world.clips()
    file = write_musubi_text(clip)
    with pytest.raises(InputError, match="text encoder") as error:
        take_text(clip, ours)
    assert str(file) in str(error.value) and not clip.text_cache.exists()


# ---- their filter ----------------------------------------------------------------------------------------------------


def test_the_filter_is_the_mean_over_an_area():
    """By whole factors the mean of a block; by any factor the mean colour of an evenly cut frame stays."""
    frame = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    small = area_resize(frame, cover_crop(source_height=48, source_width=96, height=16, width=32))
    blocks = frame.reshape(16, 3, 32, 3, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.abs(small - blocks).max() <= 0.5 + 1e-4
    odd = area_resize(frame, cover_crop(source_height=48, source_width=96, height=21, width=42))
    assert np.abs(odd.mean(axis=(0, 1)) - frame.mean(axis=(0, 1))).max() < 0.1


def test_frames_that_grow_or_stay_are_resized_as_ours(world):
    for size in ([128, 96], [96, 64]):
        (clip,) = world.clips(resolution=size)
        assert torch.equal(read_as_musubi(clip), read_clip(clip)[0])
