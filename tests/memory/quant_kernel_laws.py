"""The 8-bit layer through the Triton kernels is the layer through PyTorch.

By hand: `TRITON_INTERPRET=1 pytest tests/memory/quant_kernel_laws.py`; on a GPU without the variable.
"""

import os

import pytest
import torch
from torch import nn

from memory import kernels
from memory.quant import RECIPES, QuantLinear, QuantRecipe, linear_backward, linear_forward

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NAMES = ("fp8", "int8", "int8_rotated", "int8_w8a8")


def layer(recipe: QuantRecipe, out: int, width: int, *, bias: bool) -> QuantLinear:
    torch.manual_seed(0)
    linear = nn.Linear(width, out, bias=bias)
    return QuantLinear.from_linear(linear, recipe=recipe).to(DEVICE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "rows", "out", "width", "bias"),
    [(torch.float32, 20, 24, 128, True), (torch.float32, 3, 20, 36, False), (torch.bfloat16, 20, 24, 128, True)],
)
def test_kernels_change_nothing_but_roundings(
    name: str, dtype: torch.dtype, rows: int, out: int, width: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = layer(RECIPES[name], out, width, bias=bias)
    x, grad = torch.randn(rows, width).to(DEVICE, dtype), torch.randn(rows, out).to(DEVICE, dtype)
    found = []
    for is_used in (False, True):
        monkeypatch.setattr(kernels, "available", lambda device, is_used=is_used: is_used)
        found.append((linear_forward(one, x), linear_backward(one, grad)))
    # In the middle between two steps of int8 a number may fall to either: rotations sum in another order. The
    # interpreter cuts off where the GPU rounds to bfloat16.
    tolerance = 0.02 if name == "int8_w8a8" or dtype == torch.bfloat16 else 1e-6
    for plain, by_kernel in zip(*found, strict=True):
        assert by_kernel.dtype == dtype
        torch.testing.assert_close(by_kernel, plain, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", ["int8_w8a8", "int8_w8a8_transposed"])
def test_the_kernel_reads_the_weight_as_it_lies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory.kernels import int8

    layouts: list[str] = []
    matmul = int8.int8_matmul

    def noted(a, b, scale_a, scale_b, *, layout, bias, dtype):  # type: ignore[no-untyped-def]
        layouts.append(layout)
        return matmul(a, b, scale_a, scale_b, layout=layout, bias=bias, dtype=dtype)

    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(int8, "int8_matmul", noted)
    one = layer(RECIPES[name], 24, 128, bias=True)
    linear_forward(one, torch.randn(5, 128, device=DEVICE))
    linear_backward(one, torch.randn(5, 24, device=DEVICE))
    assert layouts == ["tn", "tn" if name.endswith("transposed") else "nn"]
