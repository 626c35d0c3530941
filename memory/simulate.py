"""A device that only keeps the time: the engine runs on it as on a card, breaks no law, and its stalls are known.

What: `SimulatedDevice` is a `Device` whose memory is on meta. Copies take bytes / rate of a card's `RateProfile`;
`compute` issues a computation of known duration that reads and writes given tensors. The first thing that is out of
order raises `LawBroken` with the names of both sides; `report` says how long everything took and who waited.

How: there are three queues (computation, copies in, copies out) and the host, which issues everything in no time. What
is put into a queue starts when the one before it has ended and what it waits for has happened; so its time is known
when it is issued, and nothing has to be played back. Beside its time, each point carries a vector clock: how far into
each queue it certainly follows. Laws are about these clocks, not about times, so that an order which merely happens to
work out at one card's rates is found too. For each byte range that a queue touches:

- no use before ready: who reads follows every write of it, and something was written since it was made or freed;
- no overwrite before free: who writes follows every read and write of it; a copy into a `buffer` needs the old content
  to have been freed, and to free, the computation must have waited for every copy from it;
- memory on the device is not let go while a copy may touch it: when its last tensor is gone, the computation must have
  waited for all copies, because the allocator hands it to the next computation that asks;
- the host writes and reads host memory only when it has waited for the copies that touch it.

Inside `with device.watched():` PyTorch's own operations on memory that the device knows count as computations which
read and write it at the rate of the device's memory (views are free; on host memory, they are the host's).

Cost: some 20 microseconds for each thing issued. Memory of any size costs nothing.

Exact: times follow from the rates; launches, contention for host memory between the two directions and the allocator
are not modelled.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memory.arena import ALIGNMENT_BYTES
from memory.device import Event, check_copy
from memory.rates import RateProfile

META = torch.device("meta")
COMPUTE, IN, OUT = 0, 1, 2
QUEUES = ("computation", "copies in", "copies out")
Clock = tuple[int, int, int]


class LawBroken(RuntimeError):
    """Something was read before it was ready, or overwritten or let go before it was free."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What has happened since the last `restart`.

    Attributes:
        seconds: from then to the end of the last computation.
        makespan: from then to the end of everything.
        compute_seconds: for how long the computation was busy.
        h2d_seconds: for how long the bus was busy towards the device.
        d2h_seconds: for how long it was busy the other way.
        h2d_bytes: copied towards the device.
        d2h_bytes: copied the other way.
        lead_seconds: how long the very first computation had to wait for its data.
        stall_seconds: how long all others waited.
        waits: who waited and for how long, in order, the first one included.
    """

    seconds: float
    makespan: float
    compute_seconds: float
    h2d_seconds: float
    d2h_seconds: float
    h2d_bytes: int
    d2h_bytes: int
    lead_seconds: float
    stall_seconds: float
    waits: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedEvent:
    """A point: when it is reached, and what it certainly follows."""

    device: "SimulatedDevice"
    seconds: float
    clock: Clock

    def synchronize(self) -> None:
        self.device._host_waits(self)


class SimulatedDevice:
    """Memory on meta, three queues with a clock, and laws.

    Args:
        rates: of the card: `h2d`, `d2h` and `device_memory` are used.
    """

    def __init__(self, rates: RateProfile) -> None:
        self._rates = rates
        self._queues = tuple(_Queue() for _ in QUEUES)
        self._host_clock: Clock = (0, 0, 0)
        self._host_seconds = 0.0
        self._memories: dict[int, _Memory] = {}
        self._made = {"device buffer": 0, "host memory": 0, "tensor": 0}
        self._lock = threading.RLock()  # a worker thread may copy too
        self.restart()

    # --- Device -------------------------------------------------------------------------------------------------------

    def host(self, num_bytes: int) -> Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=META)
        with self._lock:
            self._bury(host=True)
            self._know(memory, "host memory")
        return memory

    def buffer(self, num_bytes: int) -> Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=META)
        with self._lock:
            self._know(memory, "device buffer").void = [(0, num_bytes, "anything was written there")]
        return memory

    def copy(self, target: Tensor, source: Tensor, *, after: Event | None) -> SimulatedEvent:
        check_copy(target, source)
        with self._lock:
            queue = OUT if self._know(target).kind == "host memory" else IN
            num_bytes = target.numel() * target.element_size()
            rate = self._rates.d2h if queue == OUT else self._rates.h2d
            self._copied_bytes[queue] += num_bytes
            name = f"copy {self._queues[queue].issued + 1} {'out' if queue == OUT else 'in'}"
            return self._issue(queue, name, num_bytes / rate, (source,), (target,), after)

    def record(self) -> SimulatedEvent:
        with self._lock:
            self._bury()
            computation = self._queues[COMPUTE]
            return SimulatedEvent(device=self, seconds=computation.ready, clock=computation.clock)

    def wait(self, event: Event) -> None:
        with self._lock:
            self._bury()
            computation, event = self._queues[COMPUTE], self._ours(event)
            computation.clock = _join(computation.clock, event.clock)
            computation.ready = max(computation.ready, event.seconds)

    def free(self, buffer: Tensor) -> None:
        with self._lock:
            self._bury()
            memory, start, end = self._range(buffer)
            clock = self._queues[COMPUTE].clock
            for access in memory.accesses:
                if access.queue == OUT and access.touches(start, end) and not access.is_before(clock):
                    raise LawBroken(f"{memory.name} was freed while {access.name} may still be reading it")
            memory.void = [*_without(memory.void, start, end), (start, end, "anything was written after it was freed")]

    # --- what a simulation adds ---------------------------------------------------------------------------------------

    def compute(
        self, name: str, seconds: float, *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()
    ) -> None:
        """Issue a computation.

        Args:
            name: how messages call it.
            seconds: how long it takes.
            reads: tensors on meta whose content it needs.
            writes: tensors on meta whose content it makes.

        Raises:
            LawBroken: it may run before what it reads is ready, or while what it writes is still needed.
        """
        with self._lock:
            self._issue(COMPUTE, name, seconds, reads, writes, None)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let PyTorch's operations in the body count as computations where they touch memory that the device knows."""
        with _Watch(self):
            yield

    def restart(self) -> None:
        """Let the next report begin when everything computed so far has ended."""
        with self._lock:
            self._began = self._queues[COMPUTE].ended
            self._copied_bytes = [0, 0, 0]
            self._waits: list[tuple[str, float]] = []
            for queue in self._queues:
                queue.busy = 0.0
            self._lead = 0.0

    def report(self) -> Report:
        """Return what has happened since the last `restart`."""
        with self._lock:
            computation, copies_in, copies_out = self._queues
            return Report(
                seconds=computation.ended - self._began,
                makespan=max(queue.ended for queue in self._queues) - self._began,
                compute_seconds=computation.busy,
                h2d_seconds=copies_in.busy,
                d2h_seconds=copies_out.busy,
                h2d_bytes=self._copied_bytes[IN],
                d2h_bytes=self._copied_bytes[OUT],
                lead_seconds=self._lead,
                stall_seconds=sum(seconds for _, seconds in self._waits) - self._lead,
                waits=tuple(self._waits),
            )

    # --- queues -------------------------------------------------------------------------------------------------------

    def _issue(
        self,
        number: int,
        name: str,
        seconds: float,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        after: Event | None,
    ) -> SimulatedEvent:
        """Put something into a queue: find its time, and check it against everything it does not certainly follow."""
        self._bury()
        queue = self._queues[number]
        clock, ready = _join(queue.clock, self._host_clock), max(queue.ready, self._host_seconds)
        if after is not None:
            point = self._ours(after)
            clock, ready = _join(clock, point.clock), max(ready, point.seconds)
        queue.issued += 1
        for tensor in reads:
            self._read(tensor, number, queue.issued, clock, name)
        for tensor in writes:
            self._write(tensor, number, queue.issued, clock, name)
        if number == COMPUTE and ready > queue.ended:
            if queue.issued == 1:
                self._lead = ready - queue.ended
            self._waits.append((name, ready - queue.ended))
        queue.clock = clock[:number] + (queue.issued,) + clock[number + 1 :]  # type: ignore[assignment]
        queue.busy += seconds
        queue.ended = queue.ready = ready + seconds
        return SimulatedEvent(device=self, seconds=queue.ended, clock=queue.clock)

    def _host_waits(self, event: SimulatedEvent) -> None:
        with self._lock:
            self._bury()
            self._host_clock = _join(self._host_clock, event.clock)
            self._host_seconds = max(self._host_seconds, event.seconds)

    def _ours(self, event: Event) -> SimulatedEvent:
        if not isinstance(event, SimulatedEvent) or event.device is not self:
            raise TypeError(f"expected an event of this device, found {event}")
        return event

    # --- memory -------------------------------------------------------------------------------------------------------

    def _know(self, tensor: Tensor, kind: "Kind" = "tensor") -> "_Memory":
        """What is known of a tensor's memory."""
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is None:
            self._made[kind] += 1
            memory = _Memory(
                name=f"{kind} {self._made[kind]} of {storage.nbytes():,} bytes",
                kind=kind,
                alive=int(storage._weak_ref()),  # type: ignore[call-overload]
            )
            self._memories[storage._cdata] = memory  # an address is not used again while there is a weak reference
        return memory

    def _range(self, tensor: Tensor) -> "tuple[_Memory, int, int]":
        """The memory of a tensor, and the bytes that it spans."""
        start = int(tensor.storage_offset()) * tensor.element_size()
        span = int(sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))) + 1
        return self._know(tensor), start, start + (span * tensor.element_size() if tensor.numel() else 0)

    def _read(self, tensor: Tensor, queue: int, number: int, clock: Clock, name: str) -> None:
        memory, start, end = self._range(tensor)
        gap = 0 if queue == COMPUTE else ALIGNMENT_BYTES - 1  # a copy may take along the gaps between tensors
        for left, right, reason in memory.void:
            if min(right, end) - max(left, start) > gap:
                raise LawBroken(f"{name} reads {memory.name} before {reason}")
        for access in memory.accesses:
            if access.writes and access.touches(start, end) and not access.is_before(clock, queue):
                raise LawBroken(f"{name} may read {memory.name} before {access.name} has written it")
        memory.accesses = [
            access
            for access in memory.accesses
            if access.writes or access.queue != queue or not access.within(start, end)
        ]
        memory.accesses.append(_Access(start=start, end=end, queue=queue, number=number, writes=False, name=name))

    def _write(self, tensor: Tensor, queue: int, number: int, clock: Clock, name: str) -> None:
        memory, start, end = self._range(tensor)
        for access in memory.accesses:
            if access.touches(start, end) and not access.is_before(clock, queue):
                verb = "written" if access.writes else "read"
                raise LawBroken(f"{name} may overwrite {memory.name} before {access.name} has {verb} it")
        if memory.kind == "device buffer":
            void = sum(max(0, min(end, right) - max(start, left)) for left, right, _ in memory.void)
            if queue != COMPUTE and void < end - start:
                raise LawBroken(f"{name} overwrites {memory.name}, whose content nobody has freed")
            memory.void = _without(memory.void, start, end)
        memory.accesses = [access for access in memory.accesses if not access.within(start, end)]
        memory.accesses.append(_Access(start=start, end=end, queue=queue, number=number, writes=True, name=name))

    def _bury(self, *, host: bool = False) -> None:
        """Check the memory whose last tensor is gone, and forget it; that of the host when more of it is asked for."""
        for key, memory in [
            (key, memory)
            for key, memory in self._memories.items()
            if host is (memory.kind == "host memory") and torch.UntypedStorage._expired(memory.alive)
        ]:
            del self._memories[key]
            torch.UntypedStorage._free_weak_ref(memory.alive)
            copies = [access for access in memory.accesses if access.queue != COMPUTE]
            if host and copies:  # a device waits for its copies before the system takes memory back
                for queue in self._queues[IN:]:
                    self._host_clock = _join(self._host_clock, queue.clock)
                    self._host_seconds = max(self._host_seconds, queue.ended)
            for access in () if host else copies:
                if not access.is_before(self._queues[COMPUTE].clock):
                    raise LawBroken(f"{memory.name} was let go while {access.name} may still use it")

    def _watch(self, reads: list[Tensor], writes: list[Tensor], name: str) -> None:
        """Count an operation of PyTorch's."""
        with self._lock:
            known = self._memories
            reads = [tensor for tensor in reads if tensor.untyped_storage()._cdata in known]
            writes = [tensor for tensor in writes if tensor.untyped_storage()._cdata in known]
            if any(self._know(tensor).kind == "host memory" for tensor in (*reads, *writes)):
                self._bury()
                for tensor in (*reads, *writes):
                    memory, start, end = self._range(tensor)
                    for access in memory.accesses:
                        if access.touches(start, end) and not access.is_before(self._host_clock):
                            raise LawBroken(f"the host may touch {memory.name} before {access.name} has ended")
            elif reads or writes:
                touched = sum(tensor.numel() * tensor.element_size() for tensor in (*reads, *writes))
                self._issue(COMPUTE, name, touched / self._rates.device_memory, reads, writes, None)


