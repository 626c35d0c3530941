"""A weight matrix as 8-bit values and scales, and back.

What: `quantize` turns a weight [out, in] into float8 e4m3 or int8 values and one scale for each run of inputs of a row:
64 of them (the row where the width is no multiple of 64), or the whole row. `dequantize` is the way back.

How: scale = largest magnitude of the run / largest 8-bit value (448 or 127), so that the largest weight lands on it.
Scales of 64 inputs are rounded to bfloat16: the product of an 8-bit value and such a scale (8 bits) has at most 16
bits, is rounded once, to the dtype asked for, and not at all in float32. Scales of rows stay float32. With a rotation,
what is quantised is the rotated weight (`memory.quant.rotation`).

Cost: 1 + 2/64 bytes a weight, or 1 + 4/in. Quantising holds float32 copies of a few rows at a time.

Exact: relative error of a Gaussian weight 2.5 % in e4m3 (its 3-bit mantissa), 0.6 % in int8 with 64 inputs a scale,
0.8 to 0.9 % with a row a scale, which a rotation keeps where a row has outliers (`docs/quantization.md`). Zero runs
stay zero. Quantising what was dequantised gives the same values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.errors import InputError
from memory import kernels
from memory.quant.recipes import RECIPES, QuantRecipe
from memory.quant.rotation import rotate, rotation_block

VALUE_DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST_VALUES = {"e4m3": 448.0, "int8": 127.0}
SCALE_DTYPES = {"block64": torch.bfloat16, "row": torch.float32}
SMALLEST_SCALE = 2.0**-126  # its reciprocal is still finite in float32


class QuantizedWeight(NamedTuple):
    """A weight as `values * scale`, the scale repeated along its run of inputs."""

    values: Tensor  # [out, in] float8_e4m3fn or int8
    scale: Tensor  # [out, number of runs] bfloat16 or float32


def runs_per_row(in_features: int, block_size: int = 64) -> int:
    """Number of scales of a row: one for every `block_size` inputs, or a single one where that does not divide."""
    return in_features // block_size if in_features % block_size == 0 else 1


def empty_weight(
    out_features: int, in_features: int, *, recipe: QuantRecipe, device: torch.device | str | None = None
) -> QuantizedWeight:
    """Values and scales of a recipe's shapes and dtypes, not filled.

    Args:
        out_features: rows.
        in_features: width of a row.
        recipe: what is kept.
        device: where; "meta" for shapes alone.
    """
    runs = runs_per_row(in_features) if recipe.scales == "block64" else 1
    values = torch.empty(out_features, in_features, dtype=VALUE_DTYPES[recipe.values], device=device)
    return QuantizedWeight(values, torch.empty(out_features, runs, dtype=SCALE_DTYPES[recipe.scales], device=device))


def rows_at_once(in_features: int, device: torch.device) -> int:
    """Rows whose float32 copy stays in a CPU core's cache (or in 64 MiB elsewhere)."""
    elements = 2**17 * torch.get_num_threads() if device.type == "cpu" else 2**24
    return max(1, elements // max(1, in_features))


@torch.no_grad()
def quantize(weight: Tensor, *, recipe: QuantRecipe = RECIPES["fp8"], name: str = "weight") -> QuantizedWeight:
    """Quantise a weight.

    Args:
        weight: [out, in], any float dtype, any device.
        recipe: which values and scales, and whether the weight is rotated first.
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
    values, scale = empty_weight(out_features, in_features, recipe=recipe, device=weight.device)
    if weight.numel() == 0 or weight.is_meta:
        return QuantizedWeight(values, scale)
    largest = LARGEST_VALUES[recipe.values]
    step = rows_at_once(in_features, weight.device)
    for start in range(0, out_features, step):
        rows = weight[start : start + step].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if recipe.rotate:
            rows = rotate(rows, rotation_block(in_features))
        rows = rows.view(rows.shape[0], scale.shape[1], -1)  # [rows, runs, inputs of a run]
        scale[start : start + step] = (rows.abs().amax(-1) / largest).clamp_(min=SMALLEST_SCALE)
        rows.mul_(scale[start : start + step].float().reciprocal().unsqueeze(-1))
        if recipe.values == "int8":
            rows.round_().clamp_(-largest, largest)
        values[start : start + step] = rows.view(rows.shape[0], in_features)
    if not bool(torch.isfinite(scale).all()):
        bad = int((~torch.isfinite(scale)).any(-1).nonzero()[0, 0])
        raise InputError(f"{name}: expected finite weights to quantise, found NaN or infinity in row {bad}")
    return QuantizedWeight(values, scale)


@torch.no_grad()
def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values * scale`, rounded once to `dtype`; a rotated weight stays rotated.

    Exact in float32 and float64 for scales of bfloat16; in bfloat16 and float16 then the nearest number to the exact
    product. A float32 scale rounds once more, to float32. The two NaN codes of e4m3 are not looked for (`quantize`
    never writes them).

    Args:
        values: [out, in] float8_e4m3fn or int8, contiguous.
        scale: [out or 1, runs], any float dtype; a run is in / runs inputs.
        dtype: of the result.

    Returns:
        The weight [out, in].
    """
    out_features, in_features = values.shape
    runs = scale.shape[1]
    if values.is_meta:
        return torch.empty(out_features, in_features, dtype=dtype, device="meta")
    if kernels.available(values.device) and dtype != torch.float64 and scale.shape[0] == out_features:
        from memory.kernels.dequantize import dequantize_runs

        return dequantize_runs(values, scale.contiguous(), dtype)
    if values.device.type != "cpu":
        wide = torch.promote_types(dtype, scale.dtype)
        if values.dtype == torch.int8:  # one kernel that reads int8 and writes `dtype`, with nothing in between
            weight = torch.empty(out_features, runs, in_features // runs, dtype=dtype, device=values.device)
            torch.mul(values.view(weight.shape), scale.to(wide).unsqueeze(-1), out=weight)
            return weight.view(out_features, in_features)
        weight = values.to(wide).view(out_features, runs, -1)
        return weight.mul_(scale.unsqueeze(-1)).view(out_features, in_features).to(dtype)
    weight = torch.empty(out_features, in_features, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # The CPU converts e4m3 one number at a time, but float16 in vectors: sign and the other 7 bits, moved to where
    # float16 has them, are value / 256.
    is_int8 = values.dtype == torch.int8
    scale = (scale.to(wide) * (1.0 if is_int8 else 256.0)).expand(out_features, runs).unsqueeze(-1)  # [out, runs, 1]
    step = rows_at_once(in_features, values.device)
    for start in range(0, out_features, step):
        if is_int8:
            rows = values[start : start + step].to(wide)
        else:
            bits = values[start : start + step].view(torch.int8).to(torch.int16)
            bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
            rows = bits.view(torch.float16).to(wide)
        runs_of_rows = rows.view(rows.shape[0], runs, -1)
        weight[start : start + step] = runs_of_rows.mul_(scale[start : start + step]).view(rows.shape)
    return weight
