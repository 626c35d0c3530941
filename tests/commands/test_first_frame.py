"""Image-to-video through all commands: the first frame as condition channels (I2V), or as clean latents (TI2V)."""

from dataclasses import replace

import pytest
import torch

import generate
from core.errors import InputError
from core.files import read_safetensors
from dataset.video import read_frames, write_frames
from wan_ext.configs import VARIANTS
from wan_ext.dit import WanDiT, init_weights
from wan_ext.loading import save_dit

TASKS = {"tiny-i2v": ("channels", 36), "tiny-ti2v": ("first_frame", 16)}


@pytest.fixture(params=TASKS)
def task(request, world, tmp_path, monkeypatch):
    """A task whose experts have random weights; its name. The world's TOML names it."""
    conditioning, in_dim = TASKS[request.param]
    dit = replace(VARIANTS["tiny"].dit, in_dim=in_dim, num_layers=2)
    variant = replace(VARIANTS["tiny"], name=request.param, dit=dit, image_conditioning=conditioning)
    monkeypatch.setitem(VARIANTS, variant.name, variant)
    generator = torch.Generator().manual_seed(0)
    for expert in variant.experts:
        model = WanDiT(dit)
        init_weights(model, generator)
        torch.nn.init.normal_(model.head.head.weight, std=0.02, generator=generator)
        save_dit(model, tmp_path / f"{expert}_noise_model")
    model_files = f'task = "{variant.name}"\ndit = "{tmp_path}/low_noise_model"\n'
    model_files += f'dit_high_noise = "{tmp_path}/high_noise_model"'
    world.toml.write_text(world.toml.read_text().replace('task = "tiny"', model_files))
    return variant.name


def test_first_frame_reaches_cache_training_and_video(task, world, tmp_path):
    if task == "tiny-i2v":
        with pytest.raises(InputError, match="cache_latents.py"):
            world.train("early")  # caches of a text-to-video task have no condition
    world.cache(skip_existing=True)
    latents, _ = read_safetensors(next(f for f in world.cache_files if "latents" in f.name))
    if task == "tiny-i2v":
        condition = latents["condition"]
        assert condition.shape == (20, 2, 4, 6)
        assert condition[:4, 0].eq(1).all()
        assert condition[:4, 1].eq(0).all()
    weights = world.train("out", max_train_steps=3)

    videos = []
    for shade in (40, 200):
        (image,) = write_frames(torch.full((1, 48, 48, 3), shade, dtype=torch.uint8), tmp_path / f"{shade}_%d.png")
        options = generate.Options(
            dataset_config=world.toml,
            network_weights=tuple(weights.glob("net_*_noise.safetensors")),
            image_path=image,
            mixed_precision="no",
            infer_steps=2,
            device="cpu",
            save_path=tmp_path / f"{shade}.mp4",
        )
        generate.main(options)
        videos.append(read_frames(options.save_path).float())
    assert videos[0].shape == (5, 32, 48, 3)
    assert not torch.equal(videos[0], videos[1])
    if task == "tiny-ti2v":  # the first latent frame is the image's own
        for video, shade in zip(videos, (40, 200), strict=True):
            assert (video[0] - shade).abs().mean() < 25


def test_without_an_image_i2v_refuses_and_ti2v_films_from_text(task, world, tmp_path):
    options = generate.Options(
        dataset_config=world.toml,
        prompt="a room",
        video_size=(32, 48),
        video_length=5,
        infer_steps=1,
        device="cpu",
        save_path=tmp_path / "a.mp4",
    )
    if task == "tiny-i2v":
        with pytest.raises(InputError, match="--image_path"):
            generate.main(options)
    else:
        generate.main(options)
        assert read_frames(options.save_path).shape == (5, 32, 48, 3)
