"""Laws of loading: one DiT in every file format, each tensor in its precision, no memory wasted, every fault named."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import InputError
from memory.quant import RECIPES, QuantLinear, dequantize
from memory.quant import quantize as quantize_weight
from tests.wan_ext.models import diffusers_names, lively_dit
from wan_ext import tensor_files
from wan_ext.checkpoint_files import open_checkpoint
from wan_ext.configs import VARIANTS, DiTConfig, get_variant
from wan_ext.dit import WanDiT, storage_dtype
from wan_ext.loading import DiTShape, detect_variant, load_dit, save_dit

SMALL = DiTConfig(dim=128, ffn_dim=192, num_heads=4, num_layers=2, in_dim=16, out_dim=16, text_dim=48)
SMALL_T2V = replace(get_variant("t2v-A14B"), dit=SMALL)
SMALL_I2V = replace(get_variant("i2v-14B"), dit=replace(SMALL, in_dim=36, image_dim=80))
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return lively_dit(SMALL).state_dict()


def is_block_linear(name: str, tensor: Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2


def scaled_fp8(weights: dict[str, Tensor], *, generation: int, by: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a scaled fp8 file in one of ComfyUI's generations, and the numbers that they stand for."""
    stored: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stored[name] = numbers[name] = tensor
        if not is_block_linear(name, tensor):
            continue
        layer = name.removesuffix(".weight")
        blocks = {"tensor": tensor.view(1, 1, -1), "row": tensor[:, None], "block": tensor.unflatten(1, (2, -1))}[by]
        scale = blocks.abs().amax(-1) / 448  # [1, 1], [out, 1] or [out, 2]
        stored[name] = (blocks / scale[..., None]).view(tensor.shape).to(FP8)
        numbers[name] = (stored[name].float().view(blocks.shape) * scale[..., None]).view(tensor.shape)
        if by == "tensor":
            scale = scale.view(())
        if generation == 1:
            stored[f"{layer}.scale_weight"] = scale
            stored[f"{layer}.scale_input"] = torch.tensor(1.0)
        else:
            stored[f"{layer}.weight_scale"] = scale
            stored[f"{layer}.input_scale"] = torch.tensor(1.0)
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if generation == 1:
        stored["scaled_fp8"] = torch.empty(2, dtype=FP8)
    return stored, numbers


def write_shards(tensors: dict[str, Tensor], folder) -> None:
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


def assert_same(dit: WanDiT, expected: dict[str, Tensor]) -> None:
    found = dit.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    assert not any(p.requires_grad or p.is_meta for p in dit.parameters())


def test_every_layout_is_the_same_dit(weights, tmp_path):
    save_file(weights, tmp_path / "native.safetensors")
    save_file({f"model.diffusion_model.{n}": t for n, t in weights.items()}, tmp_path / "comfy.safetensors")
    torch.save(weights, tmp_path / "native.pth")
    write_shards(weights, tmp_path / "low_noise_model")
    write_shards(diffusers_names(weights), tmp_path / "transformer_2")
    (tmp_path / "transformer").mkdir()
    save_file(diffusers_names(weights), tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    for path in sorted(tmp_path.iterdir()):
        assert_same(load_dit(path, SMALL_T2V, dtype=torch.float32), weights)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, FP8], ids=str)
def test_every_precision_of_a_file_is_read(weights, tmp_path, stored):
    cast = {name: tensor.to(stored) for name, tensor in weights.items()}
    save_file(cast, tmp_path / "w.safetensors")
    expected = {name: tensor.float() for name, tensor in cast.items()}
    assert_same(load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32), expected)


def test_the_image_branch_loads_under_both_namings(tmp_path):
    weights = lively_dit(SMALL_I2V.dit).state_dict()
    save_file(weights, tmp_path / "native.safetensors")
    save_file(diffusers_names(weights), tmp_path / "diffusers.safetensors")
    for path in tmp_path.iterdir():
        assert_same(load_dit(path, SMALL_I2V, dtype=torch.float32), weights)


