"""Frozen linear weights in 8 bits: recipes, the weights themselves, rotation, 8-bit products and the layer.

`recipes` says what can be chosen, `weights` turns a matrix into 8-bit values and scales and back, `rotation` spreads
outliers, `products` multiplies in 8 bits, `linear` is the layer. `docs/quantization.md` compares the recipes.
"""

from memory.quant.linear import PreparedInput, QuantLinear, linear_backward, linear_forward, prepare_input
from memory.quant.products import QuantizedRows, quantize_rows, require_device, scaled_product
from memory.quant.recipes import RECIPES, QuantRecipe, parse_recipe
from memory.quant.rotation import hadamard, rotate, rotation_block
from memory.quant.weights import QuantizedWeight, dequantize, quantize, runs_per_row

__all__ = [
    "RECIPES",
    "PreparedInput",
    "QuantLinear",
    "QuantRecipe",
    "QuantizedRows",
    "QuantizedWeight",
    "dequantize",
    "hadamard",
    "linear_backward",
    "linear_forward",
    "parse_recipe",
    "prepare_input",
    "quantize",
    "quantize_rows",
    "require_device",
    "rotate",
    "rotation_block",
    "runs_per_row",
    "scaled_product",
]
