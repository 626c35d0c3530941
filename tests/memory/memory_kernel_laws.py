"""Laws of the 8-bit kernels; `test_kernels.py` runs this file in a process of its own, where Triton interprets.

By hand: `TRITON_INTERPRET=1 pytest tests/memory/memory_kernel_laws.py`; on a GPU without the variable.
The interpreter cuts bfloat16 off where a GPU rounds it: hence a whole step of tolerance there, and none elsewhere.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from memory.kernels import int8 as int8_kernel
from memory.kernels.dequantize import dequantize_runs
from memory.kernels.int8 import int8_matmul
from memory.kernels.reference import dequantize_runs_reference, int8_matmul_reference, quantize_rows_reference
from memory.kernels.rows import quantize_rows
from memory.quant.rotation import hadamard, rotate

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8).to(DEVICE)


def assert_rounded_alike(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the last bit of float32 and float16, or a step of bfloat16."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    relative = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=relative, atol=1e-6)


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["tn", "nn"])
@pytest.mark.parametrize(("m", "n", "k"), [(37, 45, 50), (1, 33, 64)])
def test_product_is_the_reference(layout: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b = int8(m, k), int8(*((n, k) if layout == "tn" else (k, n)))
    scale_a, scale_b = normal(m).abs() / k, normal(n).abs() / k
    bias = normal(n, dtype=torch.bfloat16)
    for scale, term in ((scale_b, bias), (None, None)):
        expected = int8_matmul_reference(a, b, scale_a, scale, layout=layout, bias=term, dtype=dtype)
        assert_rounded_alike(int8_matmul(a, b, scale_a, scale, layout=layout, bias=term, dtype=dtype), expected)


def test_sums_beyond_24_bits_are_exact() -> None:
    k = 1100  # 127^2 * 1100 has 25 bits: sums in float32 would lose the last
    a, b = torch.full((2, k), 127, dtype=torch.int8), torch.full((3, k), -127, dtype=torch.int8)
    a[1, 0], b[0, 0] = 126, 1
    exact = a.long() @ b.long().T
    ones = torch.ones(2, device=DEVICE)
    a, b = a.to(DEVICE), b.to(DEVICE)
    low = int8_matmul(a, b, ones, None, dtype=torch.float32)
    assert torch.equal(low.cpu(), exact.float())
    rest = torch.cat((b, b.new_full((3, 1), 127)), 1), torch.cat((a, a.new_full((2, 1), 127)), 1)
    assert torch.equal(int8_matmul(rest[1], rest[0], ones, None, dtype=torch.float32).cpu(), (exact + 127**2).float())


def test_both_layouts_give_the_same_bits() -> None:
    a, b, scale_a, scale_b = int8(19, 70), int8(21, 70), normal(19), normal(21)
    forward = int8_matmul(a, b, scale_a, scale_b)
    assert torch.equal(int8_matmul(a, b.T.contiguous(), scale_a, scale_b, layout="nn"), forward)


@pytest.mark.parametrize("tile", (*int8_kernel.TILES, *int8_kernel.SHORT_TILES), ids=str)
def test_every_tile_gives_the_same_bits(tile: int8_kernel.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda" and tile not in {*int8_kernel._candidates(1, DEVICE), *int8_kernel._candidates(999, DEVICE)}:
        pytest.skip("this card has less shared memory than the tile takes")
    monkeypatch.setattr(int8_kernel, "INTERPRETED_TILE", tile)
    monkeypatch.setattr(int8_kernel, "_candidates", lambda rows, device: [tile])
    monkeypatch.setattr(int8_kernel, "_chosen", {})
    a, b, scale_a, scale_b = int8(261, 150), int8(262, 150), normal(261), normal(262)
    expected = int8_matmul_reference(a, b, scale_a, scale_b, dtype=torch.float32)
    for layout, weight in (("tn", b), ("nn", b.T.contiguous())):
        assert torch.equal(int8_matmul(a, weight, scale_a, scale_b, layout=layout, dtype=torch.float32), expected)


def test_operands_that_do_not_fit_are_refused() -> None:
    a, b, scale_a, scale_b = int8(3, 8), int8(5, 8), normal(3), normal(5)
    for wrong in (
        lambda: int8_matmul(a, b[:, :4].contiguous(), scale_a, scale_b),
        lambda: int8_matmul(a, b, scale_a, scale_b, layout="nn"),
        lambda: int8_matmul(a, b.float(), scale_a, scale_b),
        lambda: int8_matmul(a[:, ::2], b[:, :4].contiguous(), scale_a, scale_b),
        lambda: int8_matmul(a, b, scale_b, scale_b),
        lambda: int8_matmul(a, b, scale_a, scale_b.double()),
        lambda: int8_matmul(a, b, scale_a, scale_b, layout="nt"),
        lambda: int8_matmul(a, b, scale_a, scale_b, bias=scale_a),
        lambda: int8_matmul(a, b, scale_a, scale_b, dtype=torch.float64),
        lambda: quantize_rows(a),
        lambda: quantize_rows(normal(3, 12), 8),
        lambda: quantize_rows(normal(3, 12), 3),
        lambda: quantize_rows(normal(12, 3).T),
        lambda: quantize_rows(normal(3, 12), 4, columns=normal(12)),
        lambda: quantize_rows(normal(3, 12), columns=normal(3)),
        lambda: quantize_rows(normal(3, 12), dtype=torch.uint8),
        lambda: dequantize_runs(a, normal(3, 3), torch.float32),
        lambda: dequantize_runs(a, normal(2, 4), torch.float32),
        lambda: dequantize_runs(a, normal(3, 4), torch.float64),
        lambda: dequantize_runs(normal(3, 8), normal(3, 4), torch.float32),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()


# ---- rows to 8 bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("k", [1, 50, 320])
def test_rows_without_rotation_are_the_reference_bit_for_bit(dtype: torch.dtype, eight: torch.dtype, k: int) -> None:
    x = normal(5, k, dtype=dtype)
    x[2] = 0
    columns = normal(k)
    for factors in (None, columns):
        values, scale = quantize_rows(x, columns=factors, dtype=eight)
        expected_values, expected_scale = quantize_rows_reference(x, columns=factors, dtype=eight)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(values.float(), expected_values.float())


@pytest.mark.parametrize(
    ("k", "order"), [(6, 2), (24, 4), (40, 8), (48, 16), (96, 32), (192, 64), (384, 128), (768, 256)]
)
def test_rotated_rows_are_the_reference_but_for_ties(k: int, order: int) -> None:
    x = normal(3, k, dtype=torch.bfloat16)
    x[1, 3] = 100.0  # an outlier, which the rotation is for
    values, scale = quantize_rows(x, order)
    expected_values, expected_scale = quantize_rows_reference(x, order)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    off = (values.int() - expected_values.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01


def test_quantised_rotated_back_and_scaled_is_the_row_again() -> None:
    x = normal(4, 512)
    values, scale = quantize_rows(x, 256)
    again = rotate(values.float() * scale[:, None], 256)
    half_step = scale[:, None] / 2 * 512**0.5  # a rotation keeps lengths: at most half a step in every number
    assert ((again - x).norm(dim=1, keepdim=True) <= half_step).all()
    assert (again - x).norm() < 0.02 * x.norm()


def test_a_single_number_becomes_a_row_of_the_matrix() -> None:
    x = torch.zeros(16, 16, device=DEVICE).fill_diagonal_(4.0)
    values, scale = quantize_rows(x, 16)
    torch.testing.assert_close(values.float() * scale[:, None], 4.0 * hadamard(16).to(DEVICE))


def test_a_row_that_is_not_finite_shows_it_and_no_other_does() -> None:
    x = normal(4, 40)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    for order in (None, 8):
        _, scale = quantize_rows(x, order)
        assert scale.isfinite().tolist() == [True, False, False, True]


def test_rows_may_lie_apart() -> None:
    x = normal(5, 60, dtype=torch.bfloat16)
    for one, other in zip(quantize_rows(x[:, 10:42]), quantize_rows(x[:, 10:42].contiguous()), strict=True):
        assert torch.equal(one, other)


def test_rows_beyond_two_to_the_31_numbers_are_found() -> None:
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # 4 GiB of addresses, of which 3 pages are used
    x = far.as_strided((3, 20), (2**30, 1))
    x.copy_(normal(3, 20))
    for one, other in zip(quantize_rows(x), quantize_rows(x.contiguous()), strict=True):
        assert torch.equal(one, other)


# ---- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize(("k", "runs"), [(33, 1), (66, 6), (4200, 5)])  # the last takes two programs a row
def test_weights_come_back_as_the_reference_says(dtype: torch.dtype, eight: torch.dtype, k: int, runs: int) -> None:
    values = (normal(5, k) * 40).to(eight)
    for scale in (normal(5, runs, dtype=torch.bfloat16), normal(5, runs)):
        expected = dequantize_runs_reference(values, scale, dtype)
        assert_rounded_alike(dequantize_runs(values, scale, dtype), expected)


def test_every_e4m3_number_comes_and_goes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F].view(torch.float8_e4m3fn).to(DEVICE)[None]  # all but the two NaNs
    one = torch.ones(1, 1, device=DEVICE)
    numbers = dequantize_runs(codes, one, torch.float32)
    assert torch.equal(numbers, codes.float())
    values, scale = quantize_rows(numbers, dtype=torch.float8_e4m3fn)
    assert scale.item() == 1.0 and torch.equal(values.float(), numbers)


def test_numbers_between_two_e4m3_go_to_the_nearer_and_ties_to_the_even() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    step = codes[1:] - codes[:-1]
    row = torch.cat((middle, middle - step / 64, middle + step / 64, torch.tensor([448.0])))
    row = torch.cat((row, -row))[None].to(DEVICE)
    values, scale = quantize_rows(row, dtype=torch.float8_e4m3fn)
    assert scale.item() == 1.0
    assert torch.equal(values.float(), row.to(torch.float8_e4m3fn).float())
