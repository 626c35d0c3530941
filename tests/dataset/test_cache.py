"""Laws of caches: what is written is read, and whatever no longer fits the TOML, the files or the models is refused."""

import dataclasses
import os

import pytest
import torch
from tiny_dataset import T5, VAE, camera_path, edit, latents, smooth_frames

from camera.files.formats import write_ten
from core.errors import InputError
from core.files import read_safetensors, save_safetensors
from dataset import cache
from dataset.cameras import read_clip_camera
from dataset.video import write_frames

COMMANDS = {"latents": "cache_latents.py", "text": "cache_text.py", "camera": "cache_camera.py"}


def write_all(clip, **extra):
    cache.write_latents(clip, latents(clip), encoder=VAE, crop=clip.crop, **extra)
    cache.write_text(clip, torch.linspace(-1, 1, 7 * 32).view(7, 32), encoder=T5)
    cache.write_camera(clip, read_clip_camera(clip))


@pytest.fixture
def clip(world):
    (clip,) = world.clips()
    write_all(clip)
    return clip


def refusal(clip, kind, **expectation):
    """The message with which a cache is refused: the same from reading, and is_current agrees."""
    assert not cache.is_current(clip, kind, **expectation)
    read = {"latents": cache.read_latents, "text": cache.read_text, "camera": cache.read_camera}[kind]
    with pytest.raises(InputError) as caught:
        read(clip, **expectation)
    message = str(caught.value)
    assert "\n" not in message
    assert clip.key in message and str(cache.cache_path(clip, kind)) in message and COMMANDS[kind] in message
    return message


def test_what_is_written_is_read(clip):
    condition, image_context = torch.ones(20, *latents(clip).shape[1:]), torch.rand(257, 8)
    write_all(clip, condition=condition, image_context=image_context)
    read = cache.read_latents(clip, encoder=VAE, condition_channels=20, image_context=True)
    assert torch.equal(read.latents, latents(clip)) and read.latents.dtype == torch.float32
    assert torch.equal(read.condition, condition) and torch.equal(read.image_context, image_context)
    assert cache.read_latents(clip).condition is None  # what the model does not take is not handed out
    context = cache.read_text(clip, encoder=T5)
    assert context.dtype == torch.bfloat16 and torch.equal(context, torch.linspace(-1, 1, 224).view(7, 32).bfloat16())
    path, expected = cache.read_camera(clip), read_clip_camera(clip)
    assert torch.equal(path.c2w, expected.c2w) and torch.equal(path.K, expected.K)
    for name in ("height", "width", "fps", "pose_frame", "scale_rule"):
        assert getattr(path, name) == getattr(expected, name)


def test_a_low_precision_result_is_stored_in_the_schemas_dtype(clip):
    cache.write_latents(clip, latents(clip).bfloat16(), encoder=VAE, crop=clip.crop)
    assert cache.read_latents(clip).latents.dtype == torch.float32


def test_a_written_cache_is_current_and_a_missing_one_is_not(clip):
    for kind in COMMANDS:
        assert cache.is_current(clip, kind)
        cache.cache_path(clip, kind).unlink()
        assert "nothing" in refusal(clip, kind)


def test_nothing_but_the_caches_lies_in_the_folder(clip):
    assert {file.name for file in clip.cache_directory.iterdir()} == {
        "0000.mp4_00000-017_0064x0048_latents.safetensors",
        "0000.mp4_00000-017_0064x0048_camera.safetensors",
        "0000.mp4_text.safetensors",
    }


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated(clip, kind, keep):
    file = cache.cache_path(clip, kind)
    file.write_bytes(file.read_bytes()[:keep])
    assert "whole safetensors file" in refusal(clip, kind)


@pytest.mark.parametrize("kind", COMMANDS)
def test_another_version(clip, kind):
    edit(cache.cache_path(clip, kind), version="0")
    assert "version" in refusal(clip, kind)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_file_of_another_program(clip, kind):
    save_safetensors({"latents_5x6x8_bf16": torch.zeros(3)}, cache.cache_path(clip, kind), {"format_version": "1.0.1"})
    assert "another kind of cache" in refusal(clip, kind)


