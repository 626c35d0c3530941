"""One file of named tensors, read one tensor at a time: safetensors and PyTorch's .pth.

A file says what it holds (names, shapes, types) before any weight is read, and `get` reads exactly one tensor into
memory of its own. Nothing stays mapped into the process: a mapped 28 GB file counts as 28 GB of resident memory until
the kernel takes it back, and a tensor that lives in a mapping dies with the file. So the cost of loading a model is the
model, plus the one tensor that is being converted.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core.errors import InputError

# The types of the safetensors format that a Wan checkpoint can hold. Source: safetensors' format description.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class TensorFile(Protocol):
    """One file of named tensors."""

    path: Path
    metadata: Mapping[str, str]

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def position(self, name: str) -> int: ...
    def get(self, name: str) -> Tensor: ...
    def will_read(self, name: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """A safetensors file. The header is read and checked at once, tensors when they are asked for.

    Attributes:
        tensors: where each lies.
        num_bytes: size of the file.

    Raises:
        InputError: the file is truncated, or is not a safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self.tensors: dict[str, StoredTensor] = {}
        size = self.num_bytes = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise InputError(f"{path}: expected a whole safetensors file, {what_it_is(path)}")
            try:
                header = json.loads(file.read(header_bytes))
                self.metadata = header.pop("__metadata__", {})
                for name, entry in header.items():
                    self.tensors[name] = self._stored(name, entry, 8 + header_bytes)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{path}: expected a safetensors file, {what_it_is(path)}") from None
        end = max((tensor.start + tensor.num_bytes for tensor in self.tensors.values()), default=8 + header_bytes)
        if end > size:
            raise InputError(
                f"{path}: the file is truncated: expected {end} bytes, found {size}; download or write it again"
            )

    def _stored(self, name: str, entry: Mapping, data_start: int) -> StoredTensor:
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(
                f"{self.path}: tensor {name}: expected one of the types {', '.join(SAFETENSORS_DTYPES)}, "
                f"found {entry['dtype']}; use a bf16, fp16 or fp8 file"
            )
        start, stop = entry["data_offsets"]
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        if stop - start != prod(shape) * dtype.itemsize:
            raise InputError(f"{self.path}: tensor {name}: the header contradicts itself; download the file again")
        return StoredTensor(dtype=dtype, shape=shape, start=data_start + start, num_bytes=stop - start)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def position(self, name: str) -> int:
        return self.tensors[name].start

    def get(self, name: str) -> Tensor:
        stored = self.tensors[name]
        data = torch.empty(stored.num_bytes, dtype=torch.uint8)
        _advise(data, "MADV_HUGEPAGE")  # a third less time for a fresh 140 MB than in pages of 4 KB
        view = data.numpy().data
        done = 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(stored.start)
            while done < stored.num_bytes:  # one read returns at most 2 GiB
                count = file.readinto(view[done:])
                if not count:
                    raise InputError(f"{self.path}: tensor {name}: the file ended while it was read; download it again")
                done += count
        return data.view(stored.dtype).reshape(stored.shape)

    def will_read(self, name: str) -> None:
        """Let the kernel fetch a tensor from the disk into its own cache while this process computes."""
        if hasattr(os, "posix_fadvise"):
            stored = self.tensors[name]
            with open(self.path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), stored.start, stored.num_bytes, os.POSIX_FADV_WILLNEED)


class TorchFile:
    """A .pth or .pt file: a dictionary of tensors, read without running any code that the file may carry.

    PyTorch maps the file; `get` copies the asked tensor out and gives its pages back, so that the mapping never grows
    in memory. (Files from before PyTorch 1.6 cannot be mapped, and are read whole.)

    Raises:
        InputError: the file is broken, or holds something other than tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: Mapping[str, str] = {}
        is_zip = _head(path).startswith(b"PK")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError:
            raise InputError(
                f"{path}: expected a dictionary of tensors, found Python objects that only a trusted program may "
                "load; ask its author for safetensors"
            ) from None
        except Exception:  # a broken pickle fails wherever its bytes happen to lead
            raise InputError(f"{path}: expected a whole PyTorch file, {what_it_is(path)}") from None
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise InputError(f"{path}: expected a dictionary of tensors, found {type(state).__name__} of other things")
        self._tensors: dict[str, Tensor] = dict(state)
        self._mapped = is_zip

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def position(self, name: str) -> int:
        return self._tensors[name].data_ptr()

    def get(self, name: str) -> Tensor:
        stored = self._tensors[name]
        copy = stored.clone(memory_format=torch.contiguous_format)
        if self._mapped:
            _advise(stored, "MADV_DONTNEED")  # give the mapping's clean pages back; a later read fetches them again
        return copy

    def will_read(self, name: str) -> None:
        if self._mapped:
            _advise(self._tensors[name], "MADV_WILLNEED")  # into the kernel's cache, not into this process


def open_file(path: Path) -> TensorFile:
    """The reader of a file, chosen by what the file is rather than what it is called.

    Raises:
        InputError: it is no checkpoint, or broken.
    """
    head = _head(path)
    is_safetensors = head[8:9] == b"{"  # after the length of the header, the header
    if head.startswith(b"PK") or head.startswith(b"\x80") and not is_safetensors:
        return TorchFile(path)
    if not is_safetensors and path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise InputError(f"{path}: expected a PyTorch file, {what_it_is(path)}")
    return SafetensorsFile(path)


def what_it_is(path: Path) -> str:
    """Half a sentence: what a file that is not a checkpoint seems to be, and what to do."""
    head, size = _head(path), path.stat().st_size
    if size == 0:
        return "found an empty file; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "found a git-lfs pointer; fetch the file itself with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "found a web page; download the file itself, not the page about it"
    if head.startswith(b"GGUF"):
        return "found a GGUF file, which is not supported; use the .safetensors of the same model"
    return f"found {size} bytes that are not one (truncated or of another type); download it again"


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def _advise(tensor: Tensor, advice: str) -> None:
    """Tell the kernel about the whole pages of a tensor's memory, where there is a kernel that listens."""
    if not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), getattr(mmap, advice))
