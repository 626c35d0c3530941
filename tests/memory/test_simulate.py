"""The simulated device: its times are those counted by hand, breaches of order are found, the engine commits none."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_blocks import inputs, make_blocks

import memory.simulate_step
from core.errors import InputError
from memory.rates import CATALOGUE, RateProfile, find_rates
from memory.runners import Recompute
from memory.simulate import META, LawBroken, SimulatedDevice
from memory.simulate_step import BlockTimes, simulate_step
from memory.store import HostStore
from memory.stream import Ring, StreamedBlocks, ring_bytes, spread

RATES = RateProfile(
    name="a byte a second",
    vram_bytes=1,
    h2d=1.0,
    d2h=2.0,
    device_memory=1e3,
    bf16=1.0,
    int8=1.0,
    fp8=None,
    attention_forward=1.0,
    attention_backward=1.0,
)


def scene(num_bytes: int = 100):
    """A device, a buffer on it, and host memory of the same size."""
    device = SimulatedDevice(RATES)
    return device, device.buffer(num_bytes), device.host(num_bytes)


# ---- times -----------------------------------------------------------------------------------------------------------


def test_times_are_those_counted_by_hand() -> None:
    device, slot, host = scene()
    other, result = device.buffer(100), device.host(100)
    first = device.copy(slot, host, after=None)  # 0 to 100
    second = device.copy(other, host, after=None)  # 100 to 200
    device.wait(first)
    device.compute("one", 30.0, reads=[slot])  # 100 to 130: leads by 100
    device.wait(second)
    device.compute("two", 30.0, reads=[other])  # 200 to 230: stalls 70
    device.free(slot)
    third = device.copy(slot, host, after=device.record())  # 230 to 330
    device.copy(result, other, after=device.record())  # 230 to 280, beside it
    device.compute("three", 200.0)  # 230 to 430
    device.wait(third)
    device.compute("four", 1.0, reads=[slot])  # 430 to 431
    report = device.report()
    assert (report.seconds, report.makespan, report.compute_seconds) == (431.0, 431.0, 261.0)
    assert (report.h2d_seconds, report.d2h_seconds, report.h2d_bytes, report.d2h_bytes) == (300.0, 50.0, 300, 100)
    assert (report.lead_seconds, report.stall_seconds) == (100.0, 70.0)
    assert report.waits == (("one", 100.0), ("two", 70.0))


def test_the_host_issues_nothing_before_it_has_waited() -> None:
    device, slot, host = scene()
    copied = device.copy(slot, host, after=None)
    copied.synchronize()
    device.compute("late", 1.0, reads=[slot])  # and needs no further wait
    assert device.report().seconds == 101.0


def test_a_restart_begins_a_new_report() -> None:
    device, slot, host = scene()
    device.wait(device.copy(slot, host, after=None))
    device.compute("first", 5.0, reads=[slot])
    device.restart()
    device.compute("second", 7.0, reads=[slot])
    report = device.report()
    assert (report.seconds, report.compute_seconds, report.stall_seconds, report.h2d_bytes) == (7.0, 7.0, 0.0, 0)


def test_operations_of_pytorch_take_the_time_of_their_bytes() -> None:
    device, slot, host = scene()
    device.wait(device.copy(slot, host, after=None))
    device.restart()
    with device.watched():
        content = slot[:80].view(torch.float32)  # views are free
        content.mul_(2.0)
        torch.ones(5, device=META).add_(1.0)  # memory that plays no part
    assert device.report().compute_seconds == pytest.approx(0.08)


# ---- laws ------------------------------------------------------------------------------------------------------------


def reads_before_ready():
    device, slot, host = scene()
    device.copy(slot, host, after=None)
    device.compute("block", 1e9)  # in time, the copy has long ended
    device.compute("next", 1.0, reads=[slot])


def reads_a_part_before_ready():
    device, slot, host = scene()
    device.wait(device.copy(slot[:50], host[:50], after=None))
    device.copy(slot[50:], host[50:], after=None)
    device.compute("fine", 1.0, reads=[slot[:50]])
    device.compute("wrong", 1.0, reads=[slot[49:51]])


def reads_what_nobody_wrote():
    device, slot, host = scene()
    device.wait(device.copy(slot[:50], host[:50], after=None))
    device.compute("wrong", 1.0, reads=[slot[40:60]])


def reads_what_was_freed():
    device, slot, host = scene()
    device.wait(device.copy(slot, host, after=None))
    device.free(slot)
    device.compute("wrong", 1.0, reads=[slot])


def copies_over_what_is_read():
    device, slot, host = scene()
    device.wait(device.copy(slot, host, after=None))
    free = device.record()
    device.compute("block", 1.0, reads=[slot])
    device.free(slot)
    device.copy(slot, host, after=free)


def copies_over_what_nobody_freed():
    device, slot, host = scene()
    device.wait(device.copy(slot, host, after=None))
    device.copy(slot, host, after=device.record())


def copies_out_before_it_is_computed():
    device, slot, host = scene()
    before = device.record()
    device.compute("block", 1.0, writes=[slot])
    device.copy(host, slot, after=before)


def brings_back_before_it_has_left():
    device, slot, host = scene()
    device.compute("block", 1.0, writes=[slot])
    device.copy(host, slot, after=device.record())
    device.copy(device.buffer(100), host, after=device.record())


def frees_what_is_copied_out():
    device, slot, host = scene()
    device.compute("block", 1.0, writes=[slot])
    device.copy(host, slot, after=device.record())
    device.free(slot)


def computes_over_what_is_copied_out():
    device, _, host = scene()
    made = torch.empty(100, dtype=torch.uint8, device=META)
    device.compute("block", 1.0, writes=[made])
    device.copy(host, made, after=device.record())
    device.compute("next", 1.0, writes=[made])


def lets_go_what_is_copied_out():
    device, _, host = scene()
    made = torch.empty(100, dtype=torch.uint8, device=META)
    device.compute("block", 1.0, writes=[made])
    device.copy(host, made, after=device.record())
    del made
    device.compute("next", 1.0)


def lets_the_host_write_what_is_copied():
    device, slot, host = scene()
    device.wait(device.copy(slot, host, after=None))  # the computation has waited, the host has not
    with device.watched():
        host.zero_()


BREACHES = {
    reads_before_ready: "next may read device buffer 1 of 100 bytes before copy 1 in has written it",
    reads_a_part_before_ready: "wrong may read device buffer 1 of 100 bytes before copy 2 in has written it",
    reads_what_nobody_wrote: "wrong reads device buffer 1 of 100 bytes before anything was written there",
    reads_what_was_freed: "wrong reads device buffer 1 of 100 bytes before anything was written after it was freed",
    copies_over_what_is_read: "copy 2 in may overwrite device buffer 1 of 100 bytes before block has read it",
    copies_over_what_nobody_freed: "copy 2 in overwrites device buffer 1 of 100 bytes, whose content nobody has freed",
    copies_out_before_it_is_computed: "copy 1 out may read device buffer 1 of 100 bytes before block has written it",
    brings_back_before_it_has_left: "copy 1 in may read host memory 1 of 100 bytes before copy 1 out has written it",
    frees_what_is_copied_out: "device buffer 1 of 100 bytes was freed while copy 1 out may still be reading it",
    computes_over_what_is_copied_out: "next may overwrite tensor 1 of 100 bytes before copy 1 out has read it",
    lets_go_what_is_copied_out: "tensor 1 of 100 bytes was let go while copy 1 out may still use it",
    lets_the_host_write_what_is_copied: "the host may touch host memory 1 of 100 bytes before copy 1 in has ended",
}


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.__name__)
def test_a_breach_is_refused_with_names(breach) -> None:
    with pytest.raises(LawBroken, match=re.escape(BREACHES[breach])):
        breach()


def test_the_same_in_order_is_no_breach() -> None:
    device, slot, host = scene()
    made = torch.empty(100, dtype=torch.uint8, device=META)
    device.compute("block", 1.0, writes=[made])
    out = device.copy(host, made, after=device.record())
    device.wait(out)
    del made
    device.wait(device.copy(slot, host, after=device.record()))
    device.compute("next", 1.0, reads=[slot])
    device.free(slot)
    copied = device.copy(slot, host, after=device.record())
    copied.synchronize()
    with device.watched():
        host.zero_()
    device.compute("last", 1.0, reads=[slot])


def test_events_of_another_device_are_refused() -> None:
    device, _, _ = scene()
    with pytest.raises(TypeError, match="of this device"):
        device.wait(scene()[0].record())


# ---- the engine commits none -----------------------------------------------------------------------------------------


class Careless(SimulatedDevice):
    """Copies into and out of buffers whatever still happens there."""

    def copy(self, target, source, *, after):
        return super().copy(target, source, after=None)


class Impatient(SimulatedDevice):
    """Computes without waiting for copies."""

    def wait(self, event) -> None:
        pass


class Early(SimulatedDevice):
    """Records the point before the last computation instead of the one after it."""

    point = None

    def compute(self, name, seconds, *, reads=(), writes=()) -> None:
        self.point = super().record()
        super().compute(name, seconds, reads=reads, writes=writes)

    def record(self):
        return self.point or super().record()


class Forgetful(SimulatedDevice):
    """Frees nothing."""

    def free(self, buffer) -> None:
        pass


BLOCKS = [BlockTimes(weight_bytes=1000, stored_bytes=600, forward_seconds=1.0, backward_seconds=2.0)] * 6


@pytest.mark.parametrize(
    ("device", "message"),
    [(Careless, "may overwrite"), (Impatient, "may read"), (Early, "may overwrite"), (Forgetful, "nobody has freed")],
)
@pytest.mark.parametrize("stored", [0, 600])
def test_an_engine_whose_order_is_broken_on_purpose_is_refused(monkeypatch, device, message: str, stored: int) -> None:
    blocks = [dataclasses.replace(times, stored_bytes=stored) for times in BLOCKS]
    simulate_step(blocks, streamed=range(6), rates=RATES)
    monkeypatch.setattr(memory.simulate_step, "SimulatedDevice", device)
    with pytest.raises(LawBroken, match=message if not stored else "may|nobody"):
        simulate_step(blocks, streamed=range(6), rates=RATES)


@pytest.mark.parametrize("device", [SimulatedDevice, Careless, Impatient])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_real_blocks_keep_the_laws(device, eight_bits: bool) -> None:
    """Every operation of forward, recomputation, packing and rounding is seen by the simulator."""
    blocks = make_blocks(5).to(META)
    simulated = device(RATES)
    runner = StreamedBlocks(
        blocks,
        streamed=(0, 2, 3, 4),
        device=META,
        ring=Ring(simulated, ring_bytes(blocks) // 2),
        maths=Recompute(),
        store=HostStore(simulated, eight_bits=eight_bits),
    )
    x, shift = (tensor.to(META) for tensor in inputs())

    def run() -> None:
        with simulated.watched():
            for _ in range(3):
                runner(blocks, x, shift.requires_grad_()).sum().backward()
            with torch.no_grad():
                runner(blocks, x, shift)

    if device is not SimulatedDevice:
        with pytest.raises(LawBroken):
            run()
        return
    run()
    assert simulated.report().stall_seconds > 0  # a byte a second


# ---- steps -----------------------------------------------------------------------------------------------------------


def uniform(count: int, weight: int, stored: int, forward: float, backward: float) -> list[BlockTimes]:
    times = BlockTimes(weight_bytes=weight, stored_bytes=stored, forward_seconds=forward, backward_seconds=backward)
    return [times] * count


def test_what_is_copied_in_a_step() -> None:
    """Two blocks stay in the ring, and the tensors of two in the store's buffers, at the turn and at the end."""
    report = simulate_step(uniform(10, 5000, 1024, 1.0, 3.0), streamed=range(10), rates=find_rates("4090"))
    packed = 1024 + 256  # and the block's input
    assert report.h2d_bytes == 2 * 8 * 5000 + 8 * packed
    assert report.d2h_bytes == 10 * packed
    assert report.step_seconds == pytest.approx(report.compute_seconds + report.stall_seconds)
    assert report.compute_seconds == pytest.approx(40.0, rel=1e-6)
    assert report.stall_seconds == 0


