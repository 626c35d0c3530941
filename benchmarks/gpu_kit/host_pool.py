"""Host memory that is registered with the driver once and lent out again and again, and a watch on what travels.

What: a `HostPool` keeps pieces of registered host memory. A `Lease` is a `Device` (`memory/device.py`) whose host
memory comes from the pool and goes back to it when the lease ends; everything else it hands on to the device behind
the pool. It counts the bytes that travel in each direction, and how long the computation waited for them.

How: the weights of both experts, and what waits for backward, are 70 GB; to register them takes the driver tens of
seconds, which the kit has once and not for every row of its table. Waiting is timed by two events around each `wait`
in the stream of the computation: what passes between them is the wait.

Cost: two events a wait. Exact: a lease changes nothing in what is computed or in which order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memory.device import CudaDevice, Device, Event


class HostPool:
    """Pieces of host memory.

    Args:
        device: makes them.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """The smallest free piece that is large enough, or a new one of exactly the size."""
        fitting = [place for place, piece in enumerate(self.free) if piece.numel() >= num_bytes]
        if fitting:
            return self.free.pop(min(fitting, key=lambda place: self.free[place].numel()))
        return self.device.host(num_bytes)

    def missing_bytes(self, count: int, num_bytes: int) -> int:
        """What `reserve` would have to register."""
        return max(0, count - sum(piece.numel() >= num_bytes for piece in self.free)) * num_bytes

    def reserve(self, count: int, num_bytes: int) -> None:
        """See to it that so many pieces of this size are free; those that are too small are given back first."""
        if num_bytes and sum(piece.numel() >= num_bytes for piece in self.free) < count:
            self.free = [piece for piece in self.free if piece.numel() >= num_bytes]
            while len(self.free) < count:
                self.free.append(self.device.host(num_bytes))


class Lease:
    """A `Device` for a while."""

    def __init__(self, pool: HostPool) -> None:
        self._pool, self._pieces = pool, list[Tensor]()
        self._addresses: set[int] = set()
        self._is_timed = isinstance(pool.device, CudaDevice)
        self.reset()

    def reset(self) -> None:
        """Count from here."""
        self.h2d_bytes = self.d2h_bytes = 0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def waited(self) -> float:
        """Seconds that the computation has waited since `reset`; the device must have come to the end of it."""
        return sum(start.elapsed_time(end) for start, end in self._waits) / 1e3

    def end(self) -> None:
        """Give the host memory back to the pool: nothing uses it any more."""
        self._pool.free += self._pieces
        self._pieces = []
        self._addresses.clear()

    def host(self, num_bytes: int) -> Tensor:
        piece = self._pool.take(num_bytes)
        self._pieces.append(piece)
        self._addresses.add(piece.untyped_storage().data_ptr())
        return piece[:num_bytes]

    def buffer(self, num_bytes: int) -> Tensor:
        return self._pool.device.buffer(num_bytes)

    def copy(self, target: Tensor, source: Tensor, *, after: Event | None) -> Event:
        if target.untyped_storage().data_ptr() in self._addresses:
            self.d2h_bytes += target.nbytes
        else:
            self.h2d_bytes += target.nbytes
        return self._pool.device.copy(target, source, after=after)

    def record(self) -> Event:
        return self._pool.device.record()

    def wait(self, event: Event) -> None:
        if not self._is_timed:
            self._pool.device.wait(event)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._pool.device.wait(event)
        end.record()
        self._waits.append((start, end))

    def free(self, buffer: Tensor) -> None:
        self._pool.device.free(buffer)
