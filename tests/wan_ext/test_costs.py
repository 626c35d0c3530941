"""Closed forms of bytes and operations are held to the code that runs: to its tensors and to what the tracer counts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from memory.costs import Schedule
from memory.masters import flat_bytes
from memory.quant import RECIPES
from memory.runners import Recompute, run_with
from memory.trace import peak_bytes
from networks.lora_linear import LoRAAdapter, block_linears, inject_lora
from wan_ext.activations import (
    fused_backward_bytes,
    fused_forward_bytes,
    plain_backward_bytes,
    plain_forward_bytes,
    units,
)
from wan_ext.assemble import quantize_linears
from wan_ext.configs import VARIANTS, DiTConfig
from wan_ext.costs import generation_costs, training_costs
from wan_ext.dit import WanDiT, run_linears, storage_dtype
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths
from wan_ext.workload import (
    Workload,
    attention_flop,
    block_bytes,
    embedding_bytes,
    linear_flop,
    lora_flop,
    lora_parameters,
    outside_bytes,
    tokens_of,
)

CLOSE = 0.05


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def model(work: Workload, layers: int = 1) -> WanDiT:
    """The transformer as training has it, without memory."""
    with torch.device("meta"):
        dit = WanDiT(replace(work.config, num_layers=layers))
    dtype = {2: torch.bfloat16, 4: torch.float32}[work.element]
    for name, parameter in dit.named_parameters():
        parameter.data = meta(*parameter.shape, dtype=storage_dtype(name, dtype))
    dit.requires_grad_(False)
    if work.recipe is not None:
        quantize_linears(dit.blocks, recipe=work.recipe, bias_dtype=dtype)
    if work.rank:
        shapes = {name: (layer.in_features, layer.out_features) for name, layer in block_linears(dit).items()}
        inject_lora(
            dit,
            {name: LoRAAdapter(meta(work.rank, i), meta(o, work.rank), alpha=1) for name, (i, o) in shapes.items()},
        )
    return dit


def counted(work: Workload, maths) -> tuple[int, int]:
    """Peak bytes of a block's forward and backward, as `BlockCosts` means them."""
    config, block = work.config, model(work).blocks[0]
    dtype = {2: torch.bfloat16, 4: torch.float32}[work.element]
    image = None if config.image_dim is None else meta(work.batch, config.image_len, config.dim, dtype=dtype)
    inputs = (
        meta(work.batch, work.tokens, config.dim),
        meta(work.batch, 1, 6, config.dim),
        meta(work.batch, config.text_len, config.dim, dtype=dtype),
        meta(2, work.tokens, 1, config.head_dim // 2),
        image,
    )
    with torch.no_grad():
        forward = peak_bytes(lambda: maths.forward(block, inputs, keep=True))
        kept = maths.forward(block, inputs, keep=True)[1]

        def backward() -> object:
            grad = torch.empty_like(inputs[0])
            return maths.backward(block, inputs, kept, grad, needed=(True, False, False, False, False))

        return forward.peak, peak_bytes(backward).peak


def workload(task: str, tokens: int, batch: int, rank: int, recipe: str | None) -> Workload:
    config = VARIANTS[task].dit
    return Workload(config=config, tokens=tokens, batch=batch, rank=rank, recipe=recipe and RECIPES[recipe])


@pytest.mark.parametrize(
    ("task", "tokens", "batch", "rank", "recipe", "schedule"),
    [
        pytest.param(
            *("t2v-A14B", 32760, 1, 32, "fp8", (4, 4096, True)),
            marks=pytest.mark.slow(reason="13 s: plain PyTorch takes a few rows at a time"),
        ),
        ("t2v-A14B", 3000, 1, 32, "fp8", (1, None, False)),
        ("t2v-1.3B", 3000, 2, 32, None, (2, 2048, False)),
        ("t2v-A14B", 3000, 1, 32, "int8_rotated", (4, 1024, True)),
        ("t2v-A14B", 4000, 1, 32, "int8_w8a8", (1, None, False)),
        ("t2v-A14B", 1024, 1, 32, "fp8", (1, None, True)),
        ("t2v-1.3B", 7800, 1, 16, "fp8", (2, 4096, True)),
        ("t2v-1.3B", 12000, 1, 16, "fp8", (4, 1024, False)),
        ("i2v-14B", 2000, 1, 16, "fp8", (2, 1024, True)),
        ("ti2v-5B", 2000, 1, 0, None, (8, 1024, False)),
    ],
)
def test_the_scheduled_block_holds_what_the_closed_form_says(task, tokens, batch, rank, recipe, schedule) -> None:
    work = workload(task, tokens, batch, rank, recipe)
    groups, chunk, keep = schedule
    maths = FusedBlockMaths(BlockSchedule(head_groups=groups, token_chunk=chunk, keep_attention=keep))
    forward, backward = counted(work, maths)
    chosen = Schedule(head_groups=groups, token_chunk=chunk, keep_attention=keep)
    assert fused_backward_bytes(work, chosen) == pytest.approx(backward, rel=CLOSE)
    if groups == 1:  # in groups, plain PyTorch's rotation has intermediates that a kernel has not
        assert fused_forward_bytes(work, chosen) == pytest.approx(forward, rel=CLOSE)
    else:
        assert fused_forward_bytes(work, chosen) == pytest.approx(forward, rel=0.12)


@pytest.mark.parametrize(
    ("task", "tokens", "batch", "rank", "recipe"),
    [
        ("t2v-A14B", 32760, 1, 32, "fp8"),
        ("t2v-A14B", 1024, 2, 32, None),
        ("t2v-1.3B", 7800, 1, 0, None),
        ("ti2v-5B", 2048, 1, 16, "fp8"),
        ("i2v-14B", 7800, 1, 16, None),
    ],
)
def test_the_plain_block_holds_what_the_closed_form_says(task, tokens, batch, rank, recipe) -> None:
    work = workload(task, tokens, batch, rank, recipe)
    forward, backward = counted(work, Recompute())
    assert plain_forward_bytes(work) == pytest.approx(forward, rel=CLOSE)
    assert plain_backward_bytes(work) == pytest.approx(backward, rel=CLOSE)


def test_the_bars_of_one_block() -> None:
    """At 81 frames of 480 x 832: at most 5.2 GB with everything at once, 2.9 GB in four groups and 4,096 tokens."""
    work = workload("t2v-A14B", 32760, 1, 32, "fp8")
    assert fused_backward_bytes(work, Schedule()) <= 5.2e9
    assert fused_backward_bytes(work, Schedule(head_groups=4, token_chunk=4096)) <= 2.9e9


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B", "ti2v-5B", "i2v-14B", "fun-camera-14B", "fun-camera-5B"])
@pytest.mark.parametrize("recipe", [None, "fp8", "int8_rotated", "int8_w8a8_transposed"])
def test_weights_are_those_of_the_model_to_the_byte(task: str, recipe: str | None) -> None:
    work = workload(task, 1, 1, 8, recipe)
    dit = model(work)
    assert block_bytes(work) == flat_bytes(dit.blocks[0])
    inside = {id(parameter) for parameter in dit.blocks.parameters()}
    around = [parameter for parameter in dit.parameters() if id(parameter) not in inside]
    assert outside_bytes(work) == sum(parameter.nbytes for parameter in around)
    assert embedding_bytes(work) == sum(p.nbytes for module in dit.embeddings for p in module.parameters())
    trained = sum(p.numel() for p in dit.parameters() if p.requires_grad)
    assert lora_parameters(replace(work, config=replace(work.config, num_layers=1))) == trained


@pytest.mark.parametrize(("task", "rank"), [("t2v-A14B", 0), ("t2v-1.3B", 16), ("i2v-14B", 4)])
def test_operations_are_those_that_pytorch_counts(task: str, rank: int) -> None:
    work = workload(task, 640, 2, rank, None)
    config, block = work.config, model(work).blocks[0]
    image = None if config.image_dim is None else meta(2, config.image_len, config.dim, dtype=torch.bfloat16)
    inputs = (
        meta(2, 640, config.dim),
        meta(2, 1, 6, config.dim),
        meta(2, config.text_len, config.dim, dtype=torch.bfloat16),
        meta(2, 640, 1, config.head_dim // 2),
        image,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(*inputs)
    # The counter leaves out products that are added in place, the second one of each adapter: half of its operations.
    found = linear_flop(work) + lora_flop(work) / 2 + attention_flop(work)
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("task", "tokens", "batch"), [("t2v-A14B", 32760, 1), ("t2v-1.3B", 7800, 2)])
def test_the_head_holds_what_the_closed_form_says(task: str, tokens: int, batch: int, trains: bool) -> None:
    work = workload(task, tokens, batch, 0, None)
    dit = model(work)
    x, time = meta(batch, tokens, work.config.dim).requires_grad_(trains), meta(batch, 1, work.config.dim)
    scale = meta(batch, tokens, 4 * work.config.out_dim)

    def head() -> None:
        velocity = dit.head(x, time)
        if trains:
            F.mse_loss(velocity, scale).backward()

    with nullcontext() if trains else torch.no_grad():
        found = peak_bytes(head, held={"input": [x]})
    costs = (training_costs if trains else generation_costs)(VARIANTS[task], work, num_models=1)
    assert costs.outside_activation_bytes == pytest.approx(found.peak, rel=CLOSE)


def test_embeddings_on_the_host_visit_the_device_one_weight_at_a_time() -> None:
    work = workload("t2v-1.3B", 1, 1, 0, None)
    dit = model(work)
    for module in dit.embeddings:
        module.to_empty(device="cpu")
    costs = training_costs(VARIANTS["t2v-1.3B"], work, num_models=2)

    found = peak_bytes(lambda: run_linears(dit.time_projection, dit.embed_time(meta(1))))
    assert costs.visitor_bytes == pytest.approx(found.peak, rel=CLOSE)
    assert found.remaining < 0.01 * costs.visitor_bytes
    assert peak_bytes(lambda: dit.embed_text(meta(1, 512, 4096))).peak < costs.visitor_bytes
    assert costs.visiting_bytes == 2 * embedding_bytes(work) < costs.outside_bytes


def test_a_whole_step_holds_what_the_parts_say() -> None:
    """Two blocks, head and loss; what waits stays on the device."""
    work = workload("t2v-1.3B", 3 * 15 * 26, 1, 16, None)
    work = replace(work, config=replace(work.config, num_layers=2))
    dit = model(work, layers=2)
    schedule = BlockSchedule(head_groups=4, token_chunk=1024)
    latents = meta(1, 16, 3, 30, 52)
    context = meta(1, 512, 4096, dtype=torch.bfloat16)
    run_blocks = run_with(FusedBlockMaths(schedule))

    def step() -> None:
        noise = torch.empty_like(latents)
        velocity = dit(latents + noise, timestep=meta(1), context=context, run_blocks=run_blocks)
        F.mse_loss(velocity, noise - latents).backward()

    found = peak_bytes(step)
    costs = training_costs(VARIANTS["t2v-1.3B"], work, num_models=1)
    block = next(b for b in costs.blocks if b.schedule == Schedule(head_groups=4, token_chunk=1024))
    moments = (costs.outside_activation_bytes, block.backward_bytes + costs.trained_bytes["gradients"])
    planned = max(moments) + 2 * costs.checkpoint_bytes + costs.input_bytes
    assert planned == pytest.approx(found.peak, rel=CLOSE)


def test_tokens_are_those_of_the_latents() -> None:
    assert tokens_of(VARIANTS["t2v-A14B"], frames=81, height=480, width=832) == 32760
    assert tokens_of(VARIANTS["t2v-A14B"], frames=81, height=720, width=1280) == 75600
    assert tokens_of(VARIANTS["ti2v-5B"], frames=121, height=704, width=1280) == 31 * 22 * 40


def test_what_waits_is_what_the_blocks_hand_over() -> None:
    from memory.store import stored_bytes

    work = workload("t2v-1.3B", 1000, 1, 0, None)
    costs = training_costs(VARIANTS["t2v-1.3B"], work, num_models=1)
    block = next(b for b in costs.blocks if b.schedule.keep_attention)
    config: DiTConfig = work.config
    tensors = (
        meta(1, 1000, config.dim),
        meta(1, 1000, config.dim, dtype=torch.bfloat16),
        meta(1, config.num_heads, 1000),
    )
    assert costs.checkpoint_bytes + block.kept_bytes == pytest.approx(stored_bytes(tensors), abs=1024)
    eight = costs.checkpoint_eight_bit_bytes + block.kept_eight_bit_bytes
    assert eight == pytest.approx(stored_bytes(tensors, eight_bits=True), rel=0.03)
    assert units(work).wide == tensors[0].nbytes
