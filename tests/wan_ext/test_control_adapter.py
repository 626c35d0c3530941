"""Laws of the camera adapter: the published numbers and names, frame by frame, zero at start but alive."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.errors import InputError
from tests.wan_ext.models import GOLDEN
from wan_ext.control_adapter import FRAMES_AT_ONCE, ControlAdapter, zero_start

SIZE = (32, 48)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(GOLDEN / "fun_camera.safetensors").items()}


@pytest.fixture(scope="module")
def published(golden) -> ControlAdapter:
    """The adapter of the golden file; strict, so that its names are ours."""
    adapter = ControlAdapter(16, 8)
    weights = {name.removeprefix("adapter."): t for name, t in golden.items() if name.startswith("adapter.")}
    adapter.load_state_dict(weights)
    return adapter


def random_rays(frames: int, *, batch: int = 2, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 24, frames, *size, generator=torch.Generator().manual_seed(seed))


def new_adapter(dim: int = 16, downscale: int = 8) -> ControlAdapter:
    adapter = ControlAdapter(dim, downscale)
    zero_start(adapter, torch.Generator().manual_seed(0))
    return adapter


def test_agrees_with_the_published_adapter(golden, published) -> None:
    out = published(golden["folded"])  # [1, F, h, w, D]
    expected = golden["adapter_out"].permute(0, 2, 3, 4, 1)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 1e-4
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize(("dim", "downscale", "count"), [(5120, 8, 503_331_840), (3072, 16, 245_376_000)])
def test_names_and_sizes_of_the_real_models(dim: int, downscale: int, count: int) -> None:
    with torch.device("meta"):
        adapter = ControlAdapter(dim, downscale)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    assert shapes == {
        "conv.weight": (dim, 24 * downscale**2, 2, 2),
        "conv.bias": (dim,),
        "residual_blocks.0.conv1.weight": (dim, dim, 3, 3),
        "residual_blocks.0.conv1.bias": (dim,),
        "residual_blocks.0.conv2.weight": (dim, dim, 3, 3),
        "residual_blocks.0.conv2.bias": (dim,),
    }
    assert sum(math.prod(shape) for shape in shapes.values()) == count


def test_latent_frames_do_not_see_each_other(published) -> None:
    rays = random_rays(2 * FRAMES_AT_ONCE + 1)
    with torch.no_grad():
        together = published(rays)
        alone = torch.cat([published(rays[:, :, [frame]]) for frame in range(rays.shape[2])], 1)
    torch.testing.assert_close(together, alone)


def test_recomputing_in_backward_changes_nothing(published) -> None:
    rays = random_rays(FRAMES_AT_ONCE + 2)
    parameters = list(published.parameters())
    found = torch.autograd.grad(published(rays).square().mean(), parameters)
    expected = torch.autograd.grad(published.convolve(rays).square().mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_adapter_keeps_nothing_for_backward(published) -> None:
    published.requires_grad_(False)
    assert published(random_rays(1)).grad_fn is None
    published.requires_grad_(True)


def test_rays_keep_their_precision_in_a_bf16_model(published) -> None:
    """With conv1 and conv2 silent, the output is the first convolution; autocast and bf16 weights leave it float32."""
    adapter = new_adapter().to(torch.bfloat16)
    adapter.conv.load_state_dict(published.conv.state_dict())
    exact = new_adapter()
    exact.conv.load_state_dict(adapter.conv.state_dict())
    rays = random_rays(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = adapter(rays)
    assert out.dtype == torch.float32
    assert torch.equal(out, exact(rays)) and out.abs().max() > 0.1


def test_zero_at_start_and_alive_by_the_second_step() -> None:
    adapter, rays = new_adapter(), random_rays(3)
    assert not adapter(rays).any()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    alive: list[set[str]] = []
    for _ in range(2):
        optimizer.zero_grad()
        (adapter(rays) - 1).square().mean().backward()
        alive.append({name for name, parameter in adapter.named_parameters() if parameter.grad.any()})
        optimizer.step()
    first = {f"{conv}.{leaf}" for conv in ("conv", "residual_blocks.0.conv2") for leaf in ("weight", "bias")}
    assert alive[0] == first
    assert alive[1] == set(adapter.state_dict())


def test_the_generator_decides_the_start_alone() -> None:
    torch.manual_seed(1)
    one = new_adapter().state_dict()
    torch.manual_seed(2)
    other = new_adapter().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    zero_start(again := ControlAdapter(16, 8), torch.Generator().manual_seed(7))
    assert not torch.equal(again.residual_blocks[0].conv1.weight, one["residual_blocks.0.conv1.weight"])


@pytest.mark.parametrize("shape", [(1, 6, 2, 32, 48), (1, 24, 2, 40, 48), (1, 24, 2, 32, 56)])
def test_rays_that_do_not_fit_are_refused(published, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"rays: expected \[B, 24, F, H, W\] with H and W multiples of 16, found"):
        published(torch.zeros(shape))
