"""The element-wise operations of Wan's block, each with its forward and its backward: the reference in plain PyTorch.

    norm_modulate   rows of mean 0 and deviation 1, times gain, plus shift, in the dtype of the linears
    rms_rope        rows of root mean square 1, times weight, cut into heads, each pair of channels turned by its angle
    gate_residual   the float32 residual stream plus gate * branch
    gelu            of the feed-forward, tanh approximation

What: functions without autograd, for code that schedules its own backward (`wan_ext/fused_block.py`). `ops_for(device)`
gives them, or their namesakes in Triton on a CUDA device.

How: rounding points are those of `wan_ext/dit.py` and `wan_ext/norms.py`: everything is computed in float32 (float64
for float64), once rounded where the result is narrower. Operations that need wide intermediates take some rows at a
time, which on the CPU then stay in its cache.

Cost: beside the result, intermediates of at most 2^23 numbers (the CPU: 2^17 a thread). Backward asks for the input and
one or two float32 numbers a row.

Exact: forward is that of the plain block up to the rounding of a complex product; backward up to summation order.

Shapes: B clips, F latent frames, L tokens, D width over which rows are normalised, N heads, d channels of a head.
Gains, shifts and gates have one row for all tokens of a clip, or one for each latent frame: [1|B, 1|F, D].
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from memory.kernels import available

GELU = "tanh"


def ops_for(device: torch.device) -> ModuleType:
    """The operations of this file as they run on a device.

    Args:
        device: of the tensors.

    Returns:
        A module with the functions of this one: `wan_ext.kernels` where Triton's kernels run, else this one.
    """
    if available(device):
        return importlib.import_module("wan_ext.kernels")
    if device.type == "cuda":
        _warn_once()
    return sys.modules[__name__]


@cache
def _warn_once() -> None:
    warnings.warn(
        "Triton's kernels do not run here (they need an NVIDIA card from Ampere on and triton; Windows: "
        "triton-windows): norms, rotations and gates run as separate PyTorch operations, which makes a training step "
        "up to 1.6 times as long",
        stacklevel=3,
    )


def norm_modulate_forward(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / deviation * gain + shift.

    Args:
        x: float32. [B, L, D]
        gain, shift: [1|B, 1|F, D]
        eps: added to the variance.
        dtype: of the result.

    Returns:
        The result [B, L, D]; mean and 1 / deviation of each row, float32. [B, L, 1]
    """
    frames = gain.shape[1]
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(*x.shape[:-1], 1) for _ in range(2))
    x, out_rows, mean_rows, rstd_rows = (_framed(t, frames) for t in (x, out, mean, rstd))
    for rows in _some_rows(x, 2):
        unit, mean_rows[:, :, rows], rstd_rows[:, :, rows] = torch.native_layer_norm(
            x[:, :, rows], x.shape[-1:], None, None, eps
        )
        torch.addcmul(shift[:, :, None], unit, gain[:, :, None], out=out_rows[:, :, rows])
    return out, mean, rstd


def norm_modulate_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, *, into: Tensor | None = None
) -> Tensor:
    """The gradient of the rows.

    Args:
        grad: of the result, any dtype. [B, L, D]
        x: as in forward. [B, L, D]
        mean, rstd: of forward. [B, L, 1]
        gain: as in forward. [1|B, 1|F, D]
        into: a gradient to which this one is added in place. [B, L, D]

    Returns:
        `into`, or a new tensor in the dtype of `x`. [B, L, D]
    """
    frames = gain.shape[1]
    out = torch.zeros_like(x, memory_format=torch.contiguous_format) if into is None else into
    grad, x, mean, rstd, out_rows = (_framed(t, frames) for t in (grad, x, mean, rstd, out))
    only_x = [True, False, False]
    for rows in _some_rows(x, 2):
        grad_unit = (grad[:, :, rows] * gain[:, :, None]).to(x.dtype).contiguous()
        rows_x, rows_mean, rows_rstd = (t[:, :, rows].contiguous() for t in (x, mean, rstd))  # or it reads them wrongly
        out_rows[:, :, rows] += torch.ops.aten.native_layer_norm_backward(
            grad_unit, rows_x, x.shape[-1:], rows_mean, rows_rstd, None, None, only_x
        )[0]
    return out


def norm_modulate_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """The gradients of gain and shift, where the modulation or an affine norm is trained (it seldom is).

    Args:
        grad: of the result. [B, L, D]
        x, mean, rstd: as in backward.
        frames: 1 or F.

    Returns:
        Of the gain and of the shift, float32. [B, 1|F, D]
    """
    grad, x, mean, rstd = (_framed(t, frames) for t in (grad, x, mean, rstd))
    of_gain, of_shift = (x.new_zeros(*x.shape[:2], x.shape[-1]) for _ in range(2))
    for rows in _some_rows(x, 2):
        wide = grad[:, :, rows].to(x.dtype)
        of_shift += wide.sum(2)
        of_gain += ((x[:, :, rows] - mean[:, :, rows]) * rstd[:, :, rows]).mul_(wide).sum(2)
    return of_gain, of_shift


