"""What one block of Wan 14B holds at its worst moment, and what the block by hand costs on the CPU.

    python benchmarks/block_memory.py

First table: gigabytes at the peak of recomputation and backward of one block, for a clip of so many tokens: the weights
and the block's input not counted, the float32 gradient that arrives counted. Counted on meta tensors (memory/trace.py)
while the real code runs: nothing is allocated, so any machine can do it. LoRA of rank 32 on all ten linears, bf16.

Second table: a training step of a small model on this machine's CPU, by `memory.runners`' checkpointing, by the block
by hand, and by diffusers + peft with its checkpointing. Seconds are of the processor, the least of the repeats; peak
is what tensors made in forward and backward hold at one time, gradients of the adapters included.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    tokens: tuple[int, ...] = (7800, 14040, 32760, 75600)
    """Of the first table: 17, 33 and 81 frames of 480 x 832, and 81 of 720 x 1280."""
    repeats: int = 3
    """Timed steps in the second table; 0 leaves it out."""
    dim: int = 512
    """Model width in the second table; four heads."""
    layers: int = 4
    """Blocks in the second table."""
    threads: int = 0
    """CPU threads; 0: as many as torch takes."""
    json: Path | None = None
    """File for the figures, e.g. benchmarks/results/block_memory.json."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from collections.abc import Callable

import torch
from torch import Tensor, nn

from core.files import atomic_path
from memory.runners import BlockMaths, Recompute, run_checkpointed, run_with
from memory.trace import peak_bytes
from networks.lora_linear import LoRAAdapter, block_linears, inject_lora
from wan_ext.configs import DiTConfig
from wan_ext.dit import WanDiT, init_weights, storage_dtype
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths

FOURTEEN = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=1, in_dim=16, out_dim=16, text_dim=4096)
RANK = 32
LATENTS, TEXT = (1, 16, 5, 32, 32), (1, 512, 512)  # 1,280 tokens
CHUNKED = BlockSchedule(head_groups=4, token_chunk=4096)

MATHS: dict[str, tuple[BlockMaths, bool]] = {  # and whether attention's output is kept
    "plain, checkpointed": (Recompute(), False),
    "by hand": (FusedBlockMaths(), False),
    "chunks of 4096": (FusedBlockMaths(BlockSchedule(token_chunk=4096)), False),
    "and 4 head groups": (FusedBlockMaths(CHUNKED), False),
    "and attention kept": (FusedBlockMaths(BlockSchedule(head_groups=4, token_chunk=4096, keep_attention=True)), True),
    "chunks of 2048, 8 groups": (FusedBlockMaths(BlockSchedule(head_groups=8, token_chunk=2048)), False),
}


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    print("GB at the peak of one block's recomputation and backward, by tokens\n")
    print(f"{'':<26}" + "".join(f"{tokens:>10,}" for tokens in options.tokens))
    block = block_on_meta()
    peaks = {}
    for name, (maths, kept) in MATHS.items():
        peaks[name] = {tokens: block_peak(block, maths, tokens, kept=kept) for tokens in options.tokens}
        print(f"{name:<26}" + "".join(f"{peak / 1e9:>10.2f}" for peak in peaks[name].values()), flush=True)
    steps = {dtype: cpu_steps(options, dtype) for dtype in ("float32", "bfloat16")} if options.repeats else {}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"torch": torch.__version__, "block_peak_bytes": peaks, "cpu_steps": steps}
        with atomic_path(options.json) as file:
            file.write_text(json.dumps(figures, indent=2) + "\n")


# ---- one block, counted ----------------------------------------------------------------------------------------------


def block_on_meta() -> nn.Module:
    """A block of 14B in bf16 with adapters, without memory."""
    with torch.device("meta"):
        dit = WanDiT(FOURTEEN)
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(storage_dtype(name, torch.bfloat16))
        add_lora(dit, RANK)
    return dit.blocks[0]


def add_lora(dit: WanDiT, rank: int) -> None:
    """Freeze a model and put an adapter on every linear of its blocks."""
    dit.requires_grad_(False)
    sizes = {name: (linear.in_features, linear.out_features) for name, linear in block_linears(dit).items()}
    device = dit.head.head.weight.device
    inject_lora(
        dit, {name: LoRAAdapter.new(*size, rank=rank, alpha=rank, device=device) for name, size in sizes.items()}
    )


