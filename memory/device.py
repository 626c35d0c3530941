"""The operations by which bytes travel between host memory and a device, and what orders them.

What: `device_for(device)` gives a `Device`: `host` and `buffer` make memory; `copy` moves bytes in either direction;
`record`, `wait` and `free` say what depends on what. Streaming of weights (`memory/stream.py`) and the store of
activations (`memory/store.py`) need nothing else, so the same code runs on CUDA, on a simulator that only keeps the
time, and on the CPU.

How: there is one queue of computation and one of copies for each direction. What was put into a queue happens in that
order; between queues nothing is ordered unless an event says so. An `Event` is a point in a queue. `copy` takes the
event before which it must not start and returns the event of its end; `record` is the point which the computation's
queue has reached; `wait` lets the computation go on only after an event. The host waits for nothing, except where
somebody calls `Event.synchronize`.

- CUDA: a queue is a stream. Host memory is mapped in whole pages of exactly the size and registered with the driver
  (PyTorch's own pinned allocator rounds up to a power of two); it is unregistered when its last tensor is gone, after
  both copying streams have run dry. What a copy touches on the device is recorded on the copy's stream, so that memory
  which is given away too early is not reused under a copy. Such memory is reused late: what is copied often should have
  a buffer for life.
- CPU: a copy is carried out when it is waited for, not before, and its target is NaN until then. `free` fills with NaN
  at once. Whatever reads too early or too late computes NaN, so that the order of operations is tested without a GPU.

Cost: none beyond the transfer; two to four events for each copy (microseconds on the host). On the CPU one extra pass
over each target.

Exact: bytes are copied, never converted.
"""

import ctypes
import mmap
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from core.errors import InputError

POISON = 0xFF  # in every byte: NaN in float64, 32, 16, bfloat16 and both float8; -1 in integers


class Event(Protocol):
    """A point in the work of a device, which has been reached or will be."""

    def synchronize(self) -> None:
        """Let the host wait until it has been reached. Worker threads and the end of a run do that, a step does not."""
        ...


class Device(Protocol):
    """Memory, copies in both directions and their order."""

    def host(self, num_bytes: int) -> Tensor:
        """Return uninitialised host memory [num_bytes] uint8, no more than that, from and to which copies are fast."""
        ...

    def buffer(self, num_bytes: int) -> Tensor:
        """Return uninitialised device memory [num_bytes] uint8; the first copy into it must be after a `record`."""
        ...

    def copy(self, target: Tensor, source: Tensor, *, after: Event | None) -> Event:
        """Copy between host and device once `after` has happened; the host goes on at once.

        Args:
            target: contiguous; on the device, or in memory from `host`. Its content is undefined from now until the
                returned event.
            source: contiguous, of the target's shape and dtype, on the other side; not to be changed before the
                returned event.
            after: what must have happened; None where copies in this direction are order enough.

        Returns:
            The end of the copy.

        Raises:
            ValueError: the tensors do not match or have gaps.
        """
        ...

    def record(self) -> Event:
        """Return the point after everything that has been issued to the computation so far."""
        ...

    def wait(self, event: Event) -> None:
        """Let what is computed from now on wait for an event."""
        ...

    def free(self, buffer: Tensor) -> None:
        """Say that no copy and no computation issued from now on reads this content; no copy may be reading it now."""
        ...


def device_for(device: torch.device | str) -> Device:
    """Return the operations of a device.

    Args:
        device: a CUDA device or the CPU.

    Returns:
        A new `CudaDevice` or `CpuDevice`. What is to be ordered against each other must share one.

    Raises:
        InputError: the device is neither a CUDA device nor the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return CudaDevice(device)
    if device.type == "cpu":
        return CpuDevice()
    raise InputError(f"streaming: expected a cuda device or the cpu, found {device}; use 0 blocks to swap")


def check_copy(target: Tensor, source: Tensor) -> None:
    """Refuse what cannot be one transfer of bytes.

    Args:
        target: what is written.
        source: what is read.

    Raises:
        ValueError: shapes or dtypes differ, or one of them is not contiguous.
    """
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f"copy: expected the target's {target.dtype} {tuple(target.shape)}, "
            f"found {source.dtype} {tuple(source.shape)}"
        )
    if not (target.is_contiguous() and source.is_contiguous()):
        raise ValueError("copy: expected contiguous tensors, found one with gaps")


def _map_pages(num_bytes: int, when_gone: Callable[[int], None]) -> Tensor:
    """Memory [num_bytes] uint8 that starts with a page and shares its last page with nothing.

    `when_gone(address)` is called after the last tensor that shows it is gone, and before the system takes it back.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    mapping = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_DONTFORK"):  # a forked process would make pages copy-on-write under a transfer
        mapping.madvise(mmap.MADV_DONTFORK)
    pages = (ctypes.c_uint8 * size).from_buffer(mapping)
    # The tensor's storage holds `pages`, which holds the mapping. At exit driver and system clean up by themselves.
    weakref.finalize(pages, when_gone, ctypes.addressof(pages)).atexit = False
    with torch.inference_mode(False):
        return torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes)


