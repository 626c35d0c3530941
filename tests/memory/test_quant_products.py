"""Laws of 8-bit products: exact sums, any size and layout, CUDA's rules kept on every device, devices refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from memory.kernels.reference import int8_matmul_reference, quantize_rows_reference
from memory.quant import RECIPES, QuantizedRows, QuantRecipe, quantize_rows, require_device, rotate, scaled_product

INT8, E4M3 = RECIPES["int8_w8a8"], RECIPES["fp8_w8a8"]
DTYPES = {INT8: torch.int8, E4M3: torch.float8_e4m3fn}
both = pytest.mark.parametrize("recipe", [INT8, E4M3], ids=["int8", "e4m3"])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(m: int, k: int, n: int, recipe: QuantRecipe) -> tuple[QuantizedRows, torch.Tensor, torch.Tensor]:
    """Rows, a weight and its scales."""
    rows = quantize_rows(gaussian(m, k), recipe=recipe)
    weight = quantize_rows(gaussian(n, k, seed=1), recipe=recipe)
    return rows, weight.values, weight.scale


def by_definition(rows: QuantizedRows, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The emulation: exact sums in float64."""
    return (rows.values.double() @ weight.double().T) * rows.scale.double()[:, None] * scale.double()


@both
@pytest.mark.parametrize("block", [1, 64])
def test_rows_are_rounded_to_the_nearest_step(recipe: QuantRecipe, block: int) -> None:
    x = gaussian(33, 192) * torch.logspace(-20, 20, 33)[:, None]
    x[5] = 0.0
    values, scale = quantize_rows(x, recipe=recipe, block=block)
    assert values.dtype == DTYPES[recipe] and values.shape == x.shape and scale.shape == (33,)
    steps = 0.5001 if recipe is INT8 else 16.001  # e4m3 steps are 32 below its largest, 448
    assert ((values.float() * scale[:, None] - rotate(x, block)).abs() <= scale[:, None] * steps).all()
    largest = values.float().abs().amax(-1)
    assert ((largest == (127 if recipe is INT8 else 448)) == (x.abs().amax(-1) > 0)).all()


@both
@pytest.mark.parametrize("has_columns", [False, True])
def test_rows_are_those_of_the_kernels_reference(recipe: QuantRecipe, has_columns: bool) -> None:
    x, columns = gaussian(9, 96).bfloat16(), gaussian(96, seed=2).abs() if has_columns else None
    values, scale = quantize_rows(x, recipe=recipe, column_scale=columns)
    expected_values, expected_scale = quantize_rows_reference(x, columns=columns, dtype=DTYPES[recipe])
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


@both
def test_a_row_that_is_not_finite_shows_it(recipe: QuantRecipe) -> None:
    for bad in (float("nan"), float("inf")):
        x = gaussian(3, 64)
        x[1, 7] = bad
        assert torch.equal(quantize_rows(x, recipe=recipe).scale.isnan(), torch.tensor([False, True, False]))


@both
def test_chunks_of_rows_do_not_show(recipe: QuantRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight, scale = factors(100, 64, 48, recipe)
    whole = scaled_product(rows, weight, scale, None, torch.float32)
    monkeypatch.setattr("memory.quant.products.rows_at_once", lambda width, device: 7)
    monkeypatch.setattr("memory.quant.products.INT32_ELEMENTS", 48 * 30)
    again = quantize_rows(gaussian(100, 64), recipe=recipe)
    assert torch.equal(again.values.view(torch.uint8), rows.values.view(torch.uint8))
    assert torch.equal(again.scale, rows.scale)
    assert torch.equal(scaled_product(again, weight, scale, None, torch.float32), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.booleans())
def test_int8_sums_are_exact_at_every_size_and_layout(m: int, k: int, n: int, turned: bool, has_bias: bool) -> None:
    rows, weight, scale = factors(m, k, n, INT8)
    bias = gaussian(n, seed=3) if has_bias else None
    lies = weight.T.contiguous().T if turned else weight
    found = scaled_product(rows, lies, scale, bias, torch.float32)
    assert torch.equal(
        found, int8_matmul_reference(rows.values, weight, rows.scale, scale, bias=bias, dtype=torch.float32)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 40), st.booleans())
