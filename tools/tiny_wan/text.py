"""The tiny text side: a sentencepiece vocabulary of the caption grammar, and an umT5 encoder that binds words.

A caption is a list of things, each with its own colour and pattern; a context is useful to the DiT when every token
knows its neighbours ("red" of which ball?). So the encoder learns to tell, from each of its outputs, the tokens up to
three places before and after it.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from core.files import atomic_path
from scenes.scene import caption, make_scene
from wan_ext.configs import WanVariant
from wan_ext.text_encoder import TextEncoder, build_text_encoder
from wan_ext.tokenizer import Tokenizer

NUM_CAPTIONS, FIRST_SCENE = 4000, 1_000_000  # captions of scenes that are never rendered
OFFSETS = (-3, -2, -1, 0, 1, 2, 3)
PAD, EOS, UNKNOWN = 0, 1, 2


def captions() -> list[str]:
    """The sentences that tokenizer and encoder learn from."""
    return [caption(make_scene(seed)) for seed in range(FIRST_SCENE, FIRST_SCENE + NUM_CAPTIONS)]


def train_tokenizer(vocab_size: int) -> bytes:
    """A byte-pair vocabulary of the caption grammar, laid out as umT5's; text beyond the grammar falls to bytes.

    Returns:
        The contents of a spiece.model file.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNKNOWN,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def train_text_encoder(
    variant: WanVariant, work: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[TextEncoder, bytes]:
    """Train tokenizer and encoder; nothing is kept between runs, since both take about a minute.

    Args:
        variant: shape of the encoder, length of a context.
        work: folder for the tokenizer's file.
        steps: optimiser steps.
        batch_size: captions a step.
        learning_rate: the highest.
        seed: of weights and order.

    Returns:
        The encoder, and the tokenizer's file as bytes.
    """
    config = variant.text_encoder
    spiece = train_tokenizer(config.vocab_size)
    with atomic_path(work / "spiece.model") as temporary:
        temporary.write_bytes(spiece)
    tokenizer = Tokenizer.from_file(work / "spiece.model")
    ids = _padded([tokenizer(text, max_length=variant.dit.text_len) for text in captions()])  # [N, S]

    torch.manual_seed(seed)
    network = build_text_encoder(config)
    heads = nn.Linear(config.dim, len(OFFSETS) * config.vocab_size)
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for step in (progress := tqdm(range(steps), desc="text", unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = ids[torch.randint(len(ids), (batch_size,), generator=generator)]
        features = network(input_ids=batch, attention_mask=(batch != PAD).long()).last_hidden_state  # [B, S, D]
        logits = heads(features).unflatten(-1, (len(OFFSETS), -1))
        targets = torch.stack([_shifted(batch, offset) for offset in OFFSETS], dim=-1)
        targets = targets.masked_fill((batch == PAD)[..., None], PAD)
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            guessed = (logits.argmax(-1) == targets)[targets != PAD].float().mean()
            progress.set_postfix(neighbours_known=f"{guessed:.3f}")
    return TextEncoder(network, tokenizer, text_len=variant.dit.text_len), spiece


def _padded(sequences: list[list[int]]) -> Tensor:
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([sequence + [PAD] * (longest - len(sequence)) for sequence in sequences])


def _shifted(ids: Tensor, offset: int) -> Tensor:
    """The token `offset` places later at every place, PAD beyond the ends. [B, S]"""
    result = torch.full_like(ids, PAD)
    if offset > 0:
        result[:, :-offset] = ids[:, offset:]
    elif offset < 0:
        result[:, -offset:] = ids[:, :offset]
    else:
        result = ids.clone()
    return result
