"""Rows of activations or gradients to 8 bits, each with its own scale, in one pass over memory.

What: `quantize_rows` finds the largest magnitude of a row, divides by 127 (int8) or 448 (e4m3) and rounds. Before that
it rotates blocks of the row (`memory.quant.rotation`: what a rotated weight asks of its input), or multiplies every
column by a factor (in dX = dY W, the scales of W's rows are factors of dY's columns).

How: one program a row, which stays in registers from load to store. The rotation is the Kronecker power of a 4 x 4
matrix, y = sum(x) / 2 - reversed(x): each stage turns four neighbours and moves their digit of the index to the front,
so that after the last stage every number is back in its place. 8 operations a number instead of the 512 of a product
with the whole matrix, and no rounding to bfloat16 between rotation and quantisation. e4m3 is made by integer
arithmetic on the bits, so that Ampere, which has no such conversion, can store it too.

Cost: reads the row once and writes half of it (from bfloat16); 4 bytes of scale a row.

Exact: both round half to even; without a rotation values and scales are those of the reference bit for bit (up to a
rounding of 1 / scale). A row with a NaN or an infinity gets a NaN for its scale, so that what is made of it shows it.

Shapes: M rows (tokens), K numbers a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory.kernels import launching_on
from memory.kernels.reference import LARGEST_VALUES, SMALLEST_SCALE

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONGEST_ROW = 2**15
"""64 numbers a thread at 16 warps; Wan's widest is 14,336."""
TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Adding it to a float32 below 2^22 leaves no room for a fraction: the sum is rounded, half to even."""
ROOT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def _rotated(x, BLOCK: tl.constexpr, ORDER: tl.constexpr, FOURS: tl.constexpr):
    """Multiply every ORDER = 4^FOURS or 2 * 4^FOURS neighbours of x [BLOCK] with the regular Hadamard matrix."""
    ORDERS: tl.constexpr = BLOCK // ORDER
    if ORDER > 4**FOURS:
        first, second = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
        x = tl.join((first + second) * ROOT_HALF, (first - second) * ROOT_HALF)
        x = tl.reshape(tl.permute(tl.reshape(x, [ORDERS, ORDER // 2, 2]), (0, 2, 1)), [BLOCK])
    for _ in tl.static_range(FOURS):
        even, odd = tl.split(tl.reshape(x, [BLOCK // 4, 2, 2]))  # the numbers 0 and 2, 1 and 3 of four
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        half = (x0 + x1 + x2 + x3) * 0.5
        x = tl.join(tl.join(half - x3, half - x1), tl.join(half - x2, half - x0))  # 0 and 2, 1 and 3 again
        x = tl.reshape(tl.permute(tl.reshape(x, [ORDERS, ORDER // 4, 4]), (0, 2, 1)), [BLOCK])
    return x


@triton.jit
def _e4m3_bits(x):
    """The nearest e4m3 number of each x of magnitude at most 448, half to even, as its 8 bits."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    # Normal: round to 3 bits of mantissa, which may carry into the exponent, and move its bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = ((size * 512.0 + TO_INTEGER) - TO_INTEGER).to(tl.int32)  # below 2^-6 the steps are 2^-9
    return tl.where(size < 2**-6, small, normal) | tl.where(x < 0, 0x80, 0)


@triton.jit
def _quantize_rows(
    x,
    columns,
    values,
    scales,
    k,
    stride,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    IS_E4M3: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
    FOURS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < k
    numbers = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        numbers = numbers * tl.load(columns + at, mask=inside, other=0.0)
    if ORDER > 1:
        numbers = _rotated(numbers, BLOCK, ORDER, FOURS)
    largest = tl.max(tl.abs(numbers), axis=0)
    poison = tl.sum(numbers * 0.0, axis=0)  # 0, or NaN where the row is not finite: a maximum passes NaN by
    scale = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST) + poison
    steps = numbers * tl.div_rn(1.0, scale)
    steps = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    if IS_E4M3:
        tl.store(values + row * k + at, _e4m3_bits(steps).to(tl.uint8), mask=inside)
    else:
        tl.store(values + row * k + at, ((steps + TO_INTEGER) - TO_INTEGER).to(tl.int8), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(
    x: Tensor,
    rotate: int | None = None,
    *,
    columns: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """Round every row to 8-bit values times a scale of its own.

    Args:
        x: bfloat16, float16 or float32; neighbouring numbers of a row lie together. [M, K], K up to 32,768
        rotate: order of the rotation, a power of two that divides K, as from `rotation_block`; None or 1: none.
        columns: float32, contiguous, multiplied into every row first; not together with a rotation. [K]
        dtype: int8 or float8_e4m3fn.

    Returns:
        values [M, K] of `dtype`, contiguous, and scale, float32 [M]: x is about values * scale[:, None].

    Raises:
        ValueError: dtypes, shapes or strides other than these.
    """
    order = 1 if rotate is None else rotate
    _check(x, order, columns, dtype)
    m, k = x.shape
    values = torch.empty(m, k, dtype=dtype, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    if m == 0:
        return values, scales
    is_e4m3 = dtype == torch.float8_e4m3fn
    block = triton.next_power_of_2(k)
    with launching_on(x):
        _quantize_rows[(m,)](
            x,
            columns,
            values.view(torch.uint8) if is_e4m3 else values,
            scales,
            k,
            x.stride(0),
            LARGEST=LARGEST_VALUES[dtype],
            SMALLEST=SMALLEST_SCALE,
            IS_E4M3=is_e4m3,
            HAS_COLUMNS=columns is not None,
            BLOCK=block,
            ORDER=order,
            FOURS=(order.bit_length() - 1) // 2,
            num_warps=min(16, max(1, block // 512)),
        )
    return values, scales


def _check(x: Tensor, order: int, columns: Tensor | None, dtype: torch.dtype) -> None:
    if x.dtype not in DTYPES or x.ndim != 2 or x.stride(1) != 1 or not 1 <= x.shape[1] <= LONGEST_ROW:
        raise ValueError(
            f"quantize_rows: expected x [M, K <= {LONGEST_ROW}] in bfloat16, float16 or float32 with rows of "
            f"neighbouring numbers, found {x.dtype} {list(x.shape)} of strides {list(x.stride())}"
        )
    if dtype not in LARGEST_VALUES:
        raise ValueError(f"quantize_rows: expected int8 or float8_e4m3fn to round to, found {dtype}")
    if order < 1 or order & (order - 1) or x.shape[1] % order:
        raise ValueError(f"quantize_rows: expected a power of two that divides {x.shape[1]} to rotate, found {order}")
    if columns is None:
        return
    if order > 1:
        raise ValueError("quantize_rows: expected either a rotation or factors of columns, found both")
    if columns.dtype != torch.float32 or columns.shape != x.shape[1:] or not columns.is_contiguous():
        raise ValueError(
            f"quantize_rows: expected columns float32 [{x.shape[1]}], contiguous, "
            f"found {columns.dtype} {list(columns.shape)}"
        )
