"""Laws of 8-bit weights: error bounds, exact rounding, a plain linear's gradient, nothing extra kept for backward."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from core.errors import InputError
from memory.quant import QuantLinear, dequantize, quantize, runs_per_row

SHAPES = [(48, 192), (40, 100), (3, 64), (7, 1), (1, 6400)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.02) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std).to(dtype)


def quant_linear(out: int, width: int, *, bias: bool = True, seed: int = 0) -> QuantLinear:
    linear = nn.Linear(width, out, bias=bias)
    linear.weight.data = gaussian(out, width, seed=seed)
    if bias:
        linear.bias.data = gaussian(out, seed=seed + 1)
    return QuantLinear.from_linear(linear)


def product(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values * scale in float64, by the definition."""
    repeat = values.shape[1] // scale.shape[1]
    return values.double() * scale.double().expand(values.shape[0], -1).repeat_interleave(repeat, dim=1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_fallback_to_rows(shape: tuple[int, int]) -> None:
    values, scale = quantize(gaussian(*shape))
    assert values.dtype == torch.float8_e4m3fn and values.shape == shape
    assert scale.shape == (shape[0], runs_per_row(shape[1]))
    assert runs_per_row(shape[1]) == (shape[1] // 64 if shape[1] % 64 == 0 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gaussian_error_is_that_of_a_three_bit_mantissa(dtype: torch.dtype) -> None:
    weight = gaussian(256, 1024, dtype=dtype)
    back = dequantize(*quantize(weight), torch.float32)
    error = ((back - weight.float()).norm() / weight.float().norm()).item()
    assert 0.020 < error < 0.0265
    assert (
        (back - weight.float()).abs() <= weight.float().abs() / 16 * 1.001 + weight.float().abs().max() * 2**-17
    ).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_relative_error_does_not_depend_on_the_size_of_the_weights(factor: float) -> None:
    weight = gaussian(64, 256, dtype=torch.float64)
    weight[:, ::64] *= 40.0  # outliers
    weight = (weight * factor).float()
    back = dequantize(*quantize(weight), torch.float32)
    assert ((back.double() - weight.double()).norm() / weight.double().norm()).item() < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_quantising_the_dequantised_weight_changes_nothing(shape: tuple[int, int]) -> None:
    first = quantize(gaussian(*shape))
    second = quantize(dequantize(*first, torch.float32))
    assert torch.equal(bits(first.values), bits(second.values)) and torch.equal(first.scale, second.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_dequantised_is_the_product_rounded_once_for_every_code(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN codes, which quantize never writes
    values = codes.view(torch.float8_e4m3fn)
    scale = gaussian(4, 4, std=0.001, dtype=scale_dtype)
    exact = product(values, scale)
    expected = exact if dtype == torch.float64 else exact.float().to(dtype)
    assert torch.equal(dequantize(values, scale, dtype), expected)
    if scale_dtype == torch.bfloat16:
        assert torch.equal(dequantize(values, scale, torch.float32).double(), exact)


def test_one_scale_for_a_tensor_or_a_row_broadcasts() -> None:
    values, _ = quantize(gaussian(6, 128))
    for shape in [(1, 1), (6, 1), (1, 2)]:
        scale = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(dequantize(values, scale, torch.float32), product(values, scale).float())


def test_zero_and_vanishing_runs_stay_clean() -> None:
    weight = gaussian(4, 128)
    weight[1] = 0.0
    weight[2, 64:] = 0.0
    weight[3] = 1e-44  # below what a scale can resolve
    values, scale = quantize(weight)
    back = dequantize(values, scale, torch.bfloat16)
    assert torch.isfinite(back).all() and not torch.isnan(values.float()).any()
    assert (back[1] == 0).all() and (back[2, 64:] == 0).all() and (back[3].abs() < 1e-38).all()
    assert (back[0] != 0).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    weight = gaussian(5, 100)
    weight[3, 17] = bad
    with pytest.raises(InputError, match="blocks.0.ffn.0.*row 3"):
        quantize(weight, name="blocks.0.ffn.0")


def test_what_is_no_matrix_is_refused() -> None:
    for wrong in (torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(3, 64, dtype=torch.int8)):
        with pytest.raises(InputError, match="float matrix"):
            quantize(wrong)


@pytest.mark.parametrize(
    "make", [lambda w: w, lambda w: w.T, lambda w: w[:, ::2]], ids=["plain", "transposed", "strided"]
)
def test_the_weight_is_left_alone_and_its_layout_does_not_matter(make) -> None:  # type: ignore[no-untyped-def]
    weight = make(gaussian(128, 256))
    before = weight.clone()
    one, two = quantize(weight), quantize(weight.contiguous())
    assert torch.equal(weight, before)
    assert torch.equal(bits(one.values), bits(two.values)) and torch.equal(one.scale, two.scale)


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(37, 192)
    whole = quantize(weight)
    back = dequantize(*whole, torch.bfloat16)
    monkeypatch.setattr("memory.quant.weights.rows_at_once", lambda in_features, device: 5)
    chunked = quantize(weight)
    assert torch.equal(bits(whole.values), bits(chunked.values)) and torch.equal(whole.scale, chunked.scale)
    assert torch.equal(back, dequantize(*whole, torch.bfloat16))


INPUTS = {
    "1-D": lambda x: x[0, 0],
    "2-D": lambda x: x[0],
    "3-D": lambda x: x,
    "4-D": lambda x: x.unflatten(1, (3, 4)),
    "sliced": lambda x: x[:, ::2],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", INPUTS.values(), ids=INPUTS.keys())
def test_output_and_input_gradient_are_those_of_a_plain_linear(view, dtype: torch.dtype, bias: bool) -> None:  # type: ignore[no-untyped-def]
    layer = quant_linear(96, 128, bias=bias)
    x = gaussian(2, 12, 128, seed=3, std=1.0, dtype=dtype).requires_grad_()
    plain_bias = layer.bias.to(dtype) if bias else None
    outputs, gradients = [], []
    for run in (layer, lambda y: F.linear(y, layer.dequantized(dtype), plain_bias)):
        y = run(view(x))
        weights = gaussian(*y.shape, seed=4, std=1.0, dtype=dtype)
        gradients.append(torch.autograd.grad((y * weights).sum(), x)[0])
        outputs.append(y)
    assert outputs[0].dtype == dtype
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(gradients[0], gradients[1])


def test_an_input_that_is_not_contiguous_differs_by_the_order_of_sums_only() -> None:
    layer = quant_linear(96, 128)
    x = gaussian(2, 12, 128, seed=3, std=1.0).requires_grad_()
    (ours,) = torch.autograd.grad(layer(x.transpose(0, 1)).square().sum(), x)
    (plain,) = torch.autograd.grad(
        F.linear(x.transpose(0, 1), layer.dequantized(x.dtype), layer.bias).square().sum(), x
    )
    torch.testing.assert_close(ours, plain)


def test_gradcheck() -> None:
    layer = quant_linear(6, 128).double()
    x = gaussian(3, 128, std=1.0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    layer.bias = nn.Parameter(layer.bias.double())  # a bias that trains gets its gradient too
    assert torch.autograd.gradcheck(lambda y, b: torch.func.functional_call(layer, {"bias": b}, y), (x, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_eight_bit_weight_and_nothing_else(dtype: torch.dtype) -> None:
    layer = quant_linear(256, 512)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(gaussian(4, 512, dtype=dtype).requires_grad_())
    own = {p.untyped_storage().data_ptr() for p in (layer.weight, layer.weight_scale)}
    assert {t.untyped_storage().data_ptr() for t in saved} == own  # references, no copies
    assert sum(t.numel() * t.element_size() for t in saved) == 256 * 512 + 2 * 256 * 512 // 64
    y.sum().backward()


def test_nothing_is_kept_without_gradients() -> None:
    layer = quant_linear(64, 64)
    assert not layer(gaussian(4, 64)).requires_grad
    with torch.no_grad():
        assert not layer(gaussian(4, 64).requires_grad_()).requires_grad


def test_autocast_decides_the_dtype_as_for_a_plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quant_linear(32, 64)
    made: list[torch.dtype] = []
    monkeypatch.setattr(
        "memory.quant.linear.dequantize", lambda v, s, dtype: made.append(dtype) or dequantize(v, s, dtype)
    )
    x = gaussian(4, 64, std=1.0).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.bfloat16()))
    assert grad.dtype == torch.float32 and grad.abs().sum() > 0
    assert set(made) == {torch.bfloat16}  # no float32 weight on the way


def test_moving_and_casting_a_model_leaves_the_eight_bits() -> None:
    layer = quant_linear(32, 100)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for move in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.float64), lambda m: m.float()):
        move(layer)
        for name, tensor in layer.state_dict().items():
            assert tensor.dtype == before[name].dtype and torch.equal(bits(tensor), bits(before[name]))


@pytest.mark.parametrize("width", [192, 100])
def test_an_empty_layer_takes_a_state_dict(width: int) -> None:
    full = quant_linear(16, width)
    empty = QuantLinear(width, 16, device="meta")
    assert all(p.is_meta and not p.requires_grad for p in empty.parameters())
    empty.load_state_dict(full.state_dict(), assign=True)
    assert not any(p.requires_grad for p in empty.parameters())
    x = gaussian(2, width)
    assert torch.equal(full(x), empty(x))


def test_a_linear_on_meta_becomes_a_layer_on_meta() -> None:
    layer = QuantLinear.from_linear(nn.Linear(128, 16, device="meta"))
    assert layer.weight.is_meta and layer.weight_scale.shape == (16, 2)
    assert layer(torch.empty(3, 128, device="meta")).shape == (3, 16)
