"""Laws of computing some rows at a time: the same values and gradients, and nothing kept but the arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wan_ext.norms import layer_norm
from wan_ext.rows import in_rows


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(x, shift, scale, weight, bias):
    return F.linear(layer_norm(x, 1 + scale, shift, eps=1e-6, dtype=torch.float64), weight, bias)


def arguments() -> list[torch.Tensor]:
    shapes = (2, 11, 12), (2, 1, 12), (2, 1, 12), (5, 12), (5,)
    return [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def value_and_gradients(function, given: list[torch.Tensor]) -> list[torch.Tensor]:
    out = function(*given)
    wanted = [tensor for tensor in given if tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * random(*out.shape, seed=9)).sum(), wanted)]


@pytest.mark.parametrize("rows", [1, 3, 10, 11, 100])
@pytest.mark.parametrize("frozen", [(), (3, 4), (0,), (0, 1, 4), (1, 2, 3, 4)])
def test_some_rows_at_a_time_are_all_rows_at_once(rows: int, frozen: tuple[int, ...]) -> None:
    given = [tensor.detach() if number in frozen else tensor for number, tensor in enumerate(arguments())]
    found = value_and_gradients(lambda *tensors: in_rows(head, *tensors, rows=rows), given)
    expected = value_and_gradients(head, given)
    assert len(found) == len(expected) == 6 - len(frozen)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    if rows >= 11:
        assert torch.equal(found[0], expected[0])


def test_the_function_sees_no_more_rows_than_it_should() -> None:
    seen = []

    def spy(x, *others):
        seen.append(x.shape[1])
        return head(x, *others)

    in_rows(spy, *arguments(), rows=4).sum().backward()
    assert seen == [4, 4, 3] * 2


def test_only_the_arguments_are_kept() -> None:
    given, saved = arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        in_rows(head, *given, rows=4)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in given}


def test_without_gradients_nothing_is_recorded() -> None:
    with torch.no_grad():
        assert not in_rows(head, *arguments(), rows=4).requires_grad