@pytest.mark.parametrize("recipe", [None, RECIPES["fp8"]], ids=["whole", "fp8"])
def test_each_tensor_has_the_precision_that_the_dit_computes_with(weights, tmp_path, recipe):
    save_file(weights, tmp_path / "w.safetensors")
    dit = load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.bfloat16, recipe=recipe)
    for name, tensor in dit.state_dict().items():
        if recipe and name in weights and is_block_linear(name, weights[name]):
            assert tensor.dtype == FP8
        elif not name.endswith("weight_scale"):
            assert tensor.dtype == storage_dtype(name, torch.bfloat16)
    assert dit.dtype == torch.bfloat16


def test_quantised_linears_are_those_of_the_blocks(weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    dit = load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32, recipe=RECIPES["fp8"])
    assert not any(isinstance(module, nn.Linear) for module in dit.blocks.modules())
    assert not any(isinstance(m, QuantLinear) for name, m in dit.named_modules() if not name.startswith("blocks."))
    for name, linear in dit.named_modules():
        if isinstance(linear, QuantLinear):
            values, scale = quantize_weight(weights[f"{name}.weight"])
            assert torch.equal(linear.dequantized(torch.float32), dequantize(values, scale, torch.float32))
            assert torch.equal(linear.bias, weights[f"{name}.bias"])


@pytest.mark.parametrize("by", ["tensor", "row", "block"])
@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_is_dequantised_or_kept_exactly(weights, tmp_path, generation, by, prefix):
    stored, numbers = scaled_fp8(weights, generation=generation, by=by)
    save_file({prefix + name: tensor for name, tensor in stored.items()}, tmp_path / "w.safetensors")
    assert_same(load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32), numbers)
    kept = load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32, recipe=RECIPES["fp8"])
    for name, linear in kept.named_modules():
        if isinstance(linear, QuantLinear):
            assert torch.equal(linear.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
            assert torch.equal(linear.dequantized(torch.float32), numbers[f"{name}.weight"])


def test_formats_in_the_metadata_are_understood(weights, tmp_path):
    stored, numbers = scaled_fp8(weights, generation=2, by="tensor")
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(".comfy_quant")}
    layers = {n.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for n in stored if "weight_scale" in n}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(stored, tmp_path / "w.safetensors", metadata=metadata)
    assert_same(load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32), numbers)

    del stored["blocks.1.ffn.2.weight_scale"]
    save_file(stored, tmp_path / "w.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.2: .* no weight_scale"):
        load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32)
    save_file(stored, tmp_path / "w.safetensors", metadata={"_quantization_metadata": "{"})
    with pytest.raises(InputError, match="_quantization_metadata cannot be read"):
        load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32)


@pytest.mark.parametrize("description", [{"format": "nvfp4"}, {"format": "float8_e4m3fn", "convrot": True}])
def test_what_only_looks_like_scaled_fp8_is_refused(weights, tmp_path, description):
    stored, _ = scaled_fp8(weights, generation=2, by="tensor")
    text = json.dumps(description).encode()
    stored["blocks.0.ffn.0.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0 is stored as (nvfp4|.* rotated)"):
        load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32)


def test_a_scale_that_does_not_fit_its_weight_is_refused(weights, tmp_path):
    stored, _ = scaled_fp8(weights, generation=1, by="row")
    stored["blocks.0.ffn.0.scale_weight"] = torch.ones(3, 1)
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0\.scale_weight: .* 192 rows"):
        load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32)


@pytest.mark.parametrize("stored", [torch.bfloat16, FP8], ids=str)
def test_weights_that_are_not_numbers_are_refused_when_quantising(weights, tmp_path, stored):
    broken = {**weights, "blocks.1.self_attn.q.weight": weights["blocks.1.self_attn.q.weight"].clone()}
    broken["blocks.1.self_attn.q.weight"][5, 7] = float("nan")
    save_file({name: tensor.to(stored) for name, tensor in broken.items()}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"blocks\.1\.self_attn\.q\.weight: expected finite weights"):
        load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.bfloat16, recipe=RECIPES["fp8"])


