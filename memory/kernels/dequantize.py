"""A weight of 8-bit values and scales back to bfloat16, float16 or float32, in one pass over memory.

What: `dequantize_runs` returns values * scale for e4m3 or int8 values [out, in] with one scale for each run of inputs.

How: one program for up to 4,096 numbers of a row. e4m3 is read by its bits: sign and the other 7, moved to where
float16 has them, are the value / 256. That is exact, and works on Ampere, which cannot convert e4m3.

Cost: reads 1 byte a weight (and the scales), writes the result; no float32 copy, which PyTorch's own
`values.to(float32) * scale` makes (1.4 GB for a block of Wan 14B).

Exact: the product is rounded once, to `dtype` (a float32 scale rounds once more, to float32). The two NaN codes of e4m3
are not looked for: quantising never writes them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory.kernels import launching_on

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_DTYPES = (torch.bfloat16, torch.float32)
LARGEST_BLOCK = 4096


@triton.jit
def _dequantize_runs(
    values,
    scale,
    out,
    k,
    runs,
    RUN: tl.constexpr,
    IS_E4M3: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < k
    if IS_E4M3:
        bits = tl.load(values + row * k + at, mask=inside, other=0).to(tl.int16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        numbers = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        numbers = tl.load(values + row * k + at, mask=inside, other=0).to(tl.float32)
    steps = tl.load(scale + row * runs + at // RUN, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * k + at, (numbers * steps).to(out.dtype.element_ty), mask=inside)


def dequantize_runs(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values * scale`, rounded once to `dtype`.

    Args:
        values: float8_e4m3fn or int8, contiguous. [out, in]
        scale: bfloat16 or float32, contiguous; a run is in / runs neighbouring inputs. [out, runs]
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        [out, in]

    Raises:
        ValueError: dtypes, shapes or strides other than these.
    """
    if values.dtype not in (torch.int8, torch.float8_e4m3fn) or values.ndim != 2 or not values.is_contiguous():
        raise ValueError(
            f"dequantize_runs: expected values int8 or float8_e4m3fn, a contiguous matrix, "
            f"found {values.dtype} {list(values.shape)}"
        )
    out_features, in_features = values.shape
    fits = scale.ndim == 2 and scale.shape[0] == out_features and scale.shape[1] > 0
    if scale.dtype not in SCALE_DTYPES or not fits or in_features % scale.shape[1] or not scale.is_contiguous():
        raise ValueError(
            f"dequantize_runs: expected scale bfloat16 or float32 [{out_features}, a divisor of {in_features}], "
            f"contiguous, found {scale.dtype} {list(scale.shape)}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dequantize_runs: expected a result of bfloat16, float16 or float32, found {dtype}")
    out = torch.empty(out_features, in_features, dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    is_e4m3 = values.dtype == torch.float8_e4m3fn
    block = min(LARGEST_BLOCK, triton.next_power_of_2(in_features))
    with launching_on(values):
        _dequantize_runs[(out_features, triton.cdiv(in_features, block))](
            values.view(torch.uint8) if is_e4m3 else values,
            scale,
            out,
            in_features,
            scale.shape[1],
            RUN=in_features // scale.shape[1],
            IS_E4M3=is_e4m3,
            BLOCK=block,
            num_warps=min(8, max(1, block // 512)),
        )
    return out