def test_a_model_on_the_device_copies_nothing() -> None:
    report = simulate_step(uniform(4, 5000, 0, 1.0, 3.0), streamed=(), rates=RATES, outside_seconds=2.0)
    assert report.step_seconds == pytest.approx(18.0, rel=1e-3)  # and the gradient of one number
    assert (report.h2d_bytes, report.d2h_bytes, report.stall_seconds) == (0, 0, 0.0)


@settings(max_examples=12, deadline=None)
@given(
    weight=st.integers(1000, 10**6),
    stored=st.integers(0, 10**6),
    forward=st.floats(0.1, 3.0),
    backward=st.floats(0.1, 3.0),
)
def test_nothing_stalls_exactly_where_every_transfer_fits_behind_a_block(weight, stored, forward, backward) -> None:
    """`forward` and `backward` are shares of the transfers that travel beside them."""
    packed = stored + 256 if stored else 0
    rates = dataclasses.replace(find_rates("3090"), device_memory=1e30)
    beside_forward = max(weight / rates.h2d, packed / rates.d2h)
    beside_backward = (weight + packed) / rates.h2d
    blocks = uniform(12, weight, stored, forward * beside_forward, backward * beside_backward)
    report = simulate_step(blocks, streamed=range(12), rates=rates)
    if forward >= 1 and backward >= 1:
        assert report.stall_seconds <= 1e-12
    if min(forward, backward) < 0.98:
        assert report.stall_seconds > 0


