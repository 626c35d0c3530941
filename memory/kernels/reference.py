"""What the 8-bit kernels compute, in plain PyTorch: for the tests, and for devices that have no kernels.

How: products of int8 numbers are summed in float64, where sums of integers below 2^53 are exact, so the sum is the very
one of int32 (127^2 * K stays below 2^31 for K up to 133,000).

Cost: float64 copies of both factors; float32 copies of what is rounded.

Exact: `int8_matmul_reference` and `dequantize_runs_reference` round once a scale and once to the result's dtype.
`quantize_rows_reference` rounds half to even; with a rotation the kernel sums in another order, so that a number near
the middle of two steps may fall to either.

Shapes: M rows (tokens), K inputs, N outputs.
"""

import torch
from torch import Tensor

from memory.quant.rotation import rotate as rotate_blocks

LARGEST_VALUES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = 2.0**-126  # its reciprocal is still finite in float32


def int8_matmul_reference(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor | None,
    *,
    layout: str = "tn",
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See `memory.kernels.int8.int8_matmul`."""
    product = a.double() @ (b.double().T if layout == "tn" else b.double())
    out = product.float() * scale_a[:, None]
    if scale_b is not None:
        out = out * scale_b
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)


def quantize_rows_reference(
    x: Tensor,
    rotate: int | None = None,
    *,
    columns: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """See `memory.kernels.rows.quantize_rows`."""
    if rotate is not None and columns is not None:
        raise ValueError("expected either a rotation or factors of columns, found both")
    wide = x.float()
    if columns is not None:
        wide = wide * columns
    if rotate is not None:
        wide = rotate_blocks(wide, rotate)
    largest = LARGEST_VALUES[dtype]
    poison = (wide * 0).sum(-1)  # 0, or NaN where the row is not finite
    scale = (wide.abs().amax(-1) / largest).clamp_(min=SMALLEST_SCALE) + poison
    steps = (wide * scale.reciprocal()[:, None]).clamp_(-largest, largest)
    return (steps.round_() if dtype == torch.int8 else steps).to(dtype), scale


def dequantize_runs_reference(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `memory.kernels.dequantize.dequantize_runs`."""
    runs = values.float().unflatten(-1, (scale.shape[1], -1)) * scale.float()[..., None]
    return runs.flatten(-2).to(dtype)
