"""Laws of files of 8-bit weights: the bits of quantising on the fly, mapped not read, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
import weakref
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import InputError
from core.files import fingerprint, read_safetensors_header
from memory.masters import HostBlock, flat_bytes
from memory.quant import RECIPES, QuantLinear, QuantRecipe
from memory.stream import StreamedBlocks
from networks.export import merge_adapter
from tests.wan_ext.encoders import SENTENCES, golden_umt5, spiece_bytes, write_tokenizer_json
from tests.wan_ext.models import diffusers_names, lively_dit, random_inputs
from tests.wan_ext.test_loading import scaled_fp8
from wan_ext import quantized_files, tensor_files
from wan_ext.checkpoint_files import open_checkpoint
from wan_ext.configs import DiTConfig, get_variant
from wan_ext.dit import storage_dtype
from wan_ext.loading import chosen_recipe, load_dit, write_quantized_dit
from wan_ext.quantized_files import is_padding, quantized_file
from wan_ext.tensor_files import SafetensorsFile
from wan_ext.text_encoder import load_text_encoder, write_quantized_text_encoder

SMALL = DiTConfig(dim=128, ffn_dim=160, num_heads=4, num_layers=3, in_dim=16, out_dim=16, text_dim=48)
VARIANT = replace(get_variant("t2v-A14B"), dit=SMALL)
BY_HAND = QuantRecipe(values="int8", scales="block64", rotate=True)  # has no name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in bf16 with a width that 64 does not divide, and outliers in one linear."""
    weights = lively_dit(SMALL).state_dict()
    weights["blocks.1.ffn.0.weight"][:, 5] *= 30
    path = tmp_path_factory.mktemp("source") / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """The file of a recipe, written once."""
    folder, files = tmp_path_factory.mktemp("written"), {}

    def write(name: str):
        if name not in files:
            path = folder / f"{name}.safetensors"
            write_quantized_dit(source, path, recipe=RECIPES[name], variant=VARIANT)
            files[name] = path
        return files[name]

    return write


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {
        n: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()
    }


def load(path, *, recipe=None, dtype=torch.bfloat16, variant=VARIANT):
    return load_dit(path, variant, dtype=dtype, recipe=recipe)


def velocity(dit, **keywords) -> Tensor:
    inputs = random_inputs(SMALL, text_tokens=5)
    with torch.no_grad():
        return dit(inputs.noised, **inputs.keywords(), **keywords)


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_is_what_quantising_on_the_fly_makes(source, written, name):
    ready, made = load(written(name)), load(source, recipe=RECIPES[name])
    assert bits(ready.state_dict()) == bits(made.state_dict())
    linears = [module for module in ready.modules() if isinstance(module, QuantLinear)]
    assert linears and {linear.recipe for linear in linears} == {RECIPES[name]}
    for linear in linears:
        assert linear.weight_transposed is None or torch.equal(
            linear.weight_transposed.view(torch.uint8), linear.weight.view(torch.uint8).T
        )
    assert not any(p.requires_grad or p.is_meta for p in ready.parameters())
    assert torch.equal(velocity(ready), velocity(made))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recipe_without_a_name_and_another_precision_round_trip_too(source, tmp_path, dtype):
    write_quantized_dit(source, tmp_path / "w.safetensors", recipe=BY_HAND, variant=VARIANT, dtype=dtype)
    ready = load(tmp_path / "w.safetensors", dtype=dtype)
    assert bits(ready.state_dict()) == bits(load(source, recipe=BY_HAND, dtype=dtype).state_dict())


def test_a_file_for_another_precision_is_converted(source, written):
    ready, made = load(written("int8"), dtype=torch.float32), load(source, recipe=RECIPES["int8"], dtype=torch.float32)
    assert bits(ready.state_dict()) == bits(made.state_dict())


@pytest.mark.parametrize("name", ["fp8", "fp8_w8a8_transposed", "int8_rotated"])
@pytest.mark.parametrize("by", ["tensor", "row", "block"])
def test_scaled_fp8_of_comfyui_becomes_the_same_as_on_the_fly(tmp_path, name, by):
    stored, numbers = scaled_fp8(lively_dit(SMALL).state_dict(), generation=2, by=by)
    save_file(stored, tmp_path / "comfy.safetensors")
    write_quantized_dit(
        tmp_path / "comfy.safetensors", tmp_path / "w.safetensors", recipe=RECIPES[name], variant=VARIANT
    )
    ready = load(tmp_path / "w.safetensors")
    assert bits(ready.state_dict()) == bits(load(tmp_path / "comfy.safetensors", recipe=RECIPES[name]).state_dict())
    kept = name == "fp8" or name == "fp8_w8a8_transposed" and by != "block"
    for path, linear in ready.named_modules():
        if isinstance(linear, QuantLinear):
            same = torch.equal(linear.dequantized(torch.float32), numbers[f"{path}.weight"])
            assert same == kept, path


