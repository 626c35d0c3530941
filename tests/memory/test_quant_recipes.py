"""Laws of recipes: names that mean something, parts that exclude one another, and which files serve which."""

import dataclasses
import itertools

import pytest

from core.errors import InputError
from memory.quant import RECIPES, QuantRecipe, parse_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_is_its_recipe(name: str) -> None:
    assert parse_recipe(name) is RECIPES[name]


def test_no_two_names_mean_the_same() -> None:
    assert len(set(RECIPES.values())) == len(RECIPES)


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="'int8_rotatd'.*did you mean 'int8_rotated'"):
        parse_recipe("int8_rotatd")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"values": "e4m3", "scales": "block64", "rotate": True}, "rotate"),
        ({"values": "int8", "scales": "block64", "compute": "w8a8"}, "scales='row'"),
        ({"values": "int8", "scales": "row", "transposed": True}, "compute='w8a8'"),
        ({"values": "int4", "scales": "row"}, "int4"),
        ({"values": "int8", "scales": "column"}, "column"),
        ({"values": "int8", "scales": "row", "compute": "w4a4"}, "w4a4"),
    ],
)
def test_parts_that_exclude_one_another_are_refused(parts: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantRecipe(**parts)


def test_what_is_stored_does_not_depend_on_how_it_is_multiplied() -> None:
    assert RECIPES["int8_rotated"].stores_as(RECIPES["int8_w8a8_transposed"])
    for one, two in itertools.product(RECIPES.values(), repeat=2):
        parts = [dataclasses.replace(recipe, compute="dequant", transposed=False) for recipe in (one, two)]
        assert one.stores_as(two) == (parts[0] == parts[1])
