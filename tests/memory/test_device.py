"""Laws of the transfers: bytes arrive, and on CUDA events order copies and computation (checked without a GPU)."""

import contextlib
import gc

import pytest
import torch
from torch import Tensor

from memory.device import PAGE_BYTES, CpuCopies, CudaCopies, copies_for


def test_the_cpu_copies_when_it_is_waited_for_and_poisons_until_then() -> None:
    copies = copies_for(torch.device("cpu"))
    source = copies.host_buffer(8)
    source.copy_(torch.arange(8, dtype=torch.uint8))
    slot = copies.slot(16)
    for _ in range(2):
        copies.copy(slot, source)
        assert torch.isnan(slot.buffer.view(torch.float32)).all()
        copies.wait(slot)
        assert torch.equal(slot.buffer[:8], source)
        assert (slot.buffer[8:] == 0xFF).all()
        copies.done(slot)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_poison_is_nan_in_every_float(dtype: torch.dtype) -> None:
    assert torch.isnan(CpuCopies().slot(64).buffer.view(dtype).float()).all()


class FakeEvent:
    """Remembers the point in its stream's work at which it was recorded."""

    def __init__(self) -> None:
        self.point: tuple[str, int] | None = None

    def record(self, stream: "FakeStream") -> None:
        self.point = (stream.name, len(stream.work))


class FakeStream:
    """A queue that writes down what it was given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: list[object] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.work.append(("wait", event.point))

    def synchronize(self) -> None:
        self.work.append("synchronize")


class FakeBuffer:
    """Device memory that remembers which streams it was recorded on, and copies on the current stream."""

    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda = cuda
        self.recorded: list[FakeStream] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.recorded.append(stream)

    def __getitem__(self, part: slice) -> "FakeBuffer":
        return self

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.cuda.current.work.append(("copy", source.numel()))


class FakeCuda:
    """As much of torch.cuda as the transfers use, and a driver that pins memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0) -> None:
        self.compute, self.side = FakeStream("compute"), FakeStream("side")
        self.current = self.compute
        self.pinned: dict[int, int] = {}
        self.error = error
        self.launches_after_error = 0
        for name, value in {
            "Stream": lambda device: self.side,
            "Event": FakeEvent,
            "current_stream": lambda device: self.current,
            "stream": self.on,
            "device": lambda device: contextlib.nullcontext(),
            "cudart": lambda: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "zeros", self.launch)
        empty = torch.empty
        monkeypatch.setattr(
            torch, "empty", lambda *size, device=None, **k: FakeBuffer(self) if device else empty(*size, **k)
        )

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


def test_cuda_orders_copy_and_computation_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    copies = copies_for(torch.device("cuda"))
    assert isinstance(copies, CudaCopies)
    cuda.compute.work.append("earlier kernel")
    slot = copies.slot(100)
    assert slot.buffer.recorded == [cuda.side]  # type: ignore[attr-defined]
    source = copies.host_buffer(100)
    copies.copy(slot, source)
    copies.wait(slot)
    cuda.compute.work.append("first use")
    copies.done(slot)
    copies.copy(slot, source)
    copies.wait(slot)
    assert cuda.side.work == [("wait", ("compute", 1)), ("copy", 100), ("wait", ("compute", 3)), ("copy", 100)]
    assert cuda.compute.work == ["earlier kernel", ("wait", ("side", 2)), "first use", ("wait", ("side", 4))]


def test_cuda_pins_whole_pages_of_about_the_size_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    copies = CudaCopies(torch.device("cuda"))
    sizes = [1, PAGE_BYTES, 5 * PAGE_BYTES + 1]
    buffers = [copies.host_buffer(size) for size in sizes]
    assert [buffer.numel() for buffer in buffers] == sizes
    assert [cuda.pinned[buffer.data_ptr()] for buffer in buffers] == [PAGE_BYTES, PAGE_BYTES, 6 * PAGE_BYTES]
    assert all(buffer.data_ptr() % PAGE_BYTES == 0 for buffer in buffers)
    del copies
    gc.collect()
    assert not cuda.pinned and cuda.side.work == ["synchronize"]  # no copy may still read them
    assert buffers[0].fill_(1).sum() == 1  # what still shows them stays valid


def test_refused_pinning_falls_back_with_a_warning_that_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, error=2)
    copies = CudaCopies(torch.device("cuda"))
    with pytest.warns(UserWarning, match="refused to pin.*CUDA error 2.*slower and do not overlap"):
        buffer = copies.host_buffer(PAGE_BYTES)
    assert buffer.numel() == PAGE_BYTES and not cuda.pinned
    assert cuda.launches_after_error == 1  # which takes the error away from the next kernel
