"""Where the inputs of blocks, and what blocks keep besides, wait between forward and backward.

What: a `Store` takes the tensors of a block in forward (`put`) and gives them back in backward (`get`); `fetch` says
that they will be wanted next, `drop` that they are done with. `DeviceStore` keeps them where they are. `HostStore`
keeps them in host memory: with it a model of any depth holds the tensors of two blocks on the device.

How: a `HostStore` has two buffers on the device, each as large as the largest block's tensors, and a piece of host
memory for each block that waits. `put` packs the tensors into one of the buffers and starts its copy to the host, which
runs while the next block computes into the other one. In backward `fetch` starts the copy of the next block's tensors
into the buffer that is free while this block computes. What is still in a buffer is not copied back: at the turn from
forward to backward, the last two blocks.

Host memory is taken piece by piece at the first `put`, each of exactly a block's size, and kept: a piece that was
dropped serves the next block. When larger tensors come than any free piece can hold, one is given back for a new one.

Order: three queues run side by side (computation, copies in, copies out). Everything is ordered through the
computation, which waits for the end of each copy before its buffer changes hands.
- Out: the copy starts after a `record` that follows the packing. The computation waits for its end before anything is
  packed or copied into the same buffer, a whole block later: it loses time only if the bus is slower than a block.
- In: the copy starts after a `record` that follows (a) all that read the buffer's last content, (b) the computation's
  wait for the copy out of it, if there was one, (c) the computation's wait for the end of the copy that wrote this
  piece of host memory, because the block's own buffer was not given away before.
- A piece of host memory is written again after a `record` that follows the wait for the last copy from it.
Tensors given to `put` are read by the computation only, by the packing: no copy ever touches memory that belongs to
somebody else, and the allocator may reuse it as if there were no other queue. What copies touch are the two buffers,
which live as long as the store; one that is replaced by a larger one has no copy under way, and its successor's first
copy follows a `record`. The host waits for nothing, except where a piece of host memory is given back.

Cost: one pass over the tensors to pack them (2 GB of device traffic for 1 GB, 1 % of a block's time); twice a block's
tensors on the device; all blocks' tensors on the host, and the seconds that pinning them takes in the first step.

Exact: bytes are copied; shapes, dtypes, the order of dimensions in memory and so the results are those of
`DeviceStore`. With `eight_bits` every row (along the dimension that is contiguous in memory) is divided by its largest
magnitude / 448 in float32 and rounded to e4m3: a number is off by at most 1/16 of itself, or by 1/450,000 of the row's
largest if that is more, and is then rounded to its dtype; 2.6 % root mean square. Large values of a few channels, as
transformers have them, do not coarsen the others, as int8 would. Tensors of less than 1/8 of the block's largest stay
as they are (statistics such as a log-sum-exp weigh nothing and bear no rounding), and so do those with rows of less
than 32 numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from memory.arena import aligned
from memory.device import Device, Event

VALUE_DTYPE = torch.float8_e4m3fn
LARGEST_VALUE = 448.0  # of e4m3
SMALLEST_SCALE = 2.0**-126  # its reciprocal is still finite in float32
SMALL_SHARE = 8
"""With eight bits, tensors of less than one in so many bytes of the block's largest are not rounded."""
NARROW = 32
"""With eight bits, tensors whose rows have fewer numbers are not rounded: their scales would weigh too much."""
ELEMENTS_AT_ONCE = 2**24  # 64 MiB of float32

AnyEntry = TypeVar("AnyEntry")


class Store(Protocol):
    """Keeps tensors by number from forward to backward."""

    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Take tensors; those who gave them need not keep them.

        Args:
            number: under which they are found again; free since its last `drop`.
            tensors: on the device, any shapes and dtypes; not changed by anybody before `drop`.

        Raises:
            RuntimeError: there is something under this number.
        """
        ...

    def fetch(self, number: int) -> None:
        """Start bringing back what will be asked for next; `get` works without it.

        Args:
            number: given to `put`.

        Raises:
            RuntimeError: nothing is under this number.
        """
        ...

    def get(self, number: int) -> tuple[Tensor, ...]:
        """Return the tensors for what is computed from now on.

        Args:
            number: given to `put`.

        Returns:
            As many tensors as were put; their memory is the store's and undefined after `drop`.

        Raises:
            RuntimeError: nothing is under this number.
        """
        ...

    def drop(self, number: int) -> None:
        """Say that everything which reads the tensors has been issued.

        Args:
            number: given to `put`.

        Raises:
            RuntimeError: nothing is under this number.
        """
        ...


class DeviceStore:
    """A store that keeps the tensors themselves."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Tensor, ...]] = {}

    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        _refuse_second(number, self._entries)
        self._entries[number] = tuple(tensors)

    def fetch(self, number: int) -> None:
        self.get(number)

    def get(self, number: int) -> tuple[Tensor, ...]:
        return _found(number, self._entries)

    def drop(self, number: int) -> None:
        _found(number, self._entries)
        del self._entries[number]