def block_peak(block: nn.Module, maths: BlockMaths, tokens: int, *, kept: bool) -> int:
    """Bytes at the peak of a backward."""
    dim, heads = FOURTEEN.dim, FOURTEEN.num_heads
    with torch.device("meta"):
        x, grad = torch.empty(1, tokens, dim), torch.empty(1, tokens, dim)
        modulation, rope = torch.empty(1, 1, 6, dim), torch.empty(2, tokens, 1, FOURTEEN.head_dim // 2)
        context = torch.empty(1, FOURTEEN.text_len, dim, dtype=torch.bfloat16)
        attention = (torch.empty(1, tokens, dim, dtype=torch.bfloat16), torch.empty(1, heads, tokens)) if kept else ()
        inputs, needed = (x, modulation, context, rope), (True, False, False, False)
        return peak_bytes(
            lambda: maths.backward(block, inputs, attention, grad, needed=needed), held={"gradient": [grad]}
        ).peak


# ---- a step on the CPU -----------------------------------------------------------------------------------------------


def cpu_steps(options: Options, dtype: str) -> dict[str, dict[str, float]]:
    """Seconds and peak of a training step of each, printed as they come."""
    fused = {"by hand": BlockSchedule(), "256 tokens at a time": BlockSchedule(token_chunk=256)}
    fused["and 2 head groups"] = BlockSchedule(head_groups=2, token_chunk=256)
    steps = {"plain, checkpointed": our_step(options, dtype, run_checkpointed)}
    steps |= {name: our_step(options, dtype, run_with(FusedBlockMaths(schedule))) for name, schedule in fused.items()}
    steps["diffusers + peft"] = their_step(options, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if repeat:  # the first is for warming up
                seconds[name].append(time.process_time() - started)
    found = {
        name: {"seconds": min(seconds[name]), "peak_bytes": peak_bytes(step, device_type="cpu").peak}
        for name, step in steps.items()
    }
    plain, peer = found["plain, checkpointed"], found["diffusers + peft"]
    print(f"\n{dtype:<26}{'seconds':>10}{'of plain':>10}{'peak MiB':>10}{'of peer':>10}")
    for name, figures in found.items():
        time_share, peak_share = figures["seconds"] / plain["seconds"], figures["peak_bytes"] / peer["peak_bytes"]
        mib = figures["peak_bytes"] / 2**20
        print(f"{name:<26}{figures['seconds']:>10.2f}{time_share:>10.2f}{mib:>10.0f}{peak_share:>10.2f}", flush=True)
    return found


def base_model(options: Options) -> WanDiT:
    """The weights that all start from: random, with a head that is not zero."""
    dim, channels = options.dim, LATENTS[1]
    config = DiTConfig(
        dim=dim, ffn_dim=dim * 11 // 4, num_heads=4, num_layers=options.layers, in_dim=channels, out_dim=channels,
        text_dim=TEXT[2],
    )  # fmt: skip
    dit = WanDiT(config)
    generator = torch.Generator().manual_seed(0)
    init_weights(dit, generator)
    nn.init.normal_(dit.head.head.weight, std=0.02, generator=generator)
    return dit


def stepper(model: nn.Module, predict: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward; gradients do not stay."""
    target = torch.zeros(LATENTS)

    def step() -> None:
        nn.functional.mse_loss(predict().float(), target).backward()
        model.zero_grad(set_to_none=True)

    return step


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, timestep, context."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(LATENTS, generator=g), torch.tensor([700.0]), torch.randn(TEXT, generator=g)


def our_step(options: Options, dtype: str, run_blocks) -> Callable[[], None]:
    dit = base_model(options)
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, getattr(torch, dtype)))
    add_lora(dit, RANK)
    noised, timestep, context = inputs()
    return stepper(dit.train(), lambda: dit(noised, timestep=timestep, context=context, run_blocks=run_blocks))


def their_step(options: Options, dtype: str) -> Callable[[], None]:
    """The same model in diffusers, in its leanest form: adapters in the dtype of the linears too."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from peft import LoraConfig

    base = base_model(options)
    c, narrow = base.config, getattr(torch, dtype)
    model = WanTransformer3DModel(
        num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, text_dim=c.text_dim, ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
    )  # fmt: skip
    model.load_state_dict(convert_wan_transformer_to_diffusers(base.state_dict()))
    wide = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not wide & set(name.split(".")):
            parameter.data = parameter.data.to(narrow)
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(narrow)
    model.enable_gradient_checkpointing()
    noised, timestep, context = inputs()
    noised, context = noised.to(narrow), context.to(narrow)
    return stepper(model.train(), lambda: model(noised, timestep, context, return_dict=False)[0])


if __name__ == "__main__":
    run(main, OPTIONS)
