"""A frozen linear layer on an 8-bit weight, as a module and as two functions without autograd.

What: `QuantLinear` takes the place of a frozen `nn.Linear`. `linear_forward` and `linear_backward` are the layer's two
products for code that schedules its own backward; they take an `nn.Linear` as well.

How: with compute "dequant" the layer multiplies in the dtype of its activations with a weight that exists only during
the call. With "w8a8" activations are rounded to 8 bits, a scale a row, and multiplied in 8 bits; for the input gradient
the weight's scales (one an output) are multiplied into the gradient before it is rounded, so that the sum over outputs
needs none. A rotated weight is met by rotated activations, and its input gradient is rotated back. What autograd keeps
for backward are references to the 8-bit values and the scales.

Cost: a block of Wan 14B has 351 M weights, 0.36 GB instead of 0.70 GB in bfloat16. "dequant": one transient copy of one
layer's weight in the activation dtype, in forward and again in backward. "w8a8": 1 byte a number of its input.
Rotated: see `memory.quant.rotation`; `prepare_input` does both once for all layers that share an input.

Exact: "dequant" without rotation is bit for bit `F.linear` with the dequantised weight, and so is its gradient (for an
input that is not contiguous, PyTorch may sum in another order there). The errors of the other recipes are measured in
`docs/quantization.md`. The gradient of "w8a8" is that of the linear map, rounded; rounding itself counts as identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from memory.quant.products import QuantizedRows, quantize_rows, require_device, scaled_product
from memory.quant.recipes import RECIPES, QuantRecipe
from memory.quant.rotation import rotate, rotation_block
from memory.quant.weights import QuantizedWeight, dequantize, empty_weight, quantize


class PreparedInput(NamedTuple):
    """An input as the layers of one recipe multiply it: rotated, and in 8 bits for "w8a8"."""

    x: Tensor  # [L, in]: as given; 8-bit values for "w8a8"
    scale: Tensor | None  # [L] float32 for "w8a8"
    dtype: torch.dtype  # of the input, and of what the layers return
    recipe: QuantRecipe | None  # None: for nn.Linear


class _QuantLinear(torch.autograd.Function):
    """The frozen layer as one node of the graph, on a matrix [L, in]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        values: Tensor,
        scale: Tensor,
        transposed: Tensor | None,
        bias: Tensor | None,
        recipe: QuantRecipe,
    ) -> Tensor:
        ctx.recipe = recipe  # type: ignore[attr-defined]
        ctx.save_for_backward(values, scale, *(() if transposed is None else (transposed,)))
        return _multiply(_prepare(x, recipe, values.shape[1]), values, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, *transposed = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]  # type: ignore[attr-defined]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if needs_x:
            recipe: QuantRecipe = ctx.recipe  # type: ignore[attr-defined]
            grad_x = _multiply_back(flat, values, scale, next(iter(transposed), None), recipe)
            grad_x = grad_x.view(*grad.shape[:-1], values.shape[1])
        return grad_x, None, None, None, flat.sum(0) if needs_bias else None, None


def _block(recipe: QuantRecipe, in_features: int) -> int:
    return rotation_block(in_features) if recipe.rotate else 1


def _prepare(x: Tensor, recipe: QuantRecipe, in_features: int) -> PreparedInput:
    block = _block(recipe, in_features)
    if recipe.compute == "dequant":
        return PreparedInput(rotate(x, block), None, x.dtype, recipe)
    require_device(recipe, x.device)
    rows = quantize_rows(x, recipe=recipe, block=block)
    return PreparedInput(rows.values, rows.scale, x.dtype, recipe)


