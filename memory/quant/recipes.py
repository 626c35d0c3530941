"""How a frozen linear weight is kept in 8 bits, and how it is multiplied: one frozen record, and names for good ones.

What: `QuantRecipe` says which 8-bit numbers, how many scales, whether the weight is rotated, and what multiplies.
`RECIPES` holds the ones worth choosing, by the name that a command line takes.

How: the parts exclude one another only where the maths does. A product of 8-bit numbers (`w8a8`) sums along the inputs
of a row before any scale is applied, so it needs one scale a row. A rotation spreads outliers over a block of inputs,
which a number with a fixed step (int8) gains from and one with an exponent (e4m3) does not.

Cost: bytes a weight are in the table of `docs/quantization.md`, with the errors of each recipe; a second, transposed
copy doubles them.

Exact: nothing is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class QuantRecipe:
    """What becomes of a weight, and how the layer computes with it.

    Args:
        values: the 8-bit numbers: float8 "e4m3" or "int8".
        scales: "block64" (bfloat16, one for 64 inputs of a row; one a row where 64 does not divide the width) or "row"
            (float32, one for a row).
        rotate: multiply blocks of inputs by a regular Hadamard matrix before quantising, and the activations with it
            (`memory.quant.rotation`); int8 only.
        compute: "dequant" multiplies in the dtype of the activations with a weight made for the call; "w8a8" rounds the
            activations to 8 bits too, a scale a row, and multiplies in 8 bits, in forward and for the input gradient.
        transposed: keep the same weight a second time as [in, out], the layout that the input gradient of "w8a8" reads
            fastest.

    Raises:
        InputError: parts that exclude one another.
    """

    values: Literal["e4m3", "int8"]
    scales: Literal["block64", "row"]
    rotate: bool = False
    compute: Literal["dequant", "w8a8"] = "dequant"
    transposed: bool = False

    def __post_init__(self) -> None:
        for field, known in (
            ("values", ("e4m3", "int8")),
            ("scales", ("block64", "row")),
            ("compute", ("dequant", "w8a8")),
        ):
            found = getattr(self, field)
            if found not in known:
                raise InputError(f"quantisation: expected {field} to be one of {', '.join(known)}, found {found!r}")
        if self.rotate and self.values != "int8":
            raise InputError(
                "quantisation: expected int8 values where rotate is on, found e4m3; it gains nothing there"
            )
        if self.compute == "w8a8" and self.scales != "row":
            raise InputError(f"quantisation: expected scales='row' for compute='w8a8', found {self.scales!r}")
        if self.transposed and self.compute != "w8a8":
            raise InputError(
                "quantisation: expected compute='w8a8' where transposed is on; nothing else reads that copy"
            )

    def stores_as(self, other: QuantRecipe) -> bool:
        """Whether the 8-bit values and scales of both are the same, so that a file of one serves the other."""
        return (self.values, self.scales, self.rotate) == (other.values, other.scales, other.rotate)


RECIPES = {
    "fp8": QuantRecipe(values="e4m3", scales="block64"),
    "int8": QuantRecipe(values="int8", scales="block64"),
    "int8_rotated": QuantRecipe(values="int8", scales="row", rotate=True),
    "int8_w8a8": QuantRecipe(values="int8", scales="row", rotate=True, compute="w8a8"),
    "int8_w8a8_transposed": QuantRecipe(values="int8", scales="row", rotate=True, compute="w8a8", transposed=True),
    "fp8_w8a8": QuantRecipe(values="e4m3", scales="row", compute="w8a8"),
    "fp8_w8a8_transposed": QuantRecipe(values="e4m3", scales="row", compute="w8a8", transposed=True),
}
"""The recipes worth choosing, by name; `docs/quantization.md` compares them."""


def parse_recipe(name: str) -> QuantRecipe:
    """The recipe of a name.

    Args:
        name: a key of `RECIPES`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(
            f"quantisation: expected a recipe out of {', '.join(RECIPES)}, found {name!r}{nearest(name, RECIPES)}"
        )
    return RECIPES[name]
