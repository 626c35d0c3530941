"""From a checkpoint into a module that was built on the meta device: tensor by tensor, each with its own precision.

A meta module knows shapes and owns no memory. Every parameter is read, converted and assigned before the next one is
read, so the host holds the result and one tensor. What is missing, left over or of another shape is reported at once,
before anything is read; nothing is initialised silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from core.errors import InputError, listing
from memory.quant import QuantLinear, quantize
from wan_ext.checkpoint_files import Checkpoint
from wan_ext.scaled_fp8 import Fp8Scales, dequantize_fp8, find_fp8_scales, require_numbers, row_scales


def fill_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    what: str,
    name_in_file: Callable[[str], str],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device | str = "cpu",
    is_ignored: Callable[[str], bool] = lambda name: False,
    adapt: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Give every parameter and persistent buffer of a meta module its values from a checkpoint, frozen.

    The weight of a `QuantLinear` is quantised as it is read; where the file already holds it in e4m3, its values are
    kept, and so are its scales.

    Args:
        module: built on the meta device; tied parameters count once.
        checkpoint: where the values are.
        what: what the module is, for messages: "the Wan2.1 VAE".
        name_in_file: from the module's name of a tensor to the checkpoint's.
        dtype_of: the precision of a tensor, by the module's name of it.
        device: where the tensors go.
        is_ignored: tensors of the checkpoint that may stay unused, by name.
        adapt: called with the module's name and the stored tensor, returns the tensor in the module's layout (a part of
            a packed one, or a view). It sees meta tensors too, when shapes are compared.

    Raises:
        InputError: tensors are missing, unused (scales included), or of another shape; lists them.
    """
    scales = find_fp8_scales(checkpoint)
    wanted = {name: name_in_file(name) for name in _stored_names(module)}
    _compare(module, checkpoint, scales, wanted=wanted, what=what, is_ignored=is_ignored, adapt=adapt)
    order = sorted(wanted, key=lambda name: checkpoint.position(wanted[name]))
    for name, following in zip(order, [*order[1:], None], strict=True):
        if following:
            checkpoint.will_read(wanted[following])
        owner, leaf = _owner(module, name)
        if isinstance(owner, QuantLinear) and leaf == "weight":
            _fill_quantized(owner, checkpoint, wanted[name], scales, device=device)
            continue
        tensor = _read(checkpoint, wanted[name], scales)
        if adapt is not None:
            tensor = adapt(name, tensor)
        _assign(owner, leaf, _converted(tensor, dtype_of(name), device))


def quantize_linears(module: nn.Module, *, bias_dtype: torch.dtype) -> None:
    """Replace every linear inside a meta module by an empty 8-bit one, for `fill_module` to fill."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                bias = child.bias is not None
                empty = QuantLinear(child.in_features, child.out_features, bias, device="meta", dtype=bias_dtype)
                setattr(owner, name, empty)


def _stored_names(module: nn.Module) -> list[str]:
    """Names of the tensors that come from a file: all but the scales that quantising makes."""
    names = []
    for prefix, owner in module.named_modules():
        made_here = {"weight_scale"} if isinstance(owner, QuantLinear) else set()
        leaves = [*owner._parameters, *(n for n in owner._buffers if n not in owner._non_persistent_buffers_set)]
        for leaf in leaves:
            tensor = getattr(owner, leaf)
            if tensor is not None and leaf not in made_here:
                names.append(f"{prefix}.{leaf}" if prefix else leaf)
    return names


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _assign(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _converted(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """On its device, in its precision, and alone in its memory (a view would keep the whole packed tensor alive)."""
    tensor = tensor.to(device=device, dtype=dtype)
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _read(checkpoint: Checkpoint, stored_name: str, scales: Fp8Scales) -> Tensor:
    """A tensor as a number: in its stored type, or in float32 if it was 8 bits and a scale."""
    tensor = checkpoint.get(stored_name)
    if stored_name in scales.scale_of:
        return dequantize_fp8(tensor, checkpoint.get(scales.scale_of[stored_name]))
    return tensor


def _fill_quantized(
    linear: QuantLinear, checkpoint: Checkpoint, stored_name: str, scales: Fp8Scales, *, device: torch.device | str
) -> None:
    """Assign values and scales of one 8-bit linear."""
    where = f"{checkpoint.path}: {stored_name}"
    if checkpoint.dtype(stored_name) == torch.float8_e4m3fn:
        scale_name = scales.scale_of.get(stored_name)
        scale = row_scales(checkpoint.get(scale_name) if scale_name else torch.ones(()), linear.out_features)
        values = checkpoint.get(stored_name)
        require_numbers(values, where=where)
        values, scale = values.to(device), scale.to(device)
    else:
        block_size = linear.in_features // linear.weight_scale.shape[1]
        weight = _read(checkpoint, stored_name, scales).to(device)
        values, scale = quantize(weight, block_size=block_size, name=where)
    _assign(linear, "weight", values)
    _assign(linear, "weight_scale", scale)


def _compare(
    module: nn.Module,
    checkpoint: Checkpoint,
    scales: Fp8Scales,
    *,
    wanted: Mapping[str, str],
    what: str,
    is_ignored: Callable[[str], bool],
    adapt: Callable[[str, Tensor], Tensor] | None,
) -> None:
    """Report every difference between what the module needs and what the checkpoint holds, as one error."""
    missing = {stored for stored in wanted.values() if stored not in checkpoint}
    used = set(wanted.values()) | scales.consumed
    unused = [name for name in checkpoint.names() if name not in used and not is_ignored(name)]
    misshapen = []
    for name, stored in wanted.items():
        if stored in missing:
            continue
        owner, leaf = _owner(module, name)
        found = torch.empty(checkpoint.shape(stored), dtype=torch.uint8, device="meta")
        try:
            fits = tuple((found if adapt is None else adapt(name, found)).shape) == tuple(getattr(owner, leaf).shape)
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            misshapen.append(f"{stored} {list(found.shape)} for {list(getattr(owner, leaf).shape)}")
    faults = [
        f"{len(names)} {fault} ({listing(names)})"
        for names, fault in (
            (missing, "tensors missing"),
            (unused, "unexpected or not consumed"),
            (misshapen, "of another shape"),
        )
        if names
    ]
    if faults:
        raise InputError(f"{checkpoint.path}: expected {what}, found {'; '.join(faults)}; give the file of this model")