@settings(max_examples=12, deadline=None)
@given(
    streamed=st.integers(2, 24),
    stored=st.sampled_from([0, 3 * 10**6, 10**7]),
    forward=st.floats(0.05, 1.5),
    backward=st.floats(0.05, 3.0),
)
def test_stalls_lie_between_what_no_order_avoids_and_what_each_block_waits(streamed, stored, forward, backward) -> None:
    """`forward` and `backward` are shares of the transfer of a block's weights.

    No order hides more than the computation of each half is long; two blocks stay on the device at both turns. And no
    block waits for longer than what travels beside it takes longer than one block computes.
    """
    count, weight = 24, 10**7
    rates = dataclasses.replace(find_rates("3090"), device_memory=1e30)
    transfer, moved = weight / rates.h2d, (stored + 256 if stored else 0) / rates.h2d
    blocks = uniform(count, weight, stored, forward * transfer, backward * transfer)
    report = simulate_step(blocks, streamed=spread(count, streamed), rates=rates)
    f, b = blocks[0].forward_seconds, blocks[0].backward_seconds
    weights = (streamed - 2) * transfer
    least = max(0.0, weights - count * f, (count - 2) * moved - count * f)
    least += max(0.0, weights + (count - 2) * moved - count * b)
    most = streamed * max(0.0, transfer - f) + count * max(0.0, moved - f)
    most += streamed * max(0.0, transfer + moved - b) + count * max(0.0, moved - b)
    assert least - 1e-9 <= report.stall_seconds <= most + 1e-9


