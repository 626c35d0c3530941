"""Laws of the 8-bit layer under every recipe: one maths in three forms, errors in bounds, nothing wide kept."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from memory.quant import (
    RECIPES,
    QuantLinear,
    QuantRecipe,
    dequantize,
    linear_backward,
    linear_forward,
    prepare_input,
    quantize_rows,
    rotate,
    rotation_block,
)

W8A8 = [recipe for recipe in RECIPES.values() if recipe.compute == "w8a8"]
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def gaussian(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def plain_linear(out: int, width: int, *, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(width, out, bias=bias)
    linear.weight.data = gaussian(out, width, std=width**-0.5)
    if bias:
        linear.bias.data = gaussian(out, seed=1)
    return linear


def quant_linear(recipe: QuantRecipe, out: int = 96, width: int = 512, *, bias: bool = True) -> QuantLinear:
    return QuantLinear.from_linear(plain_linear(out, width, bias=bias), recipe=recipe)


def through(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the input gradient of its weighted sum."""
    x = x.detach().requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad((y * weights).sum(), x)
    return y.detach(), grad


@every_recipe
@every_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_module_and_explicit_functions_are_one_maths(recipe: QuantRecipe, dtype: torch.dtype, bias: bool) -> None:
    layer = quant_linear(recipe, bias=bias)
    x, grad = gaussian(40, 512, seed=2).to(dtype), gaussian(40, 96, seed=3).to(dtype)
    y, grad_x = through(layer, x, grad)
    assert y.dtype == grad_x.dtype == dtype
    assert torch.equal(linear_forward(layer, x), y)
    assert torch.equal(linear_backward(layer, grad), grad_x)
    assert torch.equal(linear_forward(layer, prepare_input(layer, x)), y)
    assert torch.equal(layer(x.view(2, 5, 4, 512)), y.view(2, 5, 4, 96))
    assert not linear_forward(layer, x.requires_grad_()).requires_grad


def test_a_plain_linear_has_the_same_functions() -> None:
    layer = plain_linear(96, 512)
    x, grad = gaussian(40, 512), gaussian(40, 96, seed=3)
    y, grad_x = through(layer, x, grad)
    assert torch.equal(linear_forward(layer, x), y) and torch.equal(linear_forward(layer, prepare_input(layer, x)), y)
    assert torch.equal(linear_backward(layer, grad), grad_x)


@pytest.mark.parametrize("width", [512, 96, 100])
def test_a_rotated_layer_multiplies_rotated_inputs_with_its_values(width: int) -> None:
    layer, block = quant_linear(RECIPES["int8_rotated"], width=width), rotation_block(width)
    x, grad = gaussian(8, width).double(), gaussian(8, 96, seed=3).double()
    y, grad_x = through(layer, x, grad)
    rotated = dequantize(layer.weight, layer.weight_scale, torch.float64)
    torch.testing.assert_close(y, F.linear(rotate(x, block), rotated, layer.bias.double()))
    torch.testing.assert_close(grad_x, rotate(grad @ rotated, block))
    torch.testing.assert_close(y, F.linear(x, layer.dequantized(torch.float64), layer.bias.double()))
    torch.testing.assert_close(grad_x, grad @ layer.dequantized(torch.float64))


@pytest.mark.parametrize("recipe", W8A8)
@pytest.mark.parametrize(("out", "width"), [(96, 512), (20, 100)])
def test_w8a8_is_its_definition(recipe: QuantRecipe, out: int, width: int) -> None:
    layer = quant_linear(recipe, out, width)
    x, grad = gaussian(40, width, seed=2), gaussian(40, out, seed=3)
    y, grad_x = through(layer, x, grad)
    block = rotation_block(width) if recipe.rotate else 1
    weight, scale = layer.weight.double(), layer.weight_scale.double()  # [out, in], [out, 1]
    rows = quantize_rows(x, recipe=recipe, block=block)
    expected = (rows.values.double() @ weight.T) * rows.scale.double()[:, None] * scale.T + layer.bias.double()
    back = quantize_rows(grad * layer.weight_scale.T, recipe=recipe)
    expected_x = rotate((back.values.double() @ weight) * back.scale.double()[:, None], block)
    tolerance = 1e-5 if recipe.values == "int8" else 1e-2  # sums of e4m3 come in bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_x.double(), expected_x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("values", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transposed_copy_changes_no_bit(values: str, dtype: torch.dtype) -> None:
    x, grad = gaussian(40, 512, seed=2).to(dtype), gaussian(40, 96, seed=3).to(dtype)
    one, two = (through(quant_linear(RECIPES[f"{values}_w8a8{end}"]), x, grad) for end in ("", "_transposed"))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_transposed_copy_is_the_one_that_backward_reads(name: str) -> None:
    layer, grad = quant_linear(RECIPES[f"{name}_w8a8_transposed"]), gaussian(40, 96)
    layer.weight.data = torch.zeros_like(layer.weight)
    assert (linear_backward(layer, grad) != 0).any() and (linear_forward(layer, gaussian(4, 512)) == layer.bias).all()