def test_all_faults_of_the_keys_are_one_error(weights, tmp_path):
    broken = {name: tensor for name, tensor in weights.items() if "cross_attn.norm" not in name}
    broken["blocks.0.self_attn.q.scale_weight"] = torch.ones(())  # of a weight that is not 8-bit: nobody uses it
    broken["ref_conv.weight"] = torch.ones(2)
    broken["blocks.1.norm3.bias"] = torch.ones(7)
    save_file(broken, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as error:
        load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32)
    message = str(error.value)
    assert f"{tmp_path / 'w.safetensors'}: expected the DiT of t2v-A14B" in message
    assert "4 tensors missing (blocks.0.cross_attn.norm_k.weight, " in message
    assert "2 unexpected or not consumed (blocks.0.self_attn.q.scale_weight, ref_conv.weight)" in message
    assert "1 of another shape (blocks.1.norm3.bias [7] for [128])" in message
    assert "\n" not in message


def test_a_long_list_of_faults_is_cut(weights, tmp_path):
    few = {name: t for name, t in weights.items() if not name.startswith("blocks.") or name == "blocks.0.ffn.0.weight"}
    save_file({**few, "blocks.1.modulation": weights["blocks.1.modulation"]}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"52 tensors missing \(blocks.* and 44 more\)"):
        load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32)


class Shapes:
    """A checkpoint of which only the shapes exist."""

    path = "big.safetensors"

    def __init__(self, config: DiTConfig):
        with torch.device("meta"):
            self.tensors = WanDiT(config).state_dict()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


@pytest.mark.parametrize("task", VARIANTS)
def test_variants_are_told_apart_by_their_shapes(task):
    shape = DiTShape.of_checkpoint(Shapes(VARIANTS[task].dit))
    alike = {"t2v-A14B", "t2v-14B", "t2i-14B"}
    assert set(detect_variant(shape)) == (alike if task in alike else {task})


def fun(**changes: object):
    """A small model with a camera adapter, in the layouts of the four published kinds."""
    return replace(SMALL, **{"control_downscale": 8, **changes})


FUN = {
    "fun-camera-A14B": fun(in_dim=36),
    "fun-camera-5B": fun(in_dim=100, out_dim=48, control_downscale=16),
    "fun-camera-1.3B": fun(in_dim=32, image_dim=80),
    "fun-camera-14B": fun(in_dim=32, image_dim=80, num_layers=3),
}


@pytest.mark.parametrize("recipe", [None, RECIPES["fp8"]], ids=["whole", "fp8"])
@pytest.mark.parametrize("task", FUN)
def test_a_camera_adapter_is_a_part_of_the_dit_in_every_layout(task, recipe, tmp_path):
    config = FUN[task]
    weights = lively_dit(config).state_dict()
    assert {name for name in weights if name.startswith("control_adapter.")} == {
        f"control_adapter.{layer}.{leaf}"
        for layer in ("conv", "residual_blocks.0.conv1", "residual_blocks.0.conv2")
        for leaf in ("weight", "bias")
    }
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{n}": t for n, t in weights.items()}, tmp_path / "comfy.safetensors")
    write_shards(weights, tmp_path / "high_noise_model")
    variant = replace(get_variant(task), dit=config)
    for path in (tmp_path / "comfy.safetensors", tmp_path / "high_noise_model", tmp_path):  # the last: by its stem
        dit = load_dit(path, variant, dtype=torch.bfloat16, recipe=recipe)
        for name, tensor in weights.items():
            if name.startswith("control_adapter."):
                assert torch.equal(dit.state_dict()[name], tensor.to(storage_dtype(name, torch.bfloat16)))
        assert not any(parameter.requires_grad for parameter in dit.parameters())


def test_a_model_with_a_camera_adapter_is_not_taken_for_one_without(tmp_path):
    save_file(lively_dit(fun(in_dim=36)).state_dict(), tmp_path / "fun.safetensors")
    plain = replace(get_variant("i2v-A14B"), dit=replace(SMALL, in_dim=36))
    with pytest.raises(InputError, match=r"expected i2v-A14B .* found no known .*, with camera adapter \(1/8\)\)"):
        load_dit(tmp_path / "fun.safetensors", plain, dtype=torch.float32)


