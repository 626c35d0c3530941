"""A memory plan as a person reads it, and as a program does.

What: `plan_table` is the text that training, generation and `tools/plan_memory.py` print: what was chosen and why,
device and host memory by part, transfers and time. `plan_record` is the same as plain values for JSON.
"""

from __future__ import annotations

from memory.plan import DRIVER, FRAGMENTS, GB, MemoryPlan

WIDTH = 46


def plan_table(plan: MemoryPlan) -> str:
    """Several lines without a final line break."""
    costs, limits = plan.costs, plan.limits
    lines = [f"{costs.name}, {'training' if costs.trains else 'one forward pass'} on {plan.rates.name}", ""]
    lines += [f"  {words}" for words in choices(plan)]
    lines += ["", _header("device memory at the worst moment", "GB")]
    lines += [_row(name, count) for name, count in plan.device_bytes.items() if name not in (FRAGMENTS, DRIVER)]
    lines.append(_row("tensors, what is measured", plan.tensor_bytes))
    lines += [_row(name, count) for name, count in plan.device_bytes.items() if name in (FRAGMENTS, DRIVER)]
    lines.append(_row("together", plan.vram_bytes, f"of {limits.vram_bytes / GB:.1f}"))
    lines += ["", _header("host memory", "GB")]
    lines += [_row(name, count) for name, count in plan.host_bytes.items()]
    lines.append(_row("together", plan.ram_bytes, f"of {limits.ram_bytes / GB:.1f}"))
    step = "step" if costs.trains else "pass"
    lines += [
        "",
        _header(f"a {step}, estimated", ""),
        f"  {'to the device':{WIDTH}}{plan.h2d_bytes / GB:8.1f} GB, {plan.h2d_bytes / plan.rates.h2d:.2f} s",
        f"  {'from the device':{WIDTH}}{plan.d2h_bytes / GB:8.1f} GB, {plan.d2h_bytes / plan.rates.d2h:.2f} s",
        f"  {'computation':{WIDTH}}{plan.compute_seconds:8.2f} s",
        f"  {'waiting for transfers':{WIDTH}}{plan.stall_seconds:8.2f} s, {plan.stall_share:.1%}",
        f"  {f'a {step}':{WIDTH}}{plan.step_seconds:8.2f} s",
    ]
    return "\n".join(lines)


def choices(plan: MemoryPlan) -> list[str]:
    """What was chosen and why, a sentence for each."""
    costs, total, streamed = plan.costs, plan.costs.num_blocks, len(plan.streamed)
    models = "" if costs.num_models == 1 else f" of each of {costs.num_models} models"
    found = []
    if not streamed:
        found.append(f"weights: all {total} blocks{models} stay on the device")
    else:
        where = "pinned host memory" if plan.masters == "pinned" else "the 8-bit file"
        whose = "" if plan.limits.streamed is None else ", as was asked for"
        found.append(
            f"weights: {total - streamed} of {total} blocks{models} stay on the device, {streamed} pass through a ring "
            f"from {where}{whose}"
        )
    if plan.outside == "host":
        found.append("weights outside the blocks: in host memory, copied to the device for each forward")
    found.append(f"blocks: {plan.schedule}")
    if costs.trains and plan.store == "host":
        bits = " in 8 bits, which rounds them" if plan.eight_bit_store else ""
        what = "inputs of the blocks and attentions" if plan.schedule.keep_attention else "inputs of the blocks"
        found.append(f"{what} wait for backward in host memory{bits}")
    elif costs.trains:
        found.append("what waits for backward stays on the device")
    return found


def plan_record(plan: MemoryPlan) -> dict[str, object]:
    """The plan as values that JSON knows. Bytes and seconds."""
    return {
        "what": plan.costs.name,
        "card": plan.rates.name,
        "trains": plan.costs.trains,
        "head_groups": plan.schedule.head_groups,
        "token_chunk": plan.schedule.token_chunk,
        "keep_attention": plan.schedule.keep_attention,
        "streamed": list(plan.streamed),
        "num_blocks": plan.costs.num_blocks,
        "store": plan.store,
        "eight_bit_store": plan.eight_bit_store,
        "masters": plan.masters,
        "outside": plan.outside,
        "device_bytes": plan.device_bytes,
        "tensor_bytes": plan.tensor_bytes,
        "vram_bytes": plan.vram_bytes,
        "host_bytes": plan.host_bytes,
        "ram_bytes": plan.ram_bytes,
        "h2d_bytes": plan.h2d_bytes,
        "d2h_bytes": plan.d2h_bytes,
        "compute_seconds": plan.compute_seconds,
        "stall_seconds": plan.stall_seconds,
        "step_seconds": plan.step_seconds,
    }


def _header(left: str, right: str) -> str:
    return f"{left:{WIDTH + 2}}{right:>8}".rstrip()


def _row(name: str, count: int, after: str = "") -> str:
    return f"  {name:{WIDTH}}{count / GB:8.2f} {after}".rstrip()
