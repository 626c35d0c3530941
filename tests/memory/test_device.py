"""Laws of the devices: bytes arrive, late and in order; on CUDA events order copies and computation (without a GPU)."""

import contextlib
import gc
import mmap
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.errors import InputError
from memory.device import CpuDevice, CudaDevice, device_for


def numbers(count: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.uint8)


def is_nan(tensor: Tensor) -> bool:
    return bool((tensor == 0xFF).all())


# --- the CPU ---------------------------------------------------------------------------------------------------------


def test_the_cpu_copies_when_it_is_waited_for_and_poisons_until_then() -> None:
    device = device_for("cpu")
    source, target = device.host(8), device.buffer(8)
    source.copy_(numbers(8))
    for _ in range(2):
        copied = device.copy(target, source, after=device.record())
        assert is_nan(target)
        device.wait(copied)
        assert torch.equal(target, numbers(8))
    device.free(target)
    assert is_nan(target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_poison_is_nan_in_every_float(dtype: torch.dtype) -> None:
    device = CpuDevice()
    for memory in (device.host(64), device.buffer(64)):
        assert torch.isnan(memory.view(dtype).float()).all()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux about a mapping")
def test_a_forked_process_does_not_share_host_memory() -> None:
    memory = CpuDevice().host(10_000)
    areas = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    area = next(area for area in areas if area.startswith(f"{memory.data_ptr():08x}-"))
    assert " dc" in re.findall(r"VmFlags:.*", area)[0]


def test_what_has_been_waited_for_includes_what_was_put_into_the_same_queue_before_and_nothing_else() -> None:
    device = CpuDevice()
    hosts, buffers = [device.host(4) for _ in range(3)], [device.buffer(4) for _ in range(3)]
    for host in hosts:
        host.copy_(numbers(4))
    copied = [device.copy(buffer, host, after=None) for buffer, host in zip(buffers, hosts, strict=True)]
    other = device.host(4)
    away = device.copy(other, numbers(4, 9), after=None)  # in the other direction
    device.wait(copied[1])
    assert [is_nan(buffer) for buffer in buffers] == [False, False, True] and is_nan(other)
    away.synchronize()
    assert torch.equal(other, numbers(4, 9)) and is_nan(buffers[2])


def test_to_the_host_and_back_needs_an_event_between_the_two() -> None:
    device = CpuDevice()
    host, back = device.host(4), device.buffer(4)
    away = device.copy(host, numbers(4), after=device.record())
    device.wait(device.copy(back, host, after=away))
    assert torch.equal(back, numbers(4))
    device.copy(host, numbers(4, 7), after=device.record())
    device.wait(device.copy(back, host, after=None))
    assert is_nan(back)


def test_a_worker_thread_may_copy() -> None:
    device = CpuDevice()
    pairs = [(device.host(4), device.buffer(4)) for _ in range(20)]
    for number, (host, _) in enumerate(pairs):
        host.fill_(number)
    copied = []
    worker = threading.Thread(
        target=lambda: copied.extend(device.copy(buffer, host, after=None) for host, buffer in pairs)
    )
    worker.start()
    worker.join()
    for number, (event, (_, buffer)) in enumerate(zip(copied, pairs, strict=True)):
        device.wait(event)
        assert (buffer == number).all()


@pytest.mark.parametrize(
    "target, source, message",
    [
        (torch.zeros(4), torch.zeros(5), "expected the target's torch.float32 \\(4,\\), found torch.float32 \\(5,\\)"),
        (torch.zeros(4), torch.zeros(4).double(), "found torch.float64"),
        (torch.zeros(4, 4).T, torch.zeros(4, 4), "contiguous"),
    ],
)
def test_what_is_not_one_transfer_of_bytes_is_refused(target: Tensor, source: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CpuDevice().copy(target, source, after=None)


def test_a_device_that_cannot_stream_is_refused() -> None:
    with pytest.raises(InputError, match="cuda device or the cpu, found mps"):
        device_for("mps")


# --- CUDA, by a driver that writes down what it was told -------------------------------------------------------------


class FakeEvent:
    """Remembers the point in its stream's work at which it was recorded."""

    def __init__(self, blocking: bool = False) -> None:
        self.point: tuple[str, int] | None = None

    def record(self, stream: "FakeStream") -> None:
        self.point = (stream.name, len(stream.work))


class FakeStream:
    """A queue that writes down what it was given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: list[object] = []

    def wait_event(self, event: FakeEvent) -> None:
        assert event.point is not None  # waiting for what was never recorded waits for nothing
        self.work.append(("wait", event.point))

    def synchronize(self) -> None:
        self.work.append("synchronize")


class FakeTensor:
    """Memory that remembers which streams it was recorded on, and copies on the current stream."""

    dtype, shape = torch.uint8, (100,)

    def __init__(self, cuda: "FakeCuda", is_cuda: bool) -> None:
        self.cuda, self.is_cuda = cuda, is_cuda
        self.recorded: list[FakeStream] = []

    def is_contiguous(self) -> bool:
        return True

    def detach(self) -> "FakeTensor":
        return self

    def record_stream(self, stream: FakeStream) -> None:
        assert self.is_cuda
        self.recorded.append(stream)

    def copy_(self, source: "FakeTensor", non_blocking: bool) -> None:
        assert non_blocking
        self.cuda.current.work.append("copy")


class FakeCuda:
    """As much of torch.cuda as the device uses, and a driver that pins memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0) -> None:
        self.compute = self.current = FakeStream("compute")
        self.copying = [FakeStream("in"), FakeStream("out")]
        self.pinned: dict[int, int] = {}
        self.error = error
        self.launches_after_error = 0
        streams = iter(self.copying)
        for name, value in {
            "Stream": lambda device: next(streams),
            "Event": FakeEvent,
            "current_stream": lambda device: self.current,
            "stream": self.on,
            "device": lambda device: contextlib.nullcontext(),
            "cudart": lambda: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "zeros", self.launch)

    @contextlib.contextmanager
    def on(self, stream: FakeStream):  # type: ignore[no-untyped-def]
        self.current, before = stream, self.current
        yield
        self.current = before

    def launch(self, *size: int, device: object) -> None:
        self.launches_after_error += 1
        raise RuntimeError("CUDA error: of the call before")

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.error:
            self.pinned[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_cuda_has_a_stream_for_each_direction_and_orders_them_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    device = device_for("cuda")
    coming, leaving = cuda.copying
    host, buffer = FakeTensor(cuda, False), FakeTensor(cuda, True)
    cuda.compute.work.append("earlier kernel")
    copied = device.copy(buffer, host, after=device.record())  # type: ignore[arg-type]
    device.wait(copied)
    cuda.compute.work.append("use")
    away = device.copy(host, buffer, after=device.record())  # type: ignore[arg-type]
    device.copy(buffer, host, after=away)  # type: ignore[arg-type]
    device.copy(buffer, host, after=None)  # type: ignore[arg-type]
    assert cuda.compute.work == ["earlier kernel", ("wait", ("in", 2)), "use"]
    assert coming.work == [("wait", ("compute", 1)), "copy", ("wait", ("out", 2)), "copy", "copy"]
    assert leaving.work == [("wait", ("compute", 3)), "copy"]
    assert buffer.recorded == [coming, leaving, coming, coming]  # so that it is not reused under a copy


def test_cuda_pins_whole_pages_of_about_the_size_and_gives_them_back_with_their_last_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    device = CudaDevice(torch.device("cuda"))
    page = mmap.PAGESIZE
    sizes = [1, page, 5 * page + 1, 0]
    memories = [device.host(size) for size in sizes]
    assert [memory.numel() for memory in memories] == sizes
    assert [cuda.pinned[memory.data_ptr()] for memory in memories[:3]] == [page, page, 6 * page]
    assert all(memory.data_ptr() % page == 0 for memory in memories[:3]) and len(cuda.pinned) == 3
    parameter = nn.Parameter(torch.ones(4))
    parameter.data = memories[2][:16].view(torch.float32)
    del memories, device
    gc.collect()
    assert list(cuda.pinned) == [parameter.data_ptr()]
    parameter.data.fill_(1)
    assert [stream.work for stream in cuda.copying] == [["synchronize"] * 2] * 2  # no copy may still read them
    del parameter
    gc.collect()
    assert not cuda.pinned


def test_refused_pinning_falls_back_with_one_warning_that_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, error=2)
    device = CudaDevice(torch.device("cuda"))
    with pytest.warns(UserWarning, match="refused to pin.*CUDA error 2.*slower and do not overlap") as warned:
        memories = [device.host(4096) for _ in range(3)]
    assert len(warned) == 1 and not cuda.pinned and cuda.launches_after_error == 3
    assert all(memory.fill_(1).sum() == 4096 for memory in memories)
    del memories
    gc.collect()
    assert [stream.work for stream in cuda.copying] == [[], []]