def stored_bytes(tensors: Iterable[Tensor], *, eight_bits: bool = False) -> int:
    """Return the host memory that a `HostStore` takes for one block; it has twice that of the largest on the device.

    Args:
        tensors: as for `put`; only shapes and dtypes count, so they may be on meta.
        eight_bits: as for `HostStore`.

    Returns:
        Bytes.
    """
    return _pack_plan(tuple(tensors), eight_bits)[1]


class HostStore:
    """A store in host memory, two of whose entries can be on the device at a time.

    Args:
        device: the operations that move bytes; share it with the ring of streamed blocks.
        eight_bits: whether large tensors are rounded to e4m3 with a scale for each row.

    Attributes:
        host_bytes: host memory taken so far.
        device_bytes: device memory of the two buffers.
    """

    def __init__(self, device: Device, *, eight_bits: bool = False) -> None:
        self._device, self._eight_bits = device, eight_bits
        self._entries: dict[int, _Entry] = {}
        self._free: list[Tensor] = []  # pieces of host memory that hold nothing
        self._buffers = [_Buffer(), _Buffer()]  # the one that was given away longest ago comes first
        self.host_bytes = 0

    @property
    def device_bytes(self) -> int:
        return sum(buffer.memory.numel() for buffer in self._buffers if buffer.memory is not None)

    @torch.no_grad()
    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        _refuse_second(number, self._entries)
        parts, num_bytes = _pack_plan(tuple(tensors), self._eight_bits)
        buffer, memory = self._take_buffer(num_bytes)
        for part, tensor in zip(parts, tensors, strict=True):
            part.pack(tensor, memory)
        piece = self._take_piece(num_bytes)
        settled = self._device.copy(piece[:num_bytes], memory, after=self._device.record())
        entry = _Entry(parts=parts, num_bytes=num_bytes, piece=piece, buffer=buffer, settled=settled)
        self._entries[number] = buffer.entry = entry

    def fetch(self, number: int) -> None:
        entry = _found(number, self._entries)
        if entry.buffer is None:
            buffer, memory = self._take_buffer(entry.num_bytes)
            after = self._device.record()
            entry.settled = self._device.copy(memory, entry.piece[: entry.num_bytes], after=after)
            entry.buffer, entry.arrives = buffer, True
            buffer.entry = entry

    @torch.no_grad()
    def get(self, number: int) -> tuple[Tensor, ...]:
        self.fetch(number)
        entry = self._entries[number]
        assert entry.buffer is not None and entry.buffer.memory is not None
        if entry.arrives:
            self._device.wait(entry.settled)
            entry.arrives = False
        entry.in_use = True
        memory = entry.buffer.memory
        return tuple(part.unpack(memory) for part in entry.parts)

    def drop(self, number: int) -> None:
        entry = _found(number, self._entries)
        del self._entries[number]
        if entry.buffer is not None:
            self._vacate(entry.buffer)
        self._free.append(entry.piece)

    def _take_buffer(self, num_bytes: int) -> "tuple[_Buffer, Tensor]":
        """A buffer in which nothing is needed any more, and its first bytes, which may be written by the computation
        from now on, and by a copy after a `record`."""
        idle = [buffer for buffer in self._buffers if buffer.entry is None or not buffer.entry.in_use]
        if not idle:
            raise RuntimeError("both buffers of a HostStore are in use; drop what was got before getting more")
        buffer = next((buffer for buffer in idle if buffer.entry is None), idle[0])
        self._buffers.remove(buffer)
        self._buffers.append(buffer)
        self._vacate(buffer)
        if buffer.memory is None or buffer.memory.numel() < num_bytes:
            buffer.memory = None  # before the new one is made
            buffer.memory = self._device.buffer(num_bytes)
        return buffer, buffer.memory[:num_bytes]

    def _vacate(self, buffer: "_Buffer") -> None:
        """Let the computation wait for the last copy to or from a buffer, and give up its content."""
        entry = buffer.entry
        if entry is not None:
            assert buffer.memory is not None
            self._device.wait(entry.settled)
            self._device.free(buffer.memory)
            entry.buffer, entry.arrives, buffer.entry = None, False, None

    def _take_piece(self, num_bytes: int) -> Tensor:
        """The smallest free piece of host memory that is large enough, or a new one of exactly the size."""
        fitting = [piece for piece in self._free if piece.numel() >= num_bytes]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._free = [piece for piece in self._free if piece is not best]
            return best
        if self._free:  # all too small
            self.host_bytes -= self._free.pop().numel()
        piece = self._device.host(num_bytes)
        self.host_bytes += num_bytes
        return piece


