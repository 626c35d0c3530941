"""The page of 8-bit weights is what the command writes from its figures, and the figures mean what they say."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quantization import CANDIDATES, CONFIG, SETTINGS, measure, page, read_rows
from core.errors import InputError
from memory.quant import RECIPES

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "results" / "quantization.json"
TINY = replace(CONFIG, dim=256, ffn_dim=512, num_heads=2, num_layers=1, text_dim=64, text_len=16)
NAMES = ("bf16", "fp8", "int8_rotated", "int8_w8a8", "int8_rotated, not rotated")


def test_the_docs_are_what_the_command_writes() -> None:
    assert (ROOT / "docs" / "quantization.md").read_text() == page(read_rows(FIGURES))


def test_every_recipe_has_a_row_in_every_setting() -> None:
    found = read_rows(FIGURES)
    assert found.keys() == SETTINGS.keys()
    differ = {name for name, recipe in RECIPES.items() if not recipe.transposed}
    for rows in found.values():
        assert [row.name for row in rows] == list(CANDIDATES) and differ < CANDIDATES.keys()


def test_what_the_page_says_of_its_tables_holds() -> None:
    for rows in read_rows(FIGURES).values():
        row = {row.name: row for row in rows}
        fp8, rotated = row["fp8"], row["int8_rotated"]
        assert rotated.bytes_per_weight < fp8.bytes_per_weight and rotated.weight_error < fp8.weight_error
        assert rotated.output_error < fp8.output_error and rotated.grad_error < fp8.grad_error
        assert rotated.cosine > fp8.cosine and rotated.worst_cosine > fp8.worst_cosine
        assert row["int8_w8a8"].cosine > fp8.cosine and row["int8_w8a8"].worst_cosine > fp8.worst_cosine


@pytest.mark.parametrize("outliers", [False, True])
def test_figures_of_a_small_model(outliers: bool) -> None:
    rows = {row.name: row for row in measure(TINY, outliers=outliers, names=NAMES)}
    assert rows["bf16"].weight_error == 0 and rows["bf16"].bytes_per_weight == 2
    assert rows["int8_w8a8"].weight_error == rows["int8_rotated"].weight_error  # they store the same
    assert rows["bf16"].output_error < rows["int8_rotated"].output_error < rows["int8_w8a8"].output_error
    assert rows["bf16"].grad_error < rows["int8_rotated"].grad_error < rows["int8_w8a8"].grad_error
    for row in rows.values():
        assert 0.9 < row.worst_cosine <= row.cosine <= 1 and rows["bf16"].cosine >= row.cosine
    if outliers:
        rotated, plain = rows["int8_rotated"], rows["int8_rotated, not rotated"]
        assert rotated.weight_error < plain.weight_error / 2 and rotated.output_error < plain.output_error / 2


@pytest.mark.parametrize("content", ["", "[]", '{"Gaussian": [{"name": "bf16"}]}'])
def test_figures_of_something_else_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(content)
    with pytest.raises(InputError, match="figures.json"):
        read_rows(tmp_path / "figures.json")
