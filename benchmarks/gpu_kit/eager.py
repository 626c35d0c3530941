"""The same step as today's trainers compute it: what the engine's seconds are compared with.

What: `run_eager` runs the blocks of our transformer, the same weights and the same LoRA, in the style that is common:
- a modulation for every token in float32, expanded to [B, L, 6, D], added to the block's own and cut in six;
- every norm, product and sum an operation of PyTorch, float32 copies and back included; the residual stream in bf16;
- rotary positions by complex numbers;
- 8-bit weights made bf16 for each call, where autograd keeps them for backward;
- LoRA as a sum of its own beside the linear's result;
- `scaled_dot_product_attention`, and a checkpoint around each block, which runs all of it a second time.

Where the usual code differs from trainer to trainer the cheaper form is taken (bf16 residual stream, float32 and not
float64 angles, the modulation expanded and not computed for every token), so that the ratio flatters nobody but it.

Exact: to rounding in bf16; `agreement` says how near loss and gradients come to ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_kit.bench import Bench, timed
from benchmarks.gpu_kit.model import DTYPE, loss_of, make_batch
from benchmarks.gpu_kit.settings import GB, Clip
from benchmarks.gpu_kit.training import step
from memory.plan import MemoryPlan

LOSS_TOLERANCE, LEAST_COSINE = 0.02, 0.95


def run_eager(blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
    """A `BlockRunner`: x float32 [B, L, D], inputs as `WanDiT.forward` gives them -> float32 [B, L, D]"""
    modulation, context, rope = inputs[:3]
    per_token = modulation.expand(-1, x.shape[1], -1, -1).contiguous()  # [B, L, 6, D]
    turn = torch.complex(*rope)  # [L, 1, d/2]
    x = x.to(DTYPE)
    for block in blocks:
        x = checkpoint(_block, block, x, per_token, context, turn, use_reentrant=False)
    return x.float()


def _block(block: Any, x: Tensor, per_token: Tensor, context: Tensor, turn: Tensor) -> Tensor:
    """x [B, L, D] bf16, per_token [B, L, 6, D], context [B, S, D], turn [L, 1, d/2] -> [B, L, D]"""
    parts = (block.modulation.float()[:, None] + per_token).chunk(6, dim=2)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part.squeeze(2) for part in parts)  # [B, L, D]
    eps = block.norm1.eps
    y = (_layer_norm(x, eps) * (1 + scale1) + shift1).to(x.dtype)
    x = x + (_self_attention(block.self_attn, y, turn).float() * gate1).to(x.dtype)
    y = (_layer_norm(x, eps) * block.norm3.weight.float() + block.norm3.bias.float()).to(x.dtype)
    x = x + _cross_attention(block.cross_attn, y, context)
    y = (_layer_norm(x, eps) * (1 + scale2) + shift2).to(x.dtype)
    y = _linear(block.ffn[2], F.gelu(_linear(block.ffn[0], y), approximate="tanh"))
    return x + (y.float() * gate2).to(x.dtype)


def _self_attention(attn: Any, x: Tensor, turn: Tensor) -> Tensor:
    q, k, v = (_heads(part, attn.num_heads) for part in _queries(attn, x, x))
    return _linear(attn.o, _attend(_rotate(q, turn), _rotate(k, turn), v))


def _cross_attention(attn: Any, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = (_heads(part, attn.num_heads) for part in _queries(attn, x, context))
    return _linear(attn.o, _attend(q, k, v))


def _queries(attn: Any, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k = _rms_norm(attn.norm_q, _linear(attn.q, x)), _rms_norm(attn.norm_k, _linear(attn.k, context))
    return q, k, _linear(attn.v, context)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, N, d], [B, S, N, d] twice -> [B, L, D]"""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], None, None, eps)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + norm.eps)
    return (wide * norm.weight.float()).to(x.dtype)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """A LoRA layer on an 8-bit linear: the weight in bf16, saved for backward; the LoRA beside it."""
    base, lora = layer.base, layer.lora
    runs = base.weight.to(x.dtype).unflatten(-1, (base.weight_scale.shape[1], -1))
    weight = (runs * base.weight_scale.to(x.dtype)[..., None]).flatten(-2)
    frozen = F.linear(x, weight, base.bias.to(x.dtype))
    hidden = F.linear(x, lora.down.to(x.dtype))
    return frozen + F.linear(hidden, lora.up.to(x.dtype)) * (layer.multiplier * lora.scale)


def agreement(bench: Bench, clip: Clip) -> dict[str, Any]:
    """Loss and gradients of the eager step against ours, at few tokens: a check with `passed`."""
    plan = _all_on_the_device(bench, clip)
    with bench.placed(plan, num_experts=1) as placed:
        expert = placed.experts[0]
        batch = make_batch(bench.setting.variant, clip, device=bench.device, seed=3)
        found = []
        for runner in (placed.runners[expert.name], run_eager):
            loss = loss_of(expert.dit, batch, runner)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in expert.network.parameters() if p.grad is not None])
            expert.network.zero_grad(set_to_none=True)
            found.append((float(loss.detach()), gradient))
        (ours, our_gradient), (theirs, their_gradient) = found
        cosine = float(F.cosine_similarity(our_gradient, their_gradient, dim=0))
        off = abs(theirs / ours - 1)
        return {
            "check": "eager step against ours: loss, gradient of the LoRA",
            "tokens": bench.setting.tokens(clip),
            "loss_error": off,
            "gradient_cosine": cosine,
            "tolerance": f"loss {LOSS_TOLERANCE}, cosine {LEAST_COSINE}",
            "passed": off <= LOSS_TOLERANCE and cosine >= LEAST_COSINE,
        }


def eager_row(bench: Bench, clip: Clip, *, steps: int, attention: str = "default") -> dict[str, Any]:
    """Seconds and peak of the eager step, all weights of one expert on the device, no cap.

    Args:
        bench: whose recipe multiplies in bf16 (not rotated).
        clip: what is trained on.
        steps: how many are timed, after one over the first blocks.
        attention: "default", what PyTorch chooses, or "cudnn".
    """
    plan = _all_on_the_device(bench, clip)
    chosen = sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if attention == "cudnn" else nullcontext()
    on_cuda = bench.device.type == "cuda"
    with bench.placed(plan, num_experts=1) as placed, chosen:
        expert = placed.experts[0]
        batch = make_batch(bench.setting.variant, clip, device=bench.device, seed=7)
        step(expert, batch, _run_first, trains=False)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        results = [timed(bench.device, lambda: step(expert, batch, run_eager)) for _ in range(steps)]
        seconds = [took for took, _ in results]
        return {
            "recipe": bench.recipe,
            "clip": str(clip),
            "tokens": bench.setting.tokens(clip),
            "attention": attention,
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "measured_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
            "losses": [float(loss) for _, loss in results],
        }


def _all_on_the_device(bench: Bench, clip: Clip) -> MemoryPlan:
    plan = bench.training_plan(clip, 1000 * GB, num_experts=1)
    return replace(plan, streamed=(), outside="device", store="device", stored_bytes=0)


def _run_first(blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
    return run_eager(blocks[:1], x, *inputs)