Kind = Literal["device buffer", "host memory", "tensor"]


@dataclass(kw_only=True)
class _Queue:
    """How far a queue has come."""

    issued: int = 0
    clock: Clock = (0, 0, 0)  # what its last element, and what it waits for, certainly follow
    ended: float = 0.0  # when the last element ends
    ready: float = 0.0  # when the next one can start; later than `ended` where it waits
    busy: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Access:
    """Bytes that an element of a queue reads or writes."""

    start: int
    end: int
    queue: int
    number: int
    writes: bool
    name: str

    def touches(self, start: int, end: int) -> bool:
        return self.start < end and start < self.end

    def within(self, start: int, end: int) -> bool:
        return start <= self.start and self.end <= end

    def is_before(self, clock: Clock, queue: int | None = None) -> bool:
        """Whether it has certainly ended at a point; `queue`: for an element of that queue at this point."""
        return self.queue == queue or self.number <= clock[self.queue]


@dataclass(kw_only=True)
class _Memory:
    """One storage: who has touched which bytes of it, and which bytes mean nothing."""

    name: str
    kind: Kind
    alive: int  # weak reference to the storage
    accesses: list[_Access] = field(default_factory=list)
    void: list[tuple[int, int, str]] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    """Tells a device what PyTorch's operations read and write."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would load its compiler, which takes seconds, in order to keep it out of here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        named = named or {}
        result = func(*given, **named)
        if _is_view(func):
            return result
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        for number, argument in enumerate(func._schema.arguments):
            value = given[number] if number < len(given) else named.get(argument.name)
            tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, list | tuple) else []
            written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if written else reads).extend(tensor for tensor in tensors if isinstance(tensor, Tensor))
        self._device._watch(reads, writes, str(func))
        return result


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operation touches no content."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


def _join(one: Clock, other: Clock) -> Clock:
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])


def _without(ranges: list[tuple[int, int, str]], start: int, end: int) -> list[tuple[int, int, str]]:
    """Byte ranges less one of them."""
    kept = []
    for left, right, reason in ranges:
        kept += [(left, min(right, start), reason)] if left < start else []
        kept += [(max(left, end), right, reason)] if end < right else []
    return kept
