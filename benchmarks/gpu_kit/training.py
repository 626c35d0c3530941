"""Training steps under the memory of small cards: seconds, memory planned and measured, and time lost to transfers.

What: for a clip and a cap, the planner's plan is carried out and some optimizer steps are timed, the experts in turn.
A row says which plan, its bytes against the allocator's peak, seconds (median), the bytes that travelled, how long they
take alone (at the measured rate) and how long the computation stood still for them: the waits that were timed, and the
embeddings' weights where they are copied for each forward, in the computation's own queue. `resident_row` is the same
schedule with all weights on the device and no cap.

How: where both experts do not fit into a card, the row is of one of them and says so. When memory runs out all the
same, the planner's next smaller plan is tried, as training does, up to twice.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_kit.bench import Bench, Placed, timed
from benchmarks.gpu_kit.model import Batch, Expert, loss_of, make_batch
from benchmarks.gpu_kit.settings import Clip
from memory.plan import MemoryPlan, next_smaller
from memory.runners import BlockRunner


def training_row(bench: Bench, clip: Clip, cap: int, *, name: str, steps: int) -> dict[str, Any]:
    """One row: the planner's plan for a card of `cap` bytes.

    Raises:
        InputError: no plan fits, for one expert either.
        torch.OutOfMemoryError: of the next smaller plan too.
    """
    plan, num_experts = bench.best_training_plan(clip, cap)
    shortages = 0
    while True:
        try:
            figures = _measure(bench, clip, plan, num_experts=num_experts, cap=cap, steps=steps)
            break
        except torch.OutOfMemoryError:
            shortages += 1
            if shortages > 2:
                raise
        plan = next_smaller(plan)
    return {
        "recipe": bench.recipe,
        "clip": str(clip),
        "tokens": bench.setting.tokens(clip),
        "card": name,
        "experts": num_experts,
        "out_of_memory_before": shortages,
        **_choice(plan),
        "planned_bytes": plan.tensor_bytes,
        "planned_parts": plan.device_bytes,
        "planned_seconds": plan.step_seconds,
        **figures,
    }


def resident_row(bench: Bench, clip: Clip, like: MemoryPlan, *, steps: int) -> dict[str, Any]:
    """One row: the schedule of a plan with all weights of one expert on the device, and no cap.

    What waits for backward waits there too where there is room.
    """
    waiting = like.stored_bytes * like.costs.num_blocks
    resident = like.costs.num_blocks * like.costs.block_bytes
    room = bench.card_bytes() - like.vram_bytes - resident
    if room < 0:
        raise torch.OutOfMemoryError(f"{clip}: the weights do not fit on this card")
    plan = replace(like, streamed=(), outside="device")
    if waiting < room and not like.eight_bit_store:
        plan = replace(plan, store="device", stored_bytes=0)
    figures = _measure(bench, clip, plan, num_experts=1, cap=None, steps=steps)
    return {
        "recipe": bench.recipe,
        "clip": str(clip),
        "tokens": bench.setting.tokens(clip),
        "card": "whole",
        "experts": 1,
        **_choice(plan),
        **figures,
    }


def _choice(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "schedule": str(plan.schedule),
        "streamed": len(plan.streamed),
        "embeddings": plan.outside,
        "store": f"{plan.store}, 8 bits" if plan.eight_bit_store else plan.store,
    }


def _measure(
    bench: Bench, clip: Clip, plan: MemoryPlan, *, num_experts: int, cap: int | None, steps: int
) -> dict[str, Any]:
    device, on_cuda = bench.device, bench.device.type == "cuda"
    with bench.placed(plan, num_experts=num_experts, cap=cap) as placed:
        batch = make_batch(bench.setting.variant, clip, device=device, seed=7)
        for expert in placed.experts:
            step(expert, batch, placed.warm[expert.name], trains=False)
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        retries = _retries() if on_cuda else 0
        seconds, waits, losses, moved = _steps(bench, placed, batch, steps)
        visits = plan.costs.visiting_bytes // plan.costs.num_models if plan.outside == "host" else 0
        found: dict[str, Any] = {
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "h2d_bytes": moved[0] + visits,
            "d2h_bytes": moved[1],
            "transfer_seconds": max((moved[0] + visits) / bench.rates.h2d, moved[1] / bench.rates.d2h),
            "stall_seconds": statistics.median(waits) + visits / bench.rates.h2d if on_cuda else None,
            "measured_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
            "reserved_bytes": torch.cuda.max_memory_reserved() if on_cuda else None,
            "allocator_retries": _retries() - retries if on_cuda else None,
            "losses": losses,
        }
    if on_cuda and cap is not None:
        if plan.step_seconds > 1:  # short ones have costs of their own
            bench.slowness[plan.costs.name] = found["seconds"] / plan.step_seconds
    return found


def _steps(
    bench: Bench, placed: Placed, batch: Batch, steps: int
) -> tuple[list[float], list[float], list[float], tuple[int, int]]:
    """Seconds and seconds of waiting of each step, losses, and bytes to and from the device of the last one."""
    seconds, waits, losses = [], [], []
    moved = (0, 0)
    for number in range(steps):
        expert = placed.experts[number % len(placed.experts)]
        placed.lease.reset()

        def one(expert: Expert = expert) -> torch.Tensor:
            return step(expert, batch, placed.runners[expert.name])

        took, loss = timed(bench.device, one)
        seconds.append(took)
        waits.append(placed.lease.waited())
        losses.append(float(loss))
        moved = (placed.lease.h2d_bytes, placed.lease.d2h_bytes)
    if not all(abs(loss) < float("inf") for loss in losses):
        raise ValueError(f"{placed.plan.costs.name}: expected finite losses, found {losses}")
    return seconds, waits, losses, moved


def step(expert: Expert, batch: Batch, run_blocks: BlockRunner, *, trains: bool = True) -> torch.Tensor:
    """One optimizer step, or without `trains` its gradients alone, which are thrown away; the loss."""
    loss = loss_of(expert.dit, batch, run_blocks)
    loss.backward()
    if trains:
        expert.optimizer.step()
    else:
        expert.network.zero_grad(set_to_none=True)
    return loss.detach()


def _retries() -> int:
    """How often the allocator had to give memory back to the driver to go on."""
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
