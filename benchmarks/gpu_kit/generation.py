"""Denoising: seconds of one forward pass, weights streamed and resident, and what a change of expert costs.

What: `generation_row` runs high, high, low, low. The change is what the first pass of the low-noise expert takes beyond
its second. Guidance runs two passes a step; a row is one pass, its LoRA not merged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_kit.bench import Bench, timed
from benchmarks.gpu_kit.model import make_batch, velocity
from benchmarks.gpu_kit.settings import Clip


def generation_row(bench: Bench, clip: Clip, cap: int | None, *, name: str) -> dict[str, Any]:
    """One row: streamed as the planner says for a card of `cap` bytes, or all resident (None).

    Raises:
        InputError: no plan fits.
    """
    plan = bench.generation_plan(clip, bench.card_bytes() if cap is None else cap)
    if cap is None:
        plan = replace(plan, streamed=(), outside="device")
    on_cuda = bench.device.type == "cuda"
    seconds: dict[str, list[float]] = {}
    waits = []
    with bench.placed(plan, cap=cap) as placed, torch.no_grad():
        batch = make_batch(bench.setting.variant, clip, device=bench.device, seed=5)
        for expert in placed.experts:
            velocity(expert.dit, batch, placed.warm[expert.name])
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        finite = True
        for expert in placed.experts:
            for _ in range(2):
                placed.lease.reset()
                run = placed.runners[expert.name]
                took, result = timed(bench.device, lambda expert=expert, run=run: velocity(expert.dit, batch, run))
                seconds.setdefault(expert.name, []).append(took)
                waits.append(placed.lease.waited())
                finite = finite and bool(torch.isfinite(result).all())
        peak = torch.cuda.max_memory_allocated() if on_cuda else None
    if not finite:
        raise ValueError(f"{clip}: expected finite velocities, found NaN or infinity")
    last = placed.experts[-1].name
    return {
        "recipe": bench.recipe,
        "clip": str(clip),
        "tokens": bench.setting.tokens(clip),
        "card": name,
        "streamed": len(plan.streamed),
        "schedule": str(plan.schedule),
        "seconds": min(min(found) for found in seconds.values()),
        "all_seconds": seconds,
        "switch_seconds": seconds[last][0] - seconds[last][1],
        "stall_seconds": min(waits) if on_cuda else None,
        "planned_bytes": plan.tensor_bytes if cap is not None else None,
        "measured_bytes": peak,
    }
