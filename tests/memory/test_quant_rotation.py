"""Laws of the rotation: its own inverse, lengths kept, products of two rotated vectors kept, outliers spread."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memory.quant import hadamard, rotate, rotation_block

ORDERS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("order", ORDERS)
def test_orthogonal_symmetric_and_of_one_magnitude(order: int) -> None:
    matrix = hadamard(order, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_regular_what_all_inputs_share_stays_spread(order: int) -> None:
    assert torch.equal(hadamard(order, torch.float64).sum(-1), torch.ones(order, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_orders_that_are_powers_of_four_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    for order in (4, 16, 64, 256):
        assert torch.equal(hadamard(order, dtype).double(), hadamard(order, torch.float64))


@pytest.mark.parametrize("block", ORDERS)
def test_rotating_twice_is_identity_and_lengths_are_kept(block: int) -> None:
    x = random(2, 5, 768)
    once = rotate(x, block)
    torch.testing.assert_close(rotate(once, block), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(once.norm(dim=-1), x.norm(dim=-1))
    assert block == 1 or not torch.allclose(once, x)


@pytest.mark.parametrize("width", [96, 100, 768, 7])
def test_a_rotated_linear_of_a_rotated_input_is_the_linear(width: int) -> None:
    x, weight, block = random(6, width), random(9, width, seed=1), rotation_block(width)
    torch.testing.assert_close(F.linear(rotate(x, block), rotate(weight, block)), F.linear(x, weight))


def test_blocks_are_rotated_each_for_itself_by_the_matrix() -> None:
    x = random(3, 768)
    matrix = torch.block_diag(*[hadamard(256, torch.float64)] * 3)
    torch.testing.assert_close(rotate(x, 256), x @ matrix)


def test_one_outlier_becomes_numbers_of_a_sixteenth() -> None:
    x = torch.zeros(512, dtype=torch.float64)
    x[300] = 16.0
    assert torch.equal(rotate(x, 256).abs(), torch.cat([torch.zeros(256), torch.ones(256)]).double())


@given(st.integers(1, 100_000))
def test_the_block_is_the_largest_power_of_two_that_divides(width: int) -> None:
    block = rotation_block(width)
    assert block in ORDERS and width % block == 0 and (block == 256 or width % (2 * block) != 0)


@pytest.mark.parametrize("order", [0, 3, 12, -4])
def test_an_order_that_is_no_power_of_two_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(order)
