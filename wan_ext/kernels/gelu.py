"""GELU with the tanh approximation, and its gradient, in place where asked.

What: `gelu_forward` and `gelu_backward`, see `wan_ext.fused_ops`.

How: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), so h * sigmoid(2 u) is the same function with one exponential, and without
the cancellation of 1 + tanh(u) where u is very negative. One program for 2,048 numbers of a row.

Cost: forward reads and writes 2 bytes a number (bfloat16); backward reads 4 and writes 2.

Exact: float32 throughout, rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory.kernels import launching_on
from wan_ext.kernels.rows import readable, token_strides

BLOCK = 2048
TWICE_ROOT = tl.constexpr(2 * (2 / 3.141592653589793) ** 0.5)
CUBE = tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["tokens"])
def _forward(h, out, tokens, width, h_clip, h_token, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    h_at = h + (row // tokens) * h_clip + (row % tokens) * h_token + at
    numbers = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
    result = numbers * tl.sigmoid(numbers * TWICE_ROOT * (1.0 + numbers * numbers * CUBE))
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    grad,
    h,
    out,
    tokens,
    width,
    grad_clip,
    grad_token,
    h_clip,
    h_token,
    out_clip,
    out_token,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip, token = row // tokens, row % tokens
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    grads = tl.load(grad + clip * grad_clip + token * grad_token + at, mask=inside, other=0.0).to(tl.float32)
    numbers = tl.load(h + clip * h_clip + token * h_token + at, mask=inside, other=0.0).to(tl.float32)
    square = numbers * numbers
    part = tl.sigmoid(numbers * TWICE_ROOT * (1.0 + square * CUBE))
    slope = part + numbers * part * (1.0 - part) * TWICE_ROOT * (1.0 + square * CUBE * 3.0)
    result = (grads * slope).to(out.dtype.element_ty)
    tl.store(out + clip * out_clip + token * out_token + at, result, mask=inside)


def gelu_forward(h: Tensor) -> Tensor:
    """See `wan_ext.fused_ops.gelu_forward`; rows may lie apart.

    Raises:
        ValueError: operands that the kernel cannot read.
    """
    rows = _as_tokens(readable(h))
    batch, tokens, width = rows.shape
    h_clip, h_token = token_strides("h", rows, rows.shape)
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if h.numel() == 0:
        return out
    with launching_on(h):
        _forward[(batch * tokens, triton.cdiv(width, BLOCK))](
            rows, out, tokens, width, h_clip, h_token, SIZE=BLOCK, num_warps=4
        )
    return out


def gelu_backward(grad: Tensor, h: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `wan_ext.fused_ops.gelu_backward`; rows may lie apart, `out` may be `grad` or `h`.

    Raises:
        ValueError: operands that the kernel cannot read.
    """
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if out is None else out
    rows = [_as_tokens(tensor) for tensor in (readable(grad), readable(h), out)]
    batch, tokens, width = shape = rows[1].shape
    strides = [token_strides(name, tensor, shape) for name, tensor in zip(("grad", "h", "out"), rows, strict=True)]
    if h.numel() == 0:
        return out
    with launching_on(h):
        _backward[(batch * tokens, triton.cdiv(width, BLOCK))](
            *rows, tokens, width, *strides[0], *strides[1], *strides[2], SIZE=BLOCK, num_warps=4
        )
    return out


def _as_tokens(x: Tensor) -> Tensor:
    """[..., H] as [B, L, H], without a copy."""
    return x if x.ndim == 3 else x.view(1, -1, x.shape[-1])
