"""Exported files compute what the network computes, in the shapes that ComfyUI recognises, through little memory."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import InputError
from core.files import read_safetensors, save_safetensors
from networks.export import (
    Entry,
    check_exportable,
    comfyui_channels,
    comfyui_lora,
    diffusers_lora,
    merge_adapter,
    write_streaming,
)
from networks.files import load_network, save_network
from tests.networks.cases import VARIANTS, disturb, make_clip, make_dit, make_network, run, small
from tests.networks.test_base_adapter import rays_of
from tests.wan_ext.models import diffusers_names, random_inputs, run_diffusers, to_diffusers
from tests.wan_ext.test_loading import scaled_fp8, write_shards
from wan_ext.condition import CameraCondition
from wan_ext.configs import VARIANTS as REAL
from wan_ext.configs import WanVariant
from wan_ext.dit import WanDiT
from wan_ext.loading import load_dit
from wan_ext.tensor_files import SafetensorsFile

FUN = small("fun-camera-A14B", in_dim=36, control_downscale=8)
BASES = {"T2V": VARIANTS["T2V"], "I2V": VARIANTS["I2V"], "Wan-Fun": FUN}


def with_adapter(variant: WanVariant) -> tuple[WanDiT, dict[str, Tensor]]:
    """A base and a trained camera adapter for it."""
    dit = make_dit(variant)
    lively = make_dit(FUN, seed=7).state_dict()
    return dit, {name: tensor for name, tensor in lively.items() if name.startswith("control_adapter.")}


def exported(weights: dict[str, Tensor], adapter: dict[str, Tensor], variant: WanVariant, folder: Path) -> Path:
    save_file(weights, folder / "base.safetensors")
    merge_adapter(folder / "base.safetensors", adapter, folder / "out.safetensors", variant=variant, metadata={})
    return folder / "out.safetensors"


# ---- the base with the adapter in it --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", BASES)
def test_the_merged_base_computes_what_base_and_adapter_do(task: str, tmp_path: Path) -> None:
    variant = BASES[task]
    dit, adapter = with_adapter(variant)
    merged = load_dit(exported(dit.state_dict(), adapter, variant, tmp_path), FUN, dtype=torch.float32)
    clip, base_clip = make_clip(FUN), make_clip(variant)
    rays = rays_of(clip).rays
    with torch.no_grad():
        inner = make_dit(FUN)
        inner.control_adapter.load_state_dict({n.removeprefix("control_adapter."): t for n, t in adapter.items()})
        if dit.control_adapter is not None:
            dit.control_adapter = inner.control_adapter
            expected = dit(base_clip.inputs.noised, camera=CameraCondition(rays=rays), **base_clip.inputs.keywords())
        else:
            tokens = CameraCondition(tokens=inner.control_adapter(rays))
            expected = dit(base_clip.inputs.noised, camera=tokens, **base_clip.inputs.keywords())
        keywords = clip.inputs.keywords() | {"context": base_clip.inputs.context}
        if task != "T2V":
            keywords["condition"] = base_clip.inputs.condition  # of a T2V base any condition gives the same
        found = merged(base_clip.inputs.noised, camera=CameraCondition(rays=rays), **keywords)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("layout", ["shards", "pth", "comfyui", "diffusers"])
def test_every_layout_of_a_base_gives_the_same_file(layout: str, tmp_path: Path) -> None:
    variant = VARIANTS["I2V"]
    dit, adapter = with_adapter(variant)
    weights = dit.state_dict()
    expected = load_file(exported(weights, adapter, variant, tmp_path))
    base, prefix = tmp_path / layout, ""
    if layout == "shards":
        write_shards(weights, base)
    elif layout == "pth":
        torch.save(weights, base := tmp_path / "base.pth")
    elif layout == "comfyui":
        prefix = "model.diffusion_model."
        save_file({prefix + name: tensor for name, tensor in weights.items()}, base)
    else:
        base.mkdir()
        save_file(diffusers_names(weights), base / "diffusion_pytorch_model.safetensors")
    merge_adapter(base, adapter, tmp_path / "again.safetensors", variant=variant, metadata={})
    found = load_file(tmp_path / "again.safetensors")
    assert found.keys() == {prefix + name for name in expected}
    assert all(torch.equal(found[prefix + name], tensor) for name, tensor in expected.items())


def test_a_base_in_scaled_8_bits_is_copied_to_the_byte(tmp_path: Path) -> None:
    variant = VARIANTS["I2V"]
    dit, adapter = with_adapter(variant)
    stored, _ = scaled_fp8(dit.state_dict(), generation=2, by="row")
    stored = {
        name: t.to(torch.bfloat16) if t.dtype == torch.float32 and "scale" not in name else t
        for name, t in stored.items()
    }
    save_safetensors(stored, tmp_path / "base.safetensors", {"made_by": "somebody", "a": "old"})
    merge_adapter(
        tmp_path / "base.safetensors", adapter, tmp_path / "o.safetensors", variant=variant, metadata={"a": "b"}
    )
    found, metadata = read_safetensors(tmp_path / "o.safetensors")
    assert metadata == {"made_by": "somebody", "a": "b"}  # what is said of the new file goes before the base's
    assert found.keys() == stored.keys() | adapter.keys()
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    assert {found[name].dtype for name in adapter} == {torch.bfloat16}
    load_dit(tmp_path / "o.safetensors", FUN, dtype=torch.bfloat16)


def test_the_copy_goes_through_memory_tensor_by_tensor(tmp_path: Path, monkeypatch) -> None:
    variant = VARIANTS["I2V"]
    dit, adapter = with_adapter(variant)
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0
    get = SafetensorsFile.get

    def counted(file: SafetensorsFile, name: str) -> Tensor:
        nonlocal most
        tensor = get(file, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "get", counted)
    exported(dit.state_dict(), adapter, variant, tmp_path)
    assert 0 < most <= 2


def test_tensors_begin_at_a_whole_number_of_eight_bytes_whatever_their_names(tmp_path: Path) -> None:
    for length in range(1, 9):
        file, name = tmp_path / f"{length}.safetensors", length * "x"
        write_streaming({name: Entry(dtype=torch.float32, shape=(2,), read=lambda: torch.ones(2))}, file, {})
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        assert torch.equal(load_file(file)[name], torch.ones(2))


def test_a_failed_export_leaves_no_file(tmp_path: Path, monkeypatch) -> None:
    dit, adapter = with_adapter(VARIANTS["I2V"])
    reads = iter(range(10))
    get = SafetensorsFile.get
    monkeypatch.setattr(SafetensorsFile, "get", lambda file, name: get(file, name) if next(reads) < 9 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(dit.state_dict(), adapter, VARIANTS["I2V"], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["base.safetensors"]


# ---- what ComfyUI recognises ----------------------------------------------------------------------------------------


def test_which_models_can_become_a_camera_model_of_comfyui() -> None:
    channels = {}
    for name, variant in REAL.items():
        try:
            channels[name] = comfyui_channels(variant.dit)
        except InputError as error:
            assert "--lora_only" in str(error)
    assert {name for name, number in channels.items() if number == 32} == {"fun-camera-1.3B", "fun-camera-14B"}
    assert {name for name, number in channels.items() if number == 36} >= {"t2v-A14B", "i2v-A14B", "fun-camera-A14B"}
    assert not channels.keys() & {"i2v-14B", "ti2v-5B", "fun-camera-5B"}
    with pytest.raises(InputError, match="found 48"):  # a control model
        comfyui_channels(replace(REAL["t2v-A14B"].dit, in_dim=48))


@pytest.mark.parametrize("task", BASES)
def test_the_merged_base_has_the_shape_that_is_looked_for(task: str, tmp_path: Path) -> None:
    dit, adapter = with_adapter(BASES[task])
    with open(exported(dit.state_dict(), adapter, BASES[task], tmp_path), "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["control_adapter.conv.weight"]["shape"] == [96, 1536, 2, 2]
    assert header["patch_embedding.weight"]["shape"] == [96, 36, 1, 2, 2]
    assert "img_emb.proj.0.bias" not in header and "head.modulation" in header


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="injection film: expected plucker, .* --lora_only"):
        check_exportable({"injection": "film"}, {})
    with pytest.raises(InputError, match="expected a trained camera adapter, found none; .* --lora_only"):
        check_exportable({"injection": "plucker"}, {})
    dit, adapter = with_adapter(VARIANTS["I2V"])
    check_exportable({}, adapter)  # an adapter of other programs, which record no injection
    with pytest.raises(InputError, match="expected the base of t2v-A14B .*, found 2 layers .* 36 channels in"):
        exported(dit.state_dict(), adapter, VARIANTS["T2V"], tmp_path)
    narrow = {**adapter, "control_adapter.conv.bias": torch.zeros(5)}
    with pytest.raises(InputError, match=r"control_adapter.conv.bias: expected \[96\] for i2v-A14B, found \[5\]"):
        exported(dit.state_dict(), narrow, VARIANTS["I2V"], tmp_path)
    wide = replace(VARIANTS["I2V with CLIP"])
    with pytest.raises(InputError, match="takes for a camera model .* found 36 with image branch"):
        exported(make_dit(wide).state_dict(), adapter, wide, tmp_path)


# ---- the LoRA -------------------------------------------------------------------------------------------------------


def saved_lora(folder: Path) -> tuple[WanDiT, dict[str, Tensor], Tensor]:
    """A disturbed LoRA with alpha other than its rank; its weights, and what the model computes with it."""
    variant = VARIANTS["T2V"]
    dit, clip = make_dit(variant), make_clip(variant)
    network = make_network(dit, variant, "lora", alpha=3.0)
    disturb(network)
    path = save_network(network, folder, "mine", {})[0]
    with torch.no_grad():
        return make_dit(variant), read_safetensors(path)[0], run(dit, network, clip)


@pytest.mark.parametrize("through", [lambda w: w, diffusers_lora], ids=["ours", "from diffusers"])
def test_comfyuis_lora_is_the_same_network(through, tmp_path: Path) -> None:
    fresh, weights, expected = saved_lora(tmp_path)
    save_file(comfyui_lora(through(weights)), tmp_path / "comfy.safetensors")
    variant = VARIANTS["T2V"]
    loaded = load_network(fresh, tmp_path / "comfy.safetensors", variant=variant, expert="low")
    with torch.no_grad():
        found = run(fresh, loaded, make_clip(variant))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_diffusers_loads_its_lora_and_computes_the_same(tmp_path: Path) -> None:
    _, weights, _ = saved_lora(tmp_path)
    variant = VARIANTS["T2V"]
    dit, inputs = make_dit(variant), random_inputs(variant.dit)
    transformer = to_diffusers(dit)
    save_file(diffusers_lora(weights), tmp_path / "theirs.safetensors")
    load_network(dit, tmp_path / "mine_low_noise.safetensors", variant=variant, expert="low")
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler", "transformer_2"))
    pipeline = WanPipeline(transformer=transformer, **parts)
    with torch.no_grad():
        pipeline.load_lora_weights(str(tmp_path), weight_name="theirs.safetensors")
        found, expected = run_diffusers(transformer, inputs), dit(inputs.noised, **inputs.keywords())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_tensor_that_is_no_lora_is_not_dropped_silently() -> None:
    with pytest.raises(InputError, match="diffusion_model.blocks.0.norm3.diff: expected a tensor of a LoRA"):
        comfyui_lora({"diffusion_model.blocks.0.norm3.diff": torch.zeros(1)})
