"""For other tools: a base model with the camera adapter in it, and the LoRA under ComfyUI's and diffusers' names.

ComfyUI finds a camera only among the tensors of the base model (`control_adapter.conv.weight`), and only in two shapes:
36 input channels without an image branch (Wan2.2), or 32 with one (Wan2.1). So the adapter is written into a copy of
the base. A text-to-video base of 16 channels gets 20 more whose weights are zero: it is then taken for the Wan2.2 kind,
and computes what it did, whatever is put into them.

A copy goes through memory one tensor at a time: 28 GB need as much disk and 0.3 GB of memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from core.errors import InputError
from core.files import atomic_path
from networks.lora_names import diffusers_lora_key, parse_lora_key
from wan_ext.checkpoint_files import Checkpoint, bare_name, open_checkpoint
from wan_ext.configs import DiTConfig, WanVariant
from wan_ext.control_adapter import PREFIX as ADAPTER_PREFIX
from wan_ext.control_adapter import ControlAdapter
from wan_ext.dit import WanDiT
from wan_ext.loading import DiTShape, names_of
from wan_ext.quantized_files import refuse_quantized
from wan_ext.tensor_files import SAFETENSORS_DTYPES

PATCHES = "patch_embedding.weight"
WAN22_CAMERA_CHANNELS, WAN21_CAMERA_CHANNELS = 36, 32
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written: what the header says of it, and where its values come from."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def comfyui_channels(config: DiTConfig) -> int:
    """How many input channels ComfyUI needs to see in a base to take it for a camera model.

    Raises:
        InputError: no number of channels makes it one.

    Source: ComfyUI, `comfy/model_detection.py` and `comfy/supported_models.py` (WAN21_Camera, WAN22_Camera).
    """
    has_image, latents = config.image_dim is not None, config.out_dim
    if latents == 16 and not has_image and config.in_dim in (latents, WAN22_CAMERA_CHANNELS):
        return WAN22_CAMERA_CHANNELS
    if latents == 16 and has_image and config.in_dim == WAN21_CAMERA_CHANNELS:
        return WAN21_CAMERA_CHANNELS
    raise InputError(
        f"expected a base that ComfyUI takes for a camera model (16 or 36 input channels without image branch, or 32 "
        f"with one), found {config.in_dim}{' with image branch' if has_image else ''}; export the LoRA alone with "
        f"--lora_only"
    )


def check_exportable(metadata: Mapping[str, str], camera: Mapping[str, Tensor]) -> None:
    """Refuse a camera that only this trainer understands. Raises InputError."""
    injection = metadata.get("injection")
    if injection not in (None, "plucker"):
        raise InputError(
            f"injection {injection}: expected plucker, the only mechanism that ComfyUI knows, found one that only this "
            f"trainer's generate.py can run; export the LoRA without camera with --lora_only"
        )
    if not any(name.startswith(ADAPTER_PREFIX) for name in camera):
        raise InputError(
            "expected a trained camera adapter, found none; the base model is used as it is, so export the LoRA alone "
            "with --lora_only"
        )


def merge_adapter(
    base: Path | str, adapter: Mapping[str, Tensor], output: Path, *, variant: WanVariant, metadata: Mapping[str, str]
) -> None:
    """Write a copy of a base model with a camera adapter in it.

    Args:
        base: the expert that the adapter was trained on: a file of any layout and precision, or a folder of shards.
        adapter: control_adapter.* tensors; those of the base are replaced.
        output: the file to write; it appears whole or not at all.
        variant: what the base must hold.
        metadata: of the written file.

    Raises:
        InputError: another base, an adapter that does not fit it, or one that ComfyUI cannot hold.
    """
    checkpoint = open_checkpoint(base)
    refuse_quantized(checkpoint, "to put the adapter into")
    found, expected = DiTShape.of_checkpoint(checkpoint), DiTShape.of_config(variant.dit)
    if found != expected:
        raise InputError(
            f"{checkpoint.path}: expected the base of {variant.name} ({expected}), found {found}; give the model that "
            f"the network was trained on"
        )
    for name, shape in adapter_shapes(variant).items():
        if name not in adapter or tuple(adapter[name].shape) != shape:
            have = [*adapter[name].shape] if name in adapter else "nothing"
            raise InputError(f"{name}: expected {[*shape]} for {variant.name}, found {have}")
    entries = dict(merged_entries(checkpoint, adapter, comfyui_channels(variant.dit), variant))
    write_streaming(entries, output, {**checkpoint.metadata, **metadata})  # a base's may describe its 8-bit weights


def merged_entries(
    checkpoint: Checkpoint, adapter: Mapping[str, Tensor], channels: int, variant: WanVariant
) -> Iterator[tuple[str, Entry]]:
    """The tensors of the written file: native names with the base's prefix, in its order, the adapter last."""
    name_in_file = names_of(checkpoint)
    prefix = common_prefix(checkpoint)
    native = {name_in_file(name): name for name in _native_names(variant)}
    for stored in sorted(checkpoint.names(), key=checkpoint.position):
        name = native.get(stored, stored)  # scales of 8-bit weights keep their names
        if name.startswith(ADAPTER_PREFIX):
            continue
        shape, read = checkpoint.shape(stored), _reader(checkpoint, stored)
        if name == PATCHES and shape[1] < channels:
            missing = channels - shape[1]
            shape, read = (shape[0], channels, *shape[2:]), _padded(read, missing)
        yield prefix + name, Entry(dtype=checkpoint.dtype(stored), shape=tuple(shape), read=read)
    dtype = checkpoint.dtype(name_in_file(PATCHES))
    dtype = dtype if dtype.itemsize > 1 else torch.bfloat16
    for name in adapter_shapes(variant):
        yield prefix + name, Entry(dtype=dtype, shape=tuple(adapter[name].shape), read=_cast(adapter[name], dtype))