def test_another_variant_is_named_with_what_was_expected(weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as error:
        load_dit(tmp_path / "w.safetensors", get_variant("i2v-A14B"), dtype=torch.float32)
    assert str(error.value).startswith(
        f"{tmp_path / 'w.safetensors'}: expected i2v-A14B (40 layers of width 5120 (ffn 13824), 36 channels in"
    )
    assert "found no known variant (2 layers of width 128" in str(error.value)

    tiny = get_variant("tiny")
    save_dit(WanDiT(tiny.dit), tmp_path / "tiny")
    with pytest.raises(InputError, match=r"tiny: expected t2v-A14B .*, found tiny \(.*; give --task tiny"):
        load_dit(tmp_path / "tiny", get_variant("t2v-A14B"), dtype=torch.float32)


def test_what_is_no_dit_is_refused(tmp_path):
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    save_file({"encoder.conv1.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    for name, kind in (("lora", "a LoRA"), ("vae", "another model")):
        with pytest.raises(InputError, match=rf"{name}\.safetensors: expected a Wan .*, found {kind} \(.*--dit"):
            load_dit(tmp_path / f"{name}.safetensors", SMALL_T2V, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_saved_is_loaded(weights, tmp_path, dtype):
    save_file(weights, tmp_path / "w.safetensors")
    dit = load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.float32)
    save_dit(dit, tmp_path / "saved", dtype=dtype)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    stored = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype or torch.float32}
    expected = {name: tensor.to(dtype or tensor.dtype) for name, tensor in weights.items()}
    assert_same(load_dit(tmp_path / "saved", SMALL_T2V, dtype=torch.float32), expected)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_layers"] == 2


class Ledger:
    """Counts the bytes that were read from files and are still in memory, whoever holds them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reader: type):
        self.live: dict[int, int] = {}
        self.peak = 0
        self.largest = 0
        read = reader.get

        def counted(file, name: str) -> Tensor:
            data = read(file, name).contiguous()
            memory = data.flatten().view(torch.uint8).numpy().copy()
            key = id(memory)
            self.live[key] = memory.nbytes
            weakref.finalize(memory, self.live.pop, key)
            self.peak = max(self.peak, sum(self.live.values()))
            self.largest = max(self.largest, memory.nbytes)
            return torch.from_numpy(memory).view(data.dtype).reshape(data.shape)

        monkeypatch.setattr(reader, "get", counted)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("recipe", [None, RECIPES["fp8"]], ids=["whole", "fp8"])
def test_the_host_holds_the_result_and_one_tensor(weights, tmp_path, monkeypatch, suffix, recipe):
    path = tmp_path / f"w.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    reader = tensor_files.SafetensorsFile if suffix == "safetensors" else tensor_files.TorchFile
    ledger = Ledger(monkeypatch, reader)
    dit = load_dit(path, SMALL_T2V, dtype=torch.bfloat16, recipe=recipe)
    kept = sum(p.nbytes for p in dit.parameters() if p.dtype == torch.float32)  # those that need no conversion
    assert sum(ledger.live.values()) == kept
    assert ledger.peak <= kept + ledger.largest
    assert sum(p.untyped_storage().nbytes() for p in dit.parameters()) == sum(p.nbytes for p in dit.parameters())


def test_nothing_is_read_from_a_file_of_another_model(weights, tmp_path, monkeypatch):
    save_file({**weights, "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    ledger = Ledger(monkeypatch, tensor_files.SafetensorsFile)
    with pytest.raises(InputError):
        load_dit(tmp_path / "w.safetensors", SMALL_T2V, dtype=torch.bfloat16)
    assert ledger.peak == 0


def test_tensors_are_read_in_the_order_of_the_file(weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    order = sorted(checkpoint.names(), key=checkpoint.position)
    starts = [checkpoint.files[0].tensors[name].start for name in order]
    assert starts == sorted(starts)
