"""Wan-Fun models through all commands: their own camera adapter, in the three layouts of a first frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import generate
from core.errors import InputError
from core.files import read_safetensors
from dataset.video import read_frames, write_frames
from tests.wan_ext.models import lively_dit
from tests.wan_ext.test_image_encoder import native_weights
from wan_ext.configs import VARIANTS, ImageEncoderConfig, WanVariant
from wan_ext.loading import save_dit

CLIP = ImageEncoderConfig(dim=32, ffn_dim=48, num_layers=2, num_heads=4, patch_size=14, image_size=224)
LAYOUTS = {
    "fun-camera-A14B": {"in_dim": 36},
    "fun-camera-5B": {"in_dim": 36},
    "fun-camera-1.3B": {"in_dim": 32, "image_dim": 32},
}


@pytest.fixture(params=LAYOUTS)
def variant(request, world, tmp_path, monkeypatch) -> WanVariant:
    """The tiny model in the layout of a published one, with random weights. The world's TOML names it."""
    real, tiny = VARIANTS[request.param], VARIANTS["tiny"]
    dit = replace(tiny.dit, num_layers=2, control_downscale=8, **LAYOUTS[request.param])
    variant = replace(
        tiny,
        name=real.name,
        dit=dit,
        boundary=real.boundary,
        image_conditioning=real.image_conditioning,
        image_encoder=CLIP if "image_dim" in LAYOUTS[request.param] else None,
    )
    monkeypatch.setitem(VARIANTS, variant.name, variant)
    keys = [f'task = "{variant.name}"']
    for seed, (expert, key) in enumerate((("low", "dit"), ("high", "dit_high_noise"))):
        if expert in variant.experts:
            save_dit(lively_dit(dit, seed), tmp_path / f"{expert}_noise_model")
            keys.append(f'{key} = "{tmp_path}/{expert}_noise_model"')
    if variant.image_encoder is not None:
        torch.save(native_weights(CLIP), tmp_path / "clip.pth")
        keys.append(f'clip = "{tmp_path}/clip.pth"')
    world.toml.write_text(world.toml.read_text().replace('task = "tiny"', "\n".join(keys)))
    return variant


def film(world, tmp_path, name: str, **options) -> torch.Tensor:
    """A video, float [T, H, W, 3]."""
    settings = {
        "dataset_config": world.toml,
        "prompt": "a room",
        "video_size": (32, 48),
        "video_length": 5,
        "mixed_precision": "no",
        "infer_steps": 2,
        "device": "cpu",
        "save_path": tmp_path / f"{name}.mp4",
    }
    generate.main(generate.Options(**(settings | options)))
    return read_frames(tmp_path / f"{name}.mp4").float()


def test_a_model_follows_a_path_without_network_and_without_first_frame(variant, world, tmp_path):
    one = film(world, tmp_path, "one", camera_path="pan right 40deg")
    other = film(world, tmp_path, "other", camera_path="dolly in 0.5")
    still = film(world, tmp_path, "still")
    assert one.shape == other.shape == still.shape == (5, 32, 48, 3)
    assert not torch.equal(one, other)
    assert not torch.equal(one, still)


def test_caches_training_and_generation(variant, world, tmp_path):
    if variant.dit.condition_channels:
        with pytest.raises(InputError, match="first-frame channels for this model, found none.*cache_latents.py"):
            world.train("early")  # caches of a text-to-video task have no condition
    world.cache(skip_existing=True)
    cached, _ = read_safetensors(next(file for file in world.cache_files if "latents" in file.name))
    condition = cached["condition"]
    assert condition.shape == (variant.dit.condition_channels, 2, 4, 6)
    if variant.dit.condition_channels == 16:  # latents of the first frame alone, then zeros
        torch.testing.assert_close(condition[:, 0], cached["latents"][:, 0])
        assert not condition[:, 1].any()
        assert cached["image_context"].shape == (257, 32)
    else:
        assert condition[:4, 0].eq(1).all() and condition[:4, 1].eq(0).all()

    with pytest.raises(InputError, match='knows poses of frame "first", found a data set of pose frame "scene"'):
        world.train("frozen", network_args=(), max_train_steps=3)
    weights = world.train("out", network_args=("camera_lr=0.1",), max_train_steps=3, train_control_adapter=True)
    cameras = sorted(weights.glob("*_camera.safetensors"))
    assert len(cameras) == len(variant.experts)
    names = read_safetensors(cameras[0])[0].keys()
    assert {name.split(".")[0] for name in names} == {"control_adapter"}

    (image,) = write_frames(torch.full((1, 48, 48, 3), 90, dtype=torch.uint8), tmp_path / "image_%d.png")
    networks = {"network_weights": tuple(f for f in sorted(weights.glob("net*.safetensors")) if f not in cameras)}
    paths = [world.folder / f"cameras/{index:04d}.txt" for index in range(2)]
    one = film(world, tmp_path, "one", camera_params=paths[0], image_path=image, **networks)
    other = film(world, tmp_path, "other", camera_params=paths[1], image_path=image, **networks)
    unknown = film(world, tmp_path, "unknown", camera_params=paths[0], **networks)
    assert one.shape == (5, 32, 48, 3)
    assert not torch.equal(one, other)
    assert not torch.equal(one, unknown)
    with pytest.raises(InputError, match='expected pose frame "first"'):  # what the model alone was taught
        film(world, tmp_path, "base", camera_params=paths[0], image_path=image)


def test_only_models_with_an_adapter_can_train_it(world):
    with pytest.raises(InputError, match="--train_control_adapter: expected a model with a camera adapter"):
        world.train("out", train_control_adapter=True)
