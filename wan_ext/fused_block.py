"""A block of Wan computed by a schedule of its own: forward, and recomputation with backward, without autograd.

What: `FusedBlockMaths` is a `BlockMaths` (see `memory/runners.py`) that computes what `WanBlock.forward` in
`wan_ext/dit.py` computes, and its gradients, with the smallest set of tensors alive at each moment. The block itself,
its modules and their names stay as they are: this file reads them. The plain block says what is computed, this one in
which order.

How, in backward, from the block's input and the gradient of its output:

    1  norm1 -> q, k, v before their norms -> attention -> o. All tokens. Queries and keys are normed and turned for
       some heads at a time; of the norm, which spans all heads, one number a token is known.
    2  for some tokens at a time: x1 = x + gate * attended, cross-attention, x2; the feed-forward of x2 up to its GELU,
       and back (its last product is never recomputed); cross-attention back; the gradient of o. Every gradient is added
       into the gradient of the output, which thus becomes that of the input.
    3  attention back, for some heads at a time. Gradients take the place of what the heads have done with.
    4  for some tokens at a time: q, k, v and norm1 back.

Everything between norms and products is one operation each (`wan_ext/fused_ops.py`, Triton on CUDA), linears with their
LoRAs are `wan_ext/fused_linear.py`, attention gives out its log-sum-exp (`wan_ext/attention.py`).

Attention's backward uses the output o only in delta = sum(dO * o), a number a row of a head. With head groups, dO
takes the place of o in step 2, and in step 3 the heads of a group are given dO * delta / |dO|^2 as their o, which has
the same delta. As every group leaves the gradients of its queries behind, groups shrink, each to 7/8 of the last.

Cost: bytes alive at the worst moment, weights and the block's input not counted, T = 2 L D bytes (335 MB for 32,760
tokens of 14B). The gradient in float32 is 2 T. Step 3 holds q, k, v, o, dO, 5 T; and of the heads at work the normed q
and k, gradients of q, k, v and attention's own float32 sum, 7 T over the number of groups: 14 T = 4.7 GB in one group,
8.5 T = 2.9 GB in four (benchmarks/block_memory.py). Step 2 holds 6 T, and about 18 T for its share of the tokens. Time:
against checkpointing one product of ffn.2 less; with `keep_attention` no attention forward either, for T bytes a block.

Exact: the same sums as the plain block in another order, whatever the schedule. Dropout of a LoRA draws other masks
than the plain block, by a seed that each forward draws.

Shapes: B clips, F latent frames, L tokens, S keys, D model width, N heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wan_ext.fused_backward import Backward
from wan_ext.fused_forward import Forward
from wan_ext.fused_schedule import BlockSchedule

__all__ = ["BlockSchedule", "FusedBlockMaths"]


class FusedBlockMaths:
    """Computes `WanBlock`s by a schedule. A `BlockMaths`.

    `backward` writes into the gradient that it is given, where that is contiguous, and returns it as that of `x`.

    Args:
        schedule: which parts exist at the same time; no choice changes results beyond summation order.
    """

    def __init__(self, schedule: BlockSchedule | None = None) -> None:
        self.schedule = BlockSchedule() if schedule is None else schedule

    @torch.no_grad()
    def forward(self, block: nn.Module, inputs: tuple[Any, ...], *, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The block's output, and attention's output and log-sum-exp where they are kept.

        Args:
            block: a `WanBlock`.
            inputs: as its `forward` takes them.
            keep: whether a backward will follow.

        Raises:
            InputError: what this schedule or maths cannot do, by name.
        """
        call = Forward(block, inputs, self.schedule)
        return call.run(keep_attention=keep and self.schedule.keep_attention)

    @torch.no_grad()
    def backward(
        self,
        block: nn.Module,
        inputs: tuple[Any, ...],
        kept: tuple[Tensor, ...],
        grad: Tensor,
        *,
        needed: tuple[bool, ...],
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Gradients of the inputs and of the trainable parameters.

        Args:
            block: the one that ran forward.
            inputs: those of forward.
            kept: what forward returned.
            grad: of the output; written into. [B, L, D]
            needed: for each of `inputs`, whether its gradient is wanted.

        Returns:
            Gradients of the inputs, None where not needed; and of the parameters that require one, in the order of
            `block.parameters()`, None where one plays no part.

        Raises:
            InputError: a gradient that does not exist here, by name.
        """
        call = Backward(block, inputs, self.schedule, needed)
        return call.run(kept, grad)
