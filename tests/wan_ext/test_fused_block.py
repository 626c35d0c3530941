"""Laws of the block by hand: it is the plain block, whatever the schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.errors import InputError
from memory.runners import run_plain, run_with, trainable_parameters
from networks.lora_linear import LoRAAdapter, block_linears, inject_lora
from tests.networks.cases import make_dit, small
from tests.wan_ext.models import SMALL, lively_dit, random_inputs, stored_in
from wan_ext.dit import WanBlock, WanDiT
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths
from wan_ext.fused_schedule import head_slices
from wan_ext.rope import rope_table

CLIPS, GRID, TEXT = 2, (3, 2, 3), 7
TOKENS = 18
SCHEDULES = {
    "all at once": BlockSchedule(),
    "attention kept": BlockSchedule(keep_attention=True),
    "3 head groups": BlockSchedule(head_groups=3),
    "4 head groups, 5 tokens": BlockSchedule(head_groups=4, token_chunk=5),
    "2 head groups, 7 tokens, attention kept": BlockSchedule(head_groups=2, token_chunk=7, keep_attention=True),
    "a clip at a time": BlockSchedule(token_chunk=20),
    "two frames at a time": BlockSchedule(token_chunk=13),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def double_block(*, image: bool = False, seed: int = 0) -> WanBlock:
    config = replace(SMALL, image_dim=80) if image else SMALL
    return lively_dit(config, seed).double().blocks[0]  # type: ignore[return-value]


def block_inputs(dtype: torch.dtype, *, frames: int = 1, image: bool = False) -> tuple[Tensor | None, ...]:
    """x, modulation, context, rope, image_context; the wide ones at least float32."""
    wide, dim = torch.promote_types(dtype, torch.float32), SMALL.dim
    return (
        draw(CLIPS, TOKENS, dim, dtype=wide, seed=1), draw(CLIPS, frames, 6, dim, dtype=wide, seed=2),
        draw(CLIPS, TEXT, dim, dtype=dtype, seed=3),
        rope_table(*GRID, head_dim=SMALL.head_dim, device=torch.device("cpu")),
        draw(CLIPS, 5, dim, dtype=dtype, seed=4) if image else None,
    )  # fmt: skip


def plain(block: WanBlock, inputs: tuple, needed: tuple[bool, ...], grad: Tensor):
    """Output, gradients of the needed inputs and of the parameters, by autograd."""
    inputs = tuple(
        given.clone().requires_grad_() if need else given for given, need in zip(inputs, needed, strict=True)
    )
    wanted = [given for given, need in zip(inputs, needed, strict=True) if need]
    output = block(*inputs)
    return output.detach(), torch.autograd.grad(output, (*wanted, *trainable_parameters(block)), grad)


def fused(block: WanBlock, inputs: tuple, needed: tuple[bool, ...], grad: Tensor, schedule: BlockSchedule):
    """The same by hand."""
    maths = FusedBlockMaths(schedule)
    before = [given.clone() if given is not None else None for given in inputs]
    output, kept = maths.forward(block, inputs, keep=True)
    assert len(kept) == (2 if schedule.keep_attention else 0)
    copies = [tensor.clone() for tensor in kept]
    of_inputs, of_parameters = maths.backward(block, inputs, kept, grad.clone(), needed=needed)
    for given, copy in zip((*inputs, *kept), (*before, *copies), strict=True):
        assert given is None or torch.equal(given, copy)  # nothing but the gradient is written into
    assert all((gradient is None) != need for gradient, need in zip(of_inputs, needed, strict=True))
    return output, [gradient for gradient in of_inputs if gradient is not None] + list(of_parameters)


@every_schedule
@pytest.mark.parametrize("frames", [1, GRID[0]], ids=["a modulation a clip", "a modulation a frame"])
@pytest.mark.parametrize("image", [False, True], ids=["text", "text and image"])
def test_is_the_plain_block_with_every_gradient(schedule, frames, image):
    block = double_block(image=image)
    inputs, grad = block_inputs(torch.float64, frames=frames, image=image), draw(CLIPS, TOKENS, SMALL.dim, seed=9)
    needed = (True, True, True, False, image)
    output, expected = plain(block, inputs, needed, grad)
    found, gradients = fused(block, inputs, needed, grad, schedule)
    torch.testing.assert_close(found, output, rtol=1e-10, atol=1e-12)
    count = sum(needed)
    for gradient, other in zip(gradients[:count], expected[:count], strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-11)
    names = [name for name, _ in block.named_parameters()]
    for name, gradient, other in zip(names, gradients[count:], expected[count:], strict=True):
        # What the plain block casts to float32 has a gradient rounded to float32.
        near = 1e-6 if name == "modulation" or name.startswith("norm3") else 1e-9
        torch.testing.assert_close(gradient, other, rtol=near, atol=near, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck_agrees():
    block, (x, modulation, context, rope, _) = double_block(), block_inputs(torch.float64)
    context = context[:, :2]
    block.requires_grad_(False)
    maths = FusedBlockMaths(BlockSchedule(head_groups=2, token_chunk=13))

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return maths.forward(block, (*inputs, rope), keep=True)[0]

        @staticmethod
        def backward(ctx, grad):
            inputs = (*ctx.saved_tensors, rope)
            return maths.backward(block, inputs, (), grad.clone(), needed=(True, True, True, False))[0][:3]

    wanted = tuple(tensor.clone().requires_grad_() for tensor in (x, modulation, context))
    assert torch.autograd.gradcheck(Node.apply, wanted, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", [SCHEDULES["all at once"], SCHEDULES["4 head groups, 5 tokens"]])
def test_in_low_precision_it_is_as_near_to_float64_as_the_plain_block(dtype, schedule):
    exact = lora_dit(torch.float64)
    model = lora_dit(dtype)
    grad = draw(CLIPS, TOKENS, SMALL.dim, seed=9)
    needed = (True, False, False, False, False)
    _, truth = plain(exact.blocks[0], block_inputs(torch.float64), needed, grad)
    inputs, grad = block_inputs(dtype), grad.float()
    output, by_autograd = plain(model.blocks[0], inputs, needed, grad)
    found, by_hand = fused(model.blocks[0], inputs, needed, grad, schedule)
    torch.testing.assert_close(found, output, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}))
    for hand, auto, true in zip(by_hand, by_autograd, truth, strict=True):
        assert hand.dtype == auto.dtype
        floor = 2 * torch.finfo(dtype).eps * true.norm()
        assert (hand - true).norm() <= 1.5 * (auto - true).norm() + floor


def lora_dit(dtype: torch.dtype, *, quantised: bool = False, dropout: float = 0.0, levels: int = 2) -> WanDiT:
    """A frozen model of which only adapters train, `levels` of them on every linear."""
    dit = make_dit(small("t2v-A14B"), quantised=quantised)
    if dtype == torch.float64:
        dit.double()
    elif not quantised:
        dit = stored_in(dit, dtype)
    dit.requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for level in range(levels):
        adapters = {}
        for name, linear in block_linears(dit).items():
            down, up = (
                0.2 * torch.randn(shape, generator=generator)
                for shape in ((3, linear.in_features), (linear.out_features, 3))
            )
            adapters[name] = LoRAAdapter(down, up, alpha=2.0, dropout=dropout)
        inject_lora(dit, adapters, multiplier=0.5 + level)
    if dtype == torch.float64:
        dit.double()
    return dit.train()


@every_schedule
@pytest.mark.parametrize("quantised", [False, True], ids=["linears", "8-bit linears"])
def test_nested_adapters_and_8_bit_linears(schedule, quantised):
    block = lora_dit(torch.float64, quantised=quantised).blocks[0]
    inputs, grad = block_inputs(torch.float64), draw(CLIPS, TOKENS, SMALL.dim, seed=9)
    needed = (True, False, False, False, False)
    output, expected = plain(block, inputs, needed, grad)
    found, gradients = fused(block, inputs, needed, grad, schedule)
    torch.testing.assert_close(found, output, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradients, list(expected), rtol=1e-9, atol=1e-10)


def test_a_frozen_block_of_which_only_one_matrix_trains():
    block = lora_dit(torch.float64, levels=1).blocks[0].requires_grad_(False)
    block.cross_attn.v.lora.up.requires_grad_()
    inputs, grad = block_inputs(torch.float64), draw(CLIPS, TOKENS, SMALL.dim, seed=9)
    needed = (False,) * 5  # the first block's x has no gradient either
    _, expected = plain(block, inputs, needed, grad)
    _, gradients = fused(block, inputs, needed, grad, BlockSchedule(token_chunk=5))
    torch.testing.assert_close(gradients, list(expected), rtol=1e-9, atol=1e-10)


def dropped(schedule: BlockSchedule, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a block whose adapters drop values, as a runner calls it."""
    dit = lora_dit(torch.float64, dropout=0.4, levels=1)
    inputs = block_inputs(torch.float64)
    x = inputs[0].requires_grad_()
    torch.manual_seed(seed)
    output = run_with(FusedBlockMaths(schedule))(dit.blocks[:1], x, *inputs[1:])
    torch.manual_seed(99)  # what happens in between must not matter
    found = torch.autograd.grad(output, (x, *trainable_parameters(dit.blocks[0])), torch.ones_like(output))
    return output.detach(), list(found)


