"""Laws of int8 weights: error bounds, exact rounding, idempotence, and what a rotation does for outliers."""

import pytest
import torch

from core.errors import InputError
from memory.quant import RECIPES, QuantRecipe, dequantize, quantize, rotate, rotation_block

BLOCK64, ROTATED = RECIPES["int8"], RECIPES["int8_rotated"]
ROW = QuantRecipe(values="int8", scales="row")
INT8 = {"block64": BLOCK64, "row": ROW, "rotated": ROTATED}
every_int8 = pytest.mark.parametrize("recipe", INT8.values(), ids=INT8.keys())


def gaussian(*shape: int, seed: int = 0, std: float = 0.02) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def with_outliers(*shape: int) -> torch.Tensor:
    weight = gaussian(*shape)
    weight[:, ::300] *= 50.0
    return weight


def error(weight: torch.Tensor, recipe: QuantRecipe) -> float:
    """Relative error of the whole matrix, in the coordinates it is kept in."""
    if recipe.rotate:
        back = rotate(dequantize(*quantize(weight, recipe=recipe), torch.float32), rotation_block(weight.shape[1]))
    else:
        back = dequantize(*quantize(weight, recipe=recipe), torch.float32)
    return ((back - weight).norm() / weight.norm()).item()


@every_int8
@pytest.mark.parametrize("shape", [(48, 192), (40, 100), (3, 64), (7, 1), (1, 6400)])
def test_every_weight_is_off_by_half_a_step_at_most(recipe: QuantRecipe, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    values, scale = quantize(weight, recipe=recipe)
    assert values.dtype == torch.int8 and values.shape == shape
    kept = rotate(weight, rotation_block(shape[1])) if recipe.rotate else weight
    steps = scale.float().repeat_interleave(shape[1] // scale.shape[1], dim=1)
    assert ((dequantize(values, scale, torch.float32) - kept).abs() <= steps * 0.5001).all()
    assert (values.view(shape[0], scale.shape[1], -1).int().abs().amax(-1) == 127).all()  # the whole range is used


@pytest.mark.parametrize(
    ("name", "low", "high"), [("block64", 0.005, 0.007), ("row", 0.007, 0.011), ("rotated", 0.007, 0.011)]
)
def test_gaussian_error_is_that_of_a_fixed_step(name: str, low: float, high: float) -> None:
    assert low < error(gaussian(256, 1024), INT8[name]) < high


def test_a_rotation_keeps_the_error_of_gaussian_weights_where_a_row_has_outliers() -> None:
    weight = with_outliers(256, 1024)
    plain = error(gaussian(256, 1024), ROTATED)
    assert error(weight, ROTATED) < 1.3 * plain
    small = torch.ones(1024, dtype=torch.bool)
    small[::300] = False
    back = dequantize(*quantize(weight, recipe=ROW), torch.float32)
    assert ((back - weight)[:, small].norm() / weight[:, small].norm()).item() > 10 * plain  # what it saves us from


@every_int8
def test_quantising_the_dequantised_weight_changes_nothing(recipe: QuantRecipe) -> None:
    kept = QuantRecipe(values="int8", scales=recipe.scales)  # what was rotated is not rotated again
    first = quantize(gaussian(48, 192), recipe=recipe)
    second = quantize(dequantize(*first, torch.float32), recipe=kept)
    assert torch.equal(first.values, second.values)
    torch.testing.assert_close(first.scale, second.scale, rtol=0 if recipe.scales == "block64" else 2**-22, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_dequantised_is_the_product_rounded_once_for_every_code(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    values = torch.arange(-128, 128).to(torch.int8).repeat(4, 1)
    scale = gaussian(4, 4, std=0.001).to(scale_dtype)
    exact = values.double() * scale.double().repeat_interleave(64, dim=1)
    assert torch.equal(dequantize(values, scale, dtype), exact if dtype == torch.float64 else exact.float().to(dtype))


@every_int8
def test_zero_runs_stay_zero(recipe: QuantRecipe) -> None:
    weight = gaussian(4, 512)
    weight[1] = 0.0
    weight[2] = 1e-44
    back = dequantize(*quantize(weight, recipe=recipe), torch.bfloat16)
    assert torch.isfinite(back).all() and (back[1] == 0).all() and (back[2].abs() < 1e-38).all() and back[0].any()


@every_int8
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(recipe: QuantRecipe, bad: float) -> None:
    weight = gaussian(5, 128)
    weight[3, 17] = bad
    with pytest.raises(InputError, match="blocks.0.ffn.0.*row 3"):
        quantize(weight, recipe=recipe, name="blocks.0.ffn.0")


@every_int8
def test_chunks_of_rows_and_the_layout_do_not_show(recipe: QuantRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(37, 192)
    whole = quantize(weight, recipe=recipe)
    monkeypatch.setattr("memory.quant.weights.rows_at_once", lambda in_features, device: 5)
    chunked = quantize(weight.T.contiguous().T, recipe=recipe)
    assert torch.equal(whole.scale, chunked.scale) or recipe.rotate  # a rotation of fewer rows may sum in another order
    torch.testing.assert_close(whole.scale, chunked.scale, rtol=1e-6, atol=0)
    assert (whole.values.int() - chunked.values.int()).abs().max() <= (1 if recipe.rotate else 0)
    assert torch.equal(dequantize(*chunked, torch.bfloat16), dequantize(*chunked, torch.float32).bfloat16())