def _multiply(prepared: PreparedInput, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if prepared.scale is None:
        return F.linear(prepared.x, dequantize(values, scale, prepared.dtype), bias)
    return scaled_product(QuantizedRows(prepared.x, prepared.scale), values, scale.view(-1), bias, prepared.dtype)


def _multiply_back(
    grad: Tensor, values: Tensor, scale: Tensor, transposed: Tensor | None, recipe: QuantRecipe
) -> Tensor:
    """The input gradient [L, in] of the output gradient [L, out]."""
    if recipe.compute == "dequant":
        grad_x = grad @ dequantize(values, scale, grad.dtype)
    else:
        require_device(recipe, grad.device)
        rows = quantize_rows(grad, recipe=recipe, column_scale=scale.view(-1))
        grad_x = scaled_product(rows, values.T if transposed is None else transposed, None, None, grad.dtype)
    return rotate(grad_x, _block(recipe, values.shape[1]))


class QuantLinear(nn.Module):
    """A linear layer with a frozen 8-bit weight; what it returns has the dtype of its input.

    Its tensors: `weight` [out, in] and `weight_scale` [out, runs] as `quantize` makes them, `weight_transposed`
    [in, out] where the recipe keeps it (else None), and `bias`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        recipe: how the weight is kept and multiplied.
        device: "meta" builds it without memory, for `load_state_dict(assign=True)`.
        dtype: of the bias.
    """

    weight_transposed: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: QuantRecipe = RECIPES["fp8"],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.recipe = recipe
        values, scale = empty_weight(out_features, in_features, recipe=recipe, device=device)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        transposed = None
        if recipe.transposed:
            empty = torch.empty(in_features, out_features, dtype=values.dtype, device=device)
            transposed = nn.Parameter(empty, requires_grad=False)
        self.register_parameter("weight_transposed", transposed)
        bias_values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if bias_values is None else nn.Parameter(bias_values, requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, recipe: QuantRecipe = RECIPES["fp8"], name: str = "weight"
    ) -> QuantLinear:
        """Quantise a linear layer; the bias is shared with it, not copied.

        Args:
            linear: stays as it is.
            recipe: how the weight is kept and multiplied.
            name: how an error calls the weight.

        Returns:
            The frozen layer, on the same device.

        Raises:
            InputError: the weight holds NaN or infinity.
        """
        layer = cls(linear.in_features, linear.out_features, bias=False, recipe=recipe, device="meta")
        layer.take(quantize(linear.weight, recipe=recipe, name=name))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def take(self, quantized: QuantizedWeight) -> None:
        """Hold these values and scales from now on (not copies), and the transposed copy that the recipe asks for.

        Args:
            quantized: values [out, in] in the recipe's dtype; scales [out, runs], whose number may be another than the
                recipe's where values with scales of their own come from a file.
        """
        self.weight = nn.Parameter(quantized.values, requires_grad=False)
        self.weight_scale = nn.Parameter(quantized.scale, requires_grad=False)
        if self.recipe.transposed:
            self.weight_transposed = nn.Parameter(quantized.values.T.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias.

        Args:
            x: [..., in_features], float32, bfloat16, float16 or float64.

        Returns:
            [..., out_features] in the dtype of `x` (of autocast inside it).

        Raises:
            InputError: the device cannot multiply as the recipe asks.
        """
        device_type = x.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # Flat out here: to a view that a custom function returns nothing can be added in place. What is not contiguous
        # F.linear does not flatten either.
        rows = x.reshape(-1, self.in_features) if x.is_contiguous() or self.recipe.compute == "w8a8" else x
        y = _QuantLinear.apply(rows, self.weight, self.weight_scale, self.weight_transposed, bias, self.recipe)
        return y.view(*x.shape[:-1], self.out_features)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out_features, in_features] that the layer stands for, not rotated.

        Without a rotation it is what the layer multiplies inputs of `dtype` with; rotated back, it is rounded to
        `dtype` after.
        """
        if not self.recipe.rotate:
            return dequantize(self.weight, self.weight_scale, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        rotated = dequantize(self.weight, self.weight_scale, wide)
        return rotate(rotated, _block(self.recipe, self.in_features)).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Let `.to()` and its like move the layer but never change a dtype: rounding the parts means nothing."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        parts = [self.recipe.values, f"{self.weight_scale.shape[1]} scales a row"]
        recipe = self.recipe
        notes = {"rotated": recipe.rotate, "w8a8": recipe.compute == "w8a8", "transposed too": recipe.transposed}
        parts += [note for note, holds in notes.items() if holds]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{', '.join(parts)}"
        )


def prepare_input(layer: nn.Module, x: Tensor) -> PreparedInput:
    """Rotate an input and round it to 8 bits as a layer's recipe asks, once for all layers of that recipe and width.

    Args:
        layer: `nn.Linear` or `QuantLinear`.
        x: [L, in].

    Returns:
        What `linear_forward` takes in place of `x`; for `nn.Linear` and plain "dequant" it holds `x` itself.
    """
    if isinstance(layer, QuantLinear):
        return _prepare(x, layer.recipe, layer.in_features)
    return PreparedInput(x, None, x.dtype, None)


@torch.no_grad()
def linear_forward(layer: nn.Module, x: Tensor | PreparedInput) -> Tensor:
    """A frozen linear layer's output, without autograd; bit for bit that of the module.

    Args:
        layer: `nn.Linear` or `QuantLinear`.
        x: [L, in], or what `prepare_input` made of it for a layer of the same recipe.

    Returns:
        [L, out] in the dtype of the input.
    """
    prepared = x if isinstance(x, PreparedInput) else prepare_input(layer, x)
    recipe = layer.recipe if isinstance(layer, QuantLinear) else None
    if prepared.recipe != recipe:
        raise ValueError(f"expected an input that was prepared for {recipe}, found one for {prepared.recipe}")
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    bias = None if bias is None else bias.to(prepared.dtype)
    if isinstance(layer, QuantLinear):
        return _multiply(prepared, weight, layer.weight_scale, bias)
    return F.linear(prepared.x, weight, bias)


@torch.no_grad()
def linear_backward(layer: nn.Module, grad: Tensor) -> Tensor:
    """The input gradient of a frozen linear layer, without autograd; bit for bit that of the module.

    Args:
        layer: `nn.Linear` or `QuantLinear`.
        grad: [L, out], of the output.

    Returns:
        [L, in] in the dtype of `grad`.
    """
    if isinstance(layer, QuantLinear):
        return _multiply_back(grad, layer.weight, layer.weight_scale, layer.weight_transposed, layer.recipe)
    return grad @ layer.weight  # type: ignore[operator]
