"""Laws of the condition channels: one frame in the layout of each kind of model, and nothing where none is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan_ext.condition import encode_first_frame, first_frame_condition, first_frame_video, no_first_frame
from wan_ext.configs import VARIANTS, get_variant

FRAMES, HEIGHT, WIDTH = 9, 64, 96
WITH_CONDITION = [name for name, variant in VARIANTS.items() if variant.dit.condition_channels]


def encoder_of(task: str):
    """Stands for a VAE: causal, and linear in each pixel block. [1, 3, T, 8H, 8W] -> [1, C, F, H, W]"""
    _, stride_h, stride_w = get_variant(task).vae.stride
    weights = torch.randn(get_variant(task).vae.z_dim, 3, generator=torch.Generator().manual_seed(0))

    def encode(video: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, stride_h, stride_w))
        return torch.einsum("oc,bcfhw->bofhw", weights, small)

    return encode


def test_the_models_with_a_condition_are_those_of_the_table() -> None:
    channels = {name: get_variant(name).dit.condition_channels for name in WITH_CONDITION}
    assert channels == {
        "i2v-A14B": 20,
        "i2v-14B": 20,
        "tiny-i2v": 20,
        "fun-camera-A14B": 20,
        "fun-camera-5B": 52,
        "fun-camera-1.3B": 16,
        "fun-camera-14B": 16,
    }


@pytest.mark.parametrize("task", WITH_CONDITION)
def test_one_frame_in_the_layout_of_each_model(task: str) -> None:
    variant, encode = get_variant(task), encoder_of(task)
    frame = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    condition = encode_first_frame(encode, frame, FRAMES, variant)
    _, stride_h, stride_w = variant.vae.stride
    assert condition.shape == (variant.dit.condition_channels, 3, HEIGHT // stride_h, WIDTH // stride_w)
    latents = condition[-variant.vae.z_dim :]
    torch.testing.assert_close(latents[:, 0], encode(frame[None, :, None])[0, :, 0])
    if variant.dit.condition_channels > variant.vae.z_dim:
        mask = condition[: -variant.vae.z_dim]
        assert mask.shape[0] == 4 and mask[:, 0].eq(1).all() and not mask[:, 1:].any()
        assert torch.equal(condition, first_frame_condition(encode(first_frame_video(frame, FRAMES)[None])[0]))
    else:
        assert not latents[:, 1:].any()  # zero latents, not those of a grey picture


@pytest.mark.parametrize("task", [name for name in WITH_CONDITION if get_variant(name).hears_camera])
def test_without_a_frame_all_is_zero_in_the_same_layout(task: str) -> None:
    variant = get_variant(task)
    assert not variant.needs_first_frame
    condition, image_context = no_first_frame(variant, HEIGHT, WIDTH, FRAMES, torch.device("cpu"))
    known = encode_first_frame(encoder_of(task), torch.zeros(3, HEIGHT, WIDTH), FRAMES, variant)
    assert condition.shape == (1, *known.shape) and not condition.any()
    assert (image_context is None) == (variant.image_encoder is None)
    if image_context is not None:
        assert image_context.shape == (1, 257, 1280) and not image_context.any()


def test_which_models_cannot_do_without_a_frame() -> None:
    assert {name for name, variant in VARIANTS.items() if variant.needs_first_frame} == {
        "i2v-A14B",
        "i2v-14B",
        "tiny-i2v",
    }
    keeping = {name for name, variant in VARIANTS.items() if variant.keeps_first_frame}
    assert keeping == {"ti2v-5B", "fun-camera-5B"}
