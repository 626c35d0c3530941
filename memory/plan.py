"""What lives where: a plan of device memory, host memory, transfers and time, made before anything is loaded.

What: `make_plan` takes the costs of a model (`memory.costs`), the sizes of device and host memory and the rates of a
card, and decides
  how a block computes: attention in groups of heads, other parts in chunks of tokens, attention kept or recomputed,
  where blocks live:    on the device, or in host memory behind a ring of two (pinned, or mapped from an 8-bit file),
  where the rest lives: weights outside the blocks on the device, or in host memory and copied for each forward,
  where inputs wait:    inputs of blocks and kept attentions, on the device or in host memory, whole or in 8 bits.
`next_smaller` is what to do when memory ran out all the same.

How: every combination of these is priced, each with as few streamed blocks as fit, and the fastest is taken; whole
before 8 bits, which rounds; then the simplest. Peak memory is a sum of parts at the worst of five moments: before the
blocks, in a block's forward, after the blocks, in a block's backward, in the optimizer's step. Time is what blocks
compute at the card's rates, and what transfers take longer than the computation that they travel beside.

Cost: some ten milliseconds.

Exact: bytes of tensors are counted (tests hold them to the tracer within 5 %). Two shares are no tensors and are
stated: `FRAGMENTATION` of the activations, for an allocator's holes, and `DRIVER_BYTES`, for the device's context and
libraries. Seconds are estimates. A plan never exceeds what there is, and with more device memory none is slower (unless
the one before had to round what waits to 8 bits).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from core.errors import InputError
from memory.costs import BlockCosts, ModelCosts, Schedule, Work
from memory.rates import RateProfile
from memory.stream import spread

GB = 1e9
FRAGMENTATION = 0.10
"""Share of the activations that an allocator loses to rounding and holes; weights, ring and arenas lie still."""
DRIVER_BYTES = 600_000_000
"""The device's context, its libraries' kernels, and a desktop's picture."""
WORKSPACE_BYTES = 64 * 2**20
"""What matrix products of cuBLAS keep for themselves: at most 32 MiB for each of two streams."""
PROCESS_BYTES = 4_000_000_000
"""Host memory of the system, Python, PyTorch, the device's libraries and one batch."""
SMALLER = 0.95
"""A smaller plan needs at most this share of the device memory of the one before, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is, and what the user decided."""

    vram_bytes: int
    ram_bytes: int
    may_map: bool = False
    """Whether the weights stand in an 8-bit file from which blocks can be read as they are."""
    streamed: int | None = None
    """Number of streamed blocks of each model; None: the planner's choice."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The choice and what it costs. Bytes are those of a training step, or of a forward pass."""

    schedule: Schedule
    streamed: tuple[int, ...]
    """Numbers of the blocks of each model that live in host memory, evenly spaced among the others."""
    store: Literal["device", "host"]
    """Where what waits for backward waits."""
    eight_bit_store: bool
    masters: Literal["pinned", "mapped"]
    """What streamed blocks are copied from."""
    outside: Literal["device", "host"]
    """Where those weights outside the blocks are that a forward needs only before the first block."""
    device_bytes: dict[str, int]
    """Peak device memory by part."""
    host_bytes: dict[str, int]
    """Host memory by part."""
    stored_bytes: int
    """Of one block that wait in host memory."""
    h2d_bytes: int
    """To the device in a step."""
    d2h_bytes: int
    """From the device in a step."""
    compute_seconds: float
    stall_seconds: float
    """In which the device waits for transfers."""
    costs: ModelCosts
    limits: Limits
    rates: RateProfile

    @property
    def vram_bytes(self) -> int:
        """Device memory that the card needs to have."""
        return sum(self.device_bytes.values())

    @property
    def tensor_bytes(self) -> int:
        """Peak of the tensors alone: what `torch.cuda.max_memory_allocated` should say."""
        return sum(count for name, count in self.device_bytes.items() if name not in (FRAGMENTS, DRIVER))

    @property
    def ram_bytes(self) -> int:
        """Host memory that the machine needs to have."""
        return sum(self.host_bytes.values())

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.stall_seconds

    @property
    def stall_share(self) -> float:
        """Of the step."""
        return self.stall_seconds / self.step_seconds


