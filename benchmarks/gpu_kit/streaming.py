"""Streamed is resident, bit for bit: optimizer steps of both experts through one ring and one host store.

What: some blocks of real width, both experts in turn, losses and trained parameters after several steps of AdamW:
once with everything on the device, once more (is the device itself deterministic?), and streamed, by
`wan_ext.placement.Placement` as training does it.

How: PyTorch's deterministic algorithms are on and cuDNN's attention is off, because backward kernels of attention may
sum in any order otherwise; a second row, which proves nothing where the device differs from itself, has the defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kit.model import Expert, loss_of, make_batch, make_expert, trained
from benchmarks.gpu_kit.optimizer import AdamW8
from benchmarks.gpu_kit.records import tidy
from benchmarks.gpu_kit.settings import GB, Setting
from memory.plan import MemoryPlan
from memory.quant import parse_recipe
from memory.rates import CATALOGUE
from wan_ext.configs import WanVariant
from wan_ext.placement import Placement
from wan_ext.planning import plan_training

Result = tuple[list[float], list[Tensor]]


def identity_row(setting: Setting, recipe: str, *, keep_attention: bool, deterministic: bool) -> dict[str, Any]:
    """One comparison; `passed` is None where the device gives another result each time."""
    variant = replace(setting.variant, dit=replace(setting.variant.dit, num_layers=setting.few_blocks))
    plan = plan_training(
        variant,
        frames=setting.image.frames,
        height=setting.image.height,
        width=setting.image.width,
        rank=setting.rank,
        experts=variant.experts,
        recipe=recipe,
        vram_bytes=1000 * GB,
        ram_bytes=1000 * GB,
        rates=CATALOGUE["h200"],
    )
    plan = replace(plan, schedule=replace(plan.schedule, keep_attention=keep_attention))
    resident = replace(plan, streamed=(), store="device")
    streamed = replace(plan, streamed=tuple(range(setting.few_blocks)), store="host", outside="host")
    with _deterministic(deterministic and setting.device.type == "cuda"):
        first, again, other = (_run(setting, variant, recipe, one) for one in (resident, resident, streamed))
    same_again, same = _equal(first, again), _equal(first, other)
    return {
        "check": f"{setting.steps} steps streamed = resident, {recipe}, attention "
        f"{'kept' if keep_attention else 'recomputed'}, {'deterministic kernels' if deterministic else 'defaults'}",
        "tokens": setting.tokens(setting.image),
        "resident_is_resident": same_again,
        "streamed_is_resident": same,
        "largest_difference": _difference(first, other),
        "losses": other[0],
        "required": deterministic,
        "passed": same if same_again or same else (False if deterministic else None),
    }


def _run(setting: Setting, variant: WanVariant, recipe: str, plan: MemoryPlan) -> Result:
    """Losses and final parameters of both experts."""
    device = setting.device
    experts: list[Expert] = [
        make_expert(
            variant,
            name,
            recipe=parse_recipe(recipe),
            rank=setting.rank,
            device=device,
            host=None,
            seed=seed,
        )
        for seed, name in enumerate(variant.experts)
    ]
    placement = Placement(device, plan=plan)
    runners = [placement.place(expert.dit) for expert in experts]
    for expert in experts:  # anew, on the parameters where they are now
        expert.optimizer = AdamW8(expert.network.parameters(), learning_rate=1e-3)
    batch = make_batch(variant, setting.image, device=device, seed=11)
    losses = []
    for number in range(setting.steps):
        which = (number // 2) % 2  # high, high, low, low
        loss = loss_of(experts[which].dit, batch, runners[which])
        loss.backward()
        experts[which].optimizer.step()
        losses.append(float(loss.detach()))
    result = losses, [tensor for expert in experts for tensor in trained(expert)]
    placement.forget()
    del experts, runners, placement
    tidy()
    return result


def _equal(one: Result, other: Result) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def _difference(one: Result, other: Result) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one[1], other[1], strict=True))


@contextmanager
def _deterministic(active: bool) -> Iterator[None]:
    if not active:
        yield
        return
    with_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)  # with warn_only, attention would stay as it is
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
