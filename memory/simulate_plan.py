"""A plan's transfers played through on the simulated device, by the engine that will run it.

What: the planner prices a plan by sums (`memory.plan`); `simulate_plan` runs the plan's blocks, ring and store on the
simulator and reports what a step would wait. The two agree but for the ends of a step, where the order matters.

Cost: 0.1 s for 40 blocks, too much for each of the hundreds of plans that the planner prices.
"""

from __future__ import annotations

from dataclasses import replace

from memory.plan import MemoryPlan
from memory.simulate_step import BlockTimes, StepReport, simulate_step


def simulate_plan(plan: MemoryPlan) -> StepReport:
    """A step, or a forward pass, after others like it."""
    costs = plan.costs
    block = next(block for block in costs.blocks if block.schedule == plan.schedule)
    rates = plan.rates if plan.masters == "pinned" else replace(plan.rates, h2d=min(plan.rates.h2d, plan.rates.disk))
    times = BlockTimes(
        weight_bytes=costs.block_bytes,
        stored_bytes=plan.stored_bytes,
        forward_seconds=block.forward.seconds(rates, costs.products),
        backward_seconds=block.backward.seconds(rates, costs.products),
    )
    outside = plan.compute_seconds - costs.num_blocks * (times.forward_seconds + times.backward_seconds)
    if plan.outside == "host":  # before the first block, with nothing beside it
        outside += costs.visiting_bytes / costs.num_models / plan.rates.h2d
    return simulate_step(
        [times] * costs.num_blocks,
        streamed=plan.streamed,
        rates=rates,
        trains=costs.trains,
        outside_seconds=outside,
    )
