"""Norm and modulation in one pass: (x - mean) / deviation * gain + shift, and its gradient.

What: `norm_modulate_forward` and `norm_modulate_backward`, see `wan_ext.fused_ops`.

How: one program a token. Mean, then the mean square of what remains, from registers; backward sums
the gradient and its product with the normalised row and writes (or adds to) the gradient of the row.

Cost: forward reads 4 D bytes of a token and writes 2 D (bfloat16); backward reads 6 D and writes 4 D, and reads 4 D
more where it adds. Gain and shift come from the cache.

Exact: float32 throughout; up to summation order those of the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory.kernels import launching_on
from wan_ext.kernels.rows import check_width, frame_strides, readable, row_numbers, token_strides, warps


@triton.jit(do_not_specialize=["tokens", "frame_tokens"])
def _forward(
    x,
    gain,
    shift,
    y,
    mean_out,
    rstd_out,
    tokens,
    frame_tokens,
    width,
    x_clip,
    x_token,
    gain_clip,
    gain_frame,
    shift_clip,
    shift_frame,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip, token = row // tokens, row % tokens
    frame = token // frame_tokens
    at = tl.arange(0, BLOCK)
    inside = at < width
    numbers = tl.load(x + clip * x_clip + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(numbers, axis=0) / width
    rest = tl.where(inside, numbers - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(rest * rest, axis=0) / width + eps)
    gains = tl.load(gain + clip * gain_clip + frame * gain_frame + at, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.load(shift + clip * shift_clip + frame * shift_frame + at, mask=inside, other=0.0).to(tl.float32)
    out = rest * rstd * gains + shifts
    tl.store(y + row * width + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit(do_not_specialize=["tokens", "frame_tokens"])
def _backward(
    grad,
    x,
    mean_in,
    rstd_in,
    gain,
    out,
    tokens,
    frame_tokens,
    width,
    grad_clip,
    grad_token,
    x_clip,
    x_token,
    gain_clip,
    gain_frame,
    out_clip,
    out_token,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip, token = row // tokens, row % tokens
    frame = token // frame_tokens
    at = tl.arange(0, BLOCK)
    inside = at < width
    gains = tl.load(gain + clip * gain_clip + frame * gain_frame + at, mask=inside, other=0.0).to(tl.float32)
    grads = tl.load(grad + clip * grad_clip + token * grad_token + at, mask=inside, other=0.0).to(tl.float32) * gains
    numbers = tl.load(x + clip * x_clip + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_in + row)
    unit = (numbers - tl.load(mean_in + row)) * rstd  # beyond the width anything: grads are 0 there
    level = tl.sum(grads, axis=0) / width
    along = tl.sum(grads * unit, axis=0) / width
    result = (grads - level - unit * along) * rstd
    out_at = out + clip * out_clip + token * out_token + at
    if ADDS:
        result += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, result.to(out.dtype.element_ty), mask=inside)


def norm_modulate_forward(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `wan_ext.fused_ops.norm_modulate_forward`; rows of `x` may lie apart.

    Raises:
        ValueError: operands that the kernel cannot read.
    """
    x, gain, shift = readable(x), readable(gain), readable(shift)
    batch, tokens, width = x.shape
    check_width(width)
    x_clip, x_token = token_strides("x", x, (batch, tokens, width))
    gain_clip, gain_frame, frame_tokens = frame_strides("gain", gain, (batch, tokens, width))
    shift_clip, shift_frame, _ = frame_strides("shift", shift, (batch, tokens, width))
    if shift.shape[1] != gain.shape[1]:
        raise ValueError(f"expected gain and shift of as many frames, found {gain.shape[1]} and {shift.shape[1]}")
    y = torch.empty(batch, tokens, width, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(batch, tokens, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return y, mean, rstd
    block = triton.next_power_of_2(width)
    with launching_on(x):
        _forward[(batch * tokens,)](
            x,
            gain,
            shift,
            y,
            mean,
            rstd,
            tokens,
            frame_tokens,
            width,
            x_clip,
            x_token,
            gain_clip,
            gain_frame,
            shift_clip,
            shift_frame,
            eps,
            BLOCK=block,
            num_warps=warps(block),
        )
    return y, mean, rstd


def norm_modulate_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, *, into: Tensor | None = None
) -> Tensor:
    """See `wan_ext.fused_ops.norm_modulate_backward`; rows of `grad`, `x` and `into` may lie apart.

    Raises:
        ValueError: operands that the kernel cannot read.
    """
    grad, x, gain = readable(grad), readable(x), readable(gain)
    batch, tokens, width = x.shape
    check_width(width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    grad_clip, grad_token = token_strides("grad", grad, (batch, tokens, width))
    x_clip, x_token = token_strides("x", x, (batch, tokens, width))
    out_clip, out_token = token_strides("into", out, (batch, tokens, width))
    gain_clip, gain_frame, frame_tokens = frame_strides("gain", gain, (batch, tokens, width))
    mean, rstd = row_numbers("mean", mean, x.shape), row_numbers("rstd", rstd, x.shape)
    if x.numel() == 0:
        return out
    block = triton.next_power_of_2(width)
    with launching_on(x):
        _backward[(batch * tokens,)](
            grad,
            x,
            mean,
            rstd,
            gain,
            out,
            tokens,
            frame_tokens,
            width,
            grad_clip,
            grad_token,
            x_clip,
            x_token,
            gain_clip,
            gain_frame,
            out_clip,
            out_token,
            ADDS=into is not None,
            BLOCK=block,
            num_warps=warps(block),
        )
    return out
