"""Saved networks come back the same, load in diffusers' own loader, and are refused where they do not belong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from core.errors import InputError
from core.files import read_safetensors, save_safetensors
from networks import lora, lora_camera
from networks.files import load_network, read_network_file, save_network
from networks.network import NetworkSettings, settings_from_metadata
from tests.networks.cases import NETWORKS, VARIANTS, disturb, make_clip, make_dit, make_network, run
from tests.wan_ext.models import random_inputs, run_diffusers, to_diffusers
from wan_ext.configs import WanVariant

T2V = VARIANTS["T2V"]


def save(folder: Path, kind: str = "plucker_light", variant: WanVariant = T2V, name: str = "mine", **changes) -> Path:
    """A disturbed network's LoRA file."""
    network = make_network(make_dit(variant), variant, kind, **changes)
    disturb(network)
    return save_network(network, folder, name, {"prompt": "a room", "ss_seed": "7"})[0]


# ---- round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("task", VARIANTS)
def test_a_loaded_network_acts_as_the_saved_one(kind: str, task: str, tmp_path: Path) -> None:
    variant = VARIANTS[task]
    dit, clip = make_dit(variant), make_clip(variant)
    network = make_network(dit, variant, kind)
    disturb(network)
    path = save_network(network, tmp_path, "mine", {})[0]
    fresh = make_dit(variant)
    loaded = load_network(fresh, path, variant=variant, expert="low")
    with torch.no_grad():
        assert torch.equal(run(fresh, loaded, clip), run(dit, network, clip))
        assert not torch.equal(run(fresh, loaded, clip), run(make_dit(variant), None, clip))
    assert loaded.settings == network.settings
    assert not loaded.training and not any(parameter.requires_grad for parameter in fresh.parameters())


def test_the_multiplier_scales_the_lora(tmp_path: Path) -> None:
    path, clip = save(tmp_path, "lora"), make_clip(T2V)

    def at(multiplier: float) -> torch.Tensor:
        dit = make_dit(T2V)
        network = load_network(dit, path, variant=T2V, expert="low", multiplier=multiplier)
        with torch.no_grad():
            out = run(dit, network, clip)
            network.merge(dit)
            torch.testing.assert_close(run(dit, None, clip), out, rtol=0, atol=1e-4)
        return out

    with torch.no_grad():
        assert torch.equal(at(0.0), run(make_dit(T2V), None, clip))
    assert not torch.allclose(at(0.5), at(1.0))


@pytest.mark.parametrize(
    ("task", "expert", "names"),
    [
        ("T2V", "high", ["mine_high_noise.safetensors", "mine_high_noise_camera.safetensors"]),
        ("T2V", "low", ["mine_low_noise.safetensors", "mine_low_noise_camera.safetensors"]),
        ("TI2V", "low", ["mine.safetensors", "mine_camera.safetensors"]),
    ],
)
def test_file_names_and_their_contents(task: str, expert: str, names: list[str], tmp_path: Path) -> None:
    network = make_network(make_dit(VARIANTS[task]), VARIANTS[task], "plucker_light", expert=expert)
    files = save_network(network, tmp_path, "mine", {"prompt": "a room", "task": "wrong"}, dtype=torch.bfloat16)
    assert [file.name for file in files] == names and sorted(tmp_path.iterdir()) == sorted(files)
    weights, metadata = read_safetensors(files[0])
    camera_weights, camera_metadata = read_safetensors(files[1])
    assert all(name.startswith("diffusion_model.blocks.") for name in weights)
    assert {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 2)[-1] for name in weights if "lora" in name} == {
        "lora_A.weight",
        "lora_B.weight",
    }
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in weights.items() if not name.endswith(".alpha"))
    assert weights["diffusion_model.blocks.0.ffn.0.alpha"].item() == 2.0
    assert all(name.startswith("camera_encoder.") for name in camera_weights)
    expected = {
        "ss_network_module": "networks.lora_camera",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "task": VARIANTS[task].name,
        "expert": expert,
        "injection": "plucker_light",
        "camera_hidden": "64",
        "pose_frame": "scene",
        "scale_rule": "none",
        "prompt": "a room",
        "camera_file": names[1],
        "modelspec.title": "mine",
        "modelspec.architecture": f"wan-{VARIANTS[task].name}/lora",
    }
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["ss_network_args"]) == {"injection": "plucker_light", "camera_hidden": 64}
    assert camera_metadata["lora_file"] == names[0] and camera_metadata["pair_id"] == metadata["pair_id"]
    assert read_network_file(files[0]) == metadata