def rms_rope_forward(
    x: Tensor, weight: Tensor, rope: Tensor | None, heads: int, eps: float, *, rrms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, turned by the rotary angles.

    Some heads of the rows can be asked for alone: their channels of `x` and `weight`, and `rrms` of the whole rows.

    Args:
        x: queries or keys before the norm; a slice of channels is welcome (last stride 1). [B, L, D]
        weight: of the norm. [D]
        rope: from `rope_table`, for the L tokens; None: not turned. [2, L, 1, d/2]
        heads: N, into which D is cut.
        eps: added to the mean square; not used with `rrms`.
        rrms: from `row_rrms`, where it is known. [B, L, 1]

    Returns:
        The result in the dtype of `x` [B, L, N, d], and 1 / rms of each row, float32. [B, L, 1]
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format).unflatten(-1, (heads, -1))
    rrms = row_rrms(x, eps) if rrms is None else rrms
    for rows in _some_rows(x, 1):
        wide = (x[:, rows] * rrms[:, rows]).mul_(weight)
        out[:, rows] = _turn(wide.unflatten(-1, (heads, -1)), rope, rows)
    return out, rrms


def rms_rope_backward(grad: Tensor, x: Tensor, rrms: Tensor, weight: Tensor, rope: Tensor | None) -> Tensor:
    """The gradient of the rows before the norm.

    Args:
        grad: of the result. [B, L, N, d]
        x: as in forward, whole rows. [B, L, D]
        rrms: of forward. [B, L, 1]
        weight, rope: as in forward.

    Returns:
        In the dtype of `x`. [B, L, D]
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in _some_rows(x, 1):
        grad_unit = _turn(_wide_copy(grad[:, rows]), rope, rows, back=True).flatten(2).mul_(weight)
        unit = x[:, rows] * rrms[:, rows]
        along = (grad_unit * unit).mean(-1, keepdim=True)
        out[:, rows] = grad_unit.sub_(unit.mul_(along)).mul_(rrms[:, rows])
    return out


def rms_rope_sum(grad: Tensor, x: Tensor, rrms: Tensor, rope: Tensor | None) -> Tensor:
    """The gradient of the norm's weight, where it is trained (it seldom is). As in backward -> float32 [D]"""
    total = x.new_zeros(x.shape[-1], dtype=rrms.dtype)
    for rows in _some_rows(x, 1):
        turned = _turn(_wide_copy(grad[:, rows]), rope, rows, back=True).flatten(2)
        total += turned.mul_(x[:, rows] * rrms[:, rows]).sum((0, 1))
    return total


def row_rrms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row, float32 (float64 for float64). [B, L, D] -> [B, L, 1]"""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def gate_residual_forward(x: Tensor, branch: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x + gate * branch.

    Args:
        x: the residual stream, float32. [B, L, D]
        branch: any dtype. [B, L, D]
        gate: [B, 1|F, D]
        out: where the result goes; may be `x`. [B, L, D]

    Returns:
        `out`, or a new tensor. [B, L, D]
    """
    frames = gate.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    torch.addcmul(_framed(x, frames), _framed(branch, frames), gate[:, :, None], out=_framed(out, frames))
    return out


def gate_residual_backward(grad: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the branch; that of `x` is `grad` itself.

    Args:
        grad: of the result, float32. [B, L, D]
        gate: [B, 1|F, D]
        dtype: of the branch.

    Returns:
        [B, L, D]
    """
    frames = gate.shape[1]
    out = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    torch.mul(_framed(grad, frames), gate[:, :, None], out=_framed(out, frames))
    return out


def gate_residual_sum(grad: Tensor, branch: Tensor, frames: int) -> Tensor:
    """The gradient of the gate, where the modulation is trained (it seldom is). [B, L, D] twice -> [B, 1|F, D]"""
    return (_framed(grad, frames) * _framed(branch, frames)).sum(2)


def gelu_forward(h: Tensor) -> Tensor:
    """GELU, tanh approximation. [..., H] -> [..., H]"""
    return F.gelu(h, approximate=GELU)


def gelu_backward(grad: Tensor, h: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient before the GELU.

    Args:
        grad: after it. [..., H]
        h: the values before it. [..., H]
        out: where the result goes; may be `grad`. [..., H]

    Returns:
        `out`, or a new tensor.
    """
    if out is None:
        return torch.ops.aten.gelu_backward(grad, h, approximate=GELU)
    return torch.ops.aten.gelu_backward.grad_input(grad, h, approximate=GELU, grad_input=out)


def _framed(x: Tensor, frames: int) -> Tensor:
    """[B, L, ...] -> [B, F, L/F, ...]"""
    return x.unflatten(1, (frames, -1))


def _some_rows(x: Tensor, axis: int) -> Iterator[slice]:
    """Slices of an axis, so small that intermediates stay in a CPU core's cache, or within 32 MiB elsewhere."""
    elements = 2**17 * torch.get_num_threads() if x.device.type == "cpu" else 2**23
    length = x.shape[axis]
    step = max(1, elements * length // max(1, x.numel()))
    for start in range(0, length, step):
        yield slice(start, start + step)


def _wide_copy(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide, copy=True, memory_format=torch.contiguous_format)


def _turn(x: Tensor, rope: Tensor | None, rows: slice, *, back: bool = False) -> Tensor:
    """Turn channel pairs of float32 heads in place, forwards or backwards. x [B, rows, N, d]"""
    if rope is None:
        return x
    cos, sin = rope[:, rows]
    turn = torch.complex(cos, -sin if back else sin)  # [rows, 1, d/2]
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)
    return x
