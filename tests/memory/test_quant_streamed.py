"""Blocks of every recipe stream: bit for bit what they compute when everything is resident."""

import pytest
import torch
from torch import nn

from memory.quant import RECIPES, QuantLinear, QuantRecipe
from memory.runners import run_checkpointed, run_plain
from memory.stream import StreamedBlocks
from tests.memory.tiny_blocks import inputs, make_blocks, trainable


def blocks_of(recipe: QuantRecipe) -> nn.ModuleList:
    blocks = make_blocks(4)
    for block in blocks:
        block.first.base = QuantLinear.from_linear(block.first.base, recipe=recipe)
        block.second = QuantLinear.from_linear(block.second, recipe=recipe)
    return blocks


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_streamed_is_resident(recipe: QuantRecipe) -> None:
    found = []
    for runner_of in (
        lambda blocks: run_plain,
        lambda blocks: run_checkpointed,
        lambda blocks: StreamedBlocks(blocks, streamed=(0, 1, 3), device="cpu"),
    ):
        blocks = blocks_of(recipe)
        x, shift = (tensor.requires_grad_() for tensor in inputs())
        y = runner_of(blocks)(blocks, x, shift)
        y.square().sum().backward()
        found.append([y, x.grad, shift.grad, *(parameter.grad for parameter in trainable(blocks))])
    for other in found[1:]:
        assert all(
            torch.equal(one, two) and torch.isfinite(one).all() for one, two in zip(found[0], other, strict=True)
        )
