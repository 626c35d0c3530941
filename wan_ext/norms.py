"""The two norms of Wan, computed in float32 and stingy with what they keep for backward.

torch's composite RMSNorm of a bf16 input keeps float32 copies of it. `rms_norm` keeps the bf16 input, which is a
quarter of the bytes, and one number a token; backward recomputes the rest. `layer_norm` reads the float32 residual
stream, which is alive anyway, so torch's own is as lean as it gets.

Shapes: [..., D], normalised over the last axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, saving x in its own dtype and 1 / rms(x)."""

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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Args:
        x: any float dtype. [..., D]
        weight: [D]

    Returns:
        float32 (float64 for float64 x). [..., D]
    """
    return _RMSNorm.apply(x, weight, eps)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm in float32 whatever the dtype of x and of the weights. [..., D]"""
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


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


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that computes and returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.eps, self.weight, self.bias)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
