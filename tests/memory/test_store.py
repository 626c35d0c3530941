"""Stores: what was put comes back bit for bit, out of memory that is poisoned whenever the rules allow."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_blocks import WIDTH, inputs, make_blocks, trainable
from torch import Tensor

from memory.device import CpuDevice
from memory.runners import Recompute, run_checkpointed, run_with
from memory.simulate import META
from memory.store import DeviceStore, HostStore, Store, stored_bytes
from memory.stream import StreamedBlocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool]


def some(shape, dtype, order, generator) -> Tensor:
    """Any bits that the dtype has, with the dimensions in any order in memory."""
    laid = [shape[dimension] for dimension in order]
    bits = torch.randint(0, 256, (*laid, dtype.itemsize), dtype=torch.uint8, generator=generator)
    tensor = (bits[..., 0] > 127) if dtype == torch.bool else bits.view(dtype).squeeze(-1)
    return tensor.permute([order.index(dimension) for dimension in range(len(order))])


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@st.composite
def entries(draw):
    """Tensors of one block: shapes, dtypes, orders in memory."""
    described = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        described.append((shape, draw(st.sampled_from(DTYPES)), draw(st.permutations(range(len(shape))))))
    return described


@settings(max_examples=40, deadline=None)
@given(st.lists(entries(), min_size=1, max_size=5), st.integers(1, 3), st.booleans())
def test_what_was_put_comes_back_bit_for_bit(blocks, steps: int, fetches: bool) -> None:
    store, generator = HostStore(CpuDevice()), torch.Generator().manual_seed(0)
    for _ in range(steps):
        truth = []
        for number, block in enumerate(blocks):
            tensors = [some(*described, generator) for described in block]
            truth.append([tensor.clone() for tensor in tensors])
            store.put(number, tensors)
            for tensor in tensors:  # the store has no use for them any more
                tensor.zero_()
        for number in reversed(range(len(blocks))):
            found = store.get(number)
            if number and fetches:
                store.fetch(number - 1)
            for expected, tensor in zip(truth[number], found, strict=True):
                assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
                assert tensor.stride() == expected.stride() or 1 in expected.shape or 0 in expected.shape
                assert torch.equal(bits_of(tensor), bits_of(expected))
            store.drop(number)


def test_an_expanded_tensor_comes_back_with_its_values() -> None:
    store, row = HostStore(CpuDevice()), torch.randn(5)
    store.put(0, [row.expand(3, 5)])
    assert torch.equal(store.get(0)[0], row.expand(3, 5))


def gradients(runner, blocks, seed: int, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, WIDTH, generator=generator).requires_grad_()
    shift = inputs(seed)[1].requires_grad_()
    output = runner(blocks, x, shift)
    output.square().sum().backward()
    found = [output.detach(), x.grad, shift.grad, *(parameter.grad for parameter in trainable(blocks))]
    blocks.zero_grad()
    return found


@pytest.mark.parametrize("streamed", [(), (0, 1, 2, 3, 4), (1, 3)])
@pytest.mark.parametrize("make", [DeviceStore, lambda: HostStore(CpuDevice())], ids=["device", "host"])
def test_training_with_a_store_is_training_with_checkpoints(make, streamed: tuple[int, ...]) -> None:
    """Over several steps, whose batches become larger and smaller."""
    blocks, reference = make_blocks(5), make_blocks(5)
    runner = StreamedBlocks(blocks, streamed=streamed, device="cpu", maths=Recompute(), store=make())
    for seed, tokens in enumerate((6, 6, 11, 3, 6)):
        expected = gradients(run_checkpointed, reference, seed, tokens)
        for one, other in zip(expected, gradients(runner, blocks, seed, tokens), strict=True):
            assert torch.equal(one, other)


class Eager(CpuDevice):
    """Takes every copy for done: computation does not wait."""

    def wait(self, event) -> None:
        pass


def test_who_does_not_wait_computes_nan() -> None:
    blocks = make_blocks(5)
    found = gradients(run_with(Recompute(), HostStore(Eager())), blocks, 0, 6)
    assert any(bool(torch.isnan(tensor).any()) for tensor in found)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_store_keeps_nothing_that_it_was_given() -> None:
    """After `put`, memory of the tensors may be used again at once: nothing holds it."""
    store, tensor = HostStore(CpuDevice()), torch.randn(100)
    alive = weakref.ref(tensor)
    store.put(0, [tensor])
    del tensor
    gc.collect()
    assert alive() is None


def step(store: Store, blocks: list[list[Tensor]]) -> None:
    for number, tensors in enumerate(blocks):
        store.put(number, tensors)
    for number in reversed(range(len(blocks))):
        store.get(number)
        if number:
            store.fetch(number - 1)
        store.drop(number)


def test_host_memory_is_exactly_what_waits() -> None:
    store = HostStore(CpuDevice())
    small = [[torch.randn(7 + number, 5), torch.randn(3)] for number in range(6)]
    large = [[torch.randn(20 + number, 5), torch.randn(3)] for number in range(6)]
    sizes = [stored_bytes(tensors) for tensors in small]
    step(store, small)
    assert (store.host_bytes, store.device_bytes) == (sum(sizes), 2 * sizes[-1])
    step(store, small)
    assert store.host_bytes == sum(sizes)
    step(store, large)  # no small piece is kept beside the large ones
    assert store.host_bytes == sum(stored_bytes(tensors) for tensors in large)
    step(store, small)
    assert store.host_bytes == sum(stored_bytes(tensors) for tensors in large)


def test_sizes_are_known_from_shapes() -> None:
    tensors = [torch.randn(4, 64), torch.randn(3).bfloat16()]
    for eight_bits in (False, True):
        sizes = {
            stored_bytes([tensor.to(device) for tensor in tensors], eight_bits=eight_bits) for device in ("cpu", META)
        }
        store = HostStore(CpuDevice(), eight_bits=eight_bits)
        store.put(0, tensors)
        assert sizes == {store.host_bytes}


# ---- eight bits ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rows=st.integers(1, 6),
    width=st.integers(32, 80),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    outlier=st.sampled_from([1.0, 100.0, 1000.0]),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_eight_bits_are_off_by_a_sixteenth_at_most(dtype, rows, width, scale, outlier, turned, seed) -> None:
    """Of the number itself, or by 1/458,752 of its row's largest; and by the rounding to the dtype."""
    x = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    x[..., 3] *= outlier
    x[0, 0] = 0.0
    x.clamp_(-3e4, 3e4)  # float16 ends at 65504
    x = x.to(dtype)
    given = x.transpose(0, 1) if turned else x
    store = HostStore(CpuDevice(), eight_bits=True)
    store.put(0, [given])
    (found,) = store.get(0)
    assert (found.dtype, found.shape) == (dtype, given.shape)
    x, found = given.double(), found.double()
    largest = x.abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps * x.abs() + torch.finfo(dtype).smallest_normal
    assert ((found - x).abs() <= torch.maximum(x.abs() / 16, largest / 458_752) * 1.001 + 2 * rounding).all()
    assert (found[x == 0] == 0).all()


