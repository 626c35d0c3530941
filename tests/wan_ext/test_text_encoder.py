"""Laws of the text encoder: parity with the official one, every file the same encoder, contexts of true length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import InputError
from memory.quant import RECIPES, QuantLinear
from tests.wan_ext.encoders import SENTENCES, golden_umt5, spiece_bytes
from wan_ext.text_encoder import load_text_encoder, save_text_encoder_native

TOLERANCE = 5e-5


def load(path, config, **kwargs):
    return load_text_encoder(path, config, **{"tokenizer": None, "text_len": 32, "dtype": torch.float32, **kwargs})


@pytest.fixture
def case(tmp_path):
    """Golden vectors, weights, configuration, and a native folder: checkpoint and tokenizer as Wan publishes them."""
    tensors, weights, config = golden_umt5()
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors"
    save_file(weights, path)
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(spiece_bytes())
    return tensors, weights, config, path


def test_agrees_with_the_official_encoder(case):
    tensors, _, config, path = case
    out = load(path, config).features(tensors["input_ids"], tensors["attention_mask"])
    inside = tensors["attention_mask"].bool()
    assert inside.any() and not inside.all()
    assert (out - tensors["out"])[inside].abs().max() <= TOLERANCE


def test_every_format_is_the_same_encoder(case, tmp_path):
    _, weights, config, path = case
    reference = load(path, config)
    context = reference.encode(SENTENCES[:1])[0]
    hf = reference.network.state_dict()
    shared = {name: tensor for name, tensor in hf.items() if name != "encoder.embed_tokens.weight"}

    torch.save(weights, tmp_path / "t5.pth")
    comfy = {**shared, "spiece_model": torch.frombuffer(bytearray(spiece_bytes()), dtype=torch.uint8)}
    (tmp_path / "comfy").mkdir()
    save_file(comfy, tmp_path / "comfy" / "umt5.safetensors")
    (tmp_path / "hf" / "text_encoder").mkdir(parents=True)
    (tmp_path / "hf" / "tokenizer").mkdir()
    (tmp_path / "hf" / "tokenizer" / "spiece.model").write_bytes(spiece_bytes())
    only_tied = {name: tensor for name, tensor in hf.items() if name != "shared.weight"}
    save_file(only_tied, tmp_path / "hf" / "text_encoder" / "model.safetensors")
    for other in (tmp_path / "t5.pth", tmp_path / "comfy" / "umt5.safetensors", tmp_path / "hf" / "text_encoder"):
        assert torch.equal(load(other, config).encode(SENTENCES[:1])[0], context), other


def test_a_context_has_its_true_length_and_ignores_its_neighbours(case):
    *_, config, path = case
    encoder = load(path, config)
    prompts = [SENTENCES[0], "", SENTENCES[2] + " " + SENTENCES[3]]
    contexts = encoder.encode(prompts)
    lengths = [len(encoder.tokenizer(prompt, max_length=32)) for prompt in prompts]
    assert [tuple(c.shape) for c in contexts] == [(length, config.dim) for length in lengths]
    assert lengths[1] == 1 and lengths[2] == 32
    assert torch.equal(encoder.encode(prompts[2:])[0], contexts[2])


def test_one_prompt_alone_equals_the_padded_and_masked_one(case):
    *_, config, path = case
    encoder = load(path, config)
    ids = encoder.tokenizer(SENTENCES[0], max_length=32)
    padded = torch.tensor([ids + [0] * (32 - len(ids))])
    out = encoder.features(padded, (torch.arange(32) < len(ids)).long()[None])
    assert torch.allclose(out[0, : len(ids)], encoder.encode(SENTENCES[:1])[0], atol=1e-5)


def test_eight_bits_round_the_weights_and_nothing_else(case):
    *_, config, path = case
    whole, small = load(path, config), load(path, config, recipe=RECIPES["fp8"])
    linears = {name: m for name, m in small.network.named_modules() if isinstance(m, QuantLinear)}
    assert len(linears) == 7 * config.num_layers
    assert not [m for m in small.network.modules() if isinstance(m, torch.nn.Linear)]
    for name, linear in linears.items():
        weight, rounded = whole.network.get_submodule(name).weight, linear.dequantized(torch.float32)
        assert 0 < (rounded - weight).norm() / weight.norm() < 0.05
        weight.data.copy_(rounded)
    assert torch.allclose(small.encode(SENTENCES[:1])[0], whole.encode(SENTENCES[:1])[0], atol=1e-5)


def test_bfloat16_computes_in_bfloat16(case):
    *_, config, path = case
    for recipe in (None, RECIPES["fp8"]):
        encoder = load(path, config, dtype=torch.bfloat16, recipe=recipe)
        assert encoder.encode(SENTENCES[:1])[0].dtype == torch.bfloat16
        assert encoder.dtype == torch.bfloat16


def test_scaled_fp8_of_comfyui_is_dequantised(case, tmp_path):
    *_, config, path = case
    hf = load(path, config).network.state_dict()
    comfy, expected = {}, {}
    for name, tensor in hf.items():
        if name == "encoder.embed_tokens.weight":
            continue
        expected[name] = comfy[name] = tensor
        if ".SelfAttention." in name and "bias" not in name:
            scale = tensor.abs().max() / 448
            comfy[name] = (tensor / scale).to(torch.float8_e4m3fn)
            comfy[name.replace(".weight", ".scale_weight")] = scale
            expected[name] = comfy[name].float() * scale
    comfy["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(comfy, tmp_path / "umt5_fp8_scaled.safetensors")
    found = load(tmp_path / "umt5_fp8_scaled.safetensors", config).network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_saved_is_the_native_file(case, tmp_path):
    _, weights, config, path = case
    save_text_encoder_native(load(path, config), tmp_path / "again.safetensors", dtype=torch.bfloat16)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_without_a_tokenizer_the_error_says_which_flag(case, tmp_path):
    _, weights, config, _ = case
    (tmp_path / "alone").mkdir()
    save_file(weights, tmp_path / "alone" / "t5.safetensors")
    with pytest.raises(InputError, match="--tokenizer"):
        load(tmp_path / "alone" / "t5.safetensors", config)
    (tmp_path / "mine.model").write_bytes(spiece_bytes())
    load(tmp_path / "alone" / "t5.safetensors", config, tokenizer=tmp_path / "mine.model")


def test_a_tokenizer_with_more_ids_than_rows_is_refused(case):
    _, weights, config, path = case
    save_file({**weights, "token_embedding.weight": weights["token_embedding.weight"][:40]}, path)
    with pytest.raises(InputError, match=r"at most 40 tokens\), found 48"):
        load(path, replace(config, vocab_size=40))


def test_another_model_is_refused(case, tmp_path):
    _, weights, config, _ = case
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "dit.safetensors")
    with pytest.raises(InputError, match=r"dit\.safetensors: expected the umT5 text encoder"):
        load(tmp_path / "dit.safetensors", config, tokenizer=tmp_path / "google" / "umt5-xxl")
    del weights["blocks.1.attn.q.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"1 tensors missing \(blocks\.1\.attn\.q\.weight\)"):
        load(tmp_path / "part.safetensors", config)