def test_e4m3_sums_are_rounded_to_bfloat16_alone(m: int, k: int, n: int, turned: bool) -> None:
    rows, weight, scale = factors(m, k, n, E4M3)
    found = scaled_product(rows, weight.T.contiguous().T if turned else weight, scale, None, torch.float32)
    exact = by_definition(rows, weight, scale)
    sums = (rows.values.double().abs() @ weight.double().abs().T) * rows.scale.double()[:, None] * scale.double()
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + sums * 2**-20).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_scale_is_ones_and_the_dtype_is_the_one_asked_for(recipe: QuantRecipe, dtype: torch.dtype) -> None:
    rows, weight, scale = factors(20, 64, 24, recipe)
    plain = scaled_product(rows, weight, None, None, dtype)
    assert plain.dtype == dtype and torch.equal(plain, scaled_product(rows, weight, torch.ones(24), None, dtype))


@pytest.mark.parametrize("shape", [(1, 8, 8), (17, 8, 8), (5, 7, 3), (33, 100, 20)])
@pytest.mark.parametrize("turned", [False, True])
@both
def test_the_rules_of_cuda_are_kept_everywhere(
    recipe: QuantRecipe, shape: tuple[int, int, int], turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiple, calls = (8 if recipe is INT8 else 16), []

    def check(a: torch.Tensor, b: torch.Tensor) -> None:
        calls.append(a)
        assert a.shape[0] > 16 and a.is_contiguous() and b.T.is_contiguous()
        assert a.shape[1] == b.shape[0] and b.shape[0] % multiple == 0 and b.shape[1] % multiple == 0

    int_mm, scaled_mm = torch._int_mm, torch._scaled_mm

    def strict_int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        check(a, b)
        return int_mm(a, b)

    def strict_scaled_mm(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):  # type: ignore[no-untyped-def]
        check(a, b)
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        assert scale_a.is_contiguous() and scale_b.is_contiguous() and out_dtype == torch.bfloat16
        return scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum)

    monkeypatch.setattr(torch, "_int_mm", strict_int_mm)
    monkeypatch.setattr(torch, "_scaled_mm", strict_scaled_mm)
    monkeypatch.setattr("memory.quant.products.INT32_ELEMENTS", 20 * shape[2])  # the last chunk is a short one
    rows, weight, scale = factors(*shape, recipe)
    found = scaled_product(rows, weight.T.contiguous().T if turned else weight, scale, None, torch.float32)
    torch.testing.assert_close(found.double(), by_definition(rows, weight, scale), rtol=2**-7, atol=1e-2)
    assert calls and found.shape == (shape[0], shape[2])


def test_sums_that_could_overflow_are_refused() -> None:
    width = 2**31 // 127**2 + 1
    rows = QuantizedRows(torch.zeros(1, width, dtype=torch.int8), torch.ones(1))
    with pytest.raises(InputError, match="at most 133144"):
        scaled_product(rows, torch.zeros(1, width, dtype=torch.int8), None, None, torch.float32)


@pytest.mark.parametrize(
    ("recipe", "capability", "is_refused"),
    [(E4M3, (8, 9), False), (E4M3, (9, 0), False), (E4M3, (8, 6), True), (INT8, (8, 0), False), (INT8, (7, 5), True)],
)
def test_a_gpu_without_the_tensor_cores_is_refused_by_name(
    recipe: QuantRecipe, capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 3000")
    require_device.cache_clear()
    try:
        if is_refused:
            with pytest.raises(InputError, match=f"Card 3000 with {capability[0]}.{capability[1]}"):
                require_device(recipe, torch.device("cuda", 0))
        else:
            require_device(recipe, torch.device("cuda", 0))
    finally:
        require_device.cache_clear()


@both
def test_other_devices_multiply_dequantised_weights_alone(recipe: QuantRecipe) -> None:
    with pytest.raises(InputError, match="found mps"):
        require_device(recipe, torch.device("mps"))
    for dequant in (RECIPES["fp8"], RECIPES["int8_rotated"]):
        require_device(dequant, torch.device("mps"))
    require_device(recipe, torch.device("cpu"))
