"""What a model costs, in the words in which a plan is made: bytes, operations and seconds of a block, of all of it.

What: `Schedule` is how a block computes, `Work` what that takes, `BlockCosts` one block under one schedule, and
`ModelCosts` a step of a whole model. `memory.plan` chooses by them; who knows a model fills them in (`wan_ext.costs`).

Cost: none. Exact: `Work.seconds` is an estimate, a sum of each kind of work at its own rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from core.errors import InputError
from memory.rates import RateProfile

LAUNCH_SECONDS = 4e-6
"""Of a kernel: what small chunks cost."""

Products = Literal["bf16", "int8", "fp8"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a block computes; the numbers of a block's own schedule."""

    head_groups: int = 1
    token_chunk: int | None = None
    keep_attention: bool = False

    def __str__(self) -> str:
        groups = "all heads at once" if self.head_groups == 1 else f"{self.head_groups} head groups"
        chunk = "all tokens at once" if self.token_chunk is None else f"{self.token_chunk:,} tokens at once"
        return f"{groups}, {chunk}, attention {'kept' if self.keep_attention else 'recomputed'}"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one pass over one block computes."""

    linear: float = 0.0
    """FLOP of products with frozen weights."""
    small: float = 0.0
    """FLOP of products with trained ones, in bfloat16."""
    attention: float = 0.0
    attention_backward: float = 0.0
    traffic: float = 0.0
    """Bytes that everything else reads and writes in device memory."""
    launches: int = 0

    def seconds(self, rates: RateProfile, products: Products) -> float:
        """How long a card takes.

        Raises:
            InputError: the card has no such products.
        """
        linear_rate = getattr(rates, products)
        if linear_rate is None:
            raise InputError(
                f"plan: expected a card with 8-bit floating-point products for this recipe, found {rates.name}; choose "
                "a recipe that computes in int8 or bfloat16"
            )
        return (
            self.linear / linear_rate
            + self.small / rates.bf16
            + self.attention / rates.attention_forward
            + self.attention_backward / rates.attention_backward
            + self.traffic / rates.device_memory
            + self.launches * LAUNCH_SECONDS
        )


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """One block under one schedule."""

    schedule: Schedule
    forward_bytes: int
    """At the worst moment of its forward, its output and what it keeps included, its input not."""
    backward_bytes: int = 0
    """At the worst moment of its backward, both gradients of the residual stream included; its input and what it kept
    are not."""
    kept_bytes: int = 0
    """What waits for backward beside the block's input."""
    kept_eight_bit_bytes: int = 0
    """The same where it is rounded to 8 bits."""
    forward: Work
    backward: Work = Work()
    """With what it recomputes."""


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """What a step of one or more models of the same shape costs; one of them is in use at a time."""

    name: str
    """What is planned, for tables and messages."""
    num_blocks: int
    """Of one model."""
    num_models: int = 1
    trains: bool
    products: Products = "bf16"
    block_bytes: int
    """Frozen tensors of a block as they lie in the ring."""
    outside_bytes: int
    """Frozen tensors outside the blocks, of all models."""
    visiting_bytes: int = 0
    """Of these, what a forward needs only before the first block, one tensor after the other: it may stay in host
    memory and be copied for each forward."""
    visitor_bytes: int = 0
    """The largest of these tensors."""
    trained_bytes: Mapping[str, int] = field(default_factory=dict)
    """What trains, by part: weights, gradients, optimizer; of all models."""
    optimizer_bytes: int = 0
    """What the optimizer needs for the time of its step."""
    input_bytes: int = 0
    """What every block reads, and the batch: for a whole step."""
    checkpoint_bytes: int = 0
    """A block's input, which waits for backward."""
    checkpoint_eight_bit_bytes: int = 0
    """The same where it is rounded to 8 bits."""
    outside_activation_bytes: int = 0
    """At the worst moment outside the blocks while checkpoints exist: head and loss."""
    outside: Work = Work()
    """Of a step, all that is not in blocks; the optimizer included."""
    blocks: tuple[BlockCosts, ...]
    """One for every schedule that may be chosen."""
    advice: Mapping[str, str] = field(default_factory=dict)
    """By part of the memory: what a user can change to make it smaller."""