# --- the CPU ---------------------------------------------------------------------------------------------------------


class CpuEvent:
    """A point in one of the CPU's queues; without a copy it has been reached."""

    def __init__(self, carry_out: Callable[[], None] | None = None) -> None:
        self._carry_out = carry_out

    def synchronize(self) -> None:
        if self._carry_out is not None:
            self._carry_out()


class CpuDevice:
    """The CPU as a device: real copies, as late as the rules allow, and NaN until then."""

    def __init__(self) -> None:
        self._host_addresses: set[int] = set()
        self._queues: dict[str, deque[tuple[Tensor, Tensor]]] = {"in": deque(), "out": deque()}
        self._carried_out = {"in": 0, "out": 0}
        self._issued = {"in": 0, "out": 0}
        self._lock = threading.RLock()  # a worker thread may copy too

    def host(self, num_bytes: int) -> Tensor:
        memory = _map_pages(num_bytes, self._host_addresses.discard)
        self._host_addresses.add(memory.untyped_storage().data_ptr())
        return memory.fill_(POISON)

    def buffer(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.full((num_bytes,), POISON, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor, *, after: Event | None) -> CpuEvent:
        check_copy(target, source)
        if after is not None:
            after.synchronize()  # it may read what is poisoned now
        with self._lock:
            queue = "out" if target.untyped_storage().data_ptr() in self._host_addresses else "in"
            _poison(target)
            self._queues[queue].append((target.detach(), source.detach()))
            self._issued[queue] += 1
            number = self._issued[queue]
        return CpuEvent(lambda: self._carry_out(queue, number))

    def record(self) -> CpuEvent:
        return CpuEvent()

    def wait(self, event: Event) -> None:
        event.synchronize()

    def free(self, buffer: Tensor) -> None:
        _poison(buffer)

    def _carry_out(self, queue: str, number: int) -> None:
        """Do the copies of a queue up to the given one."""
        with self._lock, torch.no_grad():
            while self._carried_out[queue] < number:
                target, source = self._queues[queue].popleft()
                self._carried_out[queue] += 1
                target.copy_(source)


def _poison(tensor: Tensor) -> None:
    """Fill with NaN, or -1."""
    with torch.no_grad():
        tensor.detach().reshape(-1).view(torch.uint8).fill_(POISON)


# --- CUDA ------------------------------------------------------------------------------------------------------------


class CudaDevice:
    """A CUDA device: copies on a stream for each direction, from and to host memory that is registered with the driver.

    Computation is what runs on the current stream of the thread that calls `record` and `wait`; autograd runs backward
    on the stream of forward.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._warned = False

    def host(self, num_bytes: int) -> Tensor:
        registered: set[int] = set()
        streams = (self._in, self._out)  # and not self: memory may outlive it
        memory = _map_pages(num_bytes, lambda address: _unregister(registered, streams))
        if num_bytes and self._register(memory.data_ptr(), -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE):
            registered.add(memory.data_ptr())
        return memory

    def _register(self, address: int, num_bytes: int) -> bool:
        """Pin memory where it lies; without permission say once what that costs and go on."""
        with torch.cuda.device(self._device):
            error = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
            if error == 0:
                return True
            try:  # the next kernel launch would report the failure as its own
                torch.zeros(1, device=self._device)
            except RuntimeError:
                pass
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"streaming: the system refused to pin {num_bytes / 1e6:.0f} MB of host memory (CUDA error {error}); "
                "transfers from and to memory that is not pinned are slower and do not overlap with computation. "
                "Raise `ulimit -l` or free host memory.",
                stacklevel=3,
            )
        return False

    def buffer(self, num_bytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor, *, after: Event | None) -> Event:
        check_copy(target, source)
        stream, on_device = (self._in, target) if target.is_cuda else (self._out, source)
        if after is not None:
            stream.wait_event(after)  # type: ignore[arg-type]  # one of ours
        on_device.record_stream(stream)
        with torch.cuda.stream(stream), torch.no_grad():
            target.detach().copy_(source.detach(), non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # who synchronises with it sleeps
        copied.record(stream)
        return copied

    def record(self) -> Event:
        reached = torch.cuda.Event()
        reached.record(torch.cuda.current_stream(self._device))
        return reached

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)  # type: ignore[arg-type]  # one of ours

    def free(self, buffer: Tensor) -> None:
        """Nothing: the order comes from events."""


def _unregister(registered: set[int], streams: "Sequence[torch.cuda.Stream]") -> None:
    """Give registered memory back to the system once no copy reads or writes it."""
    for address in registered:
        for stream in streams:
            stream.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)
    registered.clear()