def test_another_resolution(world, clip):
    (other,) = world.clips(resolution=[96, 64])
    assert other.latent_cache != clip.latent_cache
    clip.latent_cache.replace(other.latent_cache)
    message = refusal(other, "latents")
    assert "another resolution" in message and "expected 96x64" in message and "found 64x48" in message


def test_the_same_size_cut_from_another_place(clip):
    moved = dataclasses.replace(clip, crop=dataclasses.replace(clip.crop, left=clip.crop.left + 1))
    assert "resolution" in refusal(moved, "latents")
    assert "resolution" in refusal(moved, "camera")


def test_other_frames_under_the_same_name(world, clip):
    (half,) = world.clips(target_fps=8, target_frames=[9])
    (whole,) = world.clips(target_frames=[9])
    assert half.latent_cache == whole.latent_cache
    write_all(whole)
    for kind in ("latents", "camera"):
        message = refusal(half, kind)
        assert "expected 9 frames from 0 to 16, found 9 frames from 0 to 8" in message


def test_another_vae_or_text_encoder(clip):
    message = refusal(clip, "latents", encoder="sha256:other")
    assert "another VAE" in message and "sha256:other" in message and VAE in message
    message = refusal(clip, "text", encoder="sha256:other")
    assert "another text encoder" in message and T5 in message


def test_a_changed_source(world, clip):
    world.add_video(num_frames=21, height=64, width=96)
    cache.read_latents(clip)  # the same video again: the date does not count
    data = bytearray(clip.source.read_bytes())
    data[-1] ^= 1
    clip.source.write_bytes(data)
    assert "source file has changed" in refusal(clip, "latents")
    cache.read_latents(clip, verified=cache.recorded_checksum(clip, "latents"))  # compared at the start of a training


def test_a_changed_frame_of_a_scene_counts_and_what_else_lies_there_does_not(world):
    folder = world.root / "room"
    files = write_frames(smooth_frames(5), folder / "%d.png")
    (scene,) = world.clips(frames_directory=folder, cache_directory=folder, prompt="x", target_frames=[5])
    cache.write_latents(scene, latents(scene), encoder=VAE, crop=scene.crop)
    (folder / "notes.md").write_text("other")
    assert cache.is_current(scene, "latents")
    write_frames(smooth_frames(1, seed=1), files[4].with_name("4%d.png"))
    files[4].with_name("40.png").replace(files[4])
    assert "source file has changed" in refusal(scene, "latents")


def test_a_changed_caption_concerns_the_text_alone(world, clip):
    (world.videos / "0000.txt").write_text("another caption")
    (clip,) = world.clips()
    assert "another caption" in refusal(clip, "text")
    assert cache.is_current(clip, "latents") and cache.is_current(clip, "camera")


def test_text_depends_on_the_caption_alone(world, clip):
    (other,) = world.clips(resolution=[96, 64], target_frames=[5], pose_frame="scene", batch_size=2)
    assert torch.equal(cache.read_text(other, encoder=T5), cache.read_text(clip, encoder=T5))


def test_a_changed_camera_file_concerns_the_camera_alone(world, clip):
    write_ten(dataclasses.replace(camera_path(), c2w=camera_path().c2w.flip(0)), clip.camera.path)
    assert "camera file has changed" in refusal(clip, "camera")
    assert cache.is_current(clip, "latents") and cache.is_current(clip, "text")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pose_frame", "scene", "pose frame"),
        ("fov_axis", "vertical", "axis of the field of view"),
        ("camera_format", "ten", "camera format"),
        ("source_fps", 15.9, "frame rate"),
    ],
)
def test_a_camera_read_in_another_way(world, clip, key, value, message):
    (changed,) = world.clips(**{key: value})
    assert message in refusal(changed, "camera")
    assert cache.is_current(changed, "latents")


