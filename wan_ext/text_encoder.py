"""Wan's text encoder: prompts to context, through umT5.

The network is transformers' `UMT5EncoderModel`; weights come from native, ComfyUI or Hugging Face files. Prompts run
one at a time: nothing is padded, so a context does not depend on the prompts beside it, and a short one costs little.
In 8 bits its linears take half of bf16's memory; `write_quantized_text_encoder` makes a file of that, its tokenizer
inside, which is mapped instead of read (`wan_ext.quantized_files`).

Shapes: B prompts, S tokens (the end of the sentence included), D = 4096.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5DenseGatedActDense

from core.errors import InputError
from core.files import fingerprint, save_safetensors
from memory.quant import QuantRecipe
from wan_ext.assemble import Conversion, assign, quantize_linears
from wan_ext.checkpoint_files import Checkpoint, open_checkpoint
from wan_ext.configs import VARIANTS, TextEncoderConfig
from wan_ext.key_maps import umt5_native_name
from wan_ext.quantized_files import Report, quantized_file, refuse_quantized, write_quantized
from wan_ext.tokenizer import Tokenizer, tokenizer_in

SPIECE = "spiece_model"  # ComfyUI's name for the tokenizer's bytes inside a checkpoint
TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", "../tokenizer", ".")  # native; Hugging Face's; beside the file
NATIVE_EMBEDDING = "token_embedding.weight"
WHAT = "the umT5 text encoder"
STEMS = ("model", "pytorch_model", "models_t5_umt5-xxl-enc-bf16")  # of its file in a folder with other models'
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor, of which a file may hold either or both


class TextEncoder:
    """A frozen umT5 encoder with its tokenizer. `network` is the UMT5EncoderModel inside."""

    def __init__(self, network: UMT5EncoderModel, tokenizer: Tokenizer, *, text_len: int):
        """Args:
        network: with weights.
        tokenizer: of the same vocabulary.
        text_len: longest context; longer prompts are cut, keeping the end of the sentence.

        Raises:
            InputError: the tokenizer has more ids than the network embeds.
        """
        rows = network.shared.num_embeddings
        if tokenizer.vocab_size > rows:
            raise InputError(
                f"{tokenizer.source}: expected the tokenizer of this text encoder (at most {rows} tokens), "
                f"found {tokenizer.vocab_size} tokens; give the matching one with --tokenizer"
            )
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_len = text_len

    @property
    def device(self) -> torch.device:
        return self.network.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.shared.weight.dtype

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; returns itself."""
        self.network.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One context for each prompt, as long as its tokens. Each [S, D], in the encoder's dtype, on its device."""
        contexts = []
        for prompt in prompts:
            ids = torch.tensor([self.tokenizer(prompt, max_length=self.text_len)], device=self.device)  # [1, S]
            contexts.append(self.features(ids, torch.ones_like(ids))[0])
        return contexts

    @torch.no_grad()
    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features of token ids; rows outside the mask mean nothing. [B, S], [B, S] -> [B, S, D]"""
        return self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class GatedFeedForward(nn.Module):
    """wo(gelu(wi_0(x)) * wi_1(x)), for 8-bit linears.

    transformers' own class casts activations to the dtype of `wo.weight`, which would round them to e4m3.
    """

    def __init__(self, wi_0: nn.Module, wi_1: nn.Module, wo: nn.Module):
        super().__init__()
        self.wi_0, self.wi_1, self.wo = wi_0, wi_1, wo

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(nn.functional.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


def build_text_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """A UMT5EncoderModel of this shape with fresh weights, on the default device (meta to load, else to train)."""
    network = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.head_dim,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu",
        )
    )
    network.encoder.set_input_embeddings(network.shared)
    return network


def load_text_encoder(
    path: Path | str,
    config: TextEncoderConfig,
    *,
    tokenizer: Path | str | None,
    text_len: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    recipe: QuantRecipe | None = None,
) -> TextEncoder:
    """Load a native, ComfyUI or Hugging Face umT5 encoder, or a file of 8-bit weights, and its tokenizer.

    Args:
        path: file (.pth, .safetensors) or folder.
        config: shape of the encoder that the task needs.
        tokenizer: spiece.model, tokenizer.json, or a folder with one. None: the bytes in the checkpoint, or the usual
            places beside it.
        text_len: longest context.
        dtype: precision of the weights and the computation.
        device: where it runs.
        recipe: how to keep the linears in 8 bits; None: as `dtype`, or as a file of 8-bit weights has them.

    Raises:
        InputError: the file is broken or holds another model or recipe, or there is no tokenizer.
    """
    checkpoint = open_checkpoint(path, stems=STEMS)
    ready = quantized_file(checkpoint, model="t5")
    found = _find_tokenizer(checkpoint, tokenizer)
    if ready is None:
        network, conversion = _unfilled(checkpoint, config, dtype=dtype, recipe=recipe)
        for name, tensor in conversion.tensors(device):
            assign(network, name, tensor)
    else:
        network = _empty(config, dtype=dtype, recipe=ready.recipe_for(recipe))
        ready.fill(
            network,
            blocks=list(network.encoder.block),
            what=WHAT,
            dtype_of=lambda name: dtype,
            device=device,
            is_ignored=lambda name: name == SPIECE,
        )
    return TextEncoder(network, found, text_len=text_len)


def write_quantized_text_encoder(
    path: Path | str,
    output: Path,
    *,
    recipe: QuantRecipe,
    config: TextEncoderConfig | None = None,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> None:
    """Write an encoder with 8-bit weights: what `load_text_encoder` with this recipe would make of its checkpoint.

    A tokenizer that is a sentencepiece model goes into the file; a tokenizer.json does not, and is given with the file.

    Args:
        path: the checkpoint, of any kind that `load_text_encoder` takes but this one.
        output: the .safetensors file to write, atomically.
        recipe: of the linears.
        config: what the checkpoint must hold; None: that of any task.
        tokenizer: as for `load_text_encoder`.
        dtype: in which the model will compute; what is not quantised is stored so.
        device: where weights are quantised.
        report: told after each tensor how far it is.

    Raises:
        InputError: as for `load_text_encoder`; the checkpoint is quantised already; the disk is too small.
    """
    checkpoint = open_checkpoint(path, stems=STEMS)
    refuse_quantized(checkpoint, "to quantise")
    spiece = _find_tokenizer(checkpoint, tokenizer).sentencepiece_model
    config = config or _config_of(checkpoint)
    network, conversion = _unfilled(checkpoint, config, dtype=dtype, recipe=recipe)
    write_quantized(
        output,
        network,
        conversion.tensors(device),
        blocks=list(network.encoder.block),
        model="t5",
        recipe=recipe,
        holds=f"umT5, {config.num_layers} layers of width {config.dim} (ffn {config.ffn_dim})",
        source=fingerprint(checkpoint.path),
        extras={} if spiece is None else {SPIECE: torch.frombuffer(bytearray(spiece), dtype=torch.uint8)},
        report=report,
    )


def quantize_text_encoder(network: UMT5EncoderModel, recipe: QuantRecipe, *, dtype: torch.dtype) -> None:
    """Make the linears of a meta encoder that computes in `dtype` 8-bit ones, to be filled."""
    quantize_linears(network, recipe, bias_dtype=dtype)
    for owner in list(network.modules()):
        for name, module in list(owner.named_children()):
            if isinstance(module, UMT5DenseGatedActDense):
                setattr(owner, name, GatedFeedForward(module.wi_0, module.wi_1, module.wo))


def _empty(config: TextEncoderConfig, *, dtype: torch.dtype, recipe: QuantRecipe | None) -> UMT5EncoderModel:
    """The network on the meta device."""
    with torch.device("meta"):
        network = build_text_encoder(config)
    if recipe is not None:
        quantize_text_encoder(network, recipe, dtype=dtype)
    return network


def _unfilled(
    checkpoint: Checkpoint, config: TextEncoderConfig, *, dtype: torch.dtype, recipe: QuantRecipe | None
) -> tuple[UMT5EncoderModel, Conversion]:
    """The network on the meta device, and what will fill it."""
    embedding = _embedding(checkpoint)
    network = _empty(config, dtype=dtype, recipe=recipe)

    def name_in_file(name: str) -> str:
        if embedding == NATIVE_EMBEDDING:
            return umt5_native_name(name)
        return embedding if name == "shared.weight" else name

    conversion = Conversion(
        network,
        checkpoint,
        what=WHAT,
        name_in_file=name_in_file,
        dtype_of=lambda name: dtype,
        is_ignored=lambda name: name in (SPIECE, "lm_head.weight", *EMBEDDINGS) or name.startswith("decoder."),
    )
    return network, conversion


def _embedding(checkpoint: Checkpoint) -> str:
    """The name of the token embedding in the checkpoint, which tells its layout."""
    found = next((name for name in (*EMBEDDINGS, NATIVE_EMBEDDING) if name in checkpoint), None)
    if found is None:
        raise InputError(f"{checkpoint.path}: expected {WHAT}, found a checkpoint of another kind")
    return found


def _config_of(checkpoint: Checkpoint) -> TextEncoderConfig:
    """The encoder of a known task that a checkpoint holds, told by its embedding."""
    shape = checkpoint.shape(_embedding(checkpoint))
    configs = {variant.text_encoder for variant in VARIANTS.values()}
    found = next((config for config in configs if (config.vocab_size, config.dim) == shape), None)
    if found is None:
        raise InputError(f"{checkpoint.path}: expected the text encoder of a Wan model, found one of {list(shape)}")
    return found


def save_text_encoder_native(encoder: TextEncoder, path: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write an encoder (of plain linears) under native key names, atomically.

    Args:
        path: the .safetensors file.
        dtype: stored precision; None keeps the weights' own.
    """
    tensors = {
        umt5_native_name(name): tensor.to(dtype or tensor.dtype)
        for name, tensor in encoder.network.state_dict().items()
        if name != EMBEDDINGS[1]
    }
    assert not any(name.endswith("weight_scale") for name in tensors), "save before quantising"
    save_safetensors(tensors, path, {"format": "pt"})


def _find_tokenizer(checkpoint: Checkpoint, given: Path | str | None) -> Tokenizer:
    """The given tokenizer, else the one inside the checkpoint, else one in the usual places beside it."""
    if given is not None:
        return Tokenizer.from_file(given)
    if SPIECE in checkpoint:
        data = checkpoint.get(SPIECE).numpy().tobytes()
        return Tokenizer.from_bytes(data, source=f"{checkpoint.path}: {SPIECE}")
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for place in TOKENIZER_FOLDERS:
        found = tokenizer_in(folder / place)
        if found is not None:
            return Tokenizer.from_file(found)
    raise InputError(
        f"{checkpoint.path}: expected a tokenizer in it or beside it ({folder / TOKENIZER_FOLDERS[0]}/spiece.model), "
        "found none; give --tokenizer PATH (spiece.model or tokenizer.json), or --tokenizer hub:google/umt5-xxl"
    )
