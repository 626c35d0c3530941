"""From a checkpoint into a module that was built on the meta device: tensor by tensor, each with its own precision.

A meta module knows shapes and owns no memory. `Conversion` reads every tensor, converts it and hands it on before the
next one is read: `fill_module` assigns it, `wan_ext.quantized_files` writes it to a file. So the host holds the result
(or nothing of it) and one tensor. What is missing, left over or of another shape is reported at once, before anything
is read; nothing is initialised silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import TypeGuard

import torch
from torch import Tensor, nn

from core.errors import InputError, listing
from memory.quant import QuantizedWeight, QuantLinear, QuantRecipe, quantize
from wan_ext.checkpoint_files import Checkpoint
from wan_ext.scaled_fp8 import dequantize_fp8, find_fp8_scales, require_numbers, row_scales

MADE_HERE = {"weight_scale", "weight_transposed"}
"""What quantising makes of the weight of a `QuantLinear`; no checkpoint holds it."""


class Conversion:
    """Every parameter and persistent buffer of a meta module, read from a checkpoint and converted.

    The weight of a `QuantLinear` is quantised as it is read; where the file already holds it in e4m3 and the recipe can
    use that, its values are kept, and so are its scales. Making one gives the module's tensors, still on meta, the
    shape and dtype of what will be read.
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        *,
        what: str,
        name_in_file: Callable[[str], str],
        dtype_of: Callable[[str], torch.dtype],
        is_ignored: Callable[[str], bool] = lambda name: False,
        adapt: Callable[[str, Tensor], Tensor] | None = None,
    ):
        """Args:
        module: built on the meta device; tied parameters count once.
        checkpoint: where the values are.
        what: what the module is, for messages: "the Wan2.1 VAE".
        name_in_file: from the module's name of a tensor to the checkpoint's.
        dtype_of: the precision of a tensor, by the module's name of it.
        is_ignored: tensors of the checkpoint that may stay unused, by name.
        adapt: called with the module's name and the stored tensor, returns the tensor in the module's layout (a part of
            a packed one, or a view). It sees meta tensors too, when shapes are compared.

        Raises:
            InputError: tensors are missing, unused (scales included), or of another shape; lists them.
        """
        self._module, self._checkpoint, self._adapt = module, checkpoint, adapt
        self._scales = find_fp8_scales(checkpoint)
        self._wanted = {name: name_in_file(name) for name in _stored_names(module)}
        self._compare(what, is_ignored)
        for name, stored_name in self._wanted.items():
            owner, leaf = _owner(module, name)
            if _is_quantised(owner, leaf):
                if self._is_kept(owner, stored_name):
                    num_scales = self._num_scales(stored_name, owner.out_features)
                    scale = torch.empty(owner.out_features, num_scales, dtype=torch.float32, device="meta")
                    assign(module, f"{name}_scale", scale)
            else:
                assign(module, name, torch.empty_like(getattr(owner, leaf), dtype=dtype_of(name), device="meta"))

    def tensors(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Read and convert, in the order of the checkpoint.

        Args:
            device: where the tensors are converted and where they come out.

        Yields:
            The module's name of a tensor and the tensor, contiguous and alone in its memory.

        Raises:
            InputError: a weight to be quantised is not finite.
        """
        checkpoint = self._checkpoint
        order = sorted(self._wanted, key=lambda name: checkpoint.position(self._wanted[name]))
        for name, following in zip(order, [*order[1:], None], strict=True):
            if following:
                checkpoint.will_read(self._wanted[following])
            owner, leaf = _owner(self._module, name)
            if _is_quantised(owner, leaf):
                values, scale = self._quantised(owner, self._wanted[name], device)
                yield name, values
                yield f"{name}_scale", scale
                if owner.recipe.transposed:
                    yield f"{name}_transposed", values.T.contiguous()
                continue
            tensor = self._read(self._wanted[name])
            if self._adapt is not None:
                tensor = self._adapt(name, tensor)
            yield name, _converted(tensor, getattr(owner, leaf).dtype, device)

    def _read(self, stored_name: str) -> Tensor:
        """A tensor as a number: in its stored type, or in float32 if it was 8 bits and a scale."""
        tensor = self._checkpoint.get(stored_name)
        if stored_name in self._scales.scale_of:
            return dequantize_fp8(tensor, self._checkpoint.get(self._scales.scale_of[stored_name]))
        return tensor

    def _quantised(self, linear: QuantLinear, stored_name: str, device: torch.device | str) -> QuantizedWeight:
        """Values and scales of one 8-bit linear."""
        where = f"{self._checkpoint.path}: {stored_name}"
        if not self._is_kept(linear, stored_name):
            return quantize(self._read(stored_name).to(device), recipe=linear.recipe, name=where)
        scale_name = self._scales.scale_of.get(stored_name)
        scale = self._checkpoint.get(scale_name) if scale_name else torch.ones(())
        values = self._checkpoint.get(stored_name)
        require_numbers(values, where=where)
        return QuantizedWeight(values.to(device), row_scales(scale, linear.out_features).to(device))

    def _is_kept(self, linear: QuantLinear, stored_name: str) -> bool:
        """Whether the file's own e4m3 values and scales are what the linear's recipe computes with."""
        if self._checkpoint.dtype(stored_name) != torch.float8_e4m3fn or linear.recipe.values != "e4m3":
            return False
        return linear.recipe.scales != "row" or self._num_scales(stored_name, linear.out_features) == 1

    def _num_scales(self, stored_name: str, num_rows: int) -> int:
        """Scales of a row of an 8-bit weight in the file."""
        scale_name = self._scales.scale_of.get(stored_name)
        return max(1, prod(self._checkpoint.shape(scale_name)) // num_rows) if scale_name else 1

    def _compare(self, what: str, is_ignored: Callable[[str], bool]) -> None:
        """Report every difference between what the module needs and what the checkpoint holds, as one error."""
        checkpoint, wanted, adapt = self._checkpoint, self._wanted, self._adapt
        missing = {stored for stored in wanted.values() if stored not in checkpoint}
        used = set(wanted.values()) | self._scales.consumed
        unused = [name for name in checkpoint.names() if name not in used and not is_ignored(name)]
        misshapen = []
        for name, stored in wanted.items():
            if stored in missing:
                continue
            owner, leaf = _owner(self._module, name)
            expected = tuple(getattr(owner, leaf).shape)
            found = torch.empty(checkpoint.shape(stored), dtype=torch.uint8, device="meta")
            try:
                fits = tuple((found if adapt is None else adapt(name, found)).shape) == expected
            except (RuntimeError, IndexError):
                fits = False
            if not fits:
                misshapen.append(f"{stored} {list(found.shape)} for {list(expected)}")
        report_differences(checkpoint.path, what, missing=missing, unused=unused, misshapen=misshapen)


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

    Args and errors are those of `Conversion`; `device` is where the tensors go.
    """
    conversion = Conversion(
        module,
        checkpoint,
        what=what,
        name_in_file=name_in_file,
        dtype_of=dtype_of,
        is_ignored=is_ignored,
        adapt=adapt,
    )
    for name, tensor in conversion.tensors(device):
        assign(module, name, tensor)


def quantize_linears(module: nn.Module, recipe: QuantRecipe, *, bias_dtype: torch.dtype) -> None:
    """Replace every linear inside a meta module by an empty 8-bit one, to be filled."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                bias = child.bias is not None
                size = (child.in_features, child.out_features, bias)
                setattr(owner, name, QuantLinear(*size, recipe=recipe, device="meta", dtype=bias_dtype))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, in the order of `modules()`; tied modules count once."""
    found = {}
    for prefix, owner in module.named_modules():
        for leaf in (*owner._parameters, *(n for n in owner._buffers if n not in owner._non_persistent_buffers_set)):
            tensor = getattr(owner, leaf)
            if tensor is not None:
                found[f"{prefix}.{leaf}" if prefix else leaf] = tensor
    return found


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter, frozen, or of a buffer."""
    owner, leaf = _owner(module, name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def report_differences(
    path: object, what: str, *, missing: Iterable[str], unused: Iterable[str], misshapen: Iterable[str]
) -> None:
    """Refuse a file whose tensors are not those of a module.

    Args:
        path: of the file, for the message.
        what: what the module is: "the Wan2.1 VAE".
        missing: tensors that the file lacks.
        unused: tensors that the module has no place for.
        misshapen: tensors of another shape, in words.

    Raises:
        InputError: any of the three is not empty.
    """
    faults = [
        f"{len(names)} {fault} ({listing(names)})"
        for names, fault in (
            (list(missing), "tensors missing"),
            (list(unused), "unexpected or not consumed"),
            (list(misshapen), "of another shape"),
        )
        if names
    ]
    if faults:
        raise InputError(f"{path}: expected {what}, found {'; '.join(faults)}; give the file of this model")


def _stored_names(module: nn.Module) -> list[str]:
    """Names of the tensors that come from a checkpoint."""
    names = []
    for name in tensors_of(module):
        owner, leaf = _owner(module, name)
        if not (isinstance(owner, QuantLinear) and leaf in MADE_HERE):
            names.append(name)
    return names


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _is_quantised(owner: nn.Module, leaf: str) -> TypeGuard[QuantLinear]:
    return isinstance(owner, QuantLinear) and leaf == "weight"


def _converted(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """On its device, in its precision, and alone in its memory (a view would keep the whole packed tensor alive)."""
    tensor = tensor.to(device=device, dtype=dtype)
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
