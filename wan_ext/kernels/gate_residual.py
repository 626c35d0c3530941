"""The gated sum into the residual stream, x + gate * branch, and the gradient of the branch, in one pass.

What: `gate_residual_forward` and `gate_residual_backward`, see `wan_ext.fused_ops`.

How: one program for 1,024 numbers of a token. In place is allowed: a number is read and written by one thread.

Cost: forward reads 6 D bytes of a token (float32 stream, bfloat16 branch) and writes 4 D; backward reads 4 D and writes
2 D. The gate comes from the cache.

Exact: forward multiplies and adds with one rounding, as `torch.addcmul` does; backward is the reference bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory.kernels import launching_on
from wan_ext.kernels.rows import frame_strides, readable, token_strides

BLOCK = 1024


@triton.jit(do_not_specialize=["tokens", "frame_tokens"])
def _forward(
    x,
    branch,
    gate,
    out,
    tokens,
    frame_tokens,
    width,
    x_clip,
    x_token,
    branch_clip,
    branch_token,
    gate_clip,
    gate_frame,
    out_clip,
    out_token,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip, token = row // tokens, row % tokens
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    gate_at = gate + clip * gate_clip + (token // frame_tokens) * gate_frame + at
    gates = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    numbers = tl.load(x + clip * x_clip + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    adds = tl.load(branch + clip * branch_clip + token * branch_token + at, mask=inside, other=0.0).to(tl.float32)
    result = numbers + gates * adds
    tl.store(out + clip * out_clip + token * out_token + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "frame_tokens"])
def _backward(
    grad,
    gate,
    out,
    tokens,
    frame_tokens,
    width,
    grad_clip,
    grad_token,
    gate_clip,
    gate_frame,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    clip, token = row // tokens, row % tokens
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    gate_at = gate + clip * gate_clip + (token // frame_tokens) * gate_frame + at
    gates = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    grads = tl.load(grad + clip * grad_clip + token * grad_token + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (grads * gates).to(out.dtype.element_ty), mask=inside)


def gate_residual_forward(x: Tensor, branch: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `wan_ext.fused_ops.gate_residual_forward`; rows of `x`, `branch` and `out` may lie apart.

    Raises:
        ValueError: operands that the kernel cannot read.
    """
    batch, tokens, width = shape = x.shape
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    x, branch, gate = readable(x), readable(branch), readable(gate)
    x_clip, x_token = token_strides("x", x, shape)
    branch_clip, branch_token = token_strides("branch", branch, shape)
    out_clip, out_token = token_strides("out", out, shape)
    gate_clip, gate_frame, frame_tokens = frame_strides("gate", gate, shape)
    if x.numel() == 0:
        return out
    with launching_on(x):
        _forward[(batch * tokens, triton.cdiv(width, BLOCK))](
            x,
            branch,
            gate,
            out,
            tokens,
            frame_tokens,
            width,
            x_clip,
            x_token,
            branch_clip,
            branch_token,
            gate_clip,
            gate_frame,
            out_clip,
            out_token,
            SIZE=BLOCK,
            num_warps=4,
        )
    return out


def gate_residual_backward(grad: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """See `wan_ext.fused_ops.gate_residual_backward`; rows of `grad` may lie apart.

    Raises:
        ValueError: operands that the kernel cannot read.
    """
    batch, tokens, width = shape = grad.shape
    out = torch.empty(shape, dtype=dtype, device=grad.device)
    grad, gate = readable(grad), readable(gate)
    grad_clip, grad_token = token_strides("grad", grad, shape)
    gate_clip, gate_frame, frame_tokens = frame_strides("gate", gate, shape)
    if grad.numel() == 0:
        return out
    with launching_on(grad):
        _backward[(batch * tokens, triton.cdiv(width, BLOCK))](
            grad,
            gate,
            out,
            tokens,
            frame_tokens,
            width,
            grad_clip,
            grad_token,
            gate_clip,
            gate_frame,
            SIZE=BLOCK,
            num_warps=4,
        )
    return out
