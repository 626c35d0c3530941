"""Networks on Wan-Fun models: their own camera adapter is always heard, and trained only when asked to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import InputError
from core.files import read_safetensors
from networks import lora, lora_camera
from networks.files import load_network, save_network
from networks.mechanisms.adapter import control_rays
from networks.network import Network
from tests.networks.cases import VARIANTS, Clip, disturb, make_clip, make_dit, run, small
from wan_ext.condition import CameraCondition
from wan_ext.configs import WanVariant
from wan_ext.dit import WanDiT

FUN = {
    "fun-camera-A14B": small("fun-camera-A14B", in_dim=36, control_downscale=8),
    "fun-camera-5B": small("fun-camera-5B", in_dim=100, out_dim=48, control_downscale=16),
    "fun-camera-1.3B": small("fun-camera-1.3B", in_dim=32, image_dim=80, control_downscale=8),
}
A14B = FUN["fun-camera-A14B"]
TRAIN = {"train_control_adapter": "yes"}
on_every_model = pytest.mark.parametrize("task", FUN)
on_every_injection = pytest.mark.parametrize("injection", ["plucker", "plucker_light", "film"])


def make_network(dit: WanDiT, variant: WanVariant, pose_frame: str = "first", **network_args: str) -> Network:
    return lora_camera.create_network(
        dit,
        variant=variant,
        expert="low",
        rank=4,
        alpha=2.0,
        network_args=network_args,
        pose_frame=pose_frame,
        generator=torch.Generator().manual_seed(0),
    )


def rays_of(clip: Clip) -> CameraCondition:
    return CameraCondition(rays=control_rays(clip.c2w, clip.K, clip.height, clip.width))


def predict(dit: WanDiT, clip: Clip, camera: CameraCondition | None) -> torch.Tensor:
    with torch.no_grad():
        return dit(clip.inputs.noised, camera=camera, **clip.inputs.keywords())


@on_every_model
def test_the_model_hears_rays_and_does_without(task: str) -> None:
    dit, clip = make_dit(FUN[task]), make_clip(FUN[task])
    without = predict(dit, clip, None)
    heard = predict(dit, clip, rays_of(clip))
    assert (heard - without).abs().max() > 1e-2 * without.abs().max()
    dropped = replace(rays_of(clip), keep=torch.tensor([1.0, 0.0]))
    assert torch.equal(predict(dit, clip, dropped)[1], without[1])
    torch.testing.assert_close(predict(dit, clip, dropped)[0], heard[0])


def test_rays_join_the_tokens_where_the_patches_are() -> None:
    """The adapter's vectors, given as tokens, do the same."""
    dit, clip = make_dit(A14B), make_clip(A14B)
    rays = rays_of(clip).rays
    with torch.no_grad():
        tokens = CameraCondition(tokens=dit.control_adapter(rays))
    assert torch.equal(predict(dit, clip, CameraCondition(rays=rays)), predict(dit, clip, tokens))


def test_rays_that_the_model_cannot_use_are_refused() -> None:
    clip = make_clip(A14B)
    with pytest.raises(InputError, match="expected a model with a camera adapter .Wan-Fun., found one without"):
        plain = VARIANTS["I2V"]
        predict(make_dit(plain), make_clip(plain), rays_of(clip))
    with pytest.raises(InputError, match=r"expected them to cover \(3, 2, 3\) tokens, found \(1, 2, 3\)"):
        predict(make_dit(A14B), clip, CameraCondition(rays=rays_of(clip).rays[:, :, :1]))


@on_every_model
@on_every_injection
def test_a_new_network_leaves_the_model_with_its_camera_as_it_is(task: str, injection: str) -> None:
    dit, clip = make_dit(FUN[task]), make_clip(FUN[task])
    before = predict(dit, clip, rays_of(clip))
    network = make_network(dit, FUN[task], injection=injection, **TRAIN)
    with torch.no_grad():
        assert torch.equal(run(dit, network, clip), before)
        assert not torch.equal(run(dit, network, clip, clip.other_c2w), before)


def test_the_models_own_adapter_is_the_default() -> None:
    assert make_network(make_dit(A14B), A14B).settings.camera.injection == "plucker"


def trained(variant: WanVariant, *, steps: int = 2, **network_args: str) -> tuple[WanDiT, Network, set[str]]:
    """A network after a few steps, and the names of the model's tensors that are not what they were."""
    dit, clip = make_dit(variant), make_clip(variant)
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    network = make_network(dit, variant, **network_args)
    optimizer = torch.optim.AdamW(network.parameter_groups(1e-2))
    for _ in range(steps):
        optimizer.zero_grad()
        (run(dit, network, clip) - clip.inputs.weights).square().mean().backward()
        optimizer.step()
    now = dit.state_dict()
    return dit, network, {name for name, tensor in before.items() if name in now and not torch.equal(now[name], tensor)}