OUTSIDE, RESIDENT, RING = "weights outside the blocks", "resident blocks", "ring of streamed blocks"
TRAINED, INPUTS = "trained", "inputs of the blocks"
ACTIVATIONS, CHECKPOINTS, BUFFERS = "activations", "waiting for backward", "buffers of what waits on the host"
WORKSPACE, FRAGMENTS, DRIVER = "workspace", "share for fragmentation", "driver"
MASTERS, STORED, STAGING, PROCESS = "streamed blocks", "waiting for backward", "staging buffers", "system and process"


class NothingFits(InputError):
    """No plan keeps to the memory that there is; everything else about the request is in order."""


def make_plan(costs: ModelCosts, *, limits: Limits, rates: RateProfile) -> MemoryPlan:
    """The fastest plan that fits.

    Args:
        costs: of the model.
        limits: device and host memory, and what the user decided.
        rates: of the card.

    Returns:
        The plan.

    Raises:
        NothingFits: the message names the smallest sizes that would do, and what to change.
        InputError: the card lacks the products of the recipe.
    """
    plans = [plan for plan in _candidates(costs, limits, rates) if plan.ram_bytes <= limits.ram_bytes]
    fitting = [plan for plan in plans if plan.vram_bytes <= limits.vram_bytes]
    if not fitting:
        raise NothingFits(_why_none_fits(costs, limits, rates))
    return min(fitting, key=_preference)


def next_smaller(plan: MemoryPlan) -> MemoryPlan:
    """The fastest plan that needs less device memory: at most 95 % of it, or what little less there is.

    Args:
        plan: under which memory ran out.

    Returns:
        A plan of the same model, host memory and card.

    Raises:
        NothingFits: there is none.
    """
    # A user's number of streamed blocks has just proved too small.
    limits = Limits(vram_bytes=plan.vram_bytes, ram_bytes=plan.limits.ram_bytes, may_map=plan.limits.may_map)
    for most in (int(SMALLER * plan.vram_bytes), plan.vram_bytes - 1):
        smaller = Limits(vram_bytes=most, ram_bytes=limits.ram_bytes, may_map=limits.may_map)
        fitting = [
            candidate
            for candidate in _candidates(plan.costs, smaller, plan.rates)
            if candidate.vram_bytes <= most and candidate.ram_bytes <= limits.ram_bytes
        ]
        if fitting:
            return min(fitting, key=_preference)
    name, count = _largest(plan)
    raise NothingFits(
        f"{plan.costs.name}: expected a plan that needs less than {plan.vram_bytes / GB:.1f} GB of device memory, "
        f"found none: this is the smallest. Its largest part is {name} ({count / GB:.1f} GB){_advice(plan.costs, name)}"
    )


def _preference(plan: MemoryPlan) -> tuple[float, ...]:
    """Whole before rounded, fast before slow; then what is simpler."""
    schedule = plan.schedule
    return (
        plan.eight_bit_store,
        plan.step_seconds,
        len(plan.streamed),
        plan.store == "host",
        plan.masters == "mapped",
        plan.outside == "host",
        schedule.head_groups,
        -(schedule.token_chunk or 2**62),
        schedule.keep_attention,
    )


