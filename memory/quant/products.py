"""Products of 8-bit matrices: what `w8a8` computes with.

What: `quantize_rows` rounds activations to 8 bits with one float32 scale a row; `scaled_product` multiplies two 8-bit
matrices and applies the scales of both.

How: int8 products are sums in int32, by `torch._int_mm` or the Triton kernel of `memory.kernels` (whose epilogue
writes the result at once); e4m3 products are `torch._scaled_mm` with a scale a row. On CUDA both want more than 16
rows, sizes that are multiples of 8 (16 for e4m3) and a second matrix whose rows are contiguous along the sum ("TN");
that is brought about here, on every device alike: matrices are padded with zeros where they fall short, and a second
matrix in the other layout is transposed for the call. The Triton kernel takes any size and both layouts, and is used
where it runs. The CPU runs the same two functions of torch.

Cost: two operations a multiplication at the rate of 8-bit tensor cores. Activations: 1 byte a number beside the
original. Without the Triton kernel sums of as many rows as fill 128 MiB, in int32 and in float32, and a transposed copy
where one is made (1 byte a weight, read and written once).

Exact: int8 sums are exact (widths up to 133,144), then rounded to float32, multiplied by the two scales, and rounded
to the dtype asked for. e4m3 products are exact, their sums those of the device: float32 on the CPU, the tensor cores'
own on CUDA (fast accumulation).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.errors import InputError
from memory import kernels
from memory.quant.recipes import QuantRecipe
from memory.quant.rotation import rotate
from memory.quant.weights import LARGEST_VALUES, SMALLEST_SCALE, VALUE_DTYPES, rows_at_once

WIDEST_INT8 = 2**31 // 127**2  # numbers whose products still sum up in int32
LEAST_ROWS = 17  # of torch._int_mm on CUDA
MULTIPLES = {torch.int8: 8, torch.float8_e4m3fn: 16}  # what both sizes of a second matrix have to be multiples of
INT32_ELEMENTS = 2**25  # of the transient sums: 128 MiB
LEAST_CAPABILITY = {"int8": (8, 0), "e4m3": (8, 9)}


class QuantizedRows(NamedTuple):
    """Activations as `values * scale`."""

    values: Tensor  # [M, K] int8 or float8_e4m3fn
    scale: Tensor  # [M] float32


@cache
def require_device(recipe: QuantRecipe, device: torch.device) -> None:
    """Refuse a device that cannot multiply as a recipe asks.

    Args:
        recipe: with compute "dequant" every device will do.
        device: where the layer computes.

    Raises:
        InputError: neither CPU nor CUDA, or a CUDA device without tensor cores for these numbers.
    """
    if recipe.compute == "dequant" or device.type in ("cpu", "meta"):
        return
    needed = LEAST_CAPABILITY[recipe.values]
    instead = "take 'int8_w8a8', or a recipe without w8a8" if recipe.values == "e4m3" else "take 'int8_rotated'"
    if device.type != "cuda":
        raise InputError(
            f"quantisation: expected a CUDA device (or the CPU) for products of {recipe.values}, found {device.type}; "
            f"{'take a recipe without w8a8' if recipe.values == 'e4m3' else instead}"
        )
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        raise InputError(
            f"quantisation: expected a GPU of compute capability {needed[0]}.{needed[1]} or more for products of "
            f"{recipe.values}, found {torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}; {instead}"
        )


def quantize_rows(
    x: Tensor, *, recipe: QuantRecipe, block: int = 1, column_scale: Tensor | None = None
) -> QuantizedRows:
    """Round the rows of activations to 8 bits, each with its own scale: its largest magnitude / 448 or 127.

    Args:
        x: [M, K], any float dtype.
        recipe: which values.
        block: rotate `x` first, blocks of that order; 1: no rotation.
        column_scale: [K] float32, multiplied into `x` first.

    Returns:
        Values and scales, on the device of `x`. A row with a NaN or an infinity has a NaN for its scale.
    """
    dtype, largest = VALUE_DTYPES[recipe.values], LARGEST_VALUES[recipe.values]
    if kernels.available(x.device) and x.dtype != torch.float64:
        from memory.kernels import rows as row_kernels

        if x.shape[1] <= row_kernels.LONGEST_ROW:
            x = x if x.stride(1) == 1 else x.contiguous()
            return QuantizedRows(*row_kernels.quantize_rows(x, block, columns=column_scale, dtype=dtype))
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.is_meta:
        return QuantizedRows(values, scale)
    step = rows_at_once(x.shape[1], x.device)
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step].to(torch.float32)
        if column_scale is not None:
            rows = rows * column_scale
        rows = rotate(rows, block)
        poison = (rows * 0).sum(-1)  # 0, or NaN where the row is not finite
        scales = (rows.abs().amax(-1) / largest).clamp_(min=SMALLEST_SCALE) + poison
        rows = rows * scales.reciprocal().unsqueeze(-1)
        if recipe.values == "int8":
            rows.round_().clamp_(-largest, largest)
        values[start : start + step] = rows
        scale[start : start + step] = scales
    return QuantizedRows(values, scale)


def scaled_product(
    rows: QuantizedRows, weight: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return (values @ weight.T) * row scales * weight scales + bias.

    Args:
        rows: [M, K] 8-bit values and [M] scales.
        weight: [N, K] of the same 8-bit dtype; fastest with contiguous rows, any other layout is right too.
        scale: [N] float32; None: ones.
        bias: [N], or None.
        dtype: of the result.

    Returns:
        [M, N].
    """
    if weight.is_meta:
        return torch.empty(rows.values.shape[0], weight.shape[0], dtype=dtype, device="meta")
    if rows.values.dtype == torch.int8:
        if rows.values.shape[1] > WIDEST_INT8:
            raise InputError(
                f"quantisation: expected at most {WIDEST_INT8} numbers to sum in int8, found {rows.values.shape[1]}"
            )
        if kernels.available(weight.device):
            return _int8_product_by_triton(rows, weight, scale, bias, dtype)
        return _int8_product(rows, weight, scale, bias, dtype)
    return _e4m3_product(rows, weight, scale, bias, dtype)


