"""Laws of placement: however a plan places two experts, they compute the same; a smaller plan goes on with it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from core.errors import InputError
from memory.plan import MemoryPlan
from memory.rates import find_rates
from memory.runners import run_plain
from networks import lora
from tests.wan_ext.models import lively_dit
from wan_ext.configs import VARIANTS
from wan_ext.dit import WanDiT
from wan_ext.placement import Placement
from wan_ext.planning import plan_training

TINY = VARIANTS["tiny"]
VARIANT = replace(TINY, dit=replace(TINY.dit, num_layers=5))
CPU = torch.device("cpu")


def plan_of(**limits: int | None) -> MemoryPlan:
    return plan_training(
        VARIANT,
        frames=9,
        height=64,
        width=96,
        rank=4,
        experts=("high", "low"),
        recipe=None,
        rates=find_rates("4090"),
        bf16=False,
        optimizer="AdamW",
        **({"vram_bytes": 4 * 10**9, "ram_bytes": 16 * 10**9} | limits),
    )


def experts() -> list[WanDiT]:
    found = []
    for seed in range(2):
        dit = lively_dit(VARIANT.dit, seed)
        network = lora.create_network(
            dit, variant=VARIANT, expert="high" if seed else "low", rank=4, alpha=4.0, network_args={}
        )
        for adapter in network.adapters.values():
            torch.nn.init.normal_(adapter.up, std=0.05, generator=torch.Generator().manual_seed(seed))
        found.append(dit)
    return found


def gradients(dit: WanDiT, run_blocks) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    noised = torch.randn(1, VARIANT.dit.in_dim, 3, 8, 12, generator=generator)
    context = torch.randn(1, 7, VARIANT.dit.text_dim, generator=generator)
    dit.zero_grad(set_to_none=True)
    velocity = dit(noised, timestep=torch.tensor([700.0]), context=context, run_blocks=run_blocks)
    velocity.square().mean().backward()
    return velocity.detach(), [p.grad.clone() for p in dit.parameters() if p.grad is not None]


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    assert len(ours[1]) == len(theirs[1]) > 0
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def tight() -> MemoryPlan:
    """A plan under which every block of both experts streams and what waits does so on the host."""
    return plan_of(vram_bytes=smallest_vram(), blocks_to_swap=5)


def smallest_vram() -> int:
    plan = plan_of(blocks_to_swap=5)
    return plan.vram_bytes


@pytest.mark.parametrize("how", ["roomy", "tight", "swap", "checkpoint"])
def test_both_experts_compute_as_without_any_placement(how: str) -> None:
    dits = experts()
    plain = [gradients(copy.deepcopy(dit), run_plain) for dit in dits]
    placement = {
        "roomy": lambda: Placement(CPU, plan=plan_of()),
        "tight": lambda: Placement(CPU, plan=replace(tight(), store="host")),
        "swap": lambda: Placement(CPU, blocks_to_swap=3),
        "checkpoint": lambda: Placement(CPU, checkpoint=True),
    }[how]()
    runners = [placement.place(dit) for dit in dits]
    for _ in range(2):  # the experts take turns with one ring and one store
        for dit, runner, expected in zip(dits, runners, plain, strict=True):
            assert_same(gradients(dit, runner), expected)


def test_embeddings_on_the_host_change_no_bit_and_what_trains_in_them_still_trains() -> None:
    results, originals = [], experts()
    for outside in ("device", "host"):
        dits = copy.deepcopy(originals)
        for dit in dits:
            dit.time_embedding[0].bias.requires_grad_()
        placement = Placement(CPU, plan=replace(tight(), outside=outside))
        runners = [placement.place(dit) for dit in dits]
        results.append([gradients(dit, runner) for dit, runner in zip(dits, runners, strict=True)])
        for dit in dits:
            weights = [p for module in dit.embeddings for p in module.parameters() if not p.requires_grad]
            packed = len({p.untyped_storage().data_ptr() for p in weights}) == 1
            assert packed == (outside == "host") and len(weights) == 9
    for on_device, on_host in zip(*results, strict=True):
        assert torch.equal(on_device[0], on_host[0])
        assert len(on_device[1]) == len(on_host[1])
        assert all(torch.equal(a, b) for a, b in zip(on_device[1], on_host[1], strict=True))


def test_a_smaller_plan_goes_on_with_the_same_results() -> None:
    dits = experts()
    plain = [gradients(copy.deepcopy(dit), run_plain) for dit in dits]
    placement = Placement(CPU, plan=plan_of())
    runners = [placement.place(dit) for dit in dits]
    needed, outside = [placement.plan.vram_bytes], {placement.plan.outside}
    with pytest.raises(InputError, match="smallest"):
        for _ in range(60):
            needed.append(placement.shrink().vram_bytes)
            outside.add(placement.plan.outside)
            for dit, runner, expected in zip(dits, runners, plain, strict=True):
                if not placement.plan.eight_bit_store:
                    assert_same(gradients(dit, runner), expected)
    assert outside == {"device", "host"}
    assert len(needed) > 2 and needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)
