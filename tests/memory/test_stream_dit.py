"""The Wan DiT runs streamed as it runs checkpointed: velocity, adapter gradients and camera gradient, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from memory.device import CpuDevice
from memory.masters import Kind
from memory.quant import QuantLinear
from memory.runners import BlockRunner, run_checkpointed, run_with
from memory.store import HostStore
from memory.stream import Ring, StreamedBlocks, move_all_but, ring_bytes, spread
from networks.lora_linear import LoRAAdapter, block_linears, inject_lora
from tests.memory.tiny_blocks import trainable
from tests.wan_ext.models import CONFIGS, lively_dit
from wan_ext.condition import CameraCondition
from wan_ext.dit import WanDiT, storage_dtype
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths


def make_dit(name: str, dtype: torch.dtype, quantize: bool, seed: int = 0) -> WanDiT:
    """A frozen DiT of four blocks with LoRA on query and feed-forward, perhaps with 8-bit linears."""
    dit = lively_dit(replace(CONFIGS[name], num_layers=4), seed).requires_grad_(False)
    for parameter_name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(parameter_name, dtype))
    generator, adapters = torch.Generator().manual_seed(5 + seed), {}
    for path, linear in block_linears(dit).items():
        if path.endswith((".q", ".ffn.2")):
            down, up = (
                nn.Parameter(torch.randn(shape, generator=generator) * 0.1)
                for shape in ((4, linear.in_features), (linear.out_features, 4))
            )
            adapters[path] = LoRAAdapter(down, up, alpha=2.0, dropout=0.2)
        if quantize:
            dit.set_submodule(path, QuantLinear.from_linear(linear))
    inject_lora(dit, adapters)
    return dit


def train(dit: WanDiT, runner: BlockRunner, device: str = "cpu") -> list[Tensor]:
    """Velocity, the camera's gradient, and those of the adapters."""
    config, generator = dit.config, torch.Generator().manual_seed(6)
    torch.manual_seed(7)  # of dropout

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    tokens = (random(2, 3, 1, 1, config.dim) * 0.1).requires_grad_()
    velocity = dit(
        random(2, config.in_dim, 3, 4, 6),
        timestep=torch.tensor([900.0, 300.0], device=device),
        context=random(2, 5, config.text_dim),
        image_context=None if config.image_dim is None else random(2, config.image_len, config.image_dim),
        camera=CameraCondition(tokens=tokens),
        run_blocks=runner,
    )
    velocity.square().mean().backward()
    return [velocity.detach(), tokens.grad, *(parameter.grad for parameter in trainable(dit))]


@pytest.mark.parametrize("num_streamed", [2, 4])
@pytest.mark.parametrize(
    "name, dtype, quantize",
    [
        ("t2v", torch.float32, False),
        ("t2v", torch.bfloat16, True),
        ("i2v-14B with CLIP", torch.bfloat16, False),
        ("i2v-14B with CLIP", torch.float32, True),
    ],
)
def test_streamed_equals_checkpointed(name: str, dtype: torch.dtype, quantize: bool, num_streamed: int) -> None:
    expected = train(make_dit(name, dtype, quantize), run_checkpointed)
    dit = make_dit(name, dtype, quantize)
    runner = StreamedBlocks(dit.blocks, streamed=spread(4, num_streamed), device="cpu")
    found = train(dit, runner)
    assert len(found) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.isfinite(tensor).all() and tensor.abs().sum() > 0 for tensor in found)


@pytest.mark.parametrize("keep_attention, masters", [(True, "pinned"), (False, "mapped")])
def test_two_experts_of_fused_blocks_with_one_ring_and_one_store_in_host_memory(
    keep_attention: bool, masters: Kind
) -> None:
    maths = FusedBlockMaths(BlockSchedule(head_groups=2, token_chunk=9, keep_attention=keep_attention))
    experts, resident = ([make_dit("t2v", torch.bfloat16, True, seed) for seed in (0, 1)] for _ in range(2))
    device = CpuDevice()
    ring = Ring(device, ring_bytes(experts[0].blocks) // 2)
    store = HostStore(device)
    runners = [
        StreamedBlocks(
            dit.blocks, streamed=streamed, device="cpu", ring=ring, maths=maths, store=store, masters=masters
        )
        for dit, streamed in zip(experts, [(0, 1, 2, 3), (1, 2, 3)], strict=True)
    ]
    for which in (0, 1, 0):
        found = train(experts[which], runners[which])
        expected = train(resident[which], run_with(maths))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.isfinite(tensor).all() and tensor.abs().sum() > 0 for tensor in found)
    assert store.host_bytes > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: streams, events and pinned memory")
@pytest.mark.parametrize("quantize", [False, True])
def test_streamed_equals_checkpointed_on_cuda(quantize: bool) -> None:
    expected = train(make_dit("t2v", torch.bfloat16, quantize).cuda(), run_checkpointed, "cuda")
    dit = make_dit("t2v", torch.bfloat16, quantize)
    streamed = StreamedBlocks(dit.blocks, streamed=spread(4, 4), device="cuda")
    move_all_but(dit, dit.blocks, "cuda")
    for _ in range(3):  # the second and third pass reuse the buffers of the one before
        dit.zero_grad()
        found = train(dit, streamed, "cuda")
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