def test_dropout_is_the_same_in_recomputation_and_in_any_schedule():
    output, gradients = dropped(SCHEDULES["all at once"], seed=1)
    for name in ("4 head groups, 5 tokens", "2 head groups, 7 tokens, attention kept", "a clip at a time"):
        other, others = dropped(SCHEDULES[name], seed=1)
        torch.testing.assert_close(other, output, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(others, gradients, rtol=1e-9, atol=1e-10)
    assert (dropped(SCHEDULES["all at once"], seed=2)[0] - output).abs().max() > 1e-3
    # The gradient is that of the function that forward computed: a step along it changes the output by so much.
    dit, inputs = lora_dit(torch.float64, dropout=0.4, levels=1), block_inputs(torch.float64)
    up, step = dit.blocks[0].ffn[2].lora.up, 1e-6
    of_up = dict(
        zip((name for name, _ in dit.blocks[0].named_parameters() if "lora" in name), gradients[1:], strict=True)
    )
    totals = []
    for sign in (1, -1):
        with torch.no_grad():
            up.add_(sign * step * (1 if sign == 1 else 2))
            torch.manual_seed(1)
            totals.append(run_with(FusedBlockMaths())(dit.blocks[:1], *inputs).sum())
    slope = (totals[0] - totals[1]) / (2 * step)
    torch.testing.assert_close(slope, of_up["ffn.2.lora.up"].sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [SCHEDULES["all at once"], SCHEDULES["2 head groups, 7 tokens, attention kept"]])
def test_a_model_trains_and_samples_with_it(schedule):
    dit, inputs = lora_dit(torch.float64), random_inputs(SMALL)
    results = []
    for runner in (run_plain, run_with(FusedBlockMaths(schedule))):
        noised = inputs.noised.double().requires_grad_()
        keywords = inputs.keywords() | {"context": inputs.context.double()}
        output = dit(noised, **keywords, run_blocks=runner)
        output.sum().backward()  # a gradient without memory of its own reaches the last block
        gradients = [parameter.grad for parameter in dit.parameters() if parameter.requires_grad]
        with torch.no_grad():
            sampled = dit(noised, **keywords, run_blocks=runner)
        results.append((output.detach(), sampled, noised.grad, gradients))
        dit.zero_grad(set_to_none=True)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)  # outside the blocks it is float32
    assert torch.equal(results[1][0], results[1][1])


