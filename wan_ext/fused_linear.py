"""A linear of a block with its LoRAs, forward and backward by hand, and the sums of parameter gradients.

What: `FusedLinear` reads a linear (`nn.Linear` or `QuantLinear`) under any number of LoRA layers and computes, without
autograd, what they compute. A LoRA layer is known by its attributes: base, multiplier, and lora with down, up, scale,
dropout. `Gradients` adds up what several calls, each for some of the tokens, say of a parameter.

How: forward adds each LoRA's product into the frozen result (addmm); backward needs the input again, and makes from it
the [L, rank] between the two matrices instead of having kept it. A dropout mask is a hash of a seed, the LoRA, the
token and the channel: the same in forward and recomputation, and the same whatever tokens are computed together.

Cost: five products of width rank a LoRA in backward; float32 sums of the size of the trained matrices.

Exact: in the dtype of the input, as the modules; gradients of several calls are summed in float32.

Shapes: L tokens of some clips, one after the other, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError
from memory.quant import PreparedInput, QuantLinear, linear_backward, linear_forward, prepare_input

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # multipliers of splitmix64, as signed numbers
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class Gradients:
    """Sums of parameter gradients, in float32 or wider. Parameters that do not require a gradient have none."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add to a parameter's gradient; `gradient` may be taken over, so it must not be used afterwards."""
        found = self._sums.get(id(parameter))
        if found is None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._sums[id(parameter)] = gradient.to(wide).view(parameter.shape)
        else:
            found.add_(gradient.view(parameter.shape))

    def take(self, parameters: Iterable[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """The sums, each in the dtype of its parameter; None where nothing was added."""
        found = ((parameter, self._sums.pop(id(parameter), None)) for parameter in parameters)
        return tuple(None if total is None else total.to(parameter.dtype) for parameter, total in found)


class FusedLinear:
    """A linear and its LoRAs, from the inside out.

    Args:
        module: a LoRA layer, `nn.Linear` or `QuantLinear`.
        name: of the module in its block, for an error.
        gradients: where parameter gradients go.
    """

    def __init__(self, module: nn.Module, name: str, gradients: Gradients) -> None:
        self.loras: list[Any] = []
        while hasattr(module, "lora"):
            self.loras.insert(0, module)
            module = module.base  # type: ignore[assignment]
        if not isinstance(module, (nn.Linear, QuantLinear)):
            raise InputError(
                f"fused block: expected {name} to be a linear, an 8-bit linear or a LoRA on one, found "
                f"{type(module).__name__}; run the blocks with another maths"
            )
        self.frozen = module
        self.key = 0
        """Tells this linear's dropout masks from all others; assign a number of the call."""
        self._gradients = gradients

    @property
    def draws(self) -> bool:
        """Whether a LoRA drops some of its values."""
        return any(layer.lora.dropout and layer.lora.training for layer in self.loras)

    def forward(self, x: Tensor, first_row: int, *, prepared: PreparedInput | None = None) -> Tensor:
        """The output.

        Args:
            x: [..., in]
            first_row: the place of its first row among all tokens of all clips.
            prepared: what `prepare` made of `x`.

        Returns:
            [..., out]
        """
        rows = x.reshape(-1, x.shape[-1])
        result = linear_forward(self.frozen, rows if prepared is None else prepared)
        for place, layer in enumerate(self.loras):
            hidden = self._hidden(place, layer, rows, first_row)
            result.addmm_(hidden, layer.lora.up.to(rows.dtype).T)
        return result.view(*x.shape[:-1], -1)

    def backward(self, x: Tensor, grad: Tensor, first_row: int, *, needs_x: bool = True) -> Tensor | None:
        """The gradient of the input; those of parameters go into the sums.

        Args:
            x: as in forward; read only where something of this linear is trained. [..., in]
            grad: of the output. [..., out]
            first_row: as in forward.
            needs_x: whether the gradient of the input is wanted.

        Returns:
            [..., in], or None.
        """
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = linear_backward(self.frozen, grad_rows) if needs_x else None
        if isinstance(self.frozen, nn.Linear):
            if self.frozen.weight.requires_grad:
                self._gradients.add(self.frozen.weight, grad_rows.T @ rows)
            if self.frozen.bias is not None and self.frozen.bias.requires_grad:
                self._gradients.add(self.frozen.bias, grad_rows.sum(0))
        for place, layer in enumerate(self.loras):
            down, up = layer.lora.down, layer.lora.up
            if not (needs_x or down.requires_grad or up.requires_grad):
                continue
            grad_hidden = self._scaled(place, layer, grad_rows @ up.to(rows.dtype), first_row)
            if grad_x is not None:
                grad_x.addmm_(grad_hidden, down.to(rows.dtype))
            if down.requires_grad:
                self._gradients.add(down, grad_hidden.T @ rows)
            if up.requires_grad:
                self._gradients.add(up, grad_rows.T @ self._hidden(place, layer, rows, first_row))
        return None if grad_x is None else grad_x.view(x.shape)

    def prepare(self, x: Tensor) -> PreparedInput:
        """What linears of the same recipe can share of an input: see `memory.quant.prepare_input`."""
        return prepare_input(self.frozen, x.reshape(-1, x.shape[-1]))

    def shares_inputs_with(self, other: FusedLinear) -> bool:
        """Whether what `prepare` makes for one linear serves the other."""
        return getattr(self.frozen, "recipe", None) == getattr(other.frozen, "recipe", None)

    def _hidden(self, place: int, layer: Any, rows: Tensor, first_row: int) -> Tensor:
        return self._scaled(place, layer, F.linear(rows, layer.lora.down.to(rows.dtype)), first_row)

    def _scaled(self, place: int, layer: Any, hidden: Tensor, first_row: int) -> Tensor:
        """Dropout and strength, which are the same factors in forward and backward. In place. [L, r]"""
        dropout = layer.lora.dropout if layer.lora.training else 0.0
        if dropout:
            key = self.key + place * 0x632BE59BD9B4E019
            hidden.mul_(keep_mask(key, first_row, hidden.shape[0], hidden.shape[1], dropout, hidden.device)).div_(
                1 - dropout
            )
        return hidden.mul_(layer.multiplier * layer.lora.scale)


def keep_mask(key: int, first_row: int, rows: int, width: int, dropout: float, device: torch.device) -> Tensor:
    """Which values dropout keeps: a pure function of the key and of each value's place.

    Args:
        key: any number.
        first_row: the place of the first row.
        rows, width: shape of the result.
        dropout: share of values that are dropped.
        device: where the mask lives.

    Returns:
        bool [rows, width]

    Source: splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    first = first_row * width
    z = torch.arange(first, first + rows * width, dtype=torch.int64, device=device)
    z = z.mul_(_GOLDEN).add_((key + 2**63) % 2**64 - 2**63)  # wraps around, as it should
    for shift, factor in _MIX:
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)).mul_(factor)  # the mask makes the shift one without sign
    z = (z ^ z >> 31) & (1 << 24) - 1
    return (z >= round(dropout * (1 << 24))).view(rows, width)
