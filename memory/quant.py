"""Frozen linear weights in 8 bits.

What: `quantize` turns a weight [out, in] into float8 e4m3 values and one scale for each run of 64 inputs of a row (for
each row where the width is no multiple of 64). `QuantLinear` is a frozen linear layer on top of that.

How: scale = largest magnitude of the run / 448, rounded to bfloat16, so that the largest value lands on the largest
e4m3 number. The product of an e4m3 value (4 significant bits) and such a scale (8 bits) has 12 bits: it is rounded
once, to the dtype asked for, and not at all in float32. `QuantLinear` multiplies in the dtype of its activations with a
weight that exists only during the call; what autograd keeps for backward are references to the 8-bit values and the
scales, from which backward makes the weight again.

Cost: 1 + 2/64 bytes a weight (a block of Wan 14B: 351 M weights, 0.36 GB instead of 0.70 GB in bfloat16); one transient
copy of one layer's weight in the activation dtype, in forward and again in backward. Quantising holds float32 copies of
a few rows at a time.

Exact: relative error of a Gaussian weight 2.5 % (the 3-bit mantissa; the scale adds nothing). Output and input gradient
are bit for bit those of `F.linear` with the dequantised weight (for an input that is not contiguous, PyTorch may sum in
another order there). Zero runs stay zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from core.errors import InputError

VALUE_DTYPE = torch.float8_e4m3fn
SCALE_DTYPE = torch.bfloat16
LARGEST_VALUE = 448.0  # of e4m3
SMALLEST_SCALE = 2.0**-126  # its reciprocal is still finite in float32


class QuantizedWeight(NamedTuple):
    """A weight as `values * scale`, the scale repeated along its run of inputs."""

    values: Tensor  # [out, in] float8_e4m3fn
    scale: Tensor  # [out, number of runs] bfloat16


def runs_per_row(in_features: int, block_size: int = 64) -> int:
    """Number of scales of a row: one for every `block_size` inputs, or a single one where that does not divide."""
    return in_features // block_size if in_features % block_size == 0 else 1


def _rows_at_once(in_features: int, device: torch.device) -> int:
    """Rows whose float32 copy stays in a CPU core's cache (or in 64 MiB elsewhere)."""
    elements = 2**17 * torch.get_num_threads() if device.type == "cpu" else 2**24
    return max(1, elements // max(1, in_features))


@torch.no_grad()
def quantize(weight: Tensor, *, block_size: int = 64, name: str = "weight") -> QuantizedWeight:
    """Quantise a weight to e4m3 with block-wise scales.

    Args:
        weight: [out, in], any float dtype, any device.
        block_size: inputs that share a scale.
        name: how an error calls the weight.

    Returns:
        Values and scales on the weight's device.

    Raises:
        InputError: the weight is no matrix, or holds NaN or infinity.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(
            f"{name}: expected a float matrix [out, in] to quantise, found {weight.dtype} {list(weight.shape)}"
        )
    out_features, in_features = weight.shape
    runs = runs_per_row(in_features, block_size)
    values = torch.empty(out_features, in_features, dtype=VALUE_DTYPE, device=weight.device)
    scale = torch.empty(out_features, runs, dtype=SCALE_DTYPE, device=weight.device)
    if weight.numel() == 0 or weight.is_meta:
        return QuantizedWeight(values, scale)
    step = _rows_at_once(in_features, weight.device)
    for start in range(0, out_features, step):
        rows = weight[start : start + step].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rows = rows.view(rows.shape[0], runs, -1)  # [rows, runs, inputs of a run]
        scale[start : start + step] = (rows.abs().amax(-1) / LARGEST_VALUE).clamp_(min=SMALLEST_SCALE)
        rows.mul_(scale[start : start + step].float().reciprocal_().unsqueeze(-1))
        values[start : start + step] = rows.view(rows.shape[0], in_features)
    if not bool(torch.isfinite(scale).all()):
        bad = int((~torch.isfinite(scale)).any(-1).nonzero()[0, 0])
        raise InputError(f"{name}: expected finite weights to quantise, found NaN or infinity in row {bad}")
    return QuantizedWeight(values, scale)


@torch.no_grad()
def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values * scale`, rounded once to `dtype`.

    Exact in float32 and float64 for scales of bfloat16; in bfloat16 and float16 then the nearest number to the exact
    product. A float32 scale rounds once more, to float32. The two NaN codes of e4m3 are not looked for (`quantize`
    never writes them).

    Args:
        values: [out, in] float8_e4m3fn, contiguous.
        scale: [out or 1, runs], any float dtype; a run is in / runs inputs.
        dtype: of the result.

    Returns:
        The weight [out, in].
    """
    out_features, in_features = values.shape
    runs = scale.shape[1]
    if values.device.type != "cpu":
        weight = values.to(torch.promote_types(dtype, scale.dtype)).view(out_features, runs, -1)
        return weight.mul_(scale.unsqueeze(-1)).view(out_features, in_features).to(dtype)
    # The CPU converts e4m3 one number at a time, but float16 in vectors: sign and the other 7 bits, moved to where
    # float16 has them, are value / 256.
    weight = torch.empty(out_features, in_features, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = (scale.to(wide) * 256.0).expand(out_features, runs).unsqueeze(-1)  # [out, runs, 1]
    step = _rows_at_once(in_features, values.device)
    for start in range(0, out_features, step):
        bits = values[start : start + step].view(torch.int8).to(torch.int16)
        bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
        rows = bits.view(torch.float16).to(wide).view(bits.shape[0], runs, -1)
        weight[start : start + step] = rows.mul_(scale[start : start + step]).view(bits.shape)
    return weight


class _QuantLinear(torch.autograd.Function):
    """`F.linear` with a weight that is made from 8 bits in forward and again in backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, scale)
        return F.linear(x, dequantize(values, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        values, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_x, _, _, needs_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if needs_x:
            grad_x = (flat @ dequantize(values, scale, grad.dtype)).view(*grad.shape[:-1], values.shape[1])
        return grad_x, None, None, flat.sum(0) if needs_bias else None


class QuantLinear(nn.Module):
    """A linear layer with a frozen 8-bit weight; it computes in the dtype of its input.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        block_size: inputs that share a scale.
        device: "meta" builds it without memory, for `load_state_dict(assign=True)`.
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        runs = runs_per_row(in_features, block_size)
        values = torch.empty(out_features, in_features, dtype=VALUE_DTYPE, device=device)
        scale = torch.empty(out_features, runs, dtype=SCALE_DTYPE, device=device)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        bias_values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if bias_values is None else nn.Parameter(bias_values, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, block_size: int = 64, name: str = "weight") -> "QuantLinear":
        """Quantise a linear layer; the bias is shared with it, not copied.

        Args:
            linear: stays as it is.
            block_size: inputs that share a scale.
            name: how an error calls the weight.

        Returns:
            The frozen layer, on the same device.

        Raises:
            InputError: the weight holds NaN or infinity.
        """
        quantized = quantize(linear.weight, block_size=block_size, name=name)
        layer = cls(linear.in_features, linear.out_features, bias=False, block_size=block_size, device="meta")
        layer.weight = nn.Parameter(quantized.values, requires_grad=False)
        layer.weight_scale = nn.Parameter(quantized.scale, requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias.

        Args:
            x: [..., in_features], float32, bfloat16, float16 or float64.

        Returns:
            [..., out_features] in the dtype of `x` (of autocast inside it).
        """
        device_type = x.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _QuantLinear.apply(x, self.weight, self.weight_scale, bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out_features, in_features] as the layer uses it for inputs of `dtype`."""
        return dequantize(self.weight, self.weight_scale, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Let `.to()` and its like move the layer but never change a dtype: rounding the parts means nothing."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"e4m3, {self.weight_scale.shape[1]} scales a row"
        )
