"""What the encoders read: the right frames, the right rays, in full precision, for few parameters."""

import pytest
import torch
from torch import Tensor

from core.errors import InputError
from networks.camera_encoders import INJECTIONS, TEMPORAL_STRIDE, CameraEncoder, octaves
from tests.networks.cases import NUM_FRAMES, SIZE, VARIANTS, Clip, make_clip
from wan_ext.configs import get_variant

every_encoder = pytest.mark.parametrize("injection", INJECTIONS)


def make_encoder(injection: str, task: str = "T2V", *, lively: bool = True) -> CameraEncoder:
    generator = torch.Generator().manual_seed(0)
    encoder = INJECTIONS[injection](VARIANTS[task], hidden=32, generator=generator, device="cpu")
    if lively:
        torch.nn.init.normal_(encoder.mlp.last.weight, generator=generator)
    return encoder


def encode(encoder: CameraEncoder, clip: Clip, c2w: Tensor | None = None) -> Tensor:
    return encoder(clip.c2w if c2w is None else c2w, clip.K, clip.height, clip.width)


@every_encoder
@pytest.mark.parametrize("task", VARIANTS)
def test_output_covers_the_tokens(injection: str, task: str) -> None:
    out = encode(make_encoder(injection, task), make_clip(VARIANTS[task]))
    frames, rows, columns = SIZE
    grid = (1, 1) if injection == "bias" else (rows // 2, columns // 2)
    assert out.shape == (2, frames, *grid, 96) and out.dtype == torch.float32


@every_encoder
def test_a_latent_frame_hears_of_its_own_frames_only(injection: str) -> None:
    encoder, clip = make_encoder(injection), make_clip(VARIANTS["T2V"])
    before = encode(encoder, clip)
    for frame in range(NUM_FRAMES):
        moved = clip.c2w.clone()
        moved[:, frame, :3, 3] += 0.1
        changed = (encode(encoder, clip, moved) != before).any(-1).any(-1).any(-1)  # [B, F]
        latent_frame = (frame + 3) // 4  # latent frame k holds frames 4k-3 .. 4k
        expected = torch.arange(SIZE[0]) == latent_frame
        assert torch.equal(changed, expected.expand_as(changed))


def test_bias_reads_the_ten_numbers_of_each_frame() -> None:
    encoder, clip = make_encoder("bias"), make_clip(VARIANTS["T2V"])
    numbers = encoder.numbers(clip.c2w, clip.K, clip.height, clip.width)[:, :, 0, 0]  # [B, F, 10 * 4]
    for latent_frame in range(SIZE[0]):
        for place in range(TEMPORAL_STRIDE):
            frame = max(0, 4 * latent_frame - 3 + place)  # frame 0 four times
            pose, K = clip.c2w[:, frame], clip.K[:, frame]
            fov = 2 * torch.atan(clip.width / 2 / K[:, 0, 0])
            expected = torch.cat([pose[:, :3, 3], pose[:, :3, 0], pose[:, :3, 1], fov[:, None]], -1)
            torch.testing.assert_close(numbers[:, latent_frame, place::4], expected)


@pytest.mark.parametrize("task", VARIANTS)
def test_plucker_reads_the_rays_through_each_token(task: str) -> None:
    encoder, clip = make_encoder("plucker", task), make_clip(VARIANTS[task])
    numbers = encoder.numbers(clip.c2w, clip.K, clip.height, clip.width)  # [B, F, h, w, 96 + 12]
    stride = VARIANTS[task].vae.stride[1]
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
    plain = encoder(c2w, K, clip.height, clip.width)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(c2w, K, clip.height, clip.width), plain)


@every_encoder
def test_an_image_is_a_clip_of_one_frame(injection: str) -> None:
    encoder, clip = make_encoder(injection), make_clip(VARIANTS["T2V"])
    image = encoder(clip.c2w[:, :1], clip.K[:, :1], clip.height, clip.width)
    torch.testing.assert_close(image, encode(encoder, clip)[:, :1])


@every_encoder
def test_recomputing_in_backward_changes_nothing(injection: str) -> None:
    encoder, clip = make_encoder(injection), make_clip(VARIANTS["T2V"])
    with torch.no_grad():
        plain = encode(encoder, clip)
    out = encode(encoder, clip)
    assert torch.equal(out, plain)
    numbers = encoder.numbers(clip.c2w, clip.K, clip.height, clip.width).float().contiguous()
    parameters = list(encoder.parameters())
    found = torch.autograd.grad(out.square().sum(), parameters)
    expected = torch.autograd.grad(encoder.mlp(numbers).square().sum(), parameters)
    assert all(map(torch.equal, found, expected))


def test_octaves_keep_the_number_itself_and_tell_scales_apart() -> None:
    numbers = torch.tensor([[0.3, -50.0]])
    out = octaves(numbers)
    assert torch.equal(out[:, :2], numbers)
    assert out.shape == (1, 2 * 13) and out[:, 2:].abs().max() <= 1


@pytest.mark.parametrize(("injection", "millions"), [("plucker", 3.9), ("bias", 3.4)])
def test_an_encoder_of_the_14b_model_is_small(injection: str, millions: float) -> None:
    encoder = INJECTIONS[injection](get_variant("t2v-A14B"), hidden=512, generator=None, device="cpu")
    assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6, 1) == millions


@every_encoder
def test_a_clip_that_does_not_fit_is_refused(injection: str) -> None:
    encoder, clip = make_encoder(injection), make_clip(VARIANTS["T2V"])
    with pytest.raises(InputError, match=r"expected 4n \+ 1 frames .* found 8"):
        encoder(clip.c2w[:, :8], clip.K[:, :8], clip.height, clip.width)
    with pytest.raises(InputError, match="width: expected a multiple of 16 pixels, found 40"):
        encoder(clip.c2w, clip.K, clip.height, 40)
    with pytest.raises(InputError, match="height: expected a multiple of 16 pixels, found 8"):
        encoder(clip.c2w, clip.K, 8, clip.width)
