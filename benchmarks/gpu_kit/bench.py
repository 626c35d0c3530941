"""Both experts on one machine, placed as a memory plan says, again and again.

What: a `Bench` has the experts, whose weights lie in pinned host memory, and the rates of the machine. `placed` puts
them where a plan wants them for the length of a `with`: resident blocks are copied to the device and bound there, the
others pass through a ring, all by `memory.stream`, `memory.store` and `wan_ext.fused_block`, as in training.

How: the host's copies stay for all plans (28 GB are not pinned again for each row), and a resident block is bound to a
copy on the device. Caps are those of PyTorch's allocator, less what the driver takes beside it, so that a cap of 24 GB
is a card of 24 GB. Before anything is timed, the first blocks run once: kernels compile, tiles are chosen, libraries
make their plans.

Cost: with both experts resident, twice 14 GB to the device, about a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_kit.host_pool import HostPool, Lease
from benchmarks.gpu_kit.model import Expert, make_expert
from benchmarks.gpu_kit.records import tidy
from benchmarks.gpu_kit.settings import GB, Clip, Setting
from core.errors import InputError
from memory.device import device_for
from memory.machine import host_bytes
from memory.plan import DRIVER_BYTES, MemoryPlan, next_smaller
from memory.quant import parse_recipe
from memory.rates import CATALOGUE, RateProfile, find_rates
from memory.runners import BlockMaths, BlockRunner
from memory.store import HostStore
from memory.stream import Ring, StreamedBlocks
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths
from wan_ext.placement import place_outside
from wan_ext.planning import plan_generation, plan_training
from wan_ext.rope import rope_table

WARM_BLOCKS = 3
HOST_SHARE = 0.72
"""Of the host's memory that plans may use: the weights of both experts stay there whatever a plan says."""
USUAL_SLOWNESS = 1.5
"""How much longer than planned a step may take before one was measured."""
COPY_BYTES = 2**30
UNKNOWN = "4090"
"""Whose rates are taken for a card that the catalogue lacks."""


@dataclass(kw_only=True)
class Placed:
    """Experts where a plan wants them."""

    plan: MemoryPlan
    experts: Sequence[Expert]
    lease: Lease
    runners: dict[str, BlockRunner]
    warm: dict[str, BlockRunner]
    """The same for the first blocks alone."""


