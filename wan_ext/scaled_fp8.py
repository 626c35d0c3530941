"""ComfyUI's 8-bit weights with scales, in both generations of the format.

    number = e4m3 value * scale          (scale: one per tensor, per row, or per block of a row)

First generation: `X.weight`, `X.scale_weight`, for activations `X.scale_input`, and one tensor `scaled_fp8` of 0 or 2
elements as a marker. Second: `X.weight`, `X.weight_scale`, `X.input_scale`, and for each layer its format: as JSON in
the bytes of a tensor `X.comfy_quant`, or for all layers in the file's metadata under `_quantization_metadata`.

The scales of activations serve 8-bit matrix products; weights are the same without them. Formats that store something
else under the same names (4-bit, rotated weights) are refused: read as fp8 they would be noise.

Source: ComfyUI `comfy/utils.py` (convert_old_quants) and QUANTIZATION.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from core.errors import InputError
from wan_ext.checkpoint_files import Checkpoint, bare_name

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FORMATS = ("float8_e4m3fn", "float8_e5m2")
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"
SCALES = (".scale_weight", ".weight_scale")
NOTES = (".scale_input", ".input_scale", ".comfy_quant")


@dataclass(frozen=True, kw_only=True)
class Fp8Scales:
    """Which tensors of a checkpoint scale which, and which only describe."""

    scale_of: Mapping[str, str] = field(default_factory=dict)
    """From the name of an 8-bit weight to the name of its scale."""
    notes: frozenset[str] = frozenset()
    """Markers, format descriptions and scales of activations: understood, not needed."""

    @property
    def consumed(self) -> set[str]:
        return {*self.scale_of.values(), *self.notes}


def find_fp8_scales(checkpoint: Checkpoint) -> Fp8Scales:
    """Pair the 8-bit weights of a checkpoint with their scales.

    A scale whose weight is absent or not 8-bit is in neither list, so that it is reported as not consumed.

    Raises:
        InputError: a layer is stored in a format other than scaled fp8.
    """
    scale_of: dict[str, str] = {}
    notes = {MARKER} if MARKER in checkpoint else set()
    described = _layers_in_metadata(checkpoint)
    for layer, description in described.items():
        _require_fp8(checkpoint, layer, description)
    for name in checkpoint.names():
        layer = name.rpartition(".")[0]
        weight = f"{layer}.weight"
        is_fp8 = weight in checkpoint and checkpoint.dtype(weight) in FP8_DTYPES
        if name.endswith(".comfy_quant"):
            _require_fp8(checkpoint, layer, _description(checkpoint, name))
        if is_fp8 and name.endswith(SCALES):
            _require_scale_fits(checkpoint, weight, name)
            scale_of[weight] = name
        elif is_fp8 and name.endswith(NOTES):
            notes.add(name)
    unscaled = [layer for layer in described if f"{layer}.weight" not in scale_of]
    if unscaled:
        raise InputError(
            f"{checkpoint.path}: {unscaled[0]}: the metadata says scaled fp8, but there is no weight_scale for it; "
            "the file is incomplete, download or convert it again"
        )
    return Fp8Scales(scale_of=scale_of, notes=frozenset(notes))


def dequantize_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """The numbers that 8-bit values and their scale stand for, in float32.

    Args:
        values: e4m3 or e5m2. [out, in], or any shape if the scale has one element
        scale: one element, [out], [out, 1], [out, blocks] or [out, blocks, 1].
    """
    numbers = values.float()
    if scale.numel() == 1:
        return numbers.mul_(scale.float().reshape(()))
    scale = _by_row(scale)  # [out, blocks]
    blocks = numbers.view(numbers.shape[0], scale.shape[1], -1)  # [out, blocks, in / blocks]
    return blocks.mul_(scale[..., None]).view_as(values)


def row_scales(scale: Tensor, num_rows: int) -> Tensor:
    """The same scales in the layout of `memory.quant`: as many for every row as the file has, at least one.

    Args:
        scale: as in `dequantize_fp8`.
        num_rows: of the weight.

    Returns:
        float32 [out, 1] or [out, blocks]
    """
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).repeat(num_rows, 1)
    return _by_row(scale)


def require_numbers(values: Tensor, *, where: str) -> None:
    """Refuse the NaN codes of e4m3 (all seven bits set), which the 8-bit linear would take for a number.

    Raises:
        InputError: there is one.
    """
    if bool((values.view(torch.int8) & 0x7F).eq_(0x7F).any()):
        raise InputError(f"{where}: expected finite weights, found NaN; download the file again")


def _by_row(scale: Tensor) -> Tensor:
    """float32 [out, blocks] from [out], [out, blocks] or [out, blocks, 1]."""
    return scale.float().reshape(scale.shape[0], -1)


def _layers_in_metadata(checkpoint: Checkpoint) -> Mapping[str, Mapping]:
    text = checkpoint.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        return {bare_name(layer): dict(what) for layer, what in json.loads(text)["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{checkpoint.path}: its metadata {METADATA} cannot be read; convert the file again") from None


def _require_scale_fits(checkpoint: Checkpoint, weight: str, scale: str) -> None:
    """One scale for the tensor, or the same number of them for every row."""
    shape, num_scales = checkpoint.shape(weight), prod(checkpoint.shape(scale))
    if num_scales == 1:
        return
    out, per_row = shape[0], prod(shape[1:])
    if checkpoint.shape(scale)[0] != out or num_scales % out or per_row % (num_scales // out):
        raise InputError(
            f"{checkpoint.path}: {scale}: expected one scale, or equally many for each of the {out} rows of {weight}, "
            f"found {list(checkpoint.shape(scale))}; use the bf16 or fp16 file of this model"
        )


def _description(checkpoint: Checkpoint, name: str) -> Mapping:
    try:
        return dict(json.loads(bytes(checkpoint.get(name).tolist()).decode()))
    except (ValueError, TypeError):
        raise InputError(f"{checkpoint.path}: {name}: expected JSON as bytes; convert the file again") from None


def _require_fp8(checkpoint: Checkpoint, layer: str, description: Mapping) -> None:
    found = description.get("format")
    if found not in FORMATS or description.get("convrot"):
        rotated = " with rotated weights" if description.get("convrot") else ""
        raise InputError(
            f"{checkpoint.path}: {layer} is stored as {found}{rotated}; expected {' or '.join(FORMATS)}. "
            "Use the bf16, fp16 or scaled fp8 file of this model"
        )
