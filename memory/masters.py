"""The frozen tensors of some blocks in host memory, from which they are copied to the device block by block.

What: `HostMasters` takes over the frozen parameters and buffers (whatever does not require a gradient, of any dtype) of
chosen blocks; what trains in these blocks is moved to the device. Its `HostBlock`s know how to lie in a flat buffer:
they can be copied into one, and `bound` to it, so that the block computes with the buffer's content for a while.

How: there are two kinds. "pinned": a block's tensors are packed into one arena of exactly their size, and one transfer
takes it to the device. "mapped": tensors stay where they are, such as in a memory-mapped file, and nothing is read when
masters are made. For a transfer a worker thread copies them into one of two pinned buffers (`Staging`, shared by all
blocks of all experts), from which they go on; the file is read while the block before computes, and pages that the
system has dropped are read again. The worker is at most two blocks ahead of the transfers.

Cost: pinned: host memory of the blocks' size; while they are packed, one block more. Mapped: two pinned buffers of the
largest block, and whatever the system's page cache may use; each transfer waits for one thread to copy the block in
host memory, or for the disk where pages are not in memory.

Exact: bytes are copied. Outside of `bound` every tensor of a block shows its true value on the host, so `state_dict()`,
saving and merging in place work as always; a change in place is noticed by the tensors' version numbers. What moves or
replaces tensors (`.to(device)` on the whole model, `load_state_dict(assign=True)`) is an error when they are bound
next. Buffers are constants: what a block writes into one is lost."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from memory.arena import Arena, aligned, tensor_bytes
from memory.device import Device, Event

Kind = Literal["pinned", "mapped"]


def flat_bytes(block: nn.Module) -> int:
    """Return how many bytes the frozen tensors of a block take in a flat buffer.

    Args:
        block: any module, on any device, meta too.
    """
    return _layout(block)[1]


class HostMasters:
    """The frozen tensors of some blocks, in host memory.

    Args:
        blocks: all blocks of a model.
        numbers: which of them; what trains in these is moved to `place`.
        device: whose host memory is used.
        place: where the blocks compute.
        kind: "pinned" packs the tensors into memory from which copies are fast; "mapped" leaves them where they are.

    Attributes:
        blocks: a `HostBlock` for each of `numbers`.
        num_bytes: host memory that was taken; 0 for mapped.
        slot_bytes: the size of the largest block.

    Raises:
        RuntimeError: a tensor is on meta; or not on the host, for mapped.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], numbers: Iterable[int], device: Device, *, place: torch.device, kind: Kind
    ) -> None:
        self.blocks = {number: HostBlock(blocks[number], device, place=place, kind=kind) for number in numbers}
        sizes = [block.num_bytes for block in self.blocks.values()]
        self.num_bytes = sum(sizes) if kind == "pinned" else 0
        self.slot_bytes = max(sizes, default=0)


