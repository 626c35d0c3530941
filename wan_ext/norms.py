"""The two norms of Wan, computed in float32 and stingy with what they keep for backward.

What: torch's norms keep float32 copies of their input: of a bf16 query, and of the float32 residual stream. Here RMS
norm keeps its input as it came, layer norm keeps its normalised rows in the dtype of its result, both with one number
a row; backward computes from those.

Cost: in bf16, half the bytes of torch's layer norm and a third of its composite RMS norm; in float32, the same as
torch's. Backward of the layer norm sees its rows rounded to bf16, as every linear sees its input: the gradient's error
against float32 stays below diffusers', by three where there is no image branch (tests/wan_ext/test_dit_parity.py).

Exact: forward in any dtype; backward where the result is float32.

Shapes: B clips, L tokens, D width, over which rows are normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, keeping x and 1 / rms(x)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x))
        rrms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, rrms)
        return (wide * rrms).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, rrms = ctx.saved_tensors
        unit = x.to(_wide(x)) * rrms
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_unit = grad * weight
            along = (grad_unit * unit).mean(-1, keepdim=True)
            grad_x = grad_unit.sub_(unit.mul_(along)).mul_(rrms).to(x.dtype)
        return grad_x, grad_weight, None


class _LayerNorm(torch.autograd.Function):
    """(x - mean) / deviation * gain + shift in `dtype`, keeping the rows before the gain, in `dtype`."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows = x.unflatten(1, (gain.shape[1], -1))  # [B, 1|F, L/F, D]
        unit, _, rstd = torch.native_layer_norm(rows, rows.shape[-1:], None, None, eps)
        out = torch.addcmul(shift[:, :, None], unit, gain[:, :, None]).to(dtype)
        ctx.save_for_backward(unit.to(dtype), rstd, gain)
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        unit, rstd, gain = ctx.saved_tensors
        unit, grad = unit.to(rstd.dtype), grad.to(rstd.dtype).unflatten(1, unit.shape[1:3])
        grad_x = grad_gain = grad_shift = None  # autograd sums over what gain and shift were broadcast along
        if ctx.needs_input_grad[1]:
            grad_gain = (grad * unit).sum(2)
        if ctx.needs_input_grad[2]:
            grad_shift = grad.sum(2)
        if ctx.needs_input_grad[0]:
            grad_unit = grad * gain[:, :, None]
            mean = grad_unit.mean(-1, keepdim=True)
            along = (grad_unit * unit).mean(-1, keepdim=True)
            # unit may be the saved tensor itself, so nothing is written into it
            grad_x = grad_unit.sub_(mean).addcmul_(unit, along, value=-1).mul_(rstd).flatten(1, 2)
        return grad_x, grad_gain, grad_shift, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: any float dtype. [..., D]
        weight: [D]

    Returns:
        float32 (float64 for float64 x). [..., D]
    """
    return _RMSNorm.apply(x, weight, eps)


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of mean 0 and deviation 1, times gain, plus shift; each latent frame may have its own.

    Args:
        x: float32. [B, L, D]
        gain, shift: one row for all, for each clip, or for each clip and latent frame. [1|B, 1|F, D]
        eps: added to the variance.
        dtype: of the result.

    Returns:
        [B, L, D]
    """
    return _LayerNorm.apply(x, gain, shift, eps, dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight. The official model normalises queries and keys over all heads at once."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """`layer_norm` with a gain (weight) and shift (bias) of its own."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        gain, shift = (parameter.float()[None, None] for parameter in (self.weight, self.bias))  # [1, 1, D]
        return layer_norm(x, gain, shift, eps=self.eps, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ModulatedNorm(nn.Module):
    """`layer_norm` whose gain (1 + scale) and shift come from the timestep. It has no parameters."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B, L, D], shift and scale [B, 1|F, D] -> [B, L, D]"""
        return layer_norm(x, 1 + scale, shift, eps=self.eps, dtype=dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
