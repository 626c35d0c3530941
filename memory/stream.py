"""Streaming: the weights of some blocks live in host memory and pass through two buffers on the device.

What: `StreamedBlocks` is a `BlockRunner`. It is made once for a list of blocks; from then on the frozen tensors of the
streamed blocks are in host memory (`memory/masters.py`) and travel to a `Ring` of two device buffers when they are
needed. What trains (LoRA) and the other blocks are on the device. Training and generation use the same runner, and
several experts may share one ring: to change from one to the other moves no masters.

How: running a streamed block binds its tensors to a slot of the ring into which they were copied, and binds them back
to the host when the block has run. While a block runs, the next one (in backward the previous one) is copied into the
other slot. Slots keep their content until they are needed, so that the turn from forward to backward and from one step
to the next copies nothing. Recomputation and gradient of a block share one load, because a block is one node of the
graph (`memory/runners.py`) for which `maths` computes and `store` keeps what backward needs. Evenly spaced numbers
(`spread`) give each transfer as much computation to hide behind as there is.

Order: three queues run side by side, and two events for each slot hold them together.
- `ready`, the end of the copy into the slot: the computation waits for it before it reads the slot.
- `free`, recorded when the computation of the slot's block has been issued: the next copy into the slot waits for it. A
  slot that never computed has the `free` of its making, because the allocator may have handed out memory which earlier
  kernels still use.
So a copy into one slot needs only the block before the running one to be finished, and runs beside the running one. A
slot is given away only while its block is not running. The host waits for nothing: it may be blocks ahead of the
device, and the order is the same. With mapped masters it waits until the worker thread has issued the copy, because
waiting for an event that is not recorded yet would be waiting for nothing.

Cost: device memory for the ring instead of the streamed blocks (streaming one or two saves nothing); each streamed
block one transfer in forward and one in backward, except those that are still in their slots. On the CPU it saves
nothing and serves tests: a slot is NaN from the moment it is given away until it is waited for.

Exact: output, input gradient and gradients of trainable parameters are bit for bit those of the same maths with
everything on the device (`run_with`), and with `Recompute` those of `run_plain` and `run_checkpointed`.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.errors import InputError
from memory.device import Device, Event, device_for
from memory.masters import HostBlock, HostMasters, Kind, Staging, flat_bytes
from memory.runners import BlockMaths, Pass, Recompute, run_nodes

if TYPE_CHECKING:
    from memory.store import Store

SLOTS = 2
"""More hide nothing more: the bus is the bound, not the look-ahead."""


def spread(total: int, num_streamed: int) -> tuple[int, ...]:
    """Return the numbers of evenly spaced blocks.

    Args:
        total: how many blocks there are.
        num_streamed: how many of them to choose.

    Returns:
        Ascending numbers below `total`.

    Raises:
        InputError: `num_streamed` is negative or more than `total`.
    """
    if not 0 <= num_streamed <= total:
        raise InputError(f"blocks to swap: expected 0 to {total}, as many as the model has, found {num_streamed}")
    return tuple((2 * place + 1) * total // (2 * num_streamed) for place in range(num_streamed))


def ring_bytes(blocks: Iterable[nn.Module], *, slots: int = SLOTS) -> int:
    """Return the device memory of a ring through which any of some blocks can pass.

    Args:
        blocks: of all experts that share the ring; on any device, meta too. What is frozen now counts.
        slots: of the ring.

    Returns:
        Bytes.
    """
    return slots * max((flat_bytes(block) for block in blocks), default=0)


class Ring:
    """Device buffers through which the streamed blocks of all experts pass.

    Args:
        device: where they are.
        slot_bytes: of each; at least the `flat_bytes` of the largest block.
        slots: how many; with one nothing is copied while something computes.

    Attributes:
        device: as given.
        slot_bytes: as given.
        num_bytes: device memory of all slots.
    """

    def __init__(self, device: Device, slot_bytes: int, slots: int = SLOTS) -> None:
        self.device, self.slot_bytes, self.num_bytes = device, slot_bytes, slot_bytes * slots
        self._slots = [_Slot(device, slot_bytes) for _ in range(slots)]
        self._staging: Staging | None = None
        self._running = False

    @contextmanager
    def loaded(self, block: HostBlock, *, then: HostBlock | None) -> Iterator[None]:
        """Have a block's weights on the device for the body of the `with`, and start copying those of another one.

        Args:
            block: the one that computes.
            then: the one that will be asked for next, if it is known.

        Raises:
            RuntimeError: another block is running; a tensor of this one was moved or replaced.
        """
        if self._running:
            raise RuntimeError("a streamed block was run while another one was running")
        self._running = True
        try:
            slot = self._slot_of(block, beside=None)
            if then is not None and len(self._slots) > 1:
                self._slot_of(then, beside=slot)
            try:
                slot.wait(self.device)
                with block.bound(slot.buffer):
                    yield
            finally:
                slot.free = self.device.record()
        finally:
            self._running = False

    def _slot_of(self, block: HostBlock, *, beside: "_Slot | None") -> "_Slot":
        """The slot that holds a block, or starts receiving it; not `beside`."""
        versions = block.versions()
        for slot in self._slots:
            if slot.holds(block, versions):
                return slot
        slot = next(slot for slot in self._slots if slot is not beside)
        self._slots.remove(slot)  # the one that was given away longest ago comes first
        self._slots.append(slot)
        slot.block = None  # should the copy fail
        if isinstance(slot.ready, Future):
            wait_for_futures([slot.ready])  # its copy, which nobody wanted, must not be issued after ours
        self.device.free(slot.buffer)
        target = slot.buffer[: block.num_bytes]
        if block.flat is not None:
            slot.ready = self.device.copy(target, block.flat, after=slot.free)
        else:
            self._staging = self._staging or Staging(self.device, self.slot_bytes)
            slot.ready = self._staging.copy(target, block, after=slot.free)
        slot.block, slot.versions = weakref.ref(block), versions
        return slot


class _Slot:
    """A buffer on the device, what is in it, and the two events of its order."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.buffer = device.buffer(num_bytes)
        self.block: weakref.ref[HostBlock] | None = None
        self.versions: list[int] = []
        self.ready: Event | Future[Event] | None = None
        self.free = device.record()

    def holds(self, block: HostBlock, versions: list[int]) -> bool:
        """Whether it has or is receiving what the block's tensors are now."""
        return self.block is not None and self.block() is block and self.versions == versions

    def wait(self, device: Device) -> None:
        """Let the computation wait for the content."""
        try:
            if isinstance(self.ready, Future):
                self.ready = self.ready.result()
            assert self.ready is not None
            device.wait(self.ready)
        except BaseException:
            self.block = None  # what is in the slot is not known
            raise


