"""Our names are the libraries' names: each map against the converter or the model that it maps to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from tests.wan_ext.models import CONFIGS, diffusers_names, to_diffusers
from wan_ext.configs import CLIP_VIT_H, UMT5_XXL, VAE_2_1
from wan_ext.dit import WanDiT
from wan_ext.image_encoder import build_image_encoder
from wan_ext.key_maps import clip_native_name, dit_diffusers_name, umt5_native_name, vae_native_name
from wan_ext.text_encoder import build_text_encoder
from wan_ext.vae import build_vae


@pytest.mark.parametrize("name", CONFIGS)
def test_dit_names_are_those_of_diffusers(name):
    dit = WanDiT(CONFIGS[name])
    ours = {dit_diffusers_name(key): tensor for key, tensor in dit.state_dict().items()}
    theirs = diffusers_names(dit.state_dict())
    assert ours.keys() == theirs.keys() == to_diffusers(dit).state_dict().keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("num_res_blocks", [1, 2])
def test_vae_names_are_those_of_diffusers(num_res_blocks):
    config = replace(VAE_2_1, base_dim=4, num_res_blocks=num_res_blocks)
    tensors = build_vae(config).state_dict()
    native = {vae_native_name(key, num_res_blocks=num_res_blocks, is_residual=False): t for key, t in tensors.items()}
    assert len(native) == len(tensors)
    numbers = {int(key.split(".")[2]) for key in native if key.startswith("decoder.upsamples.")}
    assert numbers == set(range(4 * (num_res_blocks + 1) + 3))  # blocks of four stages, a resampler between each two
    if num_res_blocks == 2:  # the converter knows no other depth
        again = convert_wan_vae_to_diffusers(dict(native))
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_encoders_have_as_many_native_names_as_the_published_files():
    with torch.device("meta"):
        umt5 = {umt5_native_name(key) for key, _ in build_text_encoder(UMT5_XXL).named_parameters()}
        clip = {clip_native_name(key) for key, _ in build_image_encoder(CLIP_VIT_H).named_parameters()}
    assert len(umt5) == 2 + 24 * 10
    assert all(key.startswith(("blocks.", "norm.", "token_embedding.")) for key in umt5)
    assert len(clip) == 3 + 4 + 32 * 12  # q, k and v are one tensor there
    assert all(key.startswith("visual.") for key in clip)