def test_time_scales() -> None:
    """Twice as fast in everything takes half as long."""
    rates = find_rates("3090")
    faster = dataclasses.replace(rates, h2d=2 * rates.h2d, d2h=2 * rates.d2h, device_memory=2 * rates.device_memory)
    slow = simulate_step(uniform(6, 10**8, 10**7, 1e-3, 2e-3), streamed=(1, 3, 5), rates=rates)
    fast = simulate_step(uniform(6, 10**8, 10**7, 0.5e-3, 1e-3), streamed=(1, 3, 5), rates=faster)
    assert slow.step_seconds == pytest.approx(2 * fast.step_seconds)
    assert slow.stall_seconds == pytest.approx(2 * fast.stall_seconds)
    assert slow.stall_seconds > 0


def test_generation_streams_around() -> None:
    blocks = uniform(6, 10**8, 10**7, 4e-3, 8e-3)
    report = simulate_step(blocks, streamed=range(6), rates=find_rates("3090"), trains=False)
    assert (report.h2d_bytes, report.d2h_bytes) == (6 * 10**8, 0)
    assert report.stall_seconds == pytest.approx(0, abs=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="at least one block"):
        simulate_step([], streamed=(), rates=RATES)
    with pytest.raises(InputError, match="expected numbers from 0 to 5"):
        simulate_step(BLOCKS, streamed=(6,), rates=RATES)
    with pytest.raises(InputError, match="times of at least 0"):
        dataclasses.replace(BLOCKS[0], forward_seconds=float("nan"))
    with pytest.raises(InputError, match="1 byte of weights"):
        dataclasses.replace(BLOCKS[0], weight_bytes=0)


# ---- Wan 14B: from how many tokens the bus is hidden ----------------------------------------------------------------

WIDTH, FFN, TEXT, NUM_BLOCKS = 5120, 13824, 512, 40
WEIGHT_BYTES = 351_272_960  # of a block, one byte each
PEAK = {"4090": 165e12, "3090": 71e12, "h200": 790e12}
SUSTAINED = 0.8