def test_eight_bits_of_a_gaussian_are_off_by_three_hundredths() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    store = HostStore(CpuDevice(), eight_bits=True)
    store.put(0, [x])
    assert ((store.get(0)[0] - x).norm() / x.norm()).item() == pytest.approx(0.0264, abs=0.001)
    assert store.host_bytes == 64 * (512 + 4)


def test_eight_bits_leave_statistics_and_integers_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, statistics = torch.randn(8, 64, 256, generator=generator), torch.randn(8, 64 * 8, generator=generator)
    numbers, narrow = torch.arange(10**5), torch.randn(2**12, 16, generator=generator)
    store = HostStore(CpuDevice(), eight_bits=True)
    store.put(0, [x, statistics, numbers, narrow])
    rounded, *exact = store.get(0)
    assert not torch.equal(rounded, x)
    assert all(torch.equal(one, other) for one, other in zip(exact, (statistics, numbers, narrow), strict=True))


def test_eight_bits_hide_no_nan() -> None:
    x = torch.ones(4, 64)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    store = HostStore(CpuDevice(), eight_bits=True)
    store.put(0, [x])
    (found,) = store.get(0)
    assert torch.equal(found[[0, 3]], x[[0, 3]])
    assert torch.isnan(found[1, 5]) and not torch.isfinite(found[2, 7])


def test_eight_bits_in_pieces_are_eight_bits_at_once(monkeypatch) -> None:
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))

    def through() -> Tensor:
        store = HostStore(CpuDevice(), eight_bits=True)
        store.put(0, [x])
        return store.get(0)[0]

    at_once = through()
    monkeypatch.setattr("memory.store.ELEMENTS_AT_ONCE", 3 * 64)
    assert torch.equal(through(), at_once)


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [DeviceStore, lambda: HostStore(CpuDevice())], ids=["device", "host"])
def test_misuse_is_refused(make) -> None:
    store = make()
    for ask in (store.fetch, store.get, store.drop):
        with pytest.raises(RuntimeError, match="nothing is under 0"):
            ask(0)
    store.put(0, [torch.ones(3)])
    with pytest.raises(RuntimeError, match="something under 0 already"):
        store.put(0, [torch.ones(3)])
    store.drop(0)
    store.put(0, [torch.ones(3)])
    assert torch.equal(store.get(0)[0], torch.ones(3))


def test_only_two_can_be_in_use() -> None:
    store = HostStore(CpuDevice())
    for number in range(3):
        store.put(number, [torch.full((3,), float(number))])
    assert store.get(2)[0][0] == 2 and store.get(1)[0][0] == 1
    with pytest.raises(RuntimeError, match="both buffers"):
        store.get(0)
    store.drop(2)
    assert store.get(0)[0][0] == 0


def test_what_was_given_up_leaves_no_trace() -> None:
    """Entries that are dropped in any state, in any order."""
    store, generator = HostStore(CpuDevice()), torch.Generator().manual_seed(0)
    for attempt in range(4):
        truth = [torch.randn(5, generator=generator) for _ in range(6)]
        for number, tensor in enumerate(truth):
            store.put(number, [tensor])
        for number in (5, 4, 3, 2)[:attempt]:
            assert torch.equal(store.get(number)[0], truth[number])
            store.fetch(number - 1)
            store.drop(number)
        for number in range(6 - attempt):
            store.drop(number)
    assert store.host_bytes == 6 * 20
