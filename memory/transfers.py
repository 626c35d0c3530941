"""The operations by which weights travel from host memory into a ring of buffers on a device.

What: `copies_for(device)` gives an object with five operations, which are all that streaming needs from a device:
`host_buffer` and `slot` make memory, `copy` starts a transfer into a slot, `wait` makes the computation wait for it,
`done` says that the computation of a slot's content has been issued.

How: on CUDA a transfer runs on a side stream. Each slot has two events: `ready` (recorded after the copy, waited for
by the computation) and `free` (recorded after the computation, waited for by the next copy into the slot). Nothing ever
waits on the host or for the whole device. Host buffers are ordinary memory of exactly the size (plus a page), which is
registered with the driver: PyTorch's own pinned allocator rounds up to a power of two. On the CPU a transfer fills the
slot with NaN at once and copies only when it is waited for: whatever reads a slot too early or too late computes NaN,
so that the order of operations is tested without a GPU.

Cost: none beyond the transfer itself; on the CPU one extra pass over the slot.

Exact: bytes are copied, never converted.
"""

import warnings
import weakref
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from core.errors import InputError

PAGE_BYTES = 4096
POISON = 0xFF  # in every byte: NaN in float64, 32, 16, bfloat16 and both float8; -1 in integers


class Slot(Protocol):
    """A buffer on the device into which one block's weights are copied."""

    buffer: Tensor  # [bytes] uint8


AnySlot = TypeVar("AnySlot", bound=Slot)


class Copies(Protocol[AnySlot]):
    """How one kind of device receives weights."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Return uninitialised host memory [num_bytes] uint8 from which `copy` is fast."""
        ...

    def slot(self, num_bytes: int) -> AnySlot:
        """Return a slot with uninitialised memory on the device."""
        ...

    def copy(self, slot: AnySlot, source: Tensor) -> None:
        """Start copying `source` [bytes] into the slot, once the computation before the last `done` has finished."""
        ...

    def wait(self, slot: AnySlot) -> None:
        """Let what is computed from now on wait for the slot's last copy."""
        ...

    def done(self, slot: AnySlot) -> None:
        """Say that everything which reads the slot has been issued."""
        ...


def copies_for(device: torch.device) -> "Copies":
    """Return the transfers of a device.

    Args:
        device: where the slots are.

    Returns:
        The five operations for it.

    Raises:
        InputError: the device is neither a CUDA device nor the CPU.
    """
    if device.type == "cuda":
        return CudaCopies(device)
    if device.type == "cpu":
        return CpuCopies()
    raise InputError(f"block swap: expected a cuda device or the cpu, found {device}; use 0 blocks to swap")


class CpuSlot:
    """A slot whose copy is carried out when it is waited for."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = torch.full((num_bytes,), POISON, dtype=torch.uint8)
        self.pending: Tensor | None = None


class CpuCopies:
    """The CPU as a device: real copies, as late as the rules allow, and NaN until then."""

    def host_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def slot(self, num_bytes: int) -> CpuSlot:
        return CpuSlot(num_bytes)

    def copy(self, slot: CpuSlot, source: Tensor) -> None:
        slot.buffer.fill_(POISON)
        slot.pending = source

    def wait(self, slot: CpuSlot) -> None:
        if slot.pending is not None:
            slot.buffer[: slot.pending.numel()].copy_(slot.pending)
            slot.pending = None

    def done(self, slot: CpuSlot) -> None:
        """Nothing runs behind our back here."""


class CudaSlot:
    """A slot with the two events that order copies and computation."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.ready = torch.cuda.Event()
        self.free = torch.cuda.Event()


class CudaCopies:
    """A CUDA device: transfers on a side stream, from host memory that is registered with the driver.

    Args:
        device: where the slots are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._registered: list[Tensor] = []
        # Holds the memory until it is unregistered. At exit the driver cleans up by itself.
        weakref.finalize(self, _unregister, self.stream, self._registered).atexit = False

    def host_buffer(self, num_bytes: int) -> Tensor:
        whole_pages = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES  # no two registered ranges share a page
        memory = torch.empty(whole_pages + PAGE_BYTES, dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE_BYTES
        pages = memory[start : start + whole_pages]
        if whole_pages and self._register(pages):
            self._registered.append(pages)
        return pages[:num_bytes]

    def _register(self, pages: Tensor) -> bool:
        """Pin memory where it lies; without permission say what that costs and go on."""
        with torch.cuda.device(self.device):
            error = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.numel(), 0))
            if error == 0:
                return True
            try:  # the next kernel launch would report the failure as its own
                torch.zeros(1, device=self.device)
            except RuntimeError:
                pass
        warnings.warn(
            f"block swap: the system refused to pin {pages.numel() / 1e6:.0f} MB of host memory (CUDA error {error}); "
            "transfers from it are slower and do not overlap with computation. Raise `ulimit -l` or free host memory.",
            stacklevel=2,
        )
        return False

    def slot(self, num_bytes: int) -> CudaSlot:
        slot = CudaSlot(num_bytes, self.device)
        slot.buffer.record_stream(self.stream)  # a freed slot is reused only after the copy into it has ended
        self.done(slot)  # the allocator may have handed out memory that earlier kernels still use
        return slot

    def copy(self, slot: CudaSlot, source: Tensor) -> None:
        self.stream.wait_event(slot.free)
        with torch.cuda.stream(self.stream):
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
        slot.ready.record(self.stream)

    def wait(self, slot: CudaSlot) -> None:
        torch.cuda.current_stream(self.device).wait_event(slot.ready)

    def done(self, slot: CudaSlot) -> None:
        slot.free.record(torch.cuda.current_stream(self.device))


def _unregister(stream: "torch.cuda.Stream", registered: list[Tensor]) -> None:
    """Give registered memory back to the system once no copy reads it."""
    stream.synchronize()
    for pages in registered:
        torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())
    registered.clear()