class HostBlock:
    """A block whose frozen tensors are on the host outside of `bound`.

    Args:
        block: the block.
        device: whose host memory is used.
        place: where what trains is moved to.
        kind: as for `HostMasters`.

    Attributes:
        num_bytes: size of a flat buffer with all frozen tensors.
        flat: that buffer on the host, or None for mapped.

    Raises:
        RuntimeError: as for `HostMasters`.
    """

    def __init__(self, block: nn.Module, device: Device, *, place: torch.device, kind: Kind) -> None:
        self._packed, self.num_bytes = _layout(block)
        # Blocks that compute on meta, in a simulation, have nothing to load.
        if place.type != "meta" and any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers())):
            raise RuntimeError(f"a {type(block).__name__} is on meta; load weights before it is streamed")
        for packed in self._packed:
            if kind == "mapped" and packed.tensor.device.type != "cpu":
                raise RuntimeError(
                    f"{packed}: expected it on the host for mapped masters, found {packed.tensor.device}"
                )
        for parameter in block.parameters():
            if parameter.requires_grad:
                _move(parameter, place)
        self.flat: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():  # so that training may follow
            if kind == "mapped":
                self._views = [packed.tensor.data for packed in self._packed]
                return
            arena = Arena(device, self.num_bytes)
            self.flat = arena.memory
            self._views = [arena.take(packed.shape, packed.dtype) for packed in self._packed]
            for packed, view in zip(self._packed, self._views, strict=True):
                view.copy_(packed.tensor)
                packed.tensor.data = view

    def versions(self) -> list[int]:
        """Return a number for each tensor that grows with every change in place."""
        return [packed.tensor._version for packed in self._packed]

    def fill(self, buffer: Tensor) -> None:
        """Copy all tensors into a flat buffer.

        Args:
            buffer: on the host. [>= num_bytes] uint8
        """
        with torch.no_grad():
            for packed, view in zip(self._packed, self._views, strict=True):
                packed.view(buffer).copy_(view)

    @contextmanager
    def bound(self, buffer: Tensor) -> Iterator[None]:
        """Let the block compute with the content of a flat buffer for the body of the `with`.

        Args:
            buffer: on the device. [>= num_bytes] uint8

        Raises:
            RuntimeError: a tensor is not where this left it.
        """
        for packed, view in zip(self._packed, self._views, strict=True):
            if not packed.is_at(view):
                raise RuntimeError(
                    f"{packed} of a streamed block was moved or replaced after StreamedBlocks was made; "
                    "move the rest of a model with move_all_but, or make a new StreamedBlocks"
                )
        try:
            for packed in self._packed:
                packed.tensor.data = packed.view(buffer)
            yield
        finally:
            for packed, view in zip(self._packed, self._views, strict=True):
                packed.tensor.data = view


class Staging:
    """Two pinned buffers and a worker thread, through which tensors that lie anywhere travel to the device.

    Args:
        device: to which they go.
        num_bytes: of the largest block.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self._device = device
        self._buffers = [device.host(num_bytes) for _ in range(2)]
        self._read: list[Event | None] = [None, None]  # the end of the last copy out of each
        self._turn = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="staging")

    def copy(self, target: Tensor, block: HostBlock, *, after: Event) -> "Future[Event]":
        """Start copying a block to the device.

        Args:
            target: a flat buffer on the device. [block.num_bytes] uint8
            block: whose tensors are read, some time before the result is there.
            after: what must have happened before the target is written.

        Returns:
            The end of the copy, as soon as it has been issued.
        """
        return self._worker.submit(self._copy, target, block, after)

    def _copy(self, target: Tensor, block: HostBlock, after: Event) -> Event:
        buffer, read = self._buffers[self._turn], self._read[self._turn]
        if read is not None:
            read.synchronize()
        block.fill(buffer)
        copied = self._device.copy(target, buffer[: block.num_bytes], after=after)
        self._read[self._turn] = copied
        self._turn = 1 - self._turn
        return copied


class _Packed:
    """One frozen tensor and its place in a flat buffer."""

    def __init__(self, owner: nn.Module, name: str, tensor: Tensor, offset: int) -> None:
        self.owner, self.name, self.tensor = owner, name, tensor
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self.start, self.end = offset, offset + tensor_bytes(tensor.shape, tensor.dtype)

    def __str__(self) -> str:
        return f"{type(self.owner).__name__}.{self.name}"

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)

    def is_at(self, view: Tensor) -> bool:
        """Whether the block still has this tensor under this name, in this memory."""
        found = self.owner._parameters.get(self.name, self.owner._buffers.get(self.name))
        return found is self.tensor and self.tensor.data_ptr() == view.data_ptr() and self.tensor.dtype == self.dtype


def _layout(block: nn.Module) -> tuple[list[_Packed], int]:
    """Where the frozen tensors of a block lie in a flat buffer, and its size."""
    layout: list[_Packed] = []
    seen: set[int] = set()
    for owner in block.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or id(tensor) in seen or tensor.requires_grad or tensor.numel() == 0:
                continue
            seen.add(id(tensor))
            layout.append(_Packed(owner, name, tensor, aligned(layout[-1].end) if layout else 0))
    return layout, layout[-1].end if layout else 0


def _move(tensor: Tensor, device: torch.device) -> None:
    """Move a parameter, and its gradient, without making another object of it."""
    tensor.data = tensor.data.to(device)
    if tensor.grad is not None:
        tensor.grad.data = tensor.grad.data.to(device)
