"""Laws of streaming: bit for bit what runs without it, nothing read too early or too late, true weights outside."""

import copy
import dataclasses
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from core.errors import InputError
from memory import stream
from memory.device import CpuDevice, Event
from memory.masters import HostBlock, Kind, Staging, flat_bytes
from memory.runners import BlockRunner, run_checkpointed, run_plain, run_with
from memory.store import DeviceStore, HostStore
from memory.stream import Ring, StreamedBlocks, move_all_but, ring_bytes, spread
from tests.memory.tiny_blocks import Block, KeepFirst, frozen, inputs, make_blocks, trainable

SETTINGS = {
    "linear": {},
    "quantised": {"quantize": True},
    "without lora": {"lora": False},
    "dropout": {"dropout": 0.4},
}


def streamed(
    blocks: nn.ModuleList, num_streamed: int = 3, masters: Kind = "pinned", ring: Ring | None = None
) -> StreamedBlocks:
    numbers = spread(len(blocks), num_streamed)
    return StreamedBlocks(blocks, streamed=numbers, device="cpu", masters=masters, ring=ring)


def results(runner: BlockRunner, blocks: nn.ModuleList, *, seed: int = 0, needs: tuple[bool, bool] = (True, True)):  # type: ignore[no-untyped-def]
    """Output, and the gradients of x, shift and everything trainable (None where there is none)."""
    x, shift = (tensor.requires_grad_(need) for tensor, need in zip(inputs(seed), needs, strict=True))
    torch.manual_seed(seed)
    y = runner(blocks, x, shift)
    if y.requires_grad:
        (y.square().sum() + y.sin().sum()).backward()
    return y.detach(), [x.grad, shift.grad, *(parameter.grad for parameter in trainable(blocks))]