def _int8_product(
    rows: QuantizedRows, weight: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    num_rows, num_columns = rows.values.shape[0], weight.shape[0]
    values, weight = _padded(rows.values, weight)
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=weight.device)
    step = max(LEAST_ROWS, INT32_ELEMENTS // max(1, num_columns))
    starts = range(0, num_rows, step)
    for start in starts:
        chunk = values[start : start + step] if len(starts) > 1 else values
        if chunk.shape[0] < LEAST_ROWS:  # the last few rows
            chunk = F.pad(chunk, (0, 0, 0, LEAST_ROWS - chunk.shape[0]))
        end = min(num_rows, start + step)
        sums = torch._int_mm(chunk, weight.T)[: end - start, :num_columns].float()  # [rows, N]
        sums.mul_(rows.scale[start:end].unsqueeze(-1))
        if scale is not None:
            sums.mul_(scale)
        if bias is not None:
            sums.add_(bias)
        out[start:end] = sums
    return out


def _int8_product_by_triton(
    rows: QuantizedRows, weight: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same in one kernel, which writes no int32 sums and reads a transposed weight as it lies."""
    from memory.kernels.int8 import int8_matmul

    is_transposed = weight.T.is_contiguous() and not weight.is_contiguous()
    matrix, layout = (weight.T, "nn") if is_transposed else (weight.contiguous(), "tn")
    narrow = torch.float32 if dtype == torch.float64 else dtype
    out = int8_matmul(rows.values, matrix, rows.scale, scale, layout=layout, bias=bias, dtype=narrow)
    return out.to(dtype)


def _e4m3_product(
    rows: QuantizedRows, weight: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    num_rows, num_columns = rows.values.shape[0], weight.shape[0]
    values, weight = _padded(rows.values, weight)
    row_scale = F.pad(rows.scale, (0, values.shape[0] - num_rows)).unsqueeze(-1)  # [M, 1]
    if scale is None:
        scale = torch.ones(num_columns, dtype=torch.float32, device=weight.device)
    column_scale = F.pad(scale, (0, weight.shape[0] - num_columns)).unsqueeze(0)  # [1, N]
    out = torch._scaled_mm(
        values,
        weight.T,
        scale_a=row_scale,
        scale_b=column_scale,
        out_dtype=torch.bfloat16,  # the one that every device has for scales of rows
        use_fast_accum=True,
    )
    if out.shape != (num_rows, num_columns):
        out = out[:num_rows, :num_columns].clone()  # no view: what a custom function returns may be added to in place
    out = out.to(dtype)
    return out if bias is None else out.add_(bias)


def _padded(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices in the layout and sizes that CUDA's 8-bit products take, by zeros and copies where they are not."""
    multiple = MULTIPLES[values.dtype]
    more_rows = max(0, LEAST_ROWS - values.shape[0])
    more_width, more_columns = -values.shape[1] % multiple, -weight.shape[0] % multiple
    if more_rows or more_width:
        values = _pad(values, (0, more_width, 0, more_rows))
    if more_width or more_columns:
        weight = _pad(weight, (0, more_width, 0, more_columns))
    return values.contiguous(), weight.contiguous()


def _pad(matrix: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    return F.pad(matrix.view(torch.int8), sizes).view(matrix.dtype)