class _Buffer:
    """Memory on the device and whose tensors are in it."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.entry: _Entry | None = None


@dataclass(kw_only=True, eq=False)
class _Entry:
    """The tensors of one block and where they are."""

    parts: "tuple[_Part, ...]"
    num_bytes: int
    piece: Tensor  # of host memory
    buffer: _Buffer | None
    settled: Event  # the end of the last copy between the two
    arrives: bool = False  # whether that copy writes the buffer, and the computation has not waited for it
    in_use: bool = False  # got and not dropped


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One tensor and its place in a flat buffer."""

    shape: torch.Size
    dtype: torch.dtype
    order: tuple[int, ...]  # dimensions as they lie in memory, outermost first
    start: int
    end: int
    scales: int | None  # where the rows' scales start; None: not rounded

    def pack(self, tensor: Tensor, memory: Tensor) -> None:
        """Write the tensor into a buffer."""
        dense = tensor.detach().permute(self.order)
        if self.scales is None:
            self._laid(memory, self.dtype).copy_(dense)
            return
        values = self._laid(memory, VALUE_DTYPE).flatten(0, -2)  # [rows, width]
        _round_rows(dense.reshape(values.shape), values, self._scales(memory, values.shape[0]))

    def unpack(self, memory: Tensor) -> Tensor:
        """Return the tensor: a view of the buffer, or memory of its own if it was rounded."""
        if self.scales is None:
            dense = self._laid(memory, self.dtype)
        else:
            laid = self._laid(memory, VALUE_DTYPE)
            values = laid.flatten(0, -2)
            scales = self._scales(memory, values.shape[0])
            dense = _restored_rows(values, scales, self.dtype).view(laid.shape)
        return dense.permute([self.order.index(dimension) for dimension in range(len(self.order))])

    def _laid(self, memory: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer's part as a contiguous tensor with its dimensions in `order`."""
        return memory[self.start : self.end].view(dtype).view([self.shape[dimension] for dimension in self.order])

    def _scales(self, memory: Tensor, rows: int) -> Tensor:
        assert self.scales is not None
        return memory[self.scales : self.scales + 4 * rows].view(torch.float32)


def _pack_plan(tensors: tuple[Tensor, ...], eight_bits: bool) -> tuple[tuple[_Part, ...], int]:
    """Where each tensor goes in a flat buffer, and the buffer's size."""
    largest = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
    parts, end = [], 0
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        order = _order_in_memory(tensor)
        width = tensor.shape[order[-1]] if order else 1
        start = aligned(end) if num_bytes else 0
        scales = None
        if (
            eight_bits
            and tensor.is_floating_point()
            and tensor.element_size() > 1
            and width >= NARROW
            and SMALL_SHARE * num_bytes >= largest
        ):
            num_bytes = tensor.numel()
            scales = aligned(start + num_bytes)
        parts.append(
            _Part(
                shape=tensor.shape,
                dtype=tensor.dtype,
                order=order,
                start=start,
                end=start + num_bytes,
                scales=scales,
            )
        )
        if num_bytes:
            end = start + num_bytes if scales is None else scales + 4 * (tensor.numel() // width)
    return tuple(parts), end


def _order_in_memory(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the widest stride to the narrowest; as they are for a tensor with gaps."""
    order = tuple(sorted(range(tensor.ndim), key=lambda d: (tensor.shape[d] > 1, -tensor.stride()[d], d)))
    return order if tensor.permute(order).is_contiguous() else tuple(range(tensor.ndim))


def _round_rows(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    """Write each row [rows, width] as e4m3 values of a float32 scale."""
    step = max(1, ELEMENTS_AT_ONCE // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        some = rows[start : start + step].float()
        scale = torch.linalg.vector_norm(some, ord=math.inf, dim=-1).div_(LARGEST_VALUE).clamp_(min=SMALLEST_SCALE)
        scales[start : start + step] = scale
        values[start : start + step] = some / scale.unsqueeze(-1)


def _restored_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `_round_rows` wrote, rounded to a dtype. [rows, width]"""
    rows = torch.empty(values.shape, dtype=dtype, device=values.device)
    step = max(1, ELEMENTS_AT_ONCE // values.shape[1])
    for start in range(0, values.shape[0], step):
        some = values[start : start + step].float()
        rows[start : start + step] = some.mul_(scales[start : start + step].unsqueeze(-1))
    return rows


def _refuse_second(number: int, entries: "dict[int, tuple[Tensor, ...]] | dict[int, _Entry]") -> None:
    if number in entries:
        raise RuntimeError(
            f"store: there is something under {number} already; run backward, or let go of the graph, before the next "
            "forward with gradients"
        )


def _found(number: int, entries: dict[int, AnyEntry]) -> AnyEntry:
    if number not in entries:
        raise RuntimeError(f"store: nothing is under {number}")
    return entries[number]