class StreamedBlocks:
    """A block runner that keeps the frozen weights of some blocks in host memory.

    Make it after LoRA has been added and `requires_grad` has been set: what is frozen then is what is streamed.

    Args:
        blocks: all blocks of the model, in order. Resident blocks, and what trains in streamed ones, are moved to
            `device` by this.
        streamed: numbers of the blocks that live in host memory; () is all resident.
        device: where blocks compute, CUDA or the CPU.
        ring: through which they pass, shared with other experts; None: one of their own.
        maths: how each block computes, streamed or resident.
        store: where `x` and what the maths keeps wait for backward; None: autograd keeps them.
        masters: "pinned" packs the weights into pinned host memory; "mapped" leaves them where they are on the host, in
            a memory-mapped file for instance, and copies them through two pinned buffers; or masters that were
            made before, of these blocks: those of the others must be bound to device memory meanwhile.

    Attributes:
        streamed: their numbers, ascending.
        host_bytes: host memory that the masters took; staging buffers of mapped ones not counted.
        device_bytes: device memory of the ring.

    Raises:
        InputError: a number that the model does not have; streaming does not know the device.
        ValueError: the slots of `ring` are too small.
        RuntimeError: weights are not loaded yet.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        streamed: Sequence[int],
        device: torch.device | str,
        ring: Ring | None = None,
        maths: BlockMaths | None = None,
        store: "Store | None" = None,
        masters: Kind | HostMasters = "pinned",
    ) -> None:
        self._blocks = tuple(blocks)
        self.streamed = tuple(sorted(set(streamed)))
        if any(not 0 <= number < len(self._blocks) for number in self.streamed):
            raise InputError(f"streamed blocks: expected numbers from 0 to {len(blocks) - 1}, found {self.streamed}")
        self._maths, self._store = maths or Recompute(), store
        place = torch.device(device)
        self.host_bytes = self.device_bytes = 0
        if self.streamed:
            operations = ring.device if ring is not None else device_for(place)
            needed = max(flat_bytes(self._blocks[number]) for number in self.streamed)
            if ring is not None and ring.slot_bytes < needed:
                raise ValueError(f"ring: expected slots of at least {needed} bytes, found {ring.slot_bytes}")
            if isinstance(masters, HostMasters):
                self._masters = masters
            else:
                self._masters = HostMasters(self._blocks, self.streamed, operations, place=place, kind=masters)
            self._ring = ring or Ring(operations, needed, min(SLOTS, len(self.streamed)))
            self.host_bytes, self.device_bytes = self._masters.num_bytes, self._ring.num_bytes
        for number, block in enumerate(self._blocks):
            if number not in self.streamed:
                block.to(place)

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
        """Run the blocks one after the other.

        Args:
            blocks: those the runner was made for.
            x: what one block hands to the next, on the runner's device.
            inputs: what every block receives unchanged. A tensor inside a container must not require a gradient.

        Returns:
            `x` after the last block.
        """
        if len(blocks) != len(self._blocks) or any(a is not b for a, b in zip(blocks, self._blocks, strict=True)):
            raise RuntimeError("StreamedBlocks was made for the blocks of another model")
        return run_nodes(self._blocks, x, inputs, maths=self._maths, store=self._store, load=self._load)

    @contextmanager
    def _load(self, number: int, why: Pass) -> Iterator[None]:
        """Have a block's weights on the device, and the next ones on their way."""
        if number not in self.streamed:
            yield
            return
        place = self.streamed.index(number) + (-1 if why == "back" else 1)
        if why == "alone":
            place %= len(self.streamed)
        then = self._masters.blocks[self.streamed[place]] if 0 <= place < len(self.streamed) else None
        with self._ring.loaded(self._masters.blocks[number], then=then):
            yield


def move_all_but(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device | str) -> None:
    """Move a model's parameters and buffers to a device, except those of the given blocks.

    Args:
        model: with `blocks` somewhere inside it.
        blocks: left where they are, with everything in them.
        device: for the rest.
    """
    kept = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in kept:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