def assert_same(one: tuple[Tensor, list], two: tuple[Tensor, list]) -> None:
    assert torch.equal(one[0], two[0])
    assert len(one[1]) == len(two[1])
    for a, b in zip(one[1], two[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert torch.isfinite(one[0]).all()


both_kinds = pytest.mark.parametrize("masters", ["pinned", "mapped"])


# --- equal to running without it -------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("num_streamed", [0, 1, 3, 5])
def test_output_and_gradients_are_bit_identical(num_streamed: int, settings: dict, masters: Kind) -> None:
    blocks, plain = make_blocks(**settings), make_blocks(**settings)
    runner = streamed(blocks, num_streamed, masters)
    for seed, needs in enumerate(((True, True), (False, False), (True, False), (False, True))):
        # gradients of trainable parameters accumulate over all of this
        reference = run_plain if seed % 2 else run_checkpointed
        assert_same(results(runner, blocks, seed=seed, needs=needs), results(reference, plain, seed=seed, needs=needs))


@both_kinds
@pytest.mark.parametrize("on_host", [False, True])
def test_with_a_maths_and_a_store_of_its_own_it_is_what_these_give_with_everything_resident(
    on_host: bool, masters: Kind
) -> None:
    device, blocks, resident, plain = CpuDevice(), *(make_blocks(dropout=0.3) for _ in range(3))
    store = HostStore(device) if on_host else DeviceStore()
    ring = Ring(device, flat_bytes(blocks[0]))
    runner = StreamedBlocks(
        blocks, streamed=(1, 3, 4), device="cpu", ring=ring, maths=KeepFirst(), store=store, masters=masters
    )
    for seed in range(2):
        ours = results(runner, blocks, seed=seed)
        assert_same(ours, results(run_with(KeepFirst()), resident, seed=seed))
        assert_same(ours, results(run_checkpointed, plain, seed=seed))


@pytest.mark.parametrize("chosen", [(0,), (4,), (0, 1), (1, 2, 3), (4, 0, 3), (2, 2)])
def test_any_subset_may_be_streamed(chosen: tuple[int, ...]) -> None:
    blocks, plain = make_blocks(), make_blocks()
    runner = StreamedBlocks(blocks, streamed=chosen, device="cpu")
    for seed in range(2):
        assert_same(results(runner, blocks, seed=seed), results(run_checkpointed, plain, seed=seed))
    assert runner.streamed == tuple(sorted(set(chosen)))


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_rings_of_any_length_serve(slots: int) -> None:
    blocks, plain = make_blocks(), make_blocks()
    runner = streamed(blocks, 5, ring=Ring(CpuDevice(), flat_bytes(blocks[0]), slots))
    for seed in range(2):
        assert_same(results(runner, blocks, seed=seed), results(run_checkpointed, plain, seed=seed))
        with torch.no_grad():
            assert torch.equal(runner(blocks, *inputs(seed)), run_plain(plain, *inputs(seed)))


def test_blocks_are_spread_evenly() -> None:
    for total in range(41):
        for num_streamed in range(total + 1):
            numbers = spread(total, num_streamed)
            gaps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
            assert len(set(numbers)) == num_streamed and sorted(numbers) == list(numbers)
            assert all(0 <= number < total for number in numbers) and max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forward_only_is_bit_identical_and_training_goes_on_after_it(mode) -> None:  # type: ignore[no-untyped-def]
    blocks, plain = make_blocks(quantize=True).eval(), make_blocks(quantize=True).eval()
    runner = streamed(blocks, 4)
    for seed in range(3):
        with mode():
            assert torch.equal(runner(blocks, *inputs(seed)), run_plain(plain, *inputs(seed)))
        assert_same(results(runner, blocks, seed=seed), results(run_checkpointed, plain, seed=seed))


def test_made_in_inference_mode_it_still_trains() -> None:
    blocks, plain = make_blocks(), make_blocks()
    with torch.inference_mode():
        runner = streamed(blocks)
    assert_same(results(runner, blocks), results(run_checkpointed, plain))
    assert_same(results(run_plain, blocks), results(run_plain, plain))  # its weights outside of a run serve too


@pytest.mark.parametrize("second_needs_gradients", [True, False])
def test_two_runs_of_the_same_blocks_in_one_graph(second_needs_gradients: bool) -> None:
    gradients = []
    for runner_of in (streamed, lambda blocks: run_checkpointed):
        blocks = make_blocks()
        runner = runner_of(blocks)
        x, shift = (tensor.requires_grad_() for tensor in inputs())
        conditional = runner(blocks, x, shift)
        with nullcontext() if second_needs_gradients else torch.no_grad():
            unconditional = runner(blocks, x, None)
        (conditional * 5 - unconditional * 4).square().sum().backward()
        gradients.append([x.grad, shift.grad, *(parameter.grad for parameter in trainable(blocks))])
    assert all(torch.equal(a, b) for a, b in zip(gradients[0][1:], gradients[1][1:], strict=True))
    torch.testing.assert_close(
        *(of[0] for of in gradients), rtol=1e-4, atol=1e-4
    )  # read twice in each run: sums in another order


def test_training_steps_give_the_same_adapters() -> None:
    trained = []
    for runner_of in (streamed, lambda blocks: run_checkpointed):
        blocks = make_blocks(quantize=True)
        runner = runner_of(blocks)
        optimizer = torch.optim.AdamW(trainable(blocks), lr=1e-2)
        for step in range(3):
            for part in range(2):  # accumulation
                x, shift = inputs(10 * step + part)
                runner(blocks, x, shift).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(trainable(blocks))
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_gradients_of_some_parameters_only_and_twice() -> None:
    blocks, plain = make_blocks(), make_blocks()
    runner = streamed(blocks, 5)
    for chosen in ([0, 3], [5], [9]):
        both = []
        for run, of in ((runner, blocks), (run_plain, plain)):
            y = run(of, *inputs()).square().sum()
            wanted = [trainable(of)[index] for index in chosen]
            both.append(torch.autograd.grad(y, wanted, retain_graph=True) + torch.autograd.grad(y, wanted))
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_autocast_inside_and_around_backward() -> None:
    for around in (False, True):
        both = []
        for runner_of in (streamed, lambda blocks: run_checkpointed):
            blocks = make_blocks()
            runner = runner_of(blocks)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = runner(blocks, *inputs())
                if around:
                    y.float().square().sum().backward()
            if not around:
                y.float().square().sum().backward()
            both.append([y, *(parameter.grad for parameter in trainable(blocks))])
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_blocks_of_different_sizes() -> None:
    def make() -> nn.ModuleList:
        return nn.ModuleList(Block(seed, hidden=width) for seed, width in enumerate((32, 160, 64, 96)))

    blocks, plain = make(), make()
    assert_same(results(streamed(blocks, 4), blocks), results(run_checkpointed, plain))


def test_a_frozen_weight_that_a_block_uses_twice() -> None:
    def make() -> nn.ModuleList:
        blocks = make_blocks(hidden=64)
        for block in blocks:
            block.second.weight = block.first.base.weight
        return blocks

    blocks, plain = make(), make()
    assert_same(results(streamed(blocks, 5), blocks), results(run_checkpointed, plain))


def test_arguments_that_are_no_tensors_reach_the_blocks() -> None:
    x, shift = inputs()
    blocks, plain = make_blocks(), make_blocks()
    factor = {"factor": torch.tensor(0.5)}
    both = []
    for run, of in ((streamed(blocks), blocks), (run_plain, plain)):
        y = run(of, x, None, factor)
        y.sum().backward()
        both.append([y, *(parameter.grad for parameter in trainable(of))])
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_hidden_tensor_that_needs_a_gradient_is_refused() -> None:
    @dataclasses.dataclass
    class Options:
        factors: list[Tensor]

    blocks = make_blocks()
    runner = streamed(blocks)
    x, shift = inputs()
    for hidden in ({"factor": torch.ones(1).requires_grad_()}, Options([torch.ones(1).requires_grad_()])):
        with pytest.raises(RuntimeError, match="argument of its own"):
            runner(blocks, x, shift, hidden)


# --- what lives where ------------------------------------------------------------------------------------------------


def addresses(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_frozen_weights_share_one_host_buffer_a_block_and_adapters_stay_out() -> None:
    blocks = make_blocks(quantize=True)
    adapters = [parameter.data_ptr() for parameter in trainable(blocks)]
    runner = streamed(blocks, 3)
    results(runner, blocks)
    in_one_buffer = [len(addresses(frozen(block))) == 1 for block in blocks]
    assert in_one_buffer == [True, False, True, False, True]  # evenly spaced among resident ones
    assert [parameter.data_ptr() for parameter in trainable(blocks)] == adapters
    size = runner.host_bytes // 3
    content = sum(tensor.numel() * tensor.element_size() for tensor in frozen(blocks[0]))
    assert content <= size <= content + 256 * len(frozen(blocks[0]))
    assert runner.device_bytes == 2 * size


def test_backward_keeps_inputs_and_adapters_of_streamed_blocks_and_no_weights() -> None:
    blocks = make_blocks(3)
    runner = streamed(blocks, 3)
    kept: list[Tensor] = []
    x, shift = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = runner(blocks, x, shift)
    assert not addresses(kept) & (addresses(frozen(blocks)) | addresses([y]))
    assert len(kept) == 3 * (2 + 2)


def test_inputs_are_kept_by_autograd_only_so_that_its_hooks_can_move_them_away() -> None:
    blocks = make_blocks()
    runner = streamed(blocks, 5)
    saved: list[weakref.ref] = []

    def move_away(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            saved.append(weakref.ref(tensor))
        return tensor.clone()

    x, shift = inputs()
    with torch.autograd.graph.saved_tensors_hooks(move_away, lambda tensor: tensor):
        y = runner(blocks, x, shift)
    assert len(saved) == 4 and all(reference() is None for reference in saved)
    y.sum().backward()


class Reached:
    """A point in the computation: how many blocks had been computed."""

    def __init__(self, clock: int) -> None:
        self.clock = clock

    def synchronize(self) -> None:
        """The CPU computes at once."""


class Logged(CpuDevice):
    """A CPU that writes down what was asked of it, and checks that no copy overtakes the computation of its target."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []
        self.clock = 0
        self.last_read: dict[int, int] = {}  # address of a slot: when a block was computed with it
        self.target_of: dict[Event, int] = {}

    def copy(self, target: Tensor, source: Tensor, *, after: Event | None) -> Event:
        assert isinstance(after, Reached) and after.clock >= self.last_read.get(target.data_ptr(), 0)
        self.log.append(("copy", target.data_ptr()))
        copied = super().copy(target, source, after=after)
        self.target_of[copied] = target.data_ptr()
        return copied

    def wait(self, event: Event) -> None:
        self.log.append(("wait", self.target_of[event]))
        super().wait(event)

    def record(self) -> Event:
        self.log.append(("record", 0))
        return Reached(self.clock)

    def free(self, buffer: Tensor) -> None:
        self.log.append(("free", buffer.data_ptr()))
        super().free(buffer)

    def watch(self, blocks: nn.ModuleList) -> None:
        """Note when each block reads a slot."""

        def note(block: nn.Module, arguments: tuple) -> None:
            self.clock += 1
            self.last_read[frozen(block)[0].untyped_storage().data_ptr()] = self.clock

        for block in blocks:
            block.register_forward_pre_hook(note)

    def copies(self) -> int:
        return sum(kind == "copy" for kind, _ in self.log)


def logged_blocks(num_streamed: int) -> tuple[Logged, nn.ModuleList, StreamedBlocks]:
    device, blocks = Logged(), make_blocks()
    device.watch(blocks)
    ring = Ring(device, flat_bytes(blocks[0]), min(2, num_streamed))
    return device, blocks, streamed(blocks, num_streamed, ring=ring)


@pytest.mark.parametrize("num_streamed, training, forward", [(5, 6, 5), (3, 2, 3), (2, 0, 0), (1, 0, 0)])
def test_transfers_of_a_step(num_streamed: int, training: int, forward: int) -> None:
    device, blocks, runner = logged_blocks(num_streamed)
    results(runner, blocks)
    device.log.clear()
    results(runner, blocks)
    assert device.copies() == training  # both ways, without the two blocks that are in their slots at each turn
    with torch.no_grad():
        runner(blocks, *inputs())
        device.log.clear()
        runner(blocks, *inputs())
    assert device.copies() == forward


@pytest.mark.parametrize("num_streamed", [3, 5])
def test_a_block_is_copied_while_the_one_before_it_runs(num_streamed: int) -> None:
    device, blocks, runner = logged_blocks(num_streamed)
    results(runner, blocks)
    device.log.clear()
    results(runner, blocks)
    with torch.no_grad():
        runner(blocks, *inputs())
        runner(blocks, *inputs())
    assert device.copies() > num_streamed
    running: int | None = None
    for (kind, slot), (following, next_slot) in zip(device.log, device.log[1:], strict=False):
        if kind in ("copy", "free"):
            assert slot != running  # never into the slot that is read
        if kind == "free":
            assert (following, next_slot) == ("copy", slot)
        if kind == "copy":
            assert following == "wait" and next_slot != slot  # and never for the block that waits now
        running = slot if kind == "wait" else None if kind == "record" else running


@both_kinds
def test_resident_blocks_go_to_the_device_and_streamed_ones_stay(masters: Kind) -> None:
    blocks = make_blocks(quantize=True, lora=False)
    ring = Ring(CpuDevice(), flat_bytes(blocks[0]))
    StreamedBlocks(blocks, streamed=(1, 4), device="meta", ring=ring, masters=masters)
    assert [{tensor.is_meta for tensor in frozen(block)} for block in blocks] == [
        {True},
        {False},
        {True},
        {True},
        {False},
    ]


def test_streaming_nothing_moves_nothing() -> None:
    blocks = make_blocks()
    before = [tensor.data_ptr() for tensor in frozen(blocks)]
    runner = streamed(blocks, 0)
    assert_same(results(runner, blocks), results(run_checkpointed, make_blocks()))
    assert runner.host_bytes == runner.device_bytes == 0
    assert [tensor.data_ptr() for tensor in frozen(blocks)] == before


def expert(which: int, hidden: int = 96) -> nn.ModuleList:
    return nn.ModuleList(Block(seed + 50 * which, hidden=hidden, quantize=True) for seed in range(5))


@pytest.mark.parametrize("kinds", [("pinned", "pinned"), ("pinned", "mapped"), ("mapped", "mapped")], ids="-".join)
def test_two_experts_share_a_ring_and_no_masters_move(kinds: tuple[Kind, Kind]) -> None:
    experts, plain = [expert(0), expert(1, 160)], [expert(0), expert(1, 160)]
    device = CpuDevice()
    ring = Ring(device, ring_bytes([block for blocks in experts for block in blocks]) // 2)
    runners = [
        streamed(blocks, number, kind, ring) for blocks, number, kind in zip(experts, (5, 4), kinds, strict=True)
    ]
    addresses_before = [[tensor.data_ptr() for tensor in frozen(blocks)] for blocks in experts]
    for seed, which in enumerate((0, 1, 1, 0)):
        ours = results(runners[which], experts[which], seed=seed)
        assert_same(ours, results(run_checkpointed, plain[which], seed=seed))
        with torch.no_grad():  # a look at the other one, as validation does
            there = runners[1 - which](experts[1 - which], *inputs(seed))
            assert torch.equal(there, run_plain(plain[1 - which], *inputs(seed)))
    assert [[tensor.data_ptr() for tensor in frozen(blocks)] for blocks in experts] == addresses_before
    assert runners[0].device_bytes == runners[1].device_bytes == ring.num_bytes == 2 * flat_bytes(experts[1][0])
    with pytest.raises(RuntimeError, match="another model"):
        runners[1](experts[0], *inputs())


def test_the_same_blocks_may_be_streamed_anew_by_another_plan() -> None:
    blocks, plain = make_blocks(quantize=True), make_blocks(quantize=True)
    plans: list[tuple[tuple[int, ...], Kind]] = [
        ((1, 3), "pinned"), ((0, 1, 2, 3, 4), "pinned"), ((2, 4), "mapped"), ((), "pinned"), ((0, 4), "mapped"),
    ]  # fmt: skip
    for seed, (numbers, masters) in enumerate(plans):
        runner = StreamedBlocks(blocks, streamed=numbers, device="cpu", masters=masters)
        assert_same(results(runner, blocks, seed=seed), results(run_checkpointed, plain, seed=seed))


def test_a_copy_that_nobody_wants_any_more_does_not_come_after_the_one_that_took_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, gate, written = CpuDevice(), threading.Event(), []
    wait, fill, copy = stream.wait_for_futures, HostBlock.fill, CpuDevice.copy

    def wait_for_futures(futures: list) -> None:
        gate.set()
        wait(futures)

    def fill_late(self: HostBlock, buffer: Tensor) -> None:
        assert gate.wait(60)
        fill(self, buffer)

    def note(self: CpuDevice, target: Tensor, source: Tensor, *, after: Event | None) -> Event:
        written.append((target.data_ptr(), source.data_ptr()))
        return copy(self, target, source, after=after)

    monkeypatch.setattr(stream, "wait_for_futures", wait_for_futures)
    monkeypatch.setattr(HostBlock, "fill", fill_late)
    monkeypatch.setattr(CpuDevice, "copy", note)
    cpu = torch.device("cpu")
    mapped = [HostBlock(Block(seed), device, place=cpu, kind="mapped") for seed in range(2)]
    pinned = [HostBlock(Block(seed), device, place=cpu, kind="pinned") for seed in range(2)]
    ring = Ring(device, mapped[0].num_bytes)
    gate.set()
    with ring.loaded(mapped[0], then=None):
        gate.clear()
    with ring.loaded(mapped[0], then=mapped[1]):
        pass  # the worker waits at the gate
    with ring.loaded(pinned[0], then=pinned[1]):
        gate.set()
    slot = next(target for target, source in written if source == pinned[1].flat.data_ptr())  # type: ignore[union-attr]
    assert [source == pinned[1].flat.data_ptr() for target, source in written if target == slot] == [False, True]  # type: ignore[union-attr]


def test_a_ring_that_is_too_small_is_refused_before_anything_moves() -> None:
    blocks = make_blocks()
    before = [tensor.data_ptr() for tensor in frozen(blocks)]
    with pytest.raises(ValueError, match="expected slots of at least"):
        streamed(blocks, ring=Ring(CpuDevice(), flat_bytes(blocks[0]) - 1))
    assert [tensor.data_ptr() for tensor in frozen(blocks)] == before


def test_the_size_of_a_ring_is_known_before_weights_are() -> None:
    with torch.device("meta"):
        unloaded = nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 96)]).requires_grad_(False)
    loaded = nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 96)]).requires_grad_(False)
    assert ring_bytes(unloaded) == streamed(loaded, 2).device_bytes == 2 * (4 * 64 * 96 + 4 * 96)


def test_move_all_but_leaves_the_blocks() -> None:
    model = nn.Module()
    model.blocks, model.head, model.scale = make_blocks(), nn.Linear(4, 4), nn.Parameter(torch.ones(2))
    model.register_buffer("table", torch.ones(2))
    move_all_but(model, model.blocks, "meta")
    assert model.head.weight.is_meta and model.scale.is_meta and model.table.is_meta
    assert not any(tensor.is_meta for tensor in (*model.blocks.parameters(), *model.blocks.buffers()))


# --- true weights outside of a run -----------------------------------------------------------------------------------


def raw(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) for name, tensor in state.items()}


def test_state_dict_is_true_before_and_after_runs() -> None:
    blocks = make_blocks(quantize=True)
    before = raw(blocks.state_dict())
    dtypes = {name: (tensor.dtype, tensor.shape) for name, tensor in blocks.state_dict().items()}
    runner = streamed(blocks, 5)
    for run in (lambda: None, lambda: results(runner, blocks), lambda: runner(blocks, *inputs())):
        run()
        assert raw(blocks.state_dict()) == before
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in blocks.state_dict().items()} == dtypes


@pytest.mark.parametrize("num_streamed", [2, 5])  # 2: both stay in their slots
def test_a_change_in_place_is_noticed(num_streamed: int) -> None:
    blocks, plain = make_blocks(), make_blocks()
    runner = streamed(blocks, num_streamed)
    results(runner, blocks)
    results(run_checkpointed, plain)
    other = nn.ModuleList(Block(seed + 9) for seed in range(5)).state_dict()
    blocks.load_state_dict(other)
    plain.load_state_dict(other)
    assert_same(results(runner, blocks), results(run_checkpointed, plain))
    with torch.no_grad():
        for of in (blocks, plain):
            of[1].first.base.weight.add_(0.25)
            of[4].second.weight.mul_(0.5)
    assert_same(results(runner, blocks), results(run_checkpointed, plain))


def replace(blocks: nn.ModuleList) -> None:
    blocks.load_state_dict(copy.deepcopy(blocks.state_dict()), assign=True)


@pytest.mark.parametrize("spoil", [lambda blocks: blocks.double(), replace], ids=["cast", "assign"])
def test_moved_or_replaced_weights_are_an_error_and_not_a_wrong_result(spoil) -> None:  # type: ignore[no-untyped-def]
    blocks = make_blocks()
    runner = streamed(blocks)
    results(runner, blocks)
    spoil(blocks)
    with pytest.raises(RuntimeError, match="moved or replaced"):
        runner(blocks, *inputs())


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_streamed", [-1, 6])
def test_a_number_that_the_model_does_not_have_is_refused(num_streamed: int) -> None:
    with pytest.raises(InputError, match=f"0 to 5.*found {num_streamed}"):
        streamed(make_blocks(), num_streamed)
    with pytest.raises(InputError, match="from 0 to 4"):
        StreamedBlocks(make_blocks(), streamed=(1, min(num_streamed, 5)), device="cpu")


def test_a_device_without_block_swap_is_refused() -> None:
    with pytest.raises(InputError, match="cuda device or the cpu, found mps"):
        StreamedBlocks(make_blocks(), streamed=(1,), device="mps")


def test_weights_that_are_not_loaded_yet_are_refused() -> None:
    with pytest.raises(RuntimeError, match="load weights before"):
        streamed(nn.ModuleList([nn.Linear(4, 4, device="meta")]), 1)


@pytest.mark.parametrize("failing_call", range(10))  # 5 in forward, 5 in backward
def test_after_an_exception_in_mid_run_weights_are_true_and_the_next_run_is_right(failing_call: int) -> None:
    blocks, plain = make_blocks(), make_blocks()
    before = raw(blocks.state_dict())
    runner = streamed(blocks, 5)
    calls = iter(range(100))

    def fail(module: nn.Module, arguments: tuple) -> None:
        if next(calls) == failing_call:
            raise KeyboardInterrupt

    hooks = [block.register_forward_pre_hook(fail) for block in blocks]
    with pytest.raises(KeyboardInterrupt):
        results(runner, blocks)
    for hook in hooks:
        hook.remove()
    assert raw(blocks.state_dict()) == before
    for parameter in trainable(blocks):
        parameter.grad = None
    assert_same(results(runner, blocks), results(run_checkpointed, plain))


@both_kinds
@pytest.mark.parametrize("warm", [False, True])
def test_after_a_failed_transfer_the_next_run_is_right(
    warm: bool, masters: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks()
    runner = streamed(blocks, 5, masters)
    if warm:  # the first two blocks need no transfer then
        results(runner, blocks)
    with monkeypatch.context() as patch:

        def fail(self: CpuDevice, target: Tensor, source: Tensor, *, after: Event | None) -> Event:
            target.fill_(0xFF)
            raise MemoryError

        patch.setattr(CpuDevice, "copy", fail)
        with pytest.raises(MemoryError):
            runner(blocks, *inputs())
    for parameter in trainable(blocks):
        parameter.grad = None
    assert_same(results(runner, blocks), results(run_checkpointed, make_blocks()))


def test_running_streamed_blocks_inside_one_another_is_refused() -> None:
    blocks = make_blocks()
    runner = streamed(blocks, 5)
    hook = blocks[2].register_forward_pre_hook(lambda module, arguments: runner(blocks, *arguments))
    with pytest.raises(RuntimeError, match="another one was running"):
        runner(blocks, *inputs())
    hook.remove()
    assert_same(results(runner, blocks), results(run_checkpointed, make_blocks()))


class Late(Future):
    """A staged copy that the worker does when somebody asks for it, and not before."""

    def __init__(self, copy: Callable[[], Event]) -> None:
        super().__init__()
        self.copy = copy

    def result(self, timeout: float | None = None) -> Event:
        return self.copy()


def late_copies(staging: Staging, target: Tensor, block: HostBlock, *, after: Event) -> Late:
    return Late(lambda: staging._copy(target, block, after))


# --- the net that catches a wrong order ------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("quantize", [False, True])
def test_reading_a_slot_before_it_is_waited_for_gives_nan(
    masters: Kind, quantize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(quantize=quantize)
    runner = streamed(blocks, 5, masters)
    with monkeypatch.context() as patch:
        patch.setattr(CpuDevice, "wait", lambda self, event: None)
        assert torch.isnan(runner(blocks, *inputs())).all()


@both_kinds
def test_a_view_kept_from_a_run_is_nan_once_its_slot_is_needed(masters: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    if masters == "mapped":  # nothing is copied by itself then
        monkeypatch.setattr(Staging, "copy", late_copies)
    for quantize in (False, True):
        blocks = make_blocks(quantize=quantize)
        runner = streamed(blocks, 5, masters)
        seen: list[list[Tensor]] = []

        def keep(module: nn.Module, arguments: tuple, output: Tensor, seen: list = seen) -> None:
            seen.append([tensor.data for tensor in frozen(module)])
            floats = [tensor for kept in seen[-2:-1] for tensor in kept if tensor.is_floating_point()]
            assert all(torch.isnan(tensor.float()).all() for tensor in floats)  # waiting for the next block now

        for block in blocks:
            block.register_forward_hook(keep)
        with torch.no_grad():
            runner(blocks, *inputs())
        assert len(seen) == 5