def test_the_gradient_that_is_handed_in_stays_as_it_is():
    dit, inputs = lora_dit(torch.float64), block_inputs(torch.float64)
    x, grad = inputs[0].requires_grad_(), draw(CLIPS, TOKENS, SMALL.dim, seed=9)
    copy = grad.clone()
    output = run_with(FusedBlockMaths())(dit.blocks, x, *inputs[1:])
    (found,) = torch.autograd.grad(output, x, grad)
    assert torch.equal(grad, copy) and not torch.equal(found, copy)


@pytest.mark.parametrize(("heads", "groups"), [(40, 4), (40, 1), (12, 5), (40, 40), (4, 3)])
def test_head_groups_shrink_and_cover_every_head_once(heads, groups):
    found = head_slices(heads, groups)
    sizes = [part.stop - part.start for part in found]
    assert [head for part in found for head in range(heads)[part]] == list(range(heads))
    assert len(sizes) == groups and min(sizes) >= 1 and sizes == sorted(sizes, reverse=True)


def test_refuses_by_name():
    with pytest.raises(InputError, match="head_groups: expected 1 or more"):
        BlockSchedule(head_groups=0)
    with pytest.raises(InputError, match="token_chunk"):
        BlockSchedule(token_chunk=0)
    block, inputs = double_block(), block_inputs(torch.float64)
    with pytest.raises(InputError, match="at most 4, the heads"):
        FusedBlockMaths(BlockSchedule(head_groups=5)).forward(block, inputs, keep=True)
    maths = FusedBlockMaths()
    with pytest.raises(InputError, match="rotary positions"):
        maths.backward(block, inputs, (), inputs[0].clone(), needed=(True, False, False, True, False))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast"):
        maths.forward(block, inputs, keep=True)
    block.self_attn.backend = "sage"
    with pytest.raises(InputError, match="sample but not train"):
        maths.backward(block, inputs, (), inputs[0].clone(), needed=(True, False, False, False, False))
    block.self_attn.backend, block.ffn[0] = "sdpa", torch.nn.Identity()
    with pytest.raises(InputError, match=r"ffn\.0 to be a linear.*Identity"):
        maths.forward(block, inputs, keep=True)
