"""Laws of masters: a block and its flat buffer are the same bytes; mapped tensors are read late and never moved."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor, nn

from memory.device import CpuDevice, Event
from memory.masters import HostBlock, HostMasters, Kind, Staging, flat_bytes
from memory.runners import run_plain
from memory.stream import StreamedBlocks
from tests.memory.tiny_blocks import Block, frozen, inputs, make_blocks, trainable

CPU = torch.device("cpu")


def content(block: nn.Module) -> list[bytes]:
    return [bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for tensor in frozen(block)]


@pytest.mark.parametrize("kind", ["pinned", "mapped"])
@pytest.mark.parametrize("quantize", [False, True])
def test_a_block_bound_to_a_copy_of_its_bytes_is_the_same_block(kind: Kind, quantize: bool) -> None:
    block, other = Block(3, quantize=quantize), Block(4, quantize=quantize)
    mine, theirs = (HostBlock(of, CpuDevice(), place=CPU, kind=kind) for of in (block, other))
    before = content(block)
    assert mine.num_bytes == flat_bytes(block) and (mine.flat is None) == (kind == "mapped")
    buffers = [torch.full((mine.num_bytes + 7,), 0xFF, dtype=torch.uint8) for _ in range(2)]
    for master, buffer in zip((mine, theirs), buffers, strict=True):
        master.fill(buffer)
        assert (buffer[master.num_bytes :] == 0xFF).all()
    with mine.bound(buffers[0]):
        assert content(block) == before
        start = buffers[0].data_ptr()
        assert all(start <= tensor.data_ptr() < start + mine.num_bytes for tensor in frozen(block))
        assert all(tensor.data_ptr() % 16 == start % 16 for tensor in frozen(block))
    with mine.bound(buffers[1]):
        assert content(block) == content(other) != before
    assert content(block) == before


@pytest.mark.parametrize("kind", ["pinned", "mapped"])
def test_an_error_while_bound_brings_the_host_back(kind: Kind) -> None:
    block = Block(3)
    before, addresses = content(block), None
    master = HostBlock(block, CpuDevice(), place=CPU, kind=kind)
    addresses = [tensor.data_ptr() for tensor in frozen(block)]
    with pytest.raises(KeyboardInterrupt), master.bound(torch.zeros(master.num_bytes, dtype=torch.uint8)):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError), master.bound(torch.zeros(master.num_bytes - 1, dtype=torch.uint8)):  # too small
        raise AssertionError("never reached")
    assert content(block) == before and [tensor.data_ptr() for tensor in frozen(block)] == addresses


def test_masters_count_their_bytes() -> None:
    blocks = nn.ModuleList([Block(0, hidden=32), Block(1, hidden=96), Block(2)])
    pinned = HostMasters(blocks, (0, 1), CpuDevice(), place=CPU, kind="pinned")
    assert pinned.num_bytes == flat_bytes(blocks[0]) + flat_bytes(blocks[1]) and pinned.blocks.keys() == {0, 1}
    assert pinned.slot_bytes == flat_bytes(blocks[1])
    mapped = HostMasters(blocks, (2,), CpuDevice(), place=CPU, kind="mapped")
    assert mapped.num_bytes == 0 and mapped.slot_bytes == flat_bytes(blocks[2])


def test_what_is_not_on_the_host_cannot_be_mapped() -> None:
    with pytest.raises(RuntimeError, match="Linear is on meta; load weights"):
        HostBlock(nn.Linear(3, 3, device="meta"), CpuDevice(), place=CPU, kind="mapped")


# --- a file ----------------------------------------------------------------------------------------------------------


def from_file(path: Path) -> nn.ModuleList:
    """Blocks whose frozen tensors are views of a mapped file."""
    blocks = nn.ModuleList(Block(seed + 20, quantize=True) for seed in range(5))
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in (*blocks.named_parameters(), *blocks.named_buffers()):
        if not tensor.requires_grad:
            tensor.data = tensors[name]
    return blocks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(make_blocks(quantize=True).state_dict(), tmp_path / "blocks.safetensors")
    return tmp_path / "blocks.safetensors"


def copied_adapters(source: nn.Module, target: nn.Module) -> None:
    for a, b in zip(trainable(source), trainable(target), strict=True):
        b.data.copy_(a.data)


def test_blocks_run_from_a_mapped_file_in_which_nothing_moves(path: Path) -> None:
    plain, blocks = make_blocks(quantize=True), from_file(path)
    copied_adapters(plain, blocks)
    addresses = [tensor.data_ptr() for tensor in frozen(blocks)]
    runner = StreamedBlocks(blocks, streamed=range(5), device="cpu", masters="mapped")
    for seed in range(2):
        grads = []
        for run, of in ((runner, blocks), (run_plain, plain)):
            y = run(of, *inputs(seed))
            grads.append((y, *torch.autograd.grad(y.square().sum(), trainable(of))))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert [tensor.data_ptr() for tensor in frozen(blocks)] == addresses
    assert runner.host_bytes == 0


# --- staging ---------------------------------------------------------------------------------------------------------


class Held(CpuDevice):
    """A CPU on which the test says when a copy out of a staging buffer has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.synchronized: list[int] = []
        self.sources: list[int] = []

    def copy(self, target: Tensor, source: Tensor, *, after: Event | None) -> Event:
        number, copied = len(self.sources), super().copy(target, source, after=after)
        self.sources.append(source.data_ptr())
        device = self

        class Noted:
            def synchronize(self) -> None:
                device.synchronized.append(number)
                copied.synchronize()

        return Noted()


@pytest.fixture
def staging() -> Iterator[tuple[Held, Staging]]:
    device = Held()
    yield device, Staging(device, flat_bytes(Block(0)))


def test_a_staging_buffer_is_written_only_when_its_last_copy_has_ended(staging: tuple[Held, Staging]) -> None:
    device, stage = staging
    masters = [HostBlock(Block(seed), device, place=CPU, kind="mapped") for seed in range(5)]
    targets = [device.buffer(master.num_bytes) for master in masters]
    copied = [
        stage.copy(target, master, after=device.record()) for target, master in zip(targets, masters, strict=True)
    ]
    events = [future.result() for future in copied]
    assert device.synchronized == [0, 1, 2]  # before the third, fourth and fifth
    assert device.sources[0] == device.sources[2] == device.sources[4] != device.sources[1] == device.sources[3]
    for event, target, master in zip(events, targets, masters, strict=True):
        device.wait(event)
        expected = torch.full((master.num_bytes,), 0xFF, dtype=torch.uint8)
        with master.bound(target):
            seen = content(master_block(master))
        master.fill(expected)
        assert content(master_block(master)) == seen


def master_block(master: HostBlock) -> nn.Module:
    """The tensors of a master as a module, for `content`."""
    module = nn.Module()
    for number, packed in enumerate(master._packed):
        module.register_buffer(str(number), packed.tensor)
    return module


def test_an_error_of_the_worker_reaches_who_asks(staging: tuple[Held, Staging]) -> None:
    device, stage = staging
    master = HostBlock(Block(0), device, place=CPU, kind="mapped")
    future = stage.copy(device.buffer(3), master, after=device.record())
    with pytest.raises(ValueError, match="expected the target's"):
        future.result()