@pytest.mark.parametrize(
    ("name", "high"),
    [("fp8", 0.03), ("int8", 0.007), ("int8_rotated", 0.012), ("int8_w8a8", 0.016), ("fp8_w8a8", 0.045)],
)
def test_output_and_input_gradient_are_within_the_error_of_eight_bits(name: str, high: float) -> None:
    linear = plain_linear(384, 512)
    x, grad = gaussian(200, 512, seed=2), gaussian(200, 384, seed=3)
    exact = through(linear, x, grad)
    found = through(QuantLinear.from_linear(linear, recipe=RECIPES[name]), x, grad)
    for is_output, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
        error = ((ours - theirs).norm() / (theirs - (0 if is_output else linear.bias)).norm()).item()
        assert high / 3 < error < high


@pytest.mark.parametrize("name", ["int8_rotated", "int8_w8a8"])
def test_a_rotation_withstands_outliers_of_inputs_and_weights(name: str) -> None:
    linear = plain_linear(128, 1024, bias=False)
    linear.weight.data[:, ::500] *= 40.0
    x = gaussian(64, 1024, seed=2)
    x[:, 7::400] *= 60.0
    exact = linear(x)
    recipe = RECIPES[name]
    errors = [
        ((QuantLinear.from_linear(linear, recipe=each)(x) - exact).norm() / exact.norm()).item()
        for each in (recipe, dataclasses.replace(recipe, rotate=False))
    ]
    assert errors[0] < 0.02 and errors[1] > 2 * errors[0]


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_eight_bit_weights_and_nothing_else(recipe: QuantRecipe, dtype: torch.dtype) -> None:
    layer = quant_linear(recipe)
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(gaussian(20, 512).to(dtype).requires_grad_())
    kept = [layer.weight, layer.weight_scale, *([layer.weight_transposed] if recipe.transposed else [])]
    assert {t.untyped_storage().data_ptr() for t in saved} == {t.untyped_storage().data_ptr() for t in kept}
    y.sum().backward()


@every_recipe
@pytest.mark.parametrize(
    ("shape", "out", "width"), [((20,), 96, 512), ((2, 5), 96, 512), ((20,), 20, 100), ((3,), 96, 512)]
)
def test_the_output_may_be_added_to_in_place(recipe: QuantRecipe, shape: tuple[int, ...], out: int, width: int) -> None:
    """As an adapter does."""
    layer = quant_linear(recipe, out, width)
    x, delta = gaussian(*shape, width).requires_grad_(), gaussian(*shape, out, seed=4).requires_grad_()
    apart = layer(x) + delta
    together = layer(x)
    together.add_(delta)
    assert torch.equal(together, apart)
    grads = [torch.autograd.grad(y.square().sum(), (x, delta)) for y in (apart, together)]
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_a_bias_that_trains_has_the_sum_of_the_gradient() -> None:
    layer = quant_linear(RECIPES["int8_w8a8"])
    layer.bias.requires_grad_()
    grad = gaussian(2, 10, 96)
    (layer(gaussian(2, 10, 512)) * grad).sum().backward()
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


@every_recipe
@pytest.mark.parametrize("width", [512, 100])
def test_an_empty_layer_takes_a_state_dict(recipe: QuantRecipe, width: int) -> None:
    full = quant_linear(recipe, width=width)
    empty = QuantLinear(width, 96, recipe=recipe, device="meta")
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in full.state_dict().items()} | {
        "bias": (torch.Size([96]), torch.float32)
    }
    empty.load_state_dict(full.state_dict(), assign=True)
    x = gaussian(20, width)
    assert torch.equal(full(x), empty(x)) and not any(p.requires_grad for p in empty.parameters())


@every_recipe
def test_casting_a_model_leaves_the_eight_bits_and_the_scales(recipe: QuantRecipe) -> None:
    layer = quant_linear(recipe)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for name, tensor in layer.bfloat16().double().state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))


@every_recipe
def test_shapes_are_known_without_memory(recipe: QuantRecipe) -> None:
    layer = QuantLinear.from_linear(nn.Linear(512, 96, device="meta"), recipe=recipe)
    x = torch.empty(3, 7, 512, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.backward(torch.empty_like(y))
    assert y.shape == (3, 7, 96) and x.grad.shape == x.shape and y.dtype == x.grad.dtype == torch.bfloat16


def test_one_prepared_input_serves_all_layers_of_its_recipe_and_no_other() -> None:
    x = gaussian(20, 512)
    one, two = quant_linear(RECIPES["int8_w8a8"]), quant_linear(RECIPES["int8_w8a8"], out=48)
    prepared = prepare_input(one, x)
    assert torch.equal(linear_forward(two, prepared), two(x))
    for other in (quant_linear(RECIPES["int8_rotated"]), plain_linear(96, 512)):
        with pytest.raises(ValueError, match="prepared for"):
            linear_forward(other, prepared)


@every_recipe
def test_a_layer_shows_its_recipe(recipe: QuantRecipe) -> None:
    shown = repr(quant_linear(recipe))
    assert recipe.values in shown
    for word, holds in (("rotated", recipe.rotate), ("w8a8", recipe.compute == "w8a8")):
        assert (word in shown) == holds
