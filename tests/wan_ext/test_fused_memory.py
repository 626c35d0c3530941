"""What a 14B block by hand holds at its worst moment: regression limits, counted on meta tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memory.runners import Recompute
from memory.trace import peak_bytes
from networks.lora_linear import LoRAAdapter, block_linears, inject_lora
from wan_ext.configs import DiTConfig
from wan_ext.dit import WanDiT, storage_dtype
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths

CONFIG = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=1, in_dim=16, out_dim=16, text_dim=4096)
TOKENS = 32_760  # 81 frames of 480 x 832


@pytest.fixture(scope="module")
def block() -> nn.Module:
    with torch.device("meta"):
        dit = WanDiT(CONFIG)
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(storage_dtype(name, torch.bfloat16))
        dit.requires_grad_(False)
        sizes = {name: (linear.in_features, linear.out_features) for name, linear in block_linears(dit).items()}
        adapters = {n: LoRAAdapter(torch.empty(32, i), torch.empty(o, 32), alpha=32) for n, (i, o) in sizes.items()}
        inject_lora(dit, adapters)
    return dit.blocks[0]


def backward_peak(block: nn.Module, maths, tokens: int, *, kept: bool = False) -> int:
    with torch.device("meta"):
        x, grad = torch.empty(1, tokens, CONFIG.dim), torch.empty(1, tokens, CONFIG.dim)
        modulation, rope = torch.empty(1, 1, 6, CONFIG.dim), torch.empty(2, tokens, 1, 64)
        inputs = (x, modulation, torch.empty(1, 512, CONFIG.dim, dtype=torch.bfloat16), rope)
        out = torch.empty(1, tokens, CONFIG.dim, dtype=torch.bfloat16)
        attention = (out, torch.empty(1, 40, tokens)) if kept else ()

        def backward():
            return maths.backward(block, inputs, attention, grad, needed=(True, False, False, False))

        return peak_bytes(backward, held={"gradient": [grad]}).peak


@pytest.mark.parametrize(
    ("schedule", "gigabytes"),
    [
        (BlockSchedule(), 5.2),
        (BlockSchedule(head_groups=4, token_chunk=4096), 2.9),
        (BlockSchedule(head_groups=4, token_chunk=4096, keep_attention=True), 2.9),
    ],
    ids=["all at once", "4 head groups, 4096 tokens", "attention kept"],
)
def test_peak_of_a_block(block, schedule, gigabytes):
    peak = backward_peak(block, FusedBlockMaths(schedule), TOKENS, kept=schedule.keep_attention)
    assert peak <= gigabytes * 1e9


def test_the_plain_block_holds_more(block):
    plain, whole = backward_peak(block, Recompute(), 2048), backward_peak(block, FusedBlockMaths(), 2048)
    small = backward_peak(block, FusedBlockMaths(BlockSchedule(head_groups=8, token_chunk=128)), 2048)
    assert plain > 1.3 * whole
    assert plain > 2.5 * small


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen[func.overloadpacket.__name__] += 1
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.seen[f"products of width {CONFIG.ffn_dim} to {result.shape[-1]}"] += (
                args[-2].shape[-1] == CONFIG.ffn_dim
            )
        return result


@pytest.mark.parametrize("kept", [False, True])
def test_kept_attention_is_not_run_again_and_the_last_product_never_is(block, kept):
    with torch.device("meta"):
        x, modulation = torch.empty(1, 64, CONFIG.dim), torch.empty(1, 1, 6, CONFIG.dim)
        context, rope = torch.empty(1, 512, CONFIG.dim, dtype=torch.bfloat16), torch.empty(2, 64, 1, 64)
        maths, inputs = FusedBlockMaths(BlockSchedule(keep_attention=kept)), (x, modulation, context, rope)
        _, tensors = maths.forward(block, inputs, keep=True)
        with Operations() as operations:
            maths.backward(block, inputs, tensors, torch.empty_like(x), needed=(True, False, False, False))
    assert operations.seen["_scaled_dot_product_flash_attention"] == (1 if kept else 2)
    assert operations.seen["_scaled_dot_product_flash_attention_backward"] == 2
    # the gradient of ffn.0's input; the product of ffn.2 would be the second
    assert operations.seen[f"products of width {CONFIG.ffn_dim} to {CONFIG.dim}"] == 1
