"""One attention function, and its forward and backward apart; the only file that knows backends.

    sdpa    torch's scaled_dot_product_attention: everywhere, with gradients
    flash   flash-attn, where it is installed: CUDA, fp16 or bf16, with gradients
    sage    SageAttention, where it is installed: CUDA, 8-bit products, sampling only (it has no backward)

`attention` is for autograd. `attention_forward` and `attention_backward` are for code that schedules its own backward:
with the log-sum-exp of the forward, backward recomputes nothing but the scores, a tile at a time.

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
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        check_backend_has_backward(backend)
    if q.dtype not in (torch.float16, torch.bfloat16) or q.device.type != "cuda":
        raise InputError(
            f"attention: {backend} needs float16 or bfloat16 on a CUDA device, found {q.dtype} on {q.device.type}; "
            "use sdpa or --mixed_precision bf16"
        )
    if backend == "flash":
        return _kernel("flash_attn", "flash_attn_func")(q, k, v)
    return _kernel("sageattention", "sageattn")(q, k, v, tensor_layout="NHD")


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "sdpa") -> tuple[Tensor, Tensor]:
    """`attention` without autograd, with what its backward needs.

    Args:
        q: [B, L, N, d]
        k, v: of q's dtype. [B, S, N, d]
        backend: sdpa or flash. Both are PyTorch's own kernels here: see `fused_kernel`.

    Returns:
        The output [B, L, N, d], and the log of the sum of exponentials of each row, [B, N, L] or [B, N, L, 1].

    Raises:
        InputError: sage, which has no backward; or a dtype, device or width of a head without a fused kernel.
    """
    kernel = fused_kernel(q, backend)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, L, d]
    if kernel == "cudnn":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    elif kernel == "efficient":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    elif kernel == "flash":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out.transpose(1, 2), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, backend: str = "sdpa"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_forward`. Heads are independent: any of them can be asked for alone.

    Args:
        grad: of the output. [B, L, N, d]
        q, k, v: as in forward.
        out, lse: of forward. Of `out` only the products sum(grad * out) of each row of a head are used.
        backend: as in forward.

    Returns:
        Of q [B, L, N, d], of k and of v [B, S, N, d].

    Raises:
        InputError: as in forward.
    """
    kernel = fused_kernel(q, backend)
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))  # [B, N, L, d]
    lengths = (q.shape[2], k.shape[2])
    if kernel == "cudnn":
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, seed, None, None, None, *lengths, 0.0, False
        )
    elif kernel == "efficient":
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False]
        )[:3]
    elif kernel == "flash":
        seed = torch.empty((2,), dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, *lengths, 0.0, False, seed, seed
        )
    else:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    of_q, of_k, of_v = (x.transpose(1, 2) for x in grads)
    return of_q, of_k, of_v


def fused_kernel(q: Tensor, backend: str) -> str:
    """Which of PyTorch's fused attentions computes these queries.

    The CPU has one. On CUDA in 16 bits it is cuDNN's from compute capability 9.0 on, where it is about twice as fast as
    FlashAttention 2, and FlashAttention 2 else or where backend flash asks for it; in float32, the memory-efficient
    one. Meta tensors are shaped as by FlashAttention 2.

    Args:
        q: [B, L, N, d]
        backend: sdpa or flash.

    Returns:
        "cpu", "flash", "cudnn" or "efficient".

    Raises:
        InputError: as in `attention_forward`.
    """
    check_backend_has_backward(backend)
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type == "meta":
        return "flash"
    if q.shape[-1] % 8:
        raise InputError(f"attention: the fused kernels take heads of a multiple of 8 channels, found {q.shape[-1]}")
    if q.dtype == torch.float32:
        return "efficient"
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"attention: no fused kernel for {q.dtype} on {q.device.type}; use bf16 on a CUDA device")
    modern = torch.cuda.get_device_capability(q.device) >= (9, 0) and torch.version.hip is None
    return "cudnn" if backend == "sdpa" and modern and torch.backends.cuda.cudnn_sdp_enabled() else "flash"


def check_backend_has_backward(backend: str) -> None:
    """Refuse a backend that can sample but not train. Raises InputError."""
    if backend == "sage":
        raise InputError("attention: sage has no backward pass, so it can sample but not train; use sdpa or flash")


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