def test_diffusers_names_give_the_same_file_but_for_its_source(source, written, tmp_path):
    named = diffusers_names({n: t.float() for n, t in load_file(source).items()}, torch.bfloat16)
    save_file(named, tmp_path / "d.safetensors")
    write_quantized_dit(tmp_path / "d.safetensors", tmp_path / "w.safetensors", recipe=RECIPES["fp8"], variant=VARIANT)
    assert bits(load_file(tmp_path / "w.safetensors")) == bits(load_file(written("fp8")))


def test_what_is_mapped_is_what_any_reader_reads(written):
    state, read = load(written("int8_w8a8_transposed")).state_dict(), load_file(written("int8_w8a8_transposed"))
    padding = {name for name in read if is_padding(name)}
    assert read.keys() - padding == state.keys()
    assert all(torch.equal(read[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)


def test_blocks_lie_as_streaming_packs_them(written, monkeypatch):
    path = written("int8_rotated")
    monkeypatch.setattr(SafetensorsFile, "get", None)  # mapped, not read
    dit = load(path)
    file = SafetensorsFile(written("int8_rotated"))
    for number, block in enumerate(dit.blocks):
        places = [file.tensors[f"blocks.{number}.{name}"] for name, _ in block.named_parameters()]
        start = min(place.start for place in places)
        assert start % 4096 == 0 and all((place.start - start) % 256 == 0 for place in places)
        size = flat_bytes(block)
        memories = {tensor.untyped_storage().data_ptr() for tensor in block.parameters()}
        assert len(memories) == 1 and next(block.parameters()).untyped_storage().nbytes() == size
        packed = torch.zeros(size, dtype=torch.uint8)
        HostBlock(block, None, place=torch.device("cpu"), kind="mapped").fill(packed)
        data = written("int8_rotated").read_bytes()[start : start + size]
        assert packed.numpy().tobytes() == data


def test_streaming_from_the_file_computes_the_same(source, written):
    dit = load(written("int8"))
    run_blocks = StreamedBlocks(list(dit.blocks), streamed=(0, 1, 2), device="cpu", masters="mapped")
    assert torch.equal(velocity(dit, run_blocks=run_blocks), velocity(load(source, recipe=RECIPES["int8"])))


def test_a_change_in_memory_is_not_one_of_the_file(written):
    before = fingerprint(written("fp8"))
    dit = load(written("fp8"))
    for tensor in dit.state_dict().values():
        tensor.view(torch.uint8).zero_()
    assert fingerprint(written("fp8")) == before
    assert any(bool(tensor.view(torch.uint8).any()) for tensor in load(written("fp8")).state_dict().values())


def test_a_file_says_what_it_is(source, written):
    _, metadata = read_safetensors_header(written("int8_rotated"))
    assert {key.removeprefix("quantized.") for key in metadata} == {
        "version", "model", "recipe", "holds", "source", "checksum",
    }  # fmt: skip
    assert QuantRecipe(**json.loads(metadata["quantized.recipe"])) == RECIPES["int8_rotated"]
    assert metadata["quantized.source"] == fingerprint(source)
    assert "t2v-A14B, 3 layers of width 128" in metadata["quantized.holds"]


def test_the_host_holds_one_tensor_while_a_file_is_written(source, tmp_path, monkeypatch):
    read, alive = tensor_files.SafetensorsFile.get, []

    def counted(file, name):
        tensor = read(file, name)
        alive[:] = [weak for weak in alive if weak() is not None]
        alive.append(weakref.ref(tensor))
        assert len(alive) <= 2, "one is being written, the next one is being read"
        return tensor

    monkeypatch.setattr(tensor_files.SafetensorsFile, "get", counted)
    write_quantized_dit(source, tmp_path / "w.safetensors", recipe=RECIPES["int8"], variant=VARIANT)
    assert alive


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(path) -> str:
    with pytest.raises(InputError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def header_bytes(path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_header_with_a_flipped_bit_is_refused(written, tmp_path, data):
    content = bytearray(written("fp8").read_bytes())
    text = header_bytes(written("fp8"))
    position = data.draw(st.integers(0, 15) | st.integers(0, text - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(content)
    refused(broken)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_lacks_its_end_or_has_more_is_refused(written, tmp_path, data):
    content = written("fp8").read_bytes()
    size = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 3, len(content) + 3))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(content[:size].ljust(size, b"\0"))
    if size != len(content):
        refused(broken)


def test_a_file_of_another_layout_version_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized_files, "VERSION", "0")
    write_quantized_dit(source, tmp_path / "w.safetensors", recipe=RECIPES["fp8"], variant=VARIANT)
    monkeypatch.undo()
    assert "expected 8-bit weights in layout 1, found layout 0; quantise" in refused(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("asked", "stored"),
    [("fp8", "int8"), ("int8", "int8_rotated"), ("int8_w8a8_transposed", "int8_w8a8"), ("fp8", "fp8_w8a8")],
)
def test_another_recipe_than_asked_for_is_refused(written, asked, stored):
    with pytest.raises(InputError, match=rf"{stored}\.safetensors: expected .* of recipe {asked}, found {stored};"):
        load(written(stored), recipe=RECIPES[asked])


def test_another_way_to_multiply_the_same_numbers_is_not_another_recipe(source, written):
    dit = load(written("int8_w8a8"), recipe=RECIPES["int8_rotated"])
    assert torch.equal(velocity(dit), velocity(load(source, recipe=RECIPES["int8_rotated"])))


def test_what_is_quantised_already_is_neither_quantised_nor_copied(written, tmp_path):
    path = written("int8")
    with pytest.raises(
        InputError, match=r"int8\.safetensors: expected a checkpoint to quantise, found .* recipe int8 \("
    ):
        write_quantized_dit(path, tmp_path / "w.safetensors", recipe=RECIPES["fp8"], variant=VARIANT)
    with pytest.raises(InputError, match=r"expected a checkpoint to put the adapter into, found 8-bit"):
        merge_adapter(path, {}, tmp_path / "w.safetensors", variant=VARIANT, metadata={})
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(written, case, tmp_path):
    wide = replace(VARIANT, dit=replace(SMALL, ffn_dim=256))
    with pytest.raises(InputError, match=r"fp8\.safetensors: expected t2v-A14B .*ffn 256.* found no known .*ffn 160"):
        load(written("fp8"), variant=wide)
    config, path = case
    write_quantized_text_encoder(path, tmp_path / "t5.safetensors", recipe=RECIPES["fp8"], config=config)
    with pytest.raises(
        InputError, match=r"t5\.safetensors: expected .* transformer \(--dit\), found .* \(--t5\): umT5"
    ):
        load(tmp_path / "t5.safetensors")
    with pytest.raises(InputError, match=r"fp8\.safetensors: expected .* encoder \(--t5\), found .* \(--dit\)"):
        load_encoder(written("fp8"), config)
    with pytest.raises(InputError, match=r"t5\.safetensors: expected the umT5 text encoder, found .* of another shape"):
        load_encoder(tmp_path / "t5.safetensors", replace(config, ffn_dim=2 * config.ffn_dim))
    with pytest.raises(InputError, match=r"t5\.safetensors: expected the umT5 .*, found \d+ tensors missing"):
        load_encoder(tmp_path / "t5.safetensors", replace(config, num_layers=config.num_layers + 1))


def test_one_of_several_files_is_refused(written, tmp_path):
    file = written("fp8")
    shutil.copy(file, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"more": torch.ones(1)}, tmp_path / "m-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="expected one file of 8-bit weights, found it among others"):
        load(tmp_path)


def test_a_folder_with_the_file_is_the_file(written, tmp_path):
    shutil.copy(written("fp8"), tmp_path / "w.safetensors")
    assert bits(load(tmp_path).state_dict()) == bits(load(written("fp8")).state_dict())
    assert quantized_file(open_checkpoint(tmp_path), model="dit") is not None


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(source, tmp_path, fault):
    def report(done: int, total: int) -> None:
        assert list(tmp_path.iterdir())
        if done > total / 2:
            raise fault

    with pytest.raises(fault):
        write_quantized_dit(source, tmp_path / "w.safetensors", recipe=RECIPES["fp8"], variant=VARIANT, report=report)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    target = tmp_path / "new" / "w.safetensors"
    with pytest.raises(InputError, match=rf"expected 0\.0 GB of free disk space in {tmp_path}, found 0\.0 GB; free"):
        write_quantized_dit(source, target, recipe=RECIPES["fp8"], variant=VARIANT)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_meanwhile_is_named(source, tmp_path, monkeypatch):
    def full(file, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantized_files.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"w\.safetensors: the disk is full at .* GB"):
        write_quantized_dit(source, tmp_path / "w.safetensors", recipe=RECIPES["fp8"], variant=VARIANT)
    assert not list(tmp_path.iterdir())


def test_the_progress_ends_at_the_size_of_the_file(source, tmp_path):
    seen = []
    path = tmp_path / "w.safetensors"
    write_quantized_dit(
        source, path, recipe=RECIPES["fp8"], variant=VARIANT, report=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen) and seen[-1] == (path.stat().st_size,) * 2


def test_the_model_of_no_task_needs_a_variant(source, tmp_path):
    with pytest.raises(InputError, match=r"expected the DiT of a known task \(.*found one of 3 layers of width 128"):
        write_quantized_dit(source, tmp_path / "w.safetensors", recipe=RECIPES["fp8"])


@pytest.mark.parametrize(
    ("name", "fp8", "expected"),
    [(None, False, None), (None, True, "fp8"), ("int8", False, "int8"), ("fp8", True, "fp8")],
)
def test_flags_choose_one_recipe(name, fp8, expected):
    assert chosen_recipe(name, fp8=fp8) == (RECIPES[expected] if expected else None)


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="--quantize int8: .* give one of them"):
        chosen_recipe("int8", fp8=True)
    with pytest.raises(InputError, match=r"found 'int8_rotate' \(did you mean 'int8_rotated'\?\)"):
        chosen_recipe("int8_rotate", fp8=False)


# ---- the text encoder -----------------------------------------------------------------------------------------------


@pytest.fixture
def case(tmp_path_factory):
    """The golden encoder with a tokenizer beside it."""
    _, weights, config = golden_umt5()
    folder = tmp_path_factory.mktemp("t5")
    save_file(weights, folder / "models_t5_umt5-xxl-enc-bf16.safetensors")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece_bytes())
    return config, folder / "models_t5_umt5-xxl-enc-bf16.safetensors"


def load_encoder(path, config, *, recipe=None, tokenizer=None):
    return load_text_encoder(path, config, tokenizer=tokenizer, text_len=32, dtype=torch.bfloat16, recipe=recipe)


@pytest.mark.parametrize("name", ["fp8", "int8_rotated", "int8_w8a8_transposed"])
def test_the_text_encoder_is_what_quantising_on_the_fly_makes(case, tmp_path, name):
    config, path = case
    write_quantized_text_encoder(path, tmp_path / "t5.safetensors", recipe=RECIPES[name], config=config)
    ready = load_encoder(tmp_path / "t5.safetensors", config)  # its tokenizer came along
    made = load_encoder(path, config, recipe=RECIPES[name])
    assert bits(ready.network.state_dict()) == bits(made.network.state_dict())
    for found, expected in zip(ready.encode(SENTENCES[:2]), made.encode(SENTENCES[:2]), strict=True):
        assert torch.equal(found, expected)
    assert not any(isinstance(module, nn.Linear) for module in ready.network.modules())


def test_a_tokenizer_of_another_kind_is_given_with_the_file(case, tmp_path):
    config, path = case
    (tmp_path / "json").mkdir()
    write_tokenizer_json(tmp_path / "json" / "tokenizer.json", data=spiece_bytes())
    output = tmp_path / "out" / "t5.safetensors"
    write_quantized_text_encoder(path, output, recipe=RECIPES["fp8"], config=config, tokenizer=tmp_path / "json")
    with pytest.raises(InputError, match="expected a tokenizer in it or beside it"):
        load_encoder(output, config)
    assert load_encoder(output, config, tokenizer=tmp_path / "json").encode(["a room"])


def test_weights_are_stored_in_the_dtype_that_the_model_keeps_them_in(written):
    file = SafetensorsFile(written("fp8"))
    for name, place in file.tensors.items():
        if is_padding(name) or name.endswith("weight_scale") or place.dtype == torch.float8_e4m3fn:
            continue
        assert place.dtype == storage_dtype(name, torch.bfloat16), name
