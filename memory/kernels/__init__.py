"""The 8-bit kernels of `memory`, written in Triton: which there are, and where they run.

What: `int8_matmul` (memory.kernels.int8), `quantize_rows` (memory.kernels.rows) and `dequantize_runs`
(memory.kernels.dequantize). Each has a twin of the same signature in plain PyTorch, `..._reference`
(memory.kernels.reference), that says what it computes and runs anywhere.

How: `available(device)` is the one place that decides. Importing this module or the references imports no Triton; the
kernels' own modules do, so they are imported inside the function that has asked `available`. With TRITON_INTERPRET=1
set before Triton is first imported, the same kernels run on CPU tensors, slowly: that is how the tests run them.

Cost: a kernel compiles on its first use, one to three seconds each; Triton keeps the result on disk.

Exact: nothing is computed here.
"""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first cards with bfloat16 and with 8-bit tensor cores that Triton still compiles for."""


@cache
def _compiles_for(index: int) -> bool:
    """Whether the card of this number is new enough and Triton is installed."""
    has_triton = importlib.util.find_spec("triton") is not None
    return has_triton and torch.cuda.get_device_capability(index) >= OLDEST_CAPABILITY


def available(device: torch.device) -> bool:
    """Whether the Triton kernels of this project run on a device.

    Args:
        device: where the tensors are.

    Returns:
        True for an NVIDIA card from Ampere on where Triton is installed; False elsewhere.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return _compiles_for(torch.cuda.current_device() if device.index is None else device.index)


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current card: make that the tensor's for the length of a `with`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
