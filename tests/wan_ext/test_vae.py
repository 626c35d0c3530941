"""Laws of the autoencoder: parity with the official one, every file format the same weights, sizes that fit or fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_ext.vae
from core.errors import InputError
from core.files import read_safetensors
from wan_ext.configs import VAE_2_1, VAE_2_2, VAEConfig
from wan_ext.key_maps import vae_native_name
from wan_ext.vae import WanVAE, build_vae, load_vae, save_vae_native

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = 5e-5


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], VAEConfig]:
    """Vectors, native weights and configuration of a golden file."""
    tensors, metadata = read_safetensors(GOLDEN / f"{name}.safetensors")
    found = json.loads(metadata["config"])
    config = replace(
        VAE_2_1 if name == "vae21" else VAE_2_2,
        base_dim=found["dim"],
        decoder_base_dim=found.get("dec_dim"),
        latents_mean=tuple(tensors["latents_mean"].tolist()),
        latents_std=tuple(tensors["latents_std"].tolist()),
    )
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    return tensors, weights, config


@pytest.fixture(params=["vae21", "vae22"])
def case(request, tmp_path):
    tensors, weights, config = golden(request.param)
    path = tmp_path / "vae.safetensors"
    save_file(weights, path)
    return tensors, weights, config, path


@pytest.mark.parametrize("at_once", [True, False])
def test_agrees_with_the_official_vae(case, at_once, monkeypatch):
    """Small clips are run at once, large ones in chunks."""
    monkeypatch.setattr(wan_ext.vae, "WHOLE_CLIP_BYTES", 2**30 if at_once else 0)
    tensors, _, config, path = case
    vae = load_vae(path, config)
    latents = vae.encode(tensors["video"])
    assert (latents - tensors["latents"]).abs().max() <= TOLERANCE
    decoded = tensors["decoded"].clamp(-1, 1)  # the official network leaves the clamping to its wrapper
    assert (vae.decode(tensors["latents"]) - decoded).abs().max() <= TOLERANCE


@pytest.mark.parametrize("at_once", [True, False])
def test_bytes_are_encoded_as_their_values(case, at_once, monkeypatch):
    """And in chunks as diffusers walks through them, an image too."""
    monkeypatch.setattr(wan_ext.vae, "WHOLE_CLIP_BYTES", 2**30 if at_once else 0)
    tensors, _, config, path = case
    vae = load_vae(path, config)
    video = ((tensors["video"].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for part in (video, video[:, :, :1]):
        values = part.float() / 127.5 - 1
        latents = vae.encode(part)
        assert torch.equal(latents, vae.encode(values))
        plain = vae.network.encode(values).latent_dist.mean
        mean, std = (torch.tensor(v)[:, None, None, None] for v in (config.latents_mean, config.latents_std))
        assert (latents - (plain - mean) / std).abs().max() <= TOLERANCE


@pytest.mark.parametrize("config", [VAE_2_1, VAE_2_2], ids=lambda c: c.name)
def test_native_names_are_as_many_as_the_tensors_of_the_real_vae(config):
    with torch.device("meta"):
        names = list(build_vae(config).state_dict())
    native = {
        vae_native_name(name, num_res_blocks=config.num_res_blocks, is_residual=config.is_residual) for name in names
    }
    assert len(native) == len(names)
    _, weights, _ = golden("vae21" if config is VAE_2_1 else "vae22")
    assert native == set(weights)


def test_every_format_holds_the_same_weights(case, tmp_path):
    _, weights, config, path = case
    reference = load_vae(path, config).network.state_dict()
    torch.save(weights, tmp_path / "vae.pth")
    folder = tmp_path / "vae"
    folder.mkdir()
    save_file(reference, folder / "diffusion_pytorch_model.safetensors")  # diffusers' names
    for other in (tmp_path / "vae.pth", folder):
        loaded = load_vae(other, config).network.state_dict()
        assert loaded.keys() == reference.keys()
        assert all(torch.equal(loaded[name], reference[name]) for name in reference)


def test_what_is_saved_is_the_native_file(case, tmp_path):
    _, weights, config, path = case
    save_vae_native(load_vae(path, config), tmp_path / "again.safetensors", dtype=torch.bfloat16)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_one_clip_of_a_batch_is_that_clip_alone():
    torch.manual_seed(0)
    _, _, config = golden("vae21")
    vae = WanVAE(build_vae(config), config)
    video = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    both = vae.encode(video)
    assert both.shape == (2, 16, 2, 2, 3)
    assert torch.allclose(both[1:], vae.encode(video[1:]), atol=1e-5)
    assert vae.decode(both).shape == video.shape


def test_decoded_video_is_clamped():
    torch.manual_seed(0)
    _, _, config = golden("vae21")
    vae = WanVAE(build_vae(config), config)
    video = vae.decode(1e3 * torch.randn(1, 16, 1, 2, 2))
    assert video.abs().max() <= 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((6, 16, 16), r"found 6; use 5 or 9"),
        ((0, 16, 16), r"found 0"),
        ((5, 20, 16), r"multiples of 8 and 8 .* 20x16"),
        ((5, 16, 12), r"16x12"),
    ],
)
def test_sizes_off_the_grid_are_refused(size, message):
    _, _, config = golden("vae21")
    vae = WanVAE(build_vae(config), config)
    with pytest.raises(InputError, match=message):
        vae.encode(torch.zeros(1, 3, *size))


def test_latents_of_another_vae_are_refused():
    _, _, config = golden("vae21")
    vae = WanVAE(build_vae(config), config)
    with pytest.raises(InputError, match="expected 16 channels .* found 48"):
        vae.decode(torch.zeros(1, 48, 1, 2, 2))


def test_the_other_vae_is_named(tmp_path):
    _, weights, _ = golden("vae22")
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=r"wrong\.safetensors: expected the wan2\.1 VAE .* found the Wan2\.2 VAE"):
        load_vae(tmp_path / "wrong.safetensors", VAE_2_1)


def test_missing_and_unexpected_tensors_are_one_error(tmp_path):
    _, weights, config = golden("vae21")
    del weights["decoder.conv1.bias"]
    weights["decoder.extra.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match=r"1 tensors missing \(decoder\.conv1\.bias\); 1 .*\(decoder\.extra\.weight\)"):
        load_vae(tmp_path / "vae.safetensors", config)
