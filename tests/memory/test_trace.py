"""The tracer counts what tensors hold: against sums done by hand, and against an allocator that counts for itself."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memory.trace import Tracer, part, peak_bytes

MB = 1_000_000


def numbers(megabytes: int, *, requires_grad: bool = False) -> Tensor:
    return torch.empty(megabytes * MB // 4, device="meta", requires_grad=requires_grad)


def test_a_chain_of_results_counts_what_lives_at_once() -> None:
    def chain() -> Tensor:
        a = numbers(8)
        b = a + 1  # 16
        c = torch.cat((a, b))  # 32
        del a, b
        return c.exp()  # 16 + 16

    trace = peak_bytes(chain)
    assert trace.peak == 32 * MB
    assert trace.remaining == 16 * MB


def test_views_and_results_in_place_count_nothing() -> None:
    def views() -> Tensor:
        a = numbers(8)
        return a.view(-1, 2).t()[:, 3:].mul_(2).unsqueeze(0)

    assert peak_bytes(views).peak == 8 * MB


def test_tensors_that_nobody_named_do_not_count_nor_do_their_views() -> None:
    weight = numbers(8)
    assert peak_bytes(lambda: weight.view(-1, 4).t().mul_(2)).peak == 0
    assert peak_bytes(lambda: weight.view(-1, 4).t().mul_(2), held={"weights": [weight]}).peak == 8 * MB
    assert peak_bytes(lambda: weight, held={"weights": [weight, weight.view(2, -1)]}).peak == 8 * MB


def test_parts_add_up_to_the_peak_and_the_innermost_label_counts() -> None:
    def labelled() -> list[Tensor]:
        kept = [numbers(1)]
        with part("forward"):
            kept.append(numbers(2))
            with part("attention"):
                kept.append(numbers(4))
            kept.append(numbers(8))
        with part("backward"):
            kept.pop()
            kept.append(numbers(3))  # after the peak
        return kept

    trace = peak_bytes(labelled, held={"weights": [numbers(16)]})
    assert trace.by_part == {"weights": 16 * MB, "other": MB, "forward": 10 * MB, "attention": 4 * MB}
    assert sum(trace.by_part.values()) == trace.peak == 31 * MB
    assert trace.remaining == 26 * MB


def test_labels_mean_nothing_without_a_tracer() -> None:
    with part("nowhere"):
        assert numbers(1).numel() == MB // 4


def test_backward_counts_what_autograd_keeps() -> None:
    layers = nn.Sequential(*(nn.Sigmoid() for _ in range(6)))  # each keeps its result
    x = numbers(4, requires_grad=True)

    def step() -> None:
        layers(x).sum().backward()

    trace = peak_bytes(step)
    # six results; in the first backward two gradients beside them (the sum's is one number that is expanded)
    assert 7 * 4 * MB <= trace.peak <= 8 * 4 * MB
    assert trace.remaining == 4 * MB  # x.grad


def test_recomputing_keeps_only_inputs() -> None:
    from memory.runners import run_checkpointed, run_plain

    blocks = [nn.Sequential(nn.Linear(100, 400), nn.GELU(), nn.Linear(400, 100)).to("meta") for _ in range(8)]
    for block in blocks:
        block.requires_grad_(False)

    def peak(runner) -> int:
        x = torch.empty(5000, 100, device="meta", requires_grad=True)
        return peak_bytes(lambda: runner(blocks, x).sum().backward()).peak

    rows, inner = 5000 * 100 * 4, 5000 * 400 * 4
    assert peak(run_plain) >= 8 * inner
    assert 8 * rows + 2 * inner <= peak(run_checkpointed) <= 12 * rows + 3 * inner


def test_the_same_program_counts_the_same_on_the_cpu() -> None:
    def step(device: str) -> int:
        x = torch.ones(64, 32, device=device, requires_grad=True)
        weight = torch.ones(48, 32, device=device, requires_grad=True)

        def run() -> None:
            F.silu(x @ weight.t()).square().sum().backward()

        return peak_bytes(run, held={"inputs": [x, weight]}, device_type=device).peak

    gc.collect()
    assert step("cpu") == step("meta") > 0


def test_attention_is_traced_as_the_kernel_of_a_gpu() -> None:
    batch, heads, rows, channels = 1, 2, 1000, 32
    shape = (batch, heads, rows, channels)
    q, k, v = (torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    unit = 2 * batch * heads * rows * channels  # bytes of one of them
    forward = peak_bytes(lambda: F.scaled_dot_product_attention(q, k, v))
    assert unit < forward.peak < 1.2 * unit + 1000  # a number a row beside it, and no scores
    backward = peak_bytes(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    inner = 4 * heads * 1024 * (channels + 1)
    # out (its gradient is one number that is expanded), dq, dk, dv, and the kernel's own sum in float32
    assert backward.peak == pytest.approx(4 * unit + inner, rel=0.02)


def test_storages_that_grow_and_shrink_are_followed() -> None:
    with Tracer() as tracer:
        a = numbers(1)
        a.resize_(2 * MB)
        grown = tracer.trace()
        a.resize_(MB)
        del a
        assert grown.peak == 8 * MB
        assert tracer.trace().remaining == 0


def test_an_error_leaves_no_tracer_behind() -> None:
    def broken() -> None:
        with part("here"):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        peak_bytes(broken)
    from memory.trace import _ACTIVE

    assert not _ACTIVE