def test_settings_survive_the_metadata() -> None:
    network = make_network(
        make_dit(T2V),
        T2V,
        network_args={"injection": "bias", "include_patterns": r"[r'attn\.q', 'ffn']", "exclude_patterns": "ffn"},
        dropout=0.1,
        alpha=0.3,
        scale_rule="max_norm",
        pose_frame="first",
    )
    assert settings_from_metadata(network.metadata()) == network.settings
    assert isinstance(network.settings, NetworkSettings) and network.settings.camera.scale_rule == "max_norm"


# ---- other loaders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "expert", "network_args"),
    [
        ("T2V", "high", {}),
        ("T2V", "low", {"include_patterns": "self_attn"}),
        ("T2V", "low", {"include_patterns": r"blocks\.1\.ffn\.2"}),
        ("I2V", "high", {}),
        ("I2V with CLIP", "low", {}),
        ("TI2V", "low", {}),
    ],
)
def test_diffusers_loads_the_file_and_gives_the_same_output(
    task: str, expert: str, network_args: dict[str, str], tmp_path: Path
) -> None:
    variant = VARIANTS[task]
    dit, inputs = make_dit(variant), random_inputs(variant.dit, per_frame=task == "TI2V")
    transformer = to_diffusers(dit)
    network = make_network(dit, variant, "lora", expert=expert, alpha=3.0, network_args=network_args)
    disturb(network)
    path = save_network(network, tmp_path, "mine", {})[0]
    with torch.no_grad():
        ours, plain = dit(inputs.noised, **inputs.keywords()), run_diffusers(transformer, inputs)
        second = expert == "low" and variant.boundary is not None
        pipeline = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=None,
            transformer=to_diffusers(make_dit(variant)) if second else transformer,
            transformer_2=transformer if second else None,
        )
        pipeline.load_lora_weights(str(tmp_path), weight_name=path.name, load_into_transformer_2=second)
        theirs = run_diffusers(transformer, inputs)
    scale = ours.abs().max()
    assert (theirs - ours).abs().max() <= 1e-5 * scale
    assert (plain - ours).abs().max() > 1e-2 * scale


