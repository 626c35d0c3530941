"""Laws of the planner, on made-up models: it keeps to what there is, uses it, and says what is missing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from memory.costs import BlockCosts, ModelCosts, Schedule, Work
from memory.plan import DRIVER_BYTES, Limits, make_plan, next_smaller
from memory.plan_table import plan_record, plan_table
from memory.rates import CATALOGUE

GB = 10**9
CARD = CATALOGUE["4090"]
PLENTY = 10**15


def block(groups: int, *, keep: bool = False, activations: float = 4.0, tera: float = 40.0) -> BlockCosts:
    """A block that needs less in more groups, and takes a little longer."""
    return BlockCosts(
        schedule=Schedule(head_groups=groups, keep_attention=keep),
        forward_bytes=int(0.4 * activations * GB),
        backward_bytes=int(activations * GB / groups),
        kept_bytes=GB // 4 if keep else 0,
        kept_eight_bit_bytes=GB // 8 if keep else 0,
        forward=Work(linear=tera * 1e12),
        backward=Work(linear=2 * tera * 1e12, attention=0.0 if keep else 10e12, launches=100 * groups),
    )


def model(
    *, trains: bool = True, models: int = 2, checkpoint: float = 0.5, tera: float = 40.0, visiting: float = 0.0
) -> ModelCosts:
    return ModelCosts(
        name="toy",
        num_blocks=10,
        num_models=models,
        trains=trains,
        block_bytes=GB,
        outside_bytes=GB,
        visiting_bytes=int(visiting * GB),
        visitor_bytes=int(visiting * GB / 2),
        trained_bytes={"weights": GB // 2, "optimizer": GB // 4} if trains else {},
        optimizer_bytes=GB // 8,
        input_bytes=GB // 100,
        checkpoint_bytes=int(checkpoint * GB),
        checkpoint_eight_bit_bytes=int(checkpoint * GB / 4),
        outside_activation_bytes=GB // 2,
        outside=Work(traffic=1e9),
        blocks=tuple(
            block(g, keep=keep, tera=tera) for g in (1, 2, 4) for keep in ((False, True) if trains else (False,))
        ),
        advice={"ring of streamed blocks": "do less"},
    )


def plan(vram: float, ram: float = 1000.0, costs: ModelCosts | None = None, **limits):
    limits = Limits(vram_bytes=int(vram * GB), ram_bytes=int(ram * GB), **limits)
    return make_plan(costs or model(), limits=limits, rates=CARD)


def try_plan(*arguments, **limits):
    try:
        return plan(*arguments, **limits)
    except InputError:
        return None


sizes = st.floats(min_value=1, max_value=60)
models = st.builds(
    model,
    trains=st.booleans(),
    models=st.integers(1, 2),
    checkpoint=st.floats(0.01, 3),
    tera=st.floats(0.1, 100),
    visiting=st.sampled_from([0.0, 0.3, 0.9]),
)


@settings(max_examples=60, deadline=None)
@given(vram=sizes, ram=sizes, costs=models, may_map=st.booleans())
def test_a_plan_keeps_to_what_there_is(vram: float, ram: float, costs: ModelCosts, may_map: bool) -> None:
    found = try_plan(vram, ram, costs, may_map=may_map)
    if found is None:
        return
    assert found.vram_bytes <= vram * GB and found.ram_bytes <= ram * GB
    assert sum(found.device_bytes.values()) == found.vram_bytes >= found.tensor_bytes + DRIVER_BYTES
    assert min(found.device_bytes.values()) > 0 and min(found.host_bytes.values()) > 0
    assert len(set(found.streamed)) == len(found.streamed) and set(found.streamed) <= set(range(10))


@settings(max_examples=60, deadline=None)
@given(vram=sizes, more=st.floats(0, 20), ram=sizes, costs=models, may_map=st.booleans())
def test_more_device_memory_is_never_slower(vram, more, ram, costs, may_map) -> None:
    small, large = (try_plan(size, ram, costs, may_map=may_map) for size in (vram, vram + more))
    if small is None:
        return
    assert large is not None
    assert large.eight_bit_store <= small.eight_bit_store
    if large.eight_bit_store == small.eight_bit_store:
        assert large.step_seconds <= small.step_seconds
        assert large.stall_seconds <= small.stall_seconds or large.compute_seconds < small.compute_seconds


@settings(max_examples=30, deadline=None)
@given(ram=sizes, more=st.floats(0, 40), costs=models)
def test_more_host_memory_is_never_slower(ram, more, costs) -> None:
    small, large = (try_plan(12.0, size, costs) for size in (ram, ram + more))
    if small is not None:
        assert large is not None
        assert (large.eight_bit_store, large.step_seconds) <= (small.eight_bit_store, small.step_seconds)


@settings(max_examples=30, deadline=None)
@given(vram=sizes, costs=models)
def test_smaller_plans_need_less_until_there_is_none(vram: float, costs: ModelCosts) -> None:
    found = try_plan(vram, 100.0, costs)
    seen = []
    while found is not None and len(seen) < 100:
        seen.append(found.vram_bytes)
        try:
            found = next_smaller(found)
        except InputError as error:
            assert "smallest" in str(error)
            break
    assert seen == sorted(set(seen), reverse=True)
    assert len(seen) < 100


def test_a_smaller_plan_makes_a_difference_where_it_can() -> None:
    found = plan(24.0)
    assert next_smaller(found).vram_bytes <= 0.95 * found.vram_bytes


def test_the_sizes_that_an_error_names_are_enough() -> None:
    with pytest.raises(InputError, match="device memory") as error:
        plan(3.0)
    vram, ram = (float(size) for size in re.findall(r"([\d.]+) GB", str(error.value))[:2])
    assert "ring of streamed blocks" in str(error.value) and "do less" in str(error.value)
    assert plan(vram, ram).vram_bytes <= vram * GB
    assert try_plan(vram - 0.2, ram) is None
    with pytest.raises(InputError, match="host memory") as error:
        plan(vram, 5.0)
    ram = float(re.findall(r"at least ([\d.]+) GB of host memory", str(error.value))[0])
    assert plan(vram, ram).ram_bytes <= ram * GB
    assert try_plan(vram, ram - 0.2) is None


def test_everything_stays_where_there_is_room() -> None:
    found = plan(1000.0)
    assert found.streamed == () and found.store == "device" and not found.eight_bit_store
    assert found.schedule == Schedule(head_groups=1, keep_attention=True)
    assert found.h2d_bytes == found.d2h_bytes == 0 and found.stall_seconds == 0
    assert list(found.host_bytes) == ["system and process"]


def test_room_is_used_for_blocks() -> None:
    costs = model()
    for vram in (8.0, 10.0, 14.0, 20.0):
        found = plan(vram, costs=costs)
        spare = vram * GB - found.vram_bytes
        assert not found.streamed or spare < costs.num_models * costs.block_bytes


def test_what_waits_is_rounded_only_where_nothing_else_fits() -> None:
    least = min(ram for ram in range(1, 80) if try_plan(9.0, float(ram)))
    rounded = plan(9.0, float(least))
    assert rounded.eight_bit_store and rounded.store == "host"
    assert not plan(9.0, 1000.0).eight_bit_store
    assert not plan(40.0, 1000.0).eight_bit_store


def test_blocks_are_mapped_only_where_host_memory_is_short() -> None:
    assert plan(7.5, 1000.0, may_map=True).masters == "pinned"
    short = plan(7.5, 12.0, may_map=True)
    assert short.masters == "mapped"
    assert short.host_bytes["staging buffers"] == 2 * GB and "streamed blocks" not in short.host_bytes
    assert try_plan(7.5, 12.0) is None


def test_the_number_of_streamed_blocks_can_be_given() -> None:
    assert len(plan(40.0, streamed=7).streamed) == 7
    assert plan(40.0, streamed=0).streamed == ()
    with pytest.raises(InputError, match="2 streamed blocks"):
        plan(8.0, streamed=2)


def test_transfers_are_what_a_ring_of_two_has_to_move() -> None:
    """Against a ring that is played through: backward finds the last two blocks of forward, and so on."""

    def played(streamed: int) -> int:
        slots, moved = [0, 1][:streamed], 0  # the last backward ended at the first blocks
        for number in [*range(streamed), *reversed(range(streamed))]:
            if number not in slots:
                moved += 1
                slots = [*slots[-1:], number]
            else:
                slots = [*(slot for slot in slots if slot != number), number]
        return moved

    for streamed in (0, 1, 2, 3, 5, 10):
        found = plan(40.0, costs=model(models=1), streamed=streamed)
        assert found.h2d_bytes == played(streamed) * GB + found.d2h_bytes


def test_waiting_is_what_transfers_take_longer_than_computation() -> None:
    slow = replace(CARD, h2d=1e9, d2h=1e9)
    limits = Limits(vram_bytes=8 * GB, ram_bytes=PLENTY)
    found = make_plan(model(), limits=limits, rates=slow)
    assert found.stall_seconds > 0
    moved = len(found.streamed) * GB * 2 / 1e9
    assert found.step_seconds == pytest.approx(moved + found.d2h_bytes / 1e9, rel=0.15)
    fast = replace(CARD, h2d=1e15, d2h=1e15)
    assert make_plan(model(), limits=limits, rates=fast).stall_seconds == 0


def test_waiting_for_what_goes_out_counts_in_forward_alone() -> None:
    slow = replace(CARD, d2h=1e9)
    found = make_plan(model(), limits=Limits(vram_bytes=8 * GB, ram_bytes=PLENTY), rates=slow)
    forward = 10 * block(1).forward.seconds(slow, "bf16")
    assert found.stall_seconds == pytest.approx(found.d2h_bytes / 1e9 - forward)


def test_what_waits_on_the_device_is_there_for_every_block() -> None:
    found = plan(1000.0)
    assert found.device_bytes["waiting for backward"] == 10 * (GB // 2 + GB // 4)
    small = replace(model(), blocks=tuple(replace(b, forward_bytes=20 * GB) for b in model().blocks))
    found = plan(1000.0, costs=small)
    assert found.device_bytes["activations"] == 20 * GB
    assert found.device_bytes["waiting for backward"] == 10 * (GB // 2) + 9 * found.costs.blocks[1].kept_bytes


@pytest.mark.parametrize("trains", [False, True])
def test_weights_outside_the_blocks_go_to_the_host_only_where_that_saves_something(trains: bool) -> None:
    """They cost a transfer that nothing hides, and no device memory but the largest of them before the first block."""
    costs = model(trains=trains, visiting=0.9)
    roomy = plan(60.0, costs=costs)
    assert roomy.outside == "device" and roomy.stall_seconds == 0
    sizes = {}
    for visiting in (0.0, 0.9):
        found = plan(60.0, costs=model(trains=trains, visiting=visiting))
        while (smaller := next_smaller_or_none(found)) is not None:
            found = smaller
        sizes[visiting] = found
    least = sizes[0.9]
    assert least.outside == "host" and least.host_bytes["weights outside the blocks"] == costs.visiting_bytes
    assert sizes[0.0].vram_bytes - least.vram_bytes == costs.visiting_bytes
    assert least.stall_seconds >= costs.visiting_bytes / 2 / CARD.h2d  # of one model at a time
    assert least.h2d_bytes - sizes[0.0].h2d_bytes == costs.visiting_bytes // 2
    large = replace(costs, visitor_bytes=20 * GB)
    with pytest.raises(InputError, match="at least"):
        plan(least.vram_bytes / GB, costs=large)


def next_smaller_or_none(found):
    try:
        return next_smaller(found)
    except InputError:
        return None


def test_a_forward_pass_keeps_nothing() -> None:
    found = plan(8.0, costs=model(trains=False))
    assert found.d2h_bytes == 0 and "waiting for backward" not in found.host_bytes
    assert not found.schedule.keep_attention


def test_a_card_without_the_recipes_products_is_refused() -> None:
    with pytest.raises(InputError, match="3090"):
        limits = Limits(vram_bytes=PLENTY, ram_bytes=PLENTY)
        make_plan(replace(model(), products="fp8"), limits=limits, rates=CATALOGUE["3090"])


def test_the_table_says_what_the_plan_says() -> None:
    found = plan(12.0)
    table = plan_table(found)
    for name, count in {**found.device_bytes, **found.host_bytes}.items():
        assert re.search(rf"^  {re.escape(name)} +{count / GB:.2f}$", table, re.MULTILINE), name
    assert f"{len(found.streamed)} pass through a ring" in table
    record = plan_record(found)
    assert record["vram_bytes"] == found.vram_bytes and record["streamed"] == list(found.streamed)