def test_first_frame_channels_and_clip_features_that_are_missing(clip):
    assert "first-frame channels" in refusal(clip, "latents", condition_channels=20)
    assert "CLIP" in refusal(clip, "latents", image_context=True)


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("latents", {"latents": None}, "found none"),
        ("latents", {"extra": torch.zeros(1)}, "extra"),
        ("latents", {"latents": torch.zeros(16, 5, 6, 8, dtype=torch.float16)}, "F16"),
        ("latents", {"latents": torch.zeros(16, 5, 12, 8)}, "[16, 5, 12, 8]"),
        ("latents", {"latents": torch.zeros(16, 4, 6, 8)}, "[16, 4, 6, 8]"),
        ("latents", {"latents": torch.zeros(16, 1, 6, 8)}, "[16, 1, 6, 8]"),
        ("latents", {"latents": torch.zeros(5, 6, 8)}, "[5, 6, 8]"),
        ("latents", {"latents": torch.zeros(0, 5, 6, 8)}, "[0, 5, 6, 8]"),
        ("latents", {"condition": torch.zeros(20, 5, 6, 9)}, "[20, 5, 6, 9]"),
        ("text", {"context": torch.zeros(7, dtype=torch.bfloat16)}, "[7]"),
        ("text", {"context": torch.zeros(7, 32)}, "F32"),
        ("camera", {"c2w": torch.zeros(16, 4, 4, dtype=torch.float64)}, "17 poses"),
        ("camera", {"K": torch.zeros(17, 3, 3)}, "F32"),
    ],
)
def test_tensors_of_another_name_dtype_or_shape(clip, kind, tensors, message):
    edit(cache.cache_path(clip, kind), tensors)
    assert message in refusal(clip, kind)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_never_read(clip, value):
    for kind, name in (("latents", "latents"), ("text", "context"), ("camera", "c2w")):
        file = cache.cache_path(clip, kind)
        tensor = read_safetensors(file)[0][name]
        tensor.view(-1)[5] = value
        edit(file, {name: tensor})
        read = {"latents": cache.read_latents, "text": cache.read_text, "camera": cache.read_camera}[kind]
        with pytest.raises(InputError) as caught:
            read(clip)
        assert all(part in str(caught.value) for part in (clip.key, str(file), name, "finite", COMMANDS[kind]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_never_written(world, value):
    (clip,) = world.clips()
    bad = latents(clip)
    bad[0, 0, 0, 0] = value
    with pytest.raises(InputError, match="1 of .* numbers") as caught:
        cache.write_latents(clip, bad, encoder=VAE, crop=clip.crop)
    assert clip.key in str(caught.value) and "not written" in str(caught.value)
    with pytest.raises(InputError, match="condition"):
        cache.write_latents(clip, latents(clip), encoder=VAE, crop=clip.crop, condition=bad)
    with pytest.raises(InputError, match="context"):
        cache.write_text(clip, torch.full((3, 8), value), encoder=T5)
    assert not world.root.joinpath("cache").exists()


def test_writing_what_the_schema_does_not_know_is_our_own_mistake(clip):
    with pytest.raises(ValueError, match="16, 5, 6, 9"):
        cache.write_latents(clip, torch.zeros(16, 5, 6, 9), encoder=VAE, crop=clip.crop)


def test_an_interrupted_write_keeps_the_old_cache(clip, monkeypatch):
    before = clip.latent_cache.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.write_latents(clip, latents(clip, seed=1), encoder=VAE, crop=clip.crop)
    assert clip.latent_cache.read_bytes() == before
    assert len(list(clip.cache_directory.iterdir())) == 3


def test_poses_that_are_no_rotations_are_named(clip):
    c2w = read_safetensors(clip.camera_cache)[0]["c2w"]
    c2w[3, 0, 0] = 2
    edit(clip.camera_cache, {"c2w": c2w})
    with pytest.raises(InputError, match=r"camera\.safetensors.*rotation.*frame 3.*cache_camera\.py"):
        cache.read_camera(clip)


def test_a_clip_without_a_camera_has_no_camera_cache(world):
    (clip,) = world.clips(camera_directory=None)
    with pytest.raises(InputError, match="camera_directory"):
        cache.read_camera(clip)
