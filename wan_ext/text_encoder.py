"""Wan's text encoder: prompts to context, through umT5.

The network is transformers' `UMT5EncoderModel`; weights come from native, ComfyUI or Hugging Face files. Prompts run
one at a time: nothing is padded, so a context does not depend on the prompts beside it, and a short one costs little.
In 8 bits (e4m3 with block scales, as the DiT's) its linears take half of bf16's memory.

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
from core.files import save_safetensors
from wan_ext.assemble import fill_module, quantize_linears
from wan_ext.checkpoint_files import Checkpoint, open_checkpoint
from wan_ext.configs import TextEncoderConfig
from wan_ext.key_maps import umt5_native_name
from wan_ext.tokenizer import Tokenizer, tokenizer_in

SPIECE = "spiece_model"  # ComfyUI's name for the tokenizer's bytes inside a checkpoint
TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", "../tokenizer", ".")  # native; Hugging Face's; beside the file
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
    quantize: bool = False,
) -> TextEncoder:
    """Load a native, ComfyUI or Hugging Face umT5 encoder, and its tokenizer.

    Args:
        path: file (.pth, .safetensors) or folder.
        config: shape of the encoder that the task needs.
        tokenizer: spiece.model, tokenizer.json, or a folder with one. None: the bytes in the checkpoint, or the usual
            places beside it.
        text_len: longest context.
        dtype: precision of the weights and the computation.
        device: where it runs.
        quantize: keep the linears in 8 bits.

    Raises:
        InputError: the file is broken or holds another model, or there is no tokenizer.
    """
    checkpoint = open_checkpoint(path, stems=("model", "pytorch_model", "models_t5_umt5-xxl-enc-bf16"))
    found = _find_tokenizer(checkpoint, tokenizer)
    with torch.device("meta"):
        network = build_text_encoder(config)
        if quantize:
            quantize_text_encoder(network, dtype=dtype)
    embedding = next((name for name in EMBEDDINGS if name in checkpoint), None)
    if embedding is None and "token_embedding.weight" not in checkpoint:
        raise InputError(f"{checkpoint.path}: expected the umT5 text encoder, found a checkpoint of another kind")

    def name_in_file(name: str) -> str:
        if embedding is None:
            return umt5_native_name(name)
        return embedding if name == "shared.weight" else name

    fill_module(
        network,
        checkpoint,
        what="the umT5 text encoder",
        name_in_file=name_in_file,
        dtype_of=lambda name: dtype,
        device=device,
        is_ignored=lambda name: name in (SPIECE, "lm_head.weight", *EMBEDDINGS) or name.startswith("decoder."),
    )
    return TextEncoder(network, found, text_len=text_len)


def quantize_text_encoder(network: UMT5EncoderModel, *, dtype: torch.dtype) -> None:
    """Make the linears of a meta encoder that computes in `dtype` 8-bit ones, to be filled."""
    quantize_linears(network, bias_dtype=dtype)
    for owner in list(network.modules()):
        for name, module in list(owner.named_children()):
            if isinstance(module, UMT5DenseGatedActDense):
                setattr(owner, name, GatedFeedForward(module.wi_0, module.wi_1, module.wo))


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
