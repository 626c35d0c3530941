"""Laws of the runners: they change what is kept and where, and nothing else."""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memory.device import CpuDevice
from memory.runners import BlockRunner, Recompute, run_checkpointed, run_plain, run_with
from memory.store import DeviceStore, HostStore
from tests.memory.tiny_blocks import KeepFirst, inputs, make_blocks, trainable


def run(runner: BlockRunner, dropout: float) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], int]:
    """Output, all gradients, and how many tensors were kept for backward."""
    blocks = make_blocks(dropout=dropout)
    x, shift = (tensor.requires_grad_() for tensor in inputs())
    kept: list[torch.Tensor] = []
    torch.manual_seed(0)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = runner(blocks, x, shift, None)
    return y, torch.autograd.grad(y.square().sum(), [x, shift, *trainable(blocks)]), len(kept)


def test_checkpointed_equals_plain_bit_for_bit_and_keeps_less() -> None:
    for dropout in (0.0, 0.5):
        plain, plain_grads, plain_kept = run(run_plain, dropout)
        checkpointed, checkpointed_grads, checkpointed_kept = run(run_checkpointed, dropout)
        assert torch.equal(plain, checkpointed)
        assert all(torch.equal(a, b) for a, b in zip(plain_grads, checkpointed_grads, strict=True))
        assert checkpointed_kept < plain_kept


RUNNERS = {
    "alone": lambda: run_with(Recompute()),
    "keeps": lambda: run_with(KeepFirst()),
    "on the device": lambda: run_with(KeepFirst(), DeviceStore()),
    "on the host": lambda: run_with(KeepFirst(), HostStore(CpuDevice())),
}
every_runner = pytest.mark.parametrize("make_runner", RUNNERS.values(), ids=RUNNERS.keys())


@every_runner
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nodes_equal_plain_bit_for_bit(make_runner, dropout: float) -> None:  # type: ignore[no-untyped-def]
    plain, plain_grads, plain_kept = run(run_plain, dropout)
    ours, grads, kept = run(make_runner(), dropout)
    assert torch.equal(plain, ours) and kept < plain_kept
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, grads, strict=True))


@every_runner
def test_only_what_needs_gradients_gets_them(make_runner) -> None:  # type: ignore[no-untyped-def]
    runner, blocks, plain = make_runner(), make_blocks(), make_blocks()
    for of in (blocks, plain):
        of[0].requires_grad_(False)  # runs without a node
        of[2].first.up.requires_grad_(False)
    x, shift = inputs()
    for run_blocks, of in ((runner, blocks), (run_plain, plain)):
        run_blocks(of, x, shift).square().sum().backward()
    found, expected = ([parameter.grad for parameter in of.parameters()] for of in (blocks, plain))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(grad is not None for grad in found) == 7
    out = runner(nn.ModuleList(blocks[:1]), x, shift)
    assert not out.requires_grad


class NoPart(nn.Module):
    """A block with a parameter that plays no part, and with one that is used under a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.scale = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, scaled: bool) -> Tensor:
        return x * self.scale if scaled else x + 1


def test_a_parameter_that_plays_no_part_has_no_gradient() -> None:
    blocks = nn.ModuleList([NoPart(), NoPart()])
    run_with(Recompute())(blocks, torch.ones(3), True).sum().backward()
    assert [block.idle.grad for block in blocks] == [None, None] and all(block.scale.grad == 3 for block in blocks)
    run_with(Recompute())(blocks, torch.ones(3).requires_grad_(), False).sum().backward()
    assert [block.idle.grad for block in blocks] == [None, None] and all(block.scale.grad == 3 for block in blocks)
    run_with(Recompute())(blocks, torch.ones(3), False).sum().backward()  # nothing to go back to
    assert all(block.scale.grad == 3 for block in blocks)


# --- stores ----------------------------------------------------------------------------------------------------------


class Logged(DeviceStore):
    """A store that writes down what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []
        self.held: set[int] = set()

    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        self.log.append(("put", number))
        super().put(number, tensors)
        self.held.add(number)

    def fetch(self, number: int) -> None:
        self.log.append(("fetch", number))

    def get(self, number: int) -> tuple[Tensor, ...]:
        self.log.append(("get", number))
        return super().get(number)

    def drop(self, number: int) -> None:
        self.log.append(("drop", number))
        super().drop(number)
        self.held.remove(number)


def test_a_store_is_asked_one_block_ahead_and_holds_nothing_in_the_end() -> None:
    store, blocks = Logged(), make_blocks(3)
    y = run_with(KeepFirst(), store)(blocks, *inputs())
    assert store.log == [("put", 0), ("put", 1), ("put", 2)]
    store.log.clear()
    y.sum().backward()
    assert store.log == [
        *(("get", 2), ("fetch", 1), ("drop", 2)),
        *(("get", 1), ("fetch", 0), ("drop", 1)),
        *(("get", 0), ("drop", 0)),
    ]
    store.log.clear()
    with torch.no_grad():
        run_with(KeepFirst(), store)(blocks, *inputs())
    assert not store.log


def test_autograd_keeps_no_stream_that_a_store_keeps() -> None:
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run_with(Recompute(), DeviceStore())(make_blocks(), *inputs())
    x, shift = inputs()
    assert {tensor.shape for tensor in kept if tensor.ndim > 2} == {shift.shape}


def test_a_graph_that_is_given_up_leaves_the_store() -> None:
    store, blocks = Logged(), make_blocks()
    runner = run_with(Recompute(), store)
    y = runner(blocks, *inputs())
    with pytest.raises(RuntimeError, match="before the next forward"):
        runner(blocks, *inputs())
    assert len(store.held) == 5  # the first graph's
    del y
    gc.collect()
    assert not store.held
    runner(blocks, *inputs()).sum().backward()


def test_an_exception_in_either_direction_leaves_the_store_empty() -> None:
    store, blocks = Logged(), make_blocks()
    runner = run_with(Recompute(), store)
    for failing_call in range(10):  # 5 in forward, 5 in backward
        calls = iter(range(100))

        def fail(module: nn.Module, arguments: tuple, calls=calls, failing_call=failing_call) -> None:  # type: ignore[no-untyped-def]
            if next(calls) == failing_call:
                raise KeyboardInterrupt

        hooks = [block.register_forward_pre_hook(fail) for block in blocks]
        with pytest.raises(KeyboardInterrupt) as caught:
            runner(blocks, *inputs()).sum().backward()
        assert caught.tb is not None and not store.held  # although the traceback holds the graph
        for hook in hooks:
            hook.remove()


def test_a_second_backward_through_a_store_is_refused_and_not_wrong() -> None:
    y = run_with(Recompute(), DeviceStore())(make_blocks(), *inputs()).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        y.backward()


def test_all_call_the_blocks_in_order() -> None:
    x, shift = inputs()
    expected = x
    for block in make_blocks():
        expected = block(expected, shift)
    for runner in (run_plain, run_checkpointed, run_with(Recompute())):
        assert torch.equal(runner(make_blocks(), x, shift), expected)
        with torch.no_grad():
            assert torch.equal(runner(make_blocks(), x, shift), expected)
