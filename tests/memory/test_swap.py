"""Laws of block swap: bit for bit what runs without it, nothing read too early or too late, true weights outside."""

import copy
import dataclasses
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from core.errors import InputError
from memory.runners import BlockRunner, run_checkpointed, run_plain
from memory.swap import SwappedBlocks, move_all_but
from memory.transfers import CpuCopies, CpuSlot
from tests.memory.tiny_blocks import Block, frozen, inputs, make_blocks, trainable

SETTINGS = {
    "linear": {},
    "quantised": {"quantize": True},
    "without lora": {"lora": False},
    "dropout": {"dropout": 0.4},
}


def swapped(blocks: nn.ModuleList, num_swapped: int = 3, checkpoint: bool = True) -> SwappedBlocks:
    return SwappedBlocks(blocks, num_swapped=num_swapped, device="cpu", checkpoint=checkpoint)


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


def reference(checkpoint: bool) -> BlockRunner:
    return run_checkpointed if checkpoint else run_plain


# --- equal to running without it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("num_swapped", range(6))
def test_output_and_gradients_are_bit_identical(num_swapped: int, checkpoint: bool, settings: dict) -> None:
    blocks, plain = make_blocks(**settings), make_blocks(**settings)
    runner = swapped(blocks, num_swapped, checkpoint)
    for needs in ((True, True), (False, False), (True, False), (False, True)):
        for seed in (1, 2):  # gradients of trainable parameters accumulate over all of this
            ours = results(runner, blocks, seed=seed, needs=needs)
            assert_same(ours, results(reference(checkpoint), plain, seed=seed, needs=needs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forward_only_is_bit_identical_and_training_goes_on_after_it(mode) -> None:  # type: ignore[no-untyped-def]
    blocks, plain = make_blocks(quantize=True).eval(), make_blocks(quantize=True).eval()
    runner = swapped(blocks, 4)
    for seed in range(3):
        with mode():
            assert torch.equal(runner(blocks, *inputs(seed)), run_plain(plain, *inputs(seed)))
        assert_same(results(runner, blocks, seed=seed), results(run_checkpointed, plain, seed=seed))


def test_made_in_inference_mode_it_still_trains() -> None:
    blocks, plain = make_blocks(), make_blocks()
    with torch.inference_mode():
        runner = swapped(blocks)
    assert_same(results(runner, blocks), results(run_checkpointed, plain))
    assert_same(results(run_plain, blocks), results(run_plain, plain))  # its weights outside of a run serve too


@pytest.mark.parametrize("second_needs_gradients", [True, False])
def test_two_runs_of_the_same_blocks_in_one_graph(second_needs_gradients: bool) -> None:
    gradients = []
    for runner_of in (swapped, lambda blocks: run_checkpointed):
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
    for runner_of in (swapped, lambda blocks: run_checkpointed):
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
    runner = swapped(blocks, 5)
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
        for runner_of in (swapped, lambda blocks: run_checkpointed):
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
    assert_same(results(swapped(blocks, 4), blocks), results(run_checkpointed, plain))


def test_a_frozen_weight_that_a_block_uses_twice() -> None:
    def make() -> nn.ModuleList:
        blocks = make_blocks(hidden=64)
        for block in blocks:
            block.second.weight = block.first.base.weight
        return blocks

    blocks, plain = make(), make()
    assert_same(results(swapped(blocks, 5), blocks), results(run_checkpointed, plain))


def test_arguments_that_are_no_tensors_reach_the_blocks() -> None:
    x, shift = inputs()
    blocks, plain = make_blocks(), make_blocks()
    factor = {"factor": torch.tensor(0.5)}
    both = []
    for run, of in ((swapped(blocks), blocks), (run_plain, plain)):
        y = run(of, x, None, factor)
        y.sum().backward()
        both.append([y, *(parameter.grad for parameter in trainable(of))])
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_hidden_tensor_that_needs_a_gradient_is_refused() -> None:
    @dataclasses.dataclass
    class Options:
        factors: list[Tensor]

    blocks = make_blocks()
    runner = swapped(blocks)
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
    runner = swapped(blocks, 3)
    results(runner, blocks)
    in_one_buffer = [len(addresses(frozen(block))) == 1 for block in blocks]
    assert in_one_buffer == [True, False, True, False, True]  # evenly spaced among resident ones
    assert [parameter.data_ptr() for parameter in trainable(blocks)] == adapters
    size = runner.host_bytes // 3
    content = sum(tensor.numel() * tensor.element_size() for tensor in frozen(blocks[0]))
    assert content <= size <= content + 256 * len(frozen(blocks[0]))
    assert runner.device_bytes == 2 * size


def test_backward_keeps_inputs_and_adapters_of_swapped_blocks_and_no_weights() -> None:
    blocks = make_blocks(3)
    runner = swapped(blocks, 3)
    kept: list[Tensor] = []
    x, shift = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = runner(blocks, x, shift)
    assert not addresses(kept) & (addresses(frozen(blocks)) | addresses([y]))
    assert len(kept) == 3 * (2 + 2)


def test_checkpoint_says_whether_resident_blocks_are_recomputed() -> None:
    kept: dict[bool, list[Tensor]] = {True: [], False: []}
    for checkpoint, tensors in kept.items():
        blocks = make_blocks()
        runner = swapped(blocks, 2, checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, tensors=tensors: tensors.append(t) or t, lambda t: t):
            runner(blocks, *inputs())
    assert len(kept[True]) < len(kept[False])


def test_inputs_are_kept_by_autograd_only_so_that_its_hooks_can_move_them_away() -> None:
    blocks = make_blocks()
    runner = swapped(blocks, 5)
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


class Logged(CpuCopies):
    """CPU transfers that write down what was asked of them, and for which slot."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def copy(self, slot: CpuSlot, source: Tensor) -> None:
        self.log.append(("copy", id(slot)))
        super().copy(slot, source)

    def wait(self, slot: CpuSlot) -> None:
        self.log.append(("wait", id(slot)))
        super().wait(slot)

    def done(self, slot: CpuSlot) -> None:
        self.log.append(("done", id(slot)))

    def copies(self) -> int:
        return sum(kind == "copy" for kind, _ in self.log)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Logged:
    copies = Logged()
    monkeypatch.setattr("memory.swap.copies_for", lambda device: copies)
    return copies


@pytest.mark.parametrize("num_swapped, training, forward", [(5, 6, 5), (3, 2, 3), (2, 0, 0), (1, 0, 0)])
def test_transfers_of_a_step(logged: Logged, num_swapped: int, training: int, forward: int) -> None:
    blocks = make_blocks()
    runner = swapped(blocks, num_swapped)
    results(runner, blocks)
    logged.log.clear()
    results(runner, blocks)
    assert logged.copies() == training  # both ways, without the two blocks that are in their slots at each turn
    with torch.no_grad():
        runner(blocks, *inputs())
        logged.log.clear()
        runner(blocks, *inputs())
    assert logged.copies() == forward


@pytest.mark.parametrize("num_swapped", [3, 5])
def test_a_block_is_copied_while_the_one_before_it_runs(logged: Logged, num_swapped: int) -> None:
    blocks = make_blocks()
    runner = swapped(blocks, num_swapped)
    results(runner, blocks)
    logged.log.clear()
    results(runner, blocks)
    with torch.no_grad():
        runner(blocks, *inputs())
        runner(blocks, *inputs())
    running: int | None = None
    for (kind, slot), (following, next_slot) in zip(logged.log, logged.log[1:], strict=False):
        if kind == "copy":
            assert slot != running  # never into the slot that is read
            assert following == "wait" and next_slot != slot  # and never for the block that waits now
        running = slot if kind == "wait" else None if kind == "done" else running


def test_swapping_nothing_moves_nothing(logged: Logged) -> None:
    blocks = make_blocks()
    before = [tensor.data_ptr() for tensor in frozen(blocks)]
    runner = swapped(blocks, 0)
    assert_same(results(runner, blocks), results(run_checkpointed, make_blocks()))
    assert runner.host_bytes == runner.device_bytes == logged.copies() == 0
    assert [tensor.data_ptr() for tensor in frozen(blocks)] == before


def test_two_experts_have_a_runner_each() -> None:
    high, low = make_blocks(), nn.ModuleList(Block(seed + 50) for seed in range(5))
    runners = {id(expert): swapped(expert, 4) for expert in (high, low)}
    plain = {id(high): make_blocks(), id(low): nn.ModuleList(Block(seed + 50) for seed in range(5))}
    for seed, expert in enumerate((high, low, low, high)):
        ours = results(runners[id(expert)], expert, seed=seed)
        assert_same(ours, results(run_checkpointed, plain[id(expert)], seed=seed))
    with pytest.raises(RuntimeError, match="another model"):
        runners[id(low)](high, *inputs())


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
    runner = swapped(blocks, 5)
    for run in (lambda: None, lambda: results(runner, blocks), lambda: runner(blocks, *inputs())):
        run()
        assert raw(blocks.state_dict()) == before
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in blocks.state_dict().items()} == dtypes


@pytest.mark.parametrize("num_swapped", [2, 5])  # 2: both stay in their slots
def test_a_change_in_place_is_noticed(num_swapped: int) -> None:
    blocks, plain = make_blocks(), make_blocks()
    runner = swapped(blocks, num_swapped)
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
    runner = swapped(blocks)
    results(runner, blocks)
    spoil(blocks)
    with pytest.raises(RuntimeError, match="moved or replaced"):
        runner(blocks, *inputs())


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_swapped", [-1, 6])
def test_a_number_that_the_model_does_not_have_is_refused(num_swapped: int) -> None:
    with pytest.raises(InputError, match=f"0 to 5.*found {num_swapped}"):
        swapped(make_blocks(), num_swapped)


def test_a_device_without_block_swap_is_refused() -> None:
    with pytest.raises(InputError, match="cuda device or the cpu, found mps"):
        SwappedBlocks(make_blocks(), num_swapped=1, device="mps", checkpoint=True)


def test_weights_that_are_not_loaded_yet_are_refused() -> None:
    with pytest.raises(RuntimeError, match="load weights first"):
        swapped(nn.ModuleList([nn.Linear(4, 4, device="meta")]), 1)


@pytest.mark.parametrize("failing_call", range(10))  # 5 in forward, 5 in backward
def test_after_an_exception_in_mid_run_weights_are_true_and_the_next_run_is_right(failing_call: int) -> None:
    blocks, plain = make_blocks(), make_blocks()
    before = raw(blocks.state_dict())
    runner = swapped(blocks, 5)
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


def test_after_a_failed_transfer_the_next_run_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = make_blocks()
    runner = swapped(blocks, 5)
    results(runner, blocks)
    with monkeypatch.context() as patch:

        def fail(self: CpuCopies, slot: CpuSlot, source: Tensor) -> None:
            slot.buffer.fill_(0xFF)
            raise MemoryError

        patch.setattr(CpuCopies, "copy", fail)
        with pytest.raises(MemoryError):
            runner(blocks, *inputs())
    for parameter in trainable(blocks):
        parameter.grad = None
    assert_same(results(runner, blocks), results(run_checkpointed, make_blocks()))


def test_running_swapped_blocks_inside_one_another_is_refused() -> None:
    blocks = make_blocks()
    runner = swapped(blocks, 5)
    hook = blocks[2].register_forward_pre_hook(lambda module, arguments: runner(blocks, *arguments))
    with pytest.raises(RuntimeError, match="another one was running"):
        runner(blocks, *inputs())
    hook.remove()
    assert_same(results(runner, blocks), results(run_checkpointed, make_blocks()))


# --- the net that catches a wrong order ------------------------------------------------------------------------------


def test_reading_a_slot_before_it_is_waited_for_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for quantize in (False, True):
        blocks = make_blocks(quantize=quantize)
        runner = swapped(blocks, 5)
        with monkeypatch.context() as patch:
            patch.setattr(CpuCopies, "wait", lambda self, slot: None)
            assert torch.isnan(runner(blocks, *inputs())).all()


def test_a_view_kept_from_a_run_is_nan_once_its_slot_is_needed() -> None:
    for quantize in (False, True):
        blocks = make_blocks(quantize=quantize)
        runner = swapped(blocks, 5)
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
