"""Norm of queries and keys over all heads, their weight and the rotary positions in one pass, and its gradient.

What: `rms_rope_forward` and `rms_rope_backward`, see `wan_ext.fused_ops`.

How: one program a token. The row is read as it lies and cut into pairs in registers, where it is turned by the
token's angles, which all heads share (512 bytes a token, from the cache). Backward turns the gradient back first.

Cost: forward reads 2 D bytes of a token and writes 2 D (bfloat16); backward reads 4 D and writes 2 D.

Exact: float32 throughout, rounded once; up to summation order those of the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory.kernels import launching_on
from wan_ext.kernels.rows import DTYPES, check_width, readable, row_numbers, token_strides, warps


@triton.jit
def _turned(numbers, cos_at, sin_at, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Turn the neighbouring pairs of numbers [BLOCK] by the angles of their place in a head of HALF pairs."""
    pair = tl.arange(0, BLOCK // 2) % HALF
    cos = tl.load(cos_at + pair)
    sin = tl.load(sin_at + pair)
    if BACK:
        sin = -sin
    even, odd = tl.split(tl.reshape(numbers, [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK])


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    x,
    weight,
    rope,
    y,
    rrms_at,
    tokens,
    width,
    x_clip,
    x_token,
    rope_part,
    rope_token,
    eps,
    HAS_RRMS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip, token = row // tokens, row % tokens
    at = tl.arange(0, BLOCK)
    inside = at < width
    numbers = tl.load(x + clip * x_clip + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RRMS:
        rrms = tl.load(rrms_at + row)
    else:
        rrms = 1.0 / tl.sqrt(tl.sum(numbers * numbers, axis=0) / width + eps)
        tl.store(rrms_at + row, rrms)
    numbers = numbers * rrms * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_ROPE:
        cos_at = rope + token * rope_token
        numbers = _turned(numbers, cos_at, cos_at + rope_part, HALF, False, BLOCK)
    tl.store(y + row * width + at, numbers.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    grad,
    x,
    rrms_at,
    weight,
    rope,
    out,
    tokens,
    width,
    grad_clip,
    grad_token,
    grad_head,
    x_clip,
    x_token,
    rope_part,
    rope_token,
    HAS_ROPE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip, token = row // tokens, row % tokens
    at = tl.arange(0, BLOCK)
    inside = at < width
    head, channel = at // (2 * HALF), at % (2 * HALF)
    grad_at = grad + clip * grad_clip + token * grad_token + head.to(tl.int64) * grad_head + channel
    grads = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    if HAS_ROPE:
        cos_at = rope + token * rope_token
        grads = _turned(grads, cos_at, cos_at + rope_part, HALF, True, BLOCK)
    grads = grads * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    rrms = tl.load(rrms_at + row)
    unit = tl.load(x + clip * x_clip + token * x_token + at, mask=inside, other=0.0).to(tl.float32) * rrms
    along = tl.sum(grads * unit, axis=0) / width
    result = (grads - unit * along) * rrms
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


def rms_rope_forward(
    x: Tensor, weight: Tensor, rope: Tensor | None, heads: int, eps: float, *, rrms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `wan_ext.fused_ops.rms_rope_forward`; rows of `x` may lie apart.

    Raises:
        ValueError: operands that the kernel cannot read.
    """
    x = readable(x)
    batch, tokens, width = x.shape
    head_dim = _head_dim(width, heads)
    x_clip, x_token = token_strides("x", x, (batch, tokens, width))
    rope_part, rope_token = _check_shared(weight, rope, tokens, width, head_dim)
    y = torch.empty(batch, tokens, heads, head_dim, dtype=x.dtype, device=x.device)
    has_rrms = rrms is not None
    if rrms is None:
        rrms = torch.empty(batch, tokens, 1, dtype=torch.float32, device=x.device)
    rrms = row_numbers("rrms", rrms, x.shape)
    if x.numel() == 0:
        return y, rrms
    block = max(2, triton.next_power_of_2(width))
    with launching_on(x):
        _forward[(batch * tokens,)](
            x,
            weight,
            rope,
            y,
            rrms,
            tokens,
            width,
            x_clip,
            x_token,
            rope_part,
            rope_token,
            eps,
            HAS_RRMS=has_rrms,
            HAS_ROPE=rope is not None,
            HALF=head_dim // 2,
            BLOCK=block,
            num_warps=warps(block),
        )
    return y, rrms


def rms_rope_backward(grad: Tensor, x: Tensor, rrms: Tensor, weight: Tensor, rope: Tensor | None) -> Tensor:
    """See `wan_ext.fused_ops.rms_rope_backward`; tokens and heads of `grad`, rows of `x` may lie apart.

    Raises:
        ValueError: operands that the kernel cannot read.
    """
    grad, x = readable(grad), readable(x)
    batch, tokens, width = x.shape
    heads = grad.shape[2]
    head_dim = _head_dim(width, heads)
    grad_clip, grad_token = token_strides("grad", grad, (batch, tokens, heads, head_dim))
    x_clip, x_token = token_strides("x", x, (batch, tokens, width))
    rope_part, rope_token = _check_shared(weight, rope, tokens, width, head_dim)
    rrms = row_numbers("rrms", rrms, x.shape)
    out = torch.empty(batch, tokens, width, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    block = max(2, triton.next_power_of_2(width))
    with launching_on(x):
        _backward[(batch * tokens,)](
            grad,
            x,
            rrms,
            weight,
            rope,
            out,
            tokens,
            width,
            grad_clip,
            grad_token,
            grad.stride(2),
            x_clip,
            x_token,
            rope_part,
            rope_token,
            HAS_ROPE=rope is not None,
            HALF=head_dim // 2,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out


def _head_dim(width: int, heads: int) -> int:
    check_width(width)
    if heads < 1 or width % (2 * heads):
        raise ValueError(f"expected a width of {heads} heads of an even number of channels, found {width}")
    return width // heads


def _check_shared(weight: Tensor, rope: Tensor | None, tokens: int, width: int, head_dim: int) -> tuple[int, int]:
    """Numbers from cosines to sines and from token to token of the rotary table; (0, 0) where there is none."""
    if weight.shape != (width,) or weight.dtype not in DTYPES or not weight.is_contiguous():
        raise ValueError(f"weight: expected [{width}], contiguous, found {weight.dtype} {list(weight.shape)}")
    if rope is None:
        return 0, 0
    fits = rope.shape == (2, tokens, 1, head_dim // 2) and rope.dtype == torch.float32
    if not fits or (rope.stride(3) != 1 and head_dim > 2):
        raise ValueError(
            f"rope: expected float32 [2, {tokens}, 1, {head_dim // 2}] with rows of neighbouring numbers, "
            f"found {rope.dtype} {list(rope.shape)} of strides {list(rope.stride())}"
        )
    return rope.stride(0), rope.stride(1)
