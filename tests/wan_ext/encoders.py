"""A small tokenizer, and the golden umT5 weights with their configuration."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import sentencepiece
import tokenizers
from torch import Tensor

from core.files import read_safetensors
from wan_ext.configs import TextEncoderConfig

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SENTENCES = [
    "a red ball on a wooden floor",
    "the camera moves slowly to the left",
    "a room with two windows and a blue chair",
    "orbit around a green cube in warm light",
    "a corridor with tall columns, seen from the door",
] * 4


@cache
def spiece_bytes(vocab_size: int = 48) -> bytes:
    """A sentencepiece unigram model with umT5's special ids: padding 0, end 1, unknown 2."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=file, vocab_size=vocab_size, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return file.getvalue()


def write_tokenizer_json(path: Path, *, data: bytes) -> None:
    """The same unigram model as a tokenizer.json."""
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [(model.IdToPiece(i), model.GetScore(i)) for i in range(model.GetPieceSize())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


def golden_umt5() -> tuple[dict[str, Tensor], dict[str, Tensor], TextEncoderConfig]:
    """Vectors, native weights and configuration."""
    tensors, metadata = read_safetensors(GOLDEN / "umt5.safetensors")
    found = json.loads(metadata["config"])
    config = TextEncoderConfig(
        vocab_size=found["vocab_size"], dim=found["d_model"], head_dim=found["d_kv"], ffn_dim=found["d_ff"],
        num_layers=found["num_layers"], num_heads=found["num_heads"], num_buckets=found["num_buckets"],
    )  # fmt: skip
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    return tensors, weights, config