def _candidates(costs: ModelCosts, limits: Limits, rates: RateProfile) -> Iterator[MemoryPlan]:
    """For every way to compute and to wait, the plan with the fewest streamed blocks that fits, or with all of them."""
    waits = [("device", False), ("host", False), ("host", True)] if costs.trains else [("device", False)]
    ways = product(
        costs.blocks,
        waits,
        ("pinned", "mapped") if limits.may_map else ("pinned",),
        ("device", "host") if costs.visiting_bytes else ("device",),
    )
    for block, (store, eight_bits), masters, outside in ways:

        def plan(streamed: int, block=block, store=store, eight_bits=eight_bits, masters=masters, outside=outside):
            return _priced(costs, limits, rates, block, streamed, store, eight_bits, masters, outside)

        yield plan(_fewest(costs, limits, plan))


def _fewest(costs, limits, plan) -> int:
    """The least number of streamed blocks with which a plan fits into device memory; all of them where none does."""
    if limits.streamed is not None:
        return limits.streamed
    room = limits.vram_bytes - plan(0).vram_bytes
    if room >= 0:
        return 0
    # The ring holds two blocks, so that every model's third streamed block is the first to make room.
    per_block = costs.num_models * costs.block_bytes
    streamed = -(-(2 * costs.block_bytes - room) // per_block)
    return min(costs.num_blocks, streamed)


def _priced(
    costs: ModelCosts,
    limits: Limits,
    rates: RateProfile,
    block: BlockCosts,
    streamed: int,
    store: Literal["device", "host"],
    eight_bits: bool,
    masters: Literal["pinned", "mapped"],
    outside: Literal["device", "host"],
) -> MemoryPlan:
    """One combination with its bytes and seconds."""
    n, models = costs.num_blocks, costs.num_models
    waits = costs.checkpoint_bytes + block.kept_bytes if costs.trains else 0
    stored = costs.checkpoint_eight_bit_bytes + block.kept_eight_bit_bytes if eight_bits else waits
    visiting, visitor = (costs.visiting_bytes, costs.visitor_bytes) if outside == "host" else (0, 0)
    activations, waiting = _worst_moment(
        costs, block, on_device=store == "device", restored=waits if eight_bits else 0, visitor=visitor
    )
    device = {
        OUTSIDE: costs.outside_bytes - visiting,
        RESIDENT: models * (n - streamed) * costs.block_bytes,
        RING: min(2, streamed) * costs.block_bytes,
        **{f"{TRAINED}: {name}": count for name, count in costs.trained_bytes.items()},
        INPUTS: costs.input_bytes,
        ACTIVATIONS: activations,
        CHECKPOINTS: waiting,
        BUFFERS: 2 * stored if store == "host" else 0,
        WORKSPACE: WORKSPACE_BYTES,
        FRAGMENTS: int(FRAGMENTATION * activations),
        DRIVER: DRIVER_BYTES,
    }
    host = {
        MASTERS: models * streamed * costs.block_bytes if masters == "pinned" else 0,
        STAGING: 2 * costs.block_bytes if masters == "mapped" and streamed else 0,
        STORED: n * stored if store == "host" else 0,
        OUTSIDE: visiting,
        PROCESS: PROCESS_BYTES,
    }
    loads = 0 if streamed <= 2 else 2 * (streamed - 2) if costs.trains else streamed  # both ends meet in the ring
    loads += min(2, streamed) if models > 1 else 0  # unless another model comes
    moved = n * stored if store == "host" else 0
    visits = visiting // models  # of the model that is in use; nothing computes beside them
    forward = block.forward.seconds(rates, costs.products)
    backward = block.backward.seconds(rates, costs.products)
    source = rates.h2d if masters == "pinned" else min(rates.h2d, rates.disk)
    weights = streamed * costs.block_bytes / source
    stall = visits / rates.h2d + max(0.0, weights - n * forward, moved / rates.d2h - n * forward)
    if costs.trains:
        stall += max(0.0, weights + moved / rates.h2d - n * backward)
    rounding = Work(traffic=2 * n * 3 * waits).seconds(rates, "bf16") if eight_bits else 0.0
    return MemoryPlan(
        schedule=block.schedule,
        streamed=spread(n, streamed),
        store=store,
        eight_bit_store=eight_bits,
        masters=masters,
        outside=outside,
        device_bytes={name: count for name, count in device.items() if count},
        host_bytes={name: count for name, count in host.items() if count},
        stored_bytes=stored if store == "host" else 0,
        h2d_bytes=loads * costs.block_bytes + moved + visits,
        d2h_bytes=moved,
        compute_seconds=n * (forward + backward) + costs.outside.seconds(rates, "bf16") + rounding,
        stall_seconds=stall,
        costs=costs,
        limits=limits,
        rates=rates,
    )


def _worst_moment(
    costs: ModelCosts, block: BlockCosts, *, on_device: bool, restored: int, visitor: int
) -> tuple[int, int]:
    """Activations, and what waits on the device outside of buffers, when they are most together.

    Args:
        costs: of the model.
        block: of a block.
        on_device: whether what waits stays on the device.
        restored: what was rounded to 8 bits for the block that is in backward.
        visitor: the largest weight that is copied to the device for a product before the blocks.
    """
    n, x = costs.num_blocks, costs.checkpoint_bytes
    before = (x + visitor, 0)
    if not costs.trains:
        return max(before, (block.forward_bytes, x), (costs.outside_activation_bytes, 0), key=sum)
    all_of_them = n * (x + block.kept_bytes) if on_device else 0
    moments = (
        before,
        (block.forward_bytes, n * x + (n - 1) * block.kept_bytes if on_device else x),
        (costs.outside_activation_bytes, all_of_them),
        (block.backward_bytes, all_of_them + restored),
        (costs.optimizer_bytes, 0),
    )
    return max(moments, key=sum)


def _why_none_fits(costs: ModelCosts, limits: Limits, rates: RateProfile) -> str:
    """The smallest sizes that would do, and the part that is worth making smaller."""
    tight = Limits(vram_bytes=0, ram_bytes=0, may_map=limits.may_map, streamed=limits.streamed)
    smallest = min(_candidates(costs, tight, rates), key=lambda plan: (plan.vram_bytes, plan.ram_bytes))
    swapped = "" if limits.streamed is None else f" with {limits.streamed} streamed blocks"
    if smallest.vram_bytes > limits.vram_bytes:
        name, count = _largest(smallest)
        return (
            f"{costs.name}{swapped}: expected at least {_up(smallest.vram_bytes)} of device memory (and "
            f"{_up(smallest.ram_bytes)} of host memory), found {_gb(limits.vram_bytes)}; the largest part of that plan "
            f"is {name} ({_gb(count)}){_advice(costs, name)}"
        )
    leanest = min(
        (plan for plan in _candidates(costs, limits, rates) if plan.vram_bytes <= limits.vram_bytes),
        key=lambda plan: plan.ram_bytes,
    )
    name, count = max(leanest.host_bytes.items(), key=lambda item: item[1])
    return (
        f"{costs.name}{swapped} in {_gb(limits.vram_bytes)} of device memory: expected at least "
        f"{_up(leanest.ram_bytes)} of host memory, found {_gb(limits.ram_bytes)}; the largest part is {name} "
        f"({_gb(count)}){_advice(costs, name)}"
    )


def _largest(plan: MemoryPlan) -> tuple[str, int]:
    """The part of the device memory that is worth making smaller: not what no setting changes."""
    parts = {name: count for name, count in plan.device_bytes.items() if name not in (WORKSPACE, FRAGMENTS, DRIVER)}
    return max(parts.items(), key=lambda item: item[1])


def _advice(costs: ModelCosts, part: str) -> str:
    return f"; {costs.advice[part]}" if part in costs.advice else ""


def _gb(count: float) -> str:
    return f"{count / GB:.1f} GB"


def _up(count: float) -> str:
    """Rounded up, so that the number given back is enough."""
    return f"{math.ceil(count / GB * 10) / 10:.1f} GB"