@on_every_model
def test_the_adapter_is_trained_only_when_asked_to(task: str) -> None:
    _, network, changed = trained(FUN[task])
    assert not changed and not network.camera_state()
    assert [group["name"] for group in network.parameter_groups(1.0)] == ["low_lora"]

    dit, network, changed = trained(FUN[task], **TRAIN)
    assert (
        changed
        == {name for name in dit.state_dict() if name.startswith("control_adapter.")}
        == {*network.camera_state()}
    )
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_removing_the_network_brings_the_models_adapter_back() -> None:
    dit, network, _ = trained(A14B, **TRAIN)
    network.remove(dit)
    original = make_dit(A14B).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in dit.state_dict().items())


def test_an_adapter_in_bf16_is_trained_in_float32() -> None:
    dit = make_dit(A14B).to(torch.bfloat16)
    network = make_network(dit, A14B, **TRAIN)
    assert {tensor.dtype for tensor in network.camera_state().values()} == {torch.float32}


@on_every_model
@pytest.mark.parametrize("network_args", [{}, TRAIN, {"injection": "plucker_light"} | TRAIN], ids=str)
def test_a_loaded_network_acts_as_the_saved_one(task: str, network_args: dict, tmp_path: Path) -> None:
    dit, network, _ = trained(FUN[task], **network_args)
    files = save_network(network, tmp_path, "mine", {})
    fresh, clip = make_dit(FUN[task]), make_clip(FUN[task])
    loaded = load_network(fresh, files[0], variant=FUN[task], expert="low")
    with torch.no_grad():
        assert torch.equal(run(fresh, loaded, clip), run(dit, network, clip))
    assert loaded.settings == network.settings
    if not network_args:
        assert len(files) == 1  # nothing of the camera was trained
    else:
        names = read_safetensors(files[1])[0]
        assert {"control_adapter.conv.weight", "control_adapter.residual_blocks.0.conv2.bias"} <= names.keys()


def test_a_new_adapter_saves_under_the_published_names(tmp_path: Path) -> None:
    variant = VARIANTS["I2V"]
    dit = make_dit(variant)
    network = make_network(dit, variant, injection="plucker")
    disturb(network)
    weights, metadata = read_safetensors(save_network(network, tmp_path, "mine", {})[1])
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {
        name: tuple(t.shape) for name, t in make_dit(A14B).state_dict().items() if name.startswith("control_adapter.")
    }
    assert metadata["injection"] == "plucker"


def test_a_lora_of_another_tool_leaves_the_models_camera_in_place() -> None:
    dit, clip = make_dit(A14B), make_clip(A14B)
    expected = predict(dit, clip, rays_of(clip))
    weights = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(2, 96),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(96, 2),
    }
    network = lora.load_network(dit, weights, {}, variant=A14B, expert="low")
    with torch.no_grad():
        assert torch.equal(run(dit, network, clip), expected)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="--train_control_adapter: expected a model with a camera adapter .* i2v-"):
        make_network(make_dit(VARIANTS["I2V"]), VARIANTS["I2V"], **TRAIN)
    with pytest.raises(InputError, match="fun-camera-A14B hears a camera, .* train networks.lora_camera"):
        lora.create_network(make_dit(A14B), variant=A14B, expert="low", rank=4, alpha=2.0, network_args={})


def test_a_path_in_another_length_is_refused() -> None:
    dit, clip = make_dit(A14B), make_clip(A14B)
    network = make_network(dit, A14B)
    with pytest.raises(InputError, match=r"expected 4n \+ 1 frames .* found 8"):
        network.encode_camera(clip.c2w[:, :8], clip.K[:, :8], clip.height, clip.width)


@pytest.mark.parametrize("injection", ["plucker", "plucker_light"])
def test_a_frozen_adapter_is_not_given_poses_of_a_frame_that_it_was_not_taught(injection: str) -> None:
    with pytest.raises(InputError, match='--train_control_adapter, or set pose_frame = "first"'):
        make_network(make_dit(A14B), A14B, pose_frame="scene", injection=injection)
    network = make_network(make_dit(A14B), A14B, pose_frame="scene", injection=injection, **TRAIN)
    assert network.settings.camera is not None and network.settings.camera.pose_frame == "scene"