def test_a_lora_of_another_tool_is_taken_with_its_own_ranks(tmp_path: Path) -> None:
    """No metadata, no alpha (which means alpha = rank), a subset of the linears, and two ranks."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(2, 96, generator=generator),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.randn(96, 2, generator=generator),
        "diffusion_model.blocks.1.ffn.0.lora_A.weight": torch.randn(5, 96, generator=generator),
        "diffusion_model.blocks.1.ffn.0.lora_B.weight": torch.randn(160, 5, generator=generator),
    }
    path = tmp_path / "theirs.safetensors"
    save_safetensors(weights, path, {})
    dit, clip = make_dit(T2V), make_clip(T2V)
    network = load_network(dit, path, variant=T2V, expert="high")
    by_hand = make_dit(T2V)
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
        delta = weights[f"diffusion_model.{name}.lora_B.weight"] @ weights[f"diffusion_model.{name}.lora_A.weight"]
        by_hand.get_submodule(name).weight.data += delta
    with torch.no_grad():
        expected = run(by_hand, None, clip)
        torch.testing.assert_close(run(dit, network, clip), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    again = save_network(network, tmp_path, "again", {})[0]
    assert read_safetensors(again)[0].keys() > weights.keys()


# ---- what bad input gets ------------------------------------------------------------------------------------------


def refused(path: Path, message: str, *, variant: WanVariant = T2V, expert: str = "low") -> None:
    """Loading fails with one line that names the file, and the model is as it was."""
    dit = make_dit(variant)
    names = list(dit.state_dict())
    with pytest.raises(InputError, match=message) as caught:
        load_network(dit, path, variant=variant, expert=expert)
    assert path.stem.removesuffix("_camera") in str(caught.value) and "\n" not in str(caught.value)
    assert list(dit.state_dict()) == names


def change(path: Path, weights: dict | None = None, metadata: dict | None = None, drop: str = "nothing") -> None:
    """Rewrite a file with other tensors or metadata."""
    old_weights, old_metadata = read_safetensors(path)
    kept = {name: tensor for name, tensor in old_weights.items() if drop not in name}
    save_safetensors(kept | (weights or {}), path, old_metadata | (metadata or {}))


def test_the_other_experts_file_is_passed_over(tmp_path: Path) -> None:
    dit = make_dit(T2V)
    names = list(dit.state_dict())
    assert load_network(dit, save(tmp_path, expert="high"), variant=T2V, expert="low") is None
    assert list(dit.state_dict()) == names


@pytest.mark.parametrize("module", [lora, lora_camera])
def test_a_network_module_refuses_the_other_expert_and_another_task(module, tmp_path: Path) -> None:
    path = save(tmp_path, "lora" if module is lora else "plucker_light", expert="high")
    weights, metadata = read_safetensors(path)
    with pytest.raises(InputError, match="expected a network of the low-noise expert, found one of the high-noise"):
        module.load_network(make_dit(T2V), weights, metadata, variant=T2V, expert="low")
    with pytest.raises(InputError, match="expected a network of task t2v-1.3B, found one of task t2v-A14B"):
        variant = replace(T2V, name="t2v-1.3B")
        module.load_network(make_dit(T2V), weights, metadata, variant=variant, expert="low")


def test_a_network_of_another_task_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    refused(path, "expected a network of task i2v-A14B, found one of task t2v-A14B", variant=VARIANTS["I2V"])


@pytest.mark.parametrize("kind", ["lora", "plucker_light"])
def test_a_lora_of_another_model_is_refused(kind: str, tmp_path: Path) -> None:
    wider = replace(T2V, dit=replace(T2V.dit, dim=128))
    path = save(tmp_path, kind, wider)
    refused(path, r"blocks.0.self_attn.q: expected .*\[rank, 96\].* found \[4, 128\].*another model")
    deeper = replace(T2V, dit=replace(T2V.dit, num_layers=3))
    path = save(tmp_path, kind, deeper, name="deeper")
    refused(path, "one of another: the model has no linear blocks.2.cross_attn.k, .*it has 20, up to blocks.1.ffn.2")
    shallower = replace(T2V, dit=replace(T2V.dit, num_layers=1))
    path = save(tmp_path, kind, shallower, name="shallower")
    refused(path, "expected the 60 weights of this network, found 30: diffusion_model.blocks.1.* missing")


@pytest.mark.parametrize("kind", ["lora", "plucker_light"])
def test_missing_and_unexpected_weights_are_refused(kind: str, tmp_path: Path) -> None:
    for drop, message in (
        ("blocks.0.ffn.0.lora_B", "blocks.0.ffn.0: expected lora_A.weight and lora_B.weight, found no lora_B.weight"),
        ("blocks.0.ffn.0", "blocks.0.ffn.0.alpha, .* missing"),
        ("", "expected keys diffusion_model.<linear>.lora_A.weight, found no tensor"),
    ):
        path = save(tmp_path, kind)
        change(path, drop=drop)
        refused(path, message)
    for name, message in (
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.* unexpected key"),
        ("diffusion_model.blocks.0.norm3.diff", "norm3.diff: unexpected key"),
        ("diffusion_model.head.head.lora_A.weight", "has no linear head.head"),
        ("diffusion_model.blocks.0.ffn.0.alpha", "ffn.0.alpha: expected one number above 0"),
        ("diffusion_model.blocks.0.ffn.0.lora_B.weight", r"expected .*\[160, rank\] of this model, found .*\[4, 96\]"),
    ):
        path = save(tmp_path, kind)
        change(path, {name: torch.zeros(4, 96)})
        refused(path, message)


def test_the_camera_file_must_be_there_whole_and_of_the_same_save(tmp_path: Path) -> None:
    path = save(tmp_path)
    camera = tmp_path / "mine_low_noise_camera.safetensors"
    refused(camera, "expected a LoRA file, found the camera encoder that belongs to mine_low_noise.safetensors")

    whole = camera.read_bytes()
    change(camera, drop="mlp.second.bias")
    refused(path, "camera_encoder.mlp.second.bias missing")
    change(camera, {"camera_encoder.mlp.second.bias": torch.zeros(65)})
    refused(path, r"camera_encoder.mlp.second.bias: expected shape \[64\], found \[65\]")
    camera.write_bytes(whole[: len(whole) // 2])
    refused(path, "expected a whole safetensors file")
    camera.unlink()
    refused(path, "expected its camera encoder beside it in mine_low_noise_camera.safetensors, found none")

    other = save(tmp_path / "other", seed=9)
    (other.parent / camera.name).rename(camera)
    refused(path, "found that of another save")


def test_a_broken_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    refused(path, "expected a whole safetensors file")
    refused(tmp_path / "none.safetensors", "found nothing")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"ss_network_module": "networks.loha"},
            "expected networks.lora or networks.lora_camera, found 'networks.loha'",
        ),
        ({"injection": "flim"}, r"expected injection plucker, .*found flim .did you mean .film"),
        ({"ss_network_dim": "four"}, "metadata: .* cannot read .*four"),
        ({"ss_network_dim": "8"}, r"lora_[AB].weight: expected shape"),
    ],
)
def test_metadata_that_say_something_else_are_refused(metadata: dict, message: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    change(path, metadata=metadata)
    refused(path, message)
