"""The full adapter as a camera encoder: the published pipeline from a camera file to tokens, frame by frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from camera.files.formats import read_camera
from camera.rays import fold_frames, plucker_rays
from core.errors import InputError
from networks.mechanisms.adapter import PluckerAdapter, control_rays
from networks.mechanisms.settings import CameraSettings
from tests.networks.cases import NUM_FRAMES, SIZE, VARIANTS, Clip, make_clip
from tests.wan_ext.models import GOLDEN
from wan_ext.control_adapter import FRAMES_AT_ONCE

SETTINGS = CameraSettings(injection="plucker", pose_frame="first")


def lively(task: str = "T2V") -> PluckerAdapter:
    encoder = PluckerAdapter(VARIANTS[task], SETTINGS, torch.Generator().manual_seed(0))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return encoder


def encode(encoder: PluckerAdapter, clip: Clip) -> torch.Tensor:
    return encoder(clip.c2w, clip.K, clip.height, clip.width).tokens


def test_a_camera_file_becomes_the_published_tokens() -> None:
    golden = {name: tensor.float() for name, tensor in load_file(GOLDEN / "fun_camera.safetensors").items()}
    path = read_camera(GOLDEN / "re10k_camera.txt", height=720, width=1280).relative_to_first()
    whole = 32 * 1280 / 720  # columns of the frame at 32 rows, before its sides are cut
    path = path.cropped(resized_height=32, resized_width=whole, top=0, left=(whole - 48) / 2, height=32, width=48)
    c2w, K = path.c2w[None], path.K[None]
    torch.testing.assert_close(control_rays(c2w, K, 32, 48), golden["folded"], atol=1e-5, rtol=0)

    variant = replace(VARIANTS["T2V"], dit=replace(VARIANTS["T2V"].dit, dim=16))
    encoder = PluckerAdapter(variant, SETTINGS, None)
    encoder.load_state_dict({f"control_{name}": t for name, t in golden.items() if name.startswith("adapter.")})
    with torch.no_grad():
        out = encoder(c2w, K, 32, 48).tokens
    assert (out - golden["adapter_out"].permute(0, 2, 3, 4, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("task", VARIANTS)
def test_output_covers_the_tokens(task: str) -> None:
    out = encode(lively(task), make_clip(VARIANTS[task]))
    assert out.shape == (2, SIZE[0], SIZE[1] // 2, SIZE[2] // 2, 96) and out.dtype == torch.float32


def test_rays_of_groups_are_the_folded_rays() -> None:
    clip = make_clip(VARIANTS["T2V"])
    rays = plucker_rays(clip.c2w, clip.K, clip.height, clip.width).transpose(1, 2)  # [B, 6, T, H, W]
    assert torch.equal(control_rays(clip.c2w, clip.K, clip.height, clip.width), fold_frames(rays).float())


def test_a_latent_frame_hears_of_its_own_frames_only() -> None:
    encoder, clip = lively(), make_clip(VARIANTS["T2V"])
    with torch.no_grad():
        before = encode(encoder, clip)
        for frame in range(NUM_FRAMES):
            moved = clip.c2w.clone()
            moved[:, frame, :3, 3] += 0.1
            after = encoder(moved, clip.K, clip.height, clip.width).tokens
            changed = (after != before).any(-1).any(-1).any(-1)  # [B, F]
            assert torch.equal(changed, (torch.arange(SIZE[0]) == (frame + 3) // 4).expand_as(changed))


def test_few_frames_at_a_time_are_all_frames_at_once() -> None:
    """More latent frames than go through together; values and gradients as without recomputing."""
    encoder, clip = lively(), make_clip(VARIANTS["T2V"])
    frames = [abs(i % 16 - 8) for i in range(4 * FRAMES_AT_ONCE + 5)]  # to and fro along the clip
    c2w, K = clip.c2w[:, frames], clip.K[:, frames]
    parameters = list(encoder.parameters())
    out = encoder(c2w, K, clip.height, clip.width).tokens
    plain = encoder.control_adapter.convolve(control_rays(c2w, K, clip.height, clip.width))
    torch.testing.assert_close(out, plain)
    assert out.shape[1] > FRAMES_AT_ONCE
    found = torch.autograd.grad(out.square().mean(), parameters)
    expected = torch.autograd.grad(plain.square().mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_does_not_coarsen_the_camera() -> None:
    encoder, clip = lively(), make_clip(VARIANTS["T2V"])
    c2w, K = clip.c2w.float(), clip.K.float()
    plain = encoder(c2w, K, clip.height, clip.width).tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(c2w, K, clip.height, clip.width).tokens, plain)


def test_a_clip_that_does_not_fit_is_refused() -> None:
    encoder, clip = lively(), make_clip(VARIANTS["T2V"])
    with pytest.raises(InputError, match=r"expected 4n \+ 1 frames .* found 8"):
        encoder(clip.c2w[:, :8], clip.K[:, :8], clip.height, clip.width)
    with pytest.raises(InputError, match="width: expected a multiple of 16 pixels, found 40"):
        encoder(clip.c2w, clip.K, clip.height, 40)
    with pytest.raises(InputError, match="height: expected a multiple of 16 pixels, found 8"):
        encoder(clip.c2w, clip.K, 8, clip.width)