def flops(tokens: int, *, keep: bool) -> tuple[float, float]:
    """FLOPs of a block's forward, and of its recomputation and backward, with or without attention recomputed."""
    linear = tokens * 2 * (6 * WIDTH**2 + 2 * WIDTH * FFN)
    text = 2 * 2 * TEXT * WIDTH**2
    attention, cross = 4 * tokens**2 * WIDTH, 4 * tokens * TEXT * WIDTH
    forward = linear + text + attention + cross
    again = forward - (attention if keep else 0)
    return forward, again + linear + 2.5 * (attention + cross)


def wan_step(card: str, tokens: int, *, streamed: int = NUM_BLOCKS, keep: bool = True):
    """A step of Wan 14B with 8-bit weights, inputs (float32) and kept attentions (bfloat16, log-sum-exp) offloaded."""
    forward, backward = (count / (SUSTAINED * PEAK[card]) for count in flops(tokens, keep=keep))
    stored = tokens * (4 * WIDTH + (2 * WIDTH + 4 * 40 if keep else 0))
    blocks = uniform(NUM_BLOCKS, WEIGHT_BYTES, stored, forward, backward)
    return simulate_step(blocks, streamed=spread(NUM_BLOCKS, streamed), rates=find_rates(card))


def tokens_from(hidden) -> int:
    """The first number of tokens from which a condition holds."""
    low, high = 1, 100_000
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if hidden(middle) else (middle + 1, high)
    return low


def sums_balance(card: str) -> int:
    """From how many tokens a step computes for as long as its two transfers of all weights take."""
    bus = 2 * WEIGHT_BYTES / find_rates(card).h2d
    return tokens_from(lambda tokens: sum(flops(tokens, keep=False)) / (SUSTAINED * PEAK[card]) >= bus)


def forward_hides(card: str) -> int:
    """From how many tokens already the forward of a block takes as long as its transfer."""
    bus = WEIGHT_BYTES / find_rates(card).h2d
    return tokens_from(lambda tokens: flops(tokens, keep=False)[0] / (SUSTAINED * PEAK[card]) >= bus)


@pytest.mark.parametrize(("card", "published"), [("4090", 1880), ("3090", 820), ("h200", 4050)])
def test_from_the_break_even_on_the_bus_is_hidden(card: str, published: int) -> None:
    """Three ranges of tokens, with all 40 blocks streamed and everything that waits for backward offloaded.

    Below the count at which a step's sums balance, the bus is the bound whatever the order. Above the count at which
    forward alone hides a block's transfer, nothing waits. In between forward waits (weights cannot travel before it
    begins), and a few resident blocks end that.
    """
    balance, hides = sums_balance(card), forward_hides(card)
    assert balance == pytest.approx(published, rel=0.06)
    assert balance < hides < 1.6 * balance

    below = wan_step(card, int(0.95 * balance), keep=False)
    assert below.stall_seconds > 0
    assert below.h2d_seconds > 0.9 * below.compute_seconds

    for tokens in (int(1.01 * hides), 2 * hides, 32_760):
        for keep in (False, True):
            above = wan_step(card, tokens, keep=keep)
            assert above.stall_seconds == pytest.approx(0, abs=1e-9), (tokens, keep)
            assert above.h2d_bytes > 2 * 38 * WEIGHT_BYTES

    between = wan_step(card, balance)
    assert 0 < between.stall_seconds < 0.2 * between.step_seconds
    assert wan_step(card, balance, streamed=20).stall_seconds == pytest.approx(0, abs=1e-9)


# ---- the catalogue ---------------------------------------------------------------------------------------------------


def test_cards_are_found_by_the_drivers_names() -> None:
    for name, expected in {
        "NVIDIA GeForce RTX 4090": "4090",
        "4090-x8": "4090-x8",
        "RTX 4060 Ti": "4060ti",
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
    }.items():
        assert find_rates(name) is CATALOGUE[expected]


def test_an_unknown_card_is_named() -> None:
    with pytest.raises(InputError, match="found 'RTX 409'.*did you mean"):
        find_rates("RTX 409")


def test_rates_are_positive() -> None:
    with pytest.raises(InputError, match="expected a positive h2d, found 0"):
        dataclasses.replace(RATES, h2d=0)
    with pytest.raises(InputError, match="expected a positive fp8, found nan"):
        dataclasses.replace(RATES, fp8=float("nan"))