def common_prefix(checkpoint: Checkpoint) -> str:
    """What stands before every name in the files of a checkpoint: nothing, or a prefix of ComfyUI."""
    stored = next(iter(checkpoint.files[0].shapes()))
    return stored.removesuffix(bare_name(stored))


def write_streaming(entries: Mapping[str, Entry], output: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file tensor by tensor: the header first, for which no value is needed.

    Source: the description of the safetensors format.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, entry in entries.items():
        size = prod(entry.shape) * entry.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(output) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            tensor = entry.read().contiguous()
            assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, name
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def comfyui_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of any spelling under ComfyUI's names: diffusion_model.<linear>.lora_A.weight, .lora_B.weight, .alpha."""
    leaf = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}
    return {f"diffusion_model.{module}.{leaf[part]}": tensor for (module, part), tensor in _parsed(weights).items()}


def diffusers_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA under diffusers' names, which know no alpha: alpha / rank is multiplied into the second matrix."""
    parsed = _parsed(weights)
    state: dict[str, Tensor] = {}
    for (module, part), tensor in parsed.items():
        if part == "down":
            state[diffusers_lora_key(module, "down")] = tensor
        elif part == "up":
            rank, alpha = tensor.shape[1], parsed.get((module, "alpha"))
            scale = 1.0 if alpha is None else float(alpha) / rank
            state[diffusers_lora_key(module, "up")] = (tensor.float() * scale).to(tensor.dtype)
    return state


def adapter_shapes(variant: WanVariant) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the camera adapter of a model's size."""
    with torch.device("meta"):
        state = ControlAdapter(variant.dit.dim, variant.vae.stride[1]).state_dict()
    return {f"{ADAPTER_PREFIX}{name}": tuple(tensor.shape) for name, tensor in state.items()}


def _parsed(weights: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    keys = {name: parse_lora_key(name) for name in weights}
    unknown = [name for name, key in keys.items() if key is None]
    if unknown:
        raise InputError(f"{unknown[0]}: expected a tensor of a LoRA, found another; export a file of this trainer")
    return {(key.module, key.part): weights[name] for name, key in keys.items() if key is not None}


def _native_names(variant: WanVariant) -> list[str]:
    with torch.device("meta"):
        return list(WanDiT(variant.dit).state_dict())


def _reader(checkpoint: Checkpoint, stored: str) -> Callable[[], Tensor]:
    return lambda: checkpoint.get(stored)


def _padded(read: Callable[[], Tensor], missing: int) -> Callable[[], Tensor]:
    def padded() -> Tensor:
        weight = read()
        zeros = torch.zeros(weight.shape[0], missing, *weight.shape[2:], dtype=weight.dtype)
        parts = (weight.view(torch.uint8), zeros.view(torch.uint8))  # as bytes: 8-bit numbers know no cat
        return torch.cat(parts, 1).view(weight.dtype)

    return padded


def _cast(tensor: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: tensor.to(dtype)