class Bench:
    """Experts and their machine.

    Args:
        setting: what is measured.
        recipe: name of how the blocks' linears are kept.
    """

    def __init__(self, setting: Setting, recipe: str) -> None:
        self.setting, self.recipe, self.device = setting, recipe, setting.device
        self.pool = HostPool(device_for(self.device))
        self.rates = measured_rates(self.pool, self.device)
        self.masters = Lease(self.pool)
        self.experts: list[Expert] = []
        self._plans: dict[tuple[Clip, int, int], MemoryPlan | str] = {}  # or why there is none, which takes seconds
        self._caps: dict[Clip, dict[str, int]] = {}
        self.slowness: dict[str, float] = {}
        """How much longer a step takes than planned, by what is planned, as far as it was measured."""

    def build(self) -> None:
        """Make both experts."""
        variant = self.setting.variant
        for seed, name in enumerate(variant.experts):
            expert = make_expert(
                variant,
                name,
                recipe=parse_recipe(self.recipe),
                rank=self.setting.rank,
                device=self.device,
                host=self.masters,
                seed=seed,
            )
            self.experts.append(expert)
            tidy()

    # ---- plans ----

    def training_plan(self, clip: Clip, vram_bytes: int, *, num_experts: int = 2) -> MemoryPlan:
        """The planner's choice for a card of this size. Raises InputError where there is none."""
        key = (clip, vram_bytes, num_experts)
        if key not in self._plans:
            try:
                self._plans[key] = self._new_training_plan(clip, vram_bytes, num_experts)
            except InputError as refusal:
                self._plans[key] = str(refusal)
        found = self._plans[key]
        if isinstance(found, str):
            raise InputError(found)
        return found

    def _new_training_plan(self, clip: Clip, vram_bytes: int, num_experts: int) -> MemoryPlan:
        return plan_training(
            self.setting.variant,
            frames=clip.frames,
            height=clip.height,
            width=clip.width,
            rank=self.setting.rank,
            experts=self.setting.variant.experts[:num_experts],
            recipe=self.recipe,
            vram_bytes=vram_bytes,
            ram_bytes=int(HOST_SHARE * host_bytes()),
            rates=self.rates,
        )

    def best_training_plan(self, clip: Clip, vram_bytes: int) -> tuple[MemoryPlan, int]:
        """The same, and how many experts it has: one where both do not fit. Raises InputError where neither does."""
        try:
            return self.training_plan(clip, vram_bytes), 2
        except InputError:
            return self.training_plan(clip, vram_bytes, num_experts=1), 1

    def generation_plan(self, clip: Clip, vram_bytes: int) -> MemoryPlan:
        """For sampling with both experts, their LoRAs not merged."""
        return plan_generation(
            self.setting.variant,
            frames=clip.frames,
            height=clip.height,
            width=clip.width,
            rank=self.setting.rank,
            recipe=self.recipe,
            vram_bytes=vram_bytes,
            ram_bytes=int(HOST_SHARE * host_bytes()),
            rates=self.rates,
        )

    def card_bytes(self) -> int:
        """Memory of the card, less a reserve for what its driver keeps."""
        if self.device.type != "cuda":
            return 1000 * GB
        return int(0.95 * torch.cuda.get_device_properties(self.device).total_memory)

    def caps(self, clip: Clip) -> dict[str, int]:
        """The sizes of cards that are played, by name; on the CPU the toy's largest and smallest."""
        if self.setting.real:
            return {f"{size} GB": size * GB for size in (24, 16, 12, 8) if size * GB <= self.card_bytes()}
        if clip not in self._caps:
            whole = plan = self.training_plan(clip, 1000 * GB)
            with suppress(InputError):
                while True:
                    plan = next_smaller(plan)
            self._caps[clip] = {"whole": whole.vram_bytes, "smallest": plan.vram_bytes}
        return self._caps[clip]

    def expected_seconds(self, plan: MemoryPlan) -> float:
        """Of a step or pass: as planned, times what comparable ones took beyond their plans."""
        known = self.slowness.get(plan.costs.name)
        if known is None:
            known = max(self.slowness.values(), default=USUAL_SLOWNESS) if plan.step_seconds > 1 else USUAL_SLOWNESS
        return plan.step_seconds * known

    # ---- placing ----

    @contextmanager
    def placed(self, plan: MemoryPlan, *, num_experts: int = 2, cap: int | None = None) -> Iterator[Placed]:
        """Put experts where a plan wants them; afterwards they are on the host again.

        Args:
            plan: of training or of generation.
            num_experts: the first so many; what trains of the others waits on the host.
            cap: device memory that may be used, the driver's share included; None: all.
        """
        experts, others = self.experts[:num_experts], self.experts[num_experts:]
        lease, stack = Lease(self.pool), ExitStack()
        for expert in others:
            expert.move(torch.device("cpu"))
        rope_table.cache_clear()
        tidy()
        self._cap(cap)
        try:
            if plan.stored_bytes:
                visitors = num_experts if plan.outside == "host" else 0  # embeddings, which may take such a piece each
                self.pool.reserve(plan.costs.num_blocks + visitors, plan.stored_bytes)
            lease.reset()
            yield self._place(plan, experts, lease, stack)
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # before tensors are bound elsewhere, and host memory is lent to others
            self._cap(None)
            stack.close()
            lease.end()
            tidy()
            for expert in others:
                expert.move(self.device)

    def _place(self, plan: MemoryPlan, experts: Sequence[Expert], lease: Lease, stack: ExitStack) -> Placed:
        store = HostStore(lease, eight_bits=plan.eight_bit_store) if plan.store == "host" else None
        schedule = plan.schedule
        maths = FusedBlockMaths(
            BlockSchedule(
                head_groups=schedule.head_groups,
                token_chunk=schedule.token_chunk,
                keep_attention=schedule.keep_attention,
            )
        )
        ring = None
        if plan.streamed:
            ring = Ring(lease, max(_masters(expert).slot_bytes for expert in experts), min(2, len(plan.streamed)))
        for expert in experts:
            place_outside(expert.dit, self.device, embeddings=plan.outside, operations=lease)
            stack.callback(expert.move, self.device)
            for number, block in _masters(expert).blocks.items():
                if number not in plan.streamed:
                    buffer = lease.buffer(block.num_bytes)
                    assert block.flat is not None
                    lease.wait(lease.copy(buffer, block.flat[: block.num_bytes], after=lease.record()))
                    stack.enter_context(block.bound(buffer))
        runners, warm = {}, {}
        for expert in experts:
            blocks = list(expert.dit.blocks)
            runners[expert.name] = self._runner(expert, blocks, plan.streamed, ring, maths, store)
            warm[expert.name] = self._first(expert, blocks[:WARM_BLOCKS], plan.streamed, ring, maths, store)
        return Placed(plan=plan, experts=experts, lease=lease, runners=runners, warm=warm)

    def _runner(
        self,
        expert: Expert,
        blocks: Sequence[nn.Module],
        streamed: Sequence[int],
        ring: Ring | None,
        maths: BlockMaths,
        store: HostStore | None,
    ) -> StreamedBlocks:
        return StreamedBlocks(
            blocks,
            streamed=[number for number in streamed if number < len(blocks)],
            device=self.device,
            ring=ring,
            maths=maths,
            store=store,
            masters=_masters(expert),
        )

    def _first(
        self,
        expert: Expert,
        blocks: Sequence[nn.Module],
        streamed: Sequence[int],
        ring: Ring | None,
        maths: BlockMaths,
        store: HostStore | None,
    ) -> BlockRunner:
        """A runner that leaves out all but the first blocks."""
        runner = self._runner(expert, blocks, streamed, ring, maths, store)

        def first(all_blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
            return runner(all_blocks[: len(blocks)], x, *inputs)

        return first

    def _cap(self, num_bytes: int | None) -> None:
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            fraction = 1.0 if num_bytes is None else min(1.0, (num_bytes - DRIVER_BYTES) / total)
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)


def _masters(expert: Expert):
    assert expert.masters is not None
    return expert.masters


def measured_rates(pool: HostPool, device: torch.device) -> RateProfile:
    """The catalogue's rates of this card, with its copies as they are measured, alone; a 4090's on the CPU."""
    if device.type != "cuda":
        return CATALOGUE[UNKNOWN]
    name = torch.cuda.get_device_name(device)
    try:
        rates = find_rates(name)
    except InputError:
        rates = CATALOGUE[UNKNOWN]
    pool.reserve(1, COPY_BYTES)
    host, there = pool.take(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    host.zero_()

    def rate(target: Tensor, source: Tensor) -> float:
        seconds = [timed(device, lambda: target.copy_(source, non_blocking=True))[0] for _ in range(4)]
        return COPY_BYTES / min(seconds)

    rates = replace(rates, name=name, h2d=rate(there, host), d2h=rate(host, there))
    pool.free.append(host)
    return rates


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of what is issued to the device by a function, and its result; waits for the end."""
    if device.type != "cuda":
        started = time.perf_counter()
        result = run()
        return time.perf_counter() - started, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result
