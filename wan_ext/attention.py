"""One attention function; the only file that knows backends.

    sdpa    torch's scaled_dot_product_attention: everywhere, with gradients
    flash   flash-attn, where it is installed: CUDA, fp16 or bf16, with gradients
    sage    SageAttention, where it is installed: CUDA, 8-bit products, sampling only (it has no backward)

Shapes: B clips, L queries, S keys, N heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import InputError, nearest

BACKENDS = ("sdpa", "flash", "sage")


def check_backend(backend: str) -> str:
    """`backend` if it can run here.

    Raises:
        InputError: there is no backend of that name, or its package is not installed.
    """
    if backend not in BACKENDS:
        raise InputError(
            f"attention: expected one of {', '.join(BACKENDS)}, found {backend!r}{nearest(backend, BACKENDS)}"
        )
    if backend == "flash":
        _kernel("flash_attn", "flash_attn_func")
    elif backend == "sage":
        _kernel("sageattention", "sageattn")
    return backend


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every head, without a mask.

    Args:
        q: [B, L, N, d]
        k, v: of q's dtype. [B, S, N, d]
        backend: one of `BACKENDS`.

    Returns:
        [B, L, N, d]

    Raises:
        InputError: the backend is unknown or not installed, cannot take this dtype or device, or was asked for a
            gradient that it does not have.
    """
    if backend == "sdpa":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    check_backend(backend)
    if backend == "sage" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise InputError("attention: sage has no backward pass, so it can sample but not train; use sdpa or flash")
    if q.dtype not in (torch.float16, torch.bfloat16) or q.device.type != "cuda":
        raise InputError(
            f"attention: {backend} needs float16 or bfloat16 on a CUDA device, found {q.dtype} on {q.device.type}; "
            "use sdpa or --mixed_precision bf16"
        )
    if backend == "flash":
        return _kernel("flash_attn", "flash_attn_func")(q, k, v)
    return _kernel("sageattention", "sageattn")(q, k, v, tensor_layout="NHD")


@cache
def _kernel(package: str, function: str) -> Callable[..., Tensor]:
    """The function of an optional package, or one line that says how to do without it."""
    try:
        return getattr(import_module(package), function)
    except (ImportError, OSError, AttributeError) as error:
        raise InputError(
            f"attention: the package {package} does not load here ({str(error).splitlines()[0]}); "
            "install it, or use sdpa, which needs nothing"
        ) from error
