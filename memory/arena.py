"""Host memory of exactly the size that is needed, handed out piece by piece.

What: an `Arena` is one piece of a device's host memory; `take` hands out its next part as a tensor. `arena_bytes` says
how large an arena must be for given tensors.

How: parts follow each other, each at a multiple of 256 bytes (what kernels and copies like best). Nothing is given
back: the memory goes when the arena and all its tensors are gone.

Cost: the bytes of the tensors, at most 255 more for each, and one page. PyTorch's own pinned memory rounds every piece
up to a power of two, which is up to twice as much.

Exact: handing out changes no content.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from memory.device import Device

ALIGNMENT_BYTES = 256


def aligned(num_bytes: int) -> int:
    """Return the smallest multiple of 256 bytes that is no smaller.

    Args:
        num_bytes: a size or an offset, >= 0.
    """
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def tensor_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size of a contiguous tensor in bytes.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """
    return math.prod(shape) * dtype.itemsize


def arena_bytes(tensors: Iterable[tuple[Sequence[int], torch.dtype]]) -> int:
    """Return how large an arena must be.

    Args:
        tensors: shape and dtype of what will be taken, in this order.

    Returns:
        Bytes, without any after the last tensor.
    """
    end = 0
    for shape, dtype in tensors:
        end = aligned(end) + tensor_bytes(shape, dtype)
    return end


class Arena:
    """Host memory from and to which a device copies fast, as tensors one after the other.

    Args:
        device: whose host memory it is.
        num_bytes: how much, from `arena_bytes`.

    Attributes:
        memory: all of it [num_bytes] uint8.
        used: bytes handed out so far, gaps included.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.memory = device.host(num_bytes)
        self.used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Hand out the next part, uninitialised.

        Args:
            shape: of the tensor.
            dtype: of the tensor.

        Returns:
            A contiguous view of the arena's memory that nothing else has.

        Raises:
            ValueError: there is not enough left.
        """
        start = aligned(self.used)
        end = start + tensor_bytes(shape, dtype)
        if end > self.memory.numel():
            raise ValueError(f"arena: expected room for {end} bytes, found {self.memory.numel()}")
        self.used = end
        return self.memory[start:end].view(dtype).view(tuple(shape))
