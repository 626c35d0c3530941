"""What the encoders read: the right frames, the right rays, in full precision, for few parameters."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from core.errors import InputError
from networks.mechanisms.features import (
    TEMPORAL_STRIDE,
    CameraEncoder,
    FeatureMLP,
    frame_numbers,
    live_linear,
    octaves,
    ray_numbers,
)
from networks.mechanisms.registry import INJECTIONS, build_camera
from networks.mechanisms.settings import CameraSettings
from tests.networks.cases import NUM_FRAMES, SIZE, VARIANTS, Clip, make_clip
from wan_ext.condition import CameraCondition
from wan_ext.configs import get_variant

WIDTHS = {"hidden": 32, "rank": 32, "blocks": (0, 1), "absolute": True}
every_encoder = pytest.mark.parametrize("injection", INJECTIONS)


def settings_of(injection: str, **changes: object) -> CameraSettings:
    """Small settings of a mechanism."""
    defaults = INJECTIONS[injection].defaults
    used = {
        "hidden": defaults.hidden is not None,
        "rank": defaults.rank is not None,
        "blocks": defaults.in_blocks,
        "absolute": defaults.absolute,
    }
    given = {name: value for name, value in WIDTHS.items() if used[name]}
    return CameraSettings(injection=injection, pose_frame="scene", **(given | changes))  # type: ignore[arg-type]


def make_encoder(injection: str, task: str = "T2V") -> CameraEncoder:
    """An encoder in which every parameter matters."""
    generator = torch.Generator().manual_seed(0)
    encoder, _ = build_camera(settings_of(injection), VARIANTS[task], generator=generator, device="cpu")
    for parameter in encoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return encoder


def encode(encoder: CameraEncoder, clip: Clip, c2w: Tensor | None = None) -> CameraCondition:
    return encoder(clip.c2w if c2w is None else c2w, clip.K, clip.height, clip.width)


def parts(condition: CameraCondition) -> dict[str, Tensor]:
    """What a condition holds, frames on axis 1."""
    found = {field.name: getattr(condition, field.name) for field in fields(condition)}
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    return {name: tensor.transpose(1, 2) if name == "latents" else tensor for name, tensor in found.items()}


@every_encoder
@pytest.mark.parametrize("task", VARIANTS)
def test_what_the_model_is_told_covers_its_frames_tokens_or_channels(injection: str, task: str) -> None:
    condition = encode(make_encoder(injection, task), make_clip(VARIANTS[task]))
    frames, rows, columns = SIZE
    dim, channels = VARIANTS[task].dit.dim, VARIANTS[task].vae.z_dim
    tokens = (2, frames, rows // 2, columns // 2)
    expected = {
        "plucker": {"tokens": (*tokens, dim)},
        "plucker_light": {"tokens": (*tokens, dim)},
        "bias": {"tokens": (2, frames, 1, 1, dim)},
        "latent_bias": {"latents": (2, frames, channels, 1, 1)},
        "film": {"features": (2, frames, 1, 1, 32)},
        "self_attention": {"features": (2, frames, 1, 1, 32)},
        "cross_attention": {"features": (2, frames, 1, 1, 8, 32)},
        "ray_attention": {"tokens": (*tokens, dim), "features": (*tokens, 2, 4, 4, 4)},
    }[injection]
    assert {name: tuple(tensor.shape) for name, tensor in parts(condition).items()} == expected
    assert all(tensor.dtype == torch.float32 for tensor in parts(condition).values())


@every_encoder
def test_a_latent_frame_hears_of_its_own_frames_only(injection: str) -> None:
    encoder, clip = make_encoder(injection), make_clip(VARIANTS["T2V"])
    before = parts(encode(encoder, clip))
    for frame in range(1, NUM_FRAMES):  # the first is where relative transforms are seen from
        moved = clip.c2w.clone()
        moved[:, frame, :3, 3] += 0.1
        for name, after in parts(encode(encoder, clip, moved)).items():
            changed = (after != before[name]).flatten(2).any(-1)  # [B, F]
            latent_frame = (frame + 3) // 4  # latent frame k holds frames 4k-3 .. 4k
            assert torch.equal(changed, (torch.arange(SIZE[0]) == latent_frame).expand_as(changed))


def test_frame_numbers_are_the_ten_of_each_frame() -> None:
    clip = make_clip(VARIANTS["T2V"])
    numbers = frame_numbers(clip.c2w, clip.K, clip.width)[:, :, 0, 0]  # [B, F, 10 * 4]
    for latent_frame in range(SIZE[0]):
        for place in range(TEMPORAL_STRIDE):
            frame = max(0, 4 * latent_frame - 3 + place)  # frame 0 four times
            pose, K = clip.c2w[:, frame], clip.K[:, frame]
            fov = 2 * torch.atan(clip.width / 2 / K[:, 0, 0])
            expected = torch.cat([pose[:, :3, 3], pose[:, :3, 0], pose[:, :3, 1], fov[:, None]], -1)
            torch.testing.assert_close(numbers[:, latent_frame, place::4], expected)


@pytest.mark.parametrize("task", VARIANTS)
def test_ray_numbers_are_the_rays_through_each_token(task: str) -> None:
    variant, clip = VARIANTS[task], make_clip(VARIANTS[task])
    numbers = ray_numbers(
        clip.c2w, clip.K, clip.height, clip.width, stride=variant.vae.stride, patch_size=variant.dit.patch_size
    )  # [B, F, h, w, 96 + 12]
    stride = variant.vae.stride[1]
    latent_frame, row, column, place = 2, 1, 2, 3
    frame = 4 * latent_frame - 3 + place
    pose, K = clip.c2w[:, frame], clip.K[:, frame]
    token = numbers[:, latent_frame, row, column]
    lines = token[:, :96].unflatten(-1, (6, 4, 2, 2))[:, :, place]  # [B, 6, 2, 2]
    for i in range(2):
        for j in range(2):
            x, y = stride * (2 * column + j + 0.5), stride * (2 * row + i + 0.5)  # centre of a latent pixel, in pixels
            pixel = torch.tensor([x, y, 1.0], dtype=K.dtype)
            direction = (pose[:, :3, :3] @ (torch.linalg.inv(K) @ pixel)[..., None])[..., 0]
            direction = direction / direction.norm(dim=-1, keepdim=True)
            moment = torch.linalg.cross(pose[:, :3, 3], direction)
            torch.testing.assert_close(lines[:, :, i, j], torch.cat([moment, direction], -1))
    torch.testing.assert_close(token[:, 96 + place :: 4], pose[:, :3, 3])


@every_encoder
def test_autocast_does_not_coarsen_the_camera(injection: str) -> None:
    encoder, clip = make_encoder(injection), make_clip(VARIANTS["T2V"])
    c2w, K = clip.c2w.float(), clip.K.float()  # autocast leaves float64 alone
    plain = parts(encoder(c2w, K, clip.height, clip.width))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = parts(encoder(c2w, K, clip.height, clip.width))
    assert all(torch.equal(coarse[name], plain[name]) for name in plain)


@every_encoder
def test_an_image_is_a_clip_of_one_frame(injection: str) -> None:
    encoder, clip = make_encoder(injection), make_clip(VARIANTS["T2V"])
    image = parts(encoder(clip.c2w[:, :1], clip.K[:, :1], clip.height, clip.width))
    whole = parts(encode(encoder, clip))
    for name in whole:
        torch.testing.assert_close(image[name], whole[name][:, :1])


def test_recomputing_in_backward_changes_nothing() -> None:
    mlp = FeatureMLP(3, 32, 16, zero_start=False, generator=torch.Generator().manual_seed(0))
    numbers = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = mlp(numbers)
    out, kept = mlp(numbers), mlp.compute(numbers)
    assert torch.equal(out, plain) and torch.equal(kept, plain)
    found, expected = (torch.autograd.grad(y.square().sum(), list(mlp.parameters())) for y in (out, kept))
    assert all(map(torch.equal, found, expected))


def test_backward_keeps_the_numbers_and_nothing_of_the_layers() -> None:
    mlp = FeatureMLP(3, 32, 16, zero_start=False, generator=torch.Generator().manual_seed(0))
    numbers = torch.randn(2, 500, 3)

    def kept_bytes(compute) -> int:
        """Of activations: tensors that are no parameters."""
        own, kept = {parameter.data_ptr() for parameter in mlp.parameters()}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
            compute(numbers)
        return sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in own)

    assert kept_bytes(mlp) <= numbers.nbytes < kept_bytes(mlp.compute) / 10


def test_the_hidden_layer_is_added_to_what_it_reads() -> None:
    mlp = FeatureMLP(3, 32, 16, zero_start=False, generator=torch.Generator().manual_seed(0))
    numbers = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.zeros_(mlp.third.weight)
    torch.testing.assert_close(mlp(numbers), mlp.last(torch.nn.functional.silu(mlp.first(octaves(numbers)))))


def test_octaves_are_the_number_and_its_waves_from_a_quarter_to_eight() -> None:
    numbers = torch.tensor([[0.3, -50.0]], dtype=torch.float64)
    out = octaves(numbers)
    waves = [wave(numbers * factor) for factor in (0.25, 0.5, 1, 2, 4, 8) for wave in (torch.sin, torch.cos)]
    torch.testing.assert_close(out, torch.cat([numbers, *waves], -1))


def test_a_live_linear_keeps_the_variance_of_its_input() -> None:
    linear = live_linear(400, 300, torch.Generator().manual_seed(0))
    out = linear(torch.randn(200, 400, generator=torch.Generator().manual_seed(1)))
    assert abs(out.std() - 1) < 0.05 and not linear.bias.any()


@pytest.mark.parametrize(("injection", "millions"), [("plucker_light", 3.9), ("bias", 3.4)])
def test_an_encoder_of_the_14b_model_is_small(injection: str, millions: float) -> None:
    settings = settings_of(injection, hidden=512)
    encoder, branches = build_camera(settings, get_variant("t2v-A14B"), generator=None, device="cpu")
    assert not branches and round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6, 1) == millions


@every_encoder
def test_a_clip_that_does_not_fit_is_refused(injection: str) -> None:
    encoder, clip = make_encoder(injection), make_clip(VARIANTS["T2V"])
    for frames in (2, 3, 4, 6, 8):
        with pytest.raises(InputError, match=rf"expected 4n \+ 1 frames .* found {frames}"):
            encoder(clip.c2w[:, :frames], clip.K[:, :frames], clip.height, clip.width)
    with pytest.raises(InputError, match="width: expected a multiple of 16 pixels, found 40"):
        encoder(clip.c2w, clip.K, clip.height, 40)
    with pytest.raises(InputError, match="height: expected a multiple of 16 pixels, found 8"):
        encoder(clip.c2w, clip.K, 8, clip.width)
