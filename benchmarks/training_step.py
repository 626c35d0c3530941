"""One LoRA training step: time and memory of this project against diffusers + peft, at the same size, in one run.

    make bench        or        python benchmarks/training_step.py --repeats 8

Both train rank-16 adapters on all linears of the blocks of one frozen model (the same weights, through diffusers' own
converter): forward, backward, AdamW. Four cases: float32 and bf16, with and without gradient checkpointing.

    seconds     median over the repeats, in which the two take turns within one process
    saved       bytes of activations that autograd keeps for backward (parameters and inputs not counted)
    peak        the most that tensors made during a step hold at one time, gradients included (torch's profiler)
    resident    growth of the process by two steps, over what the model and the libraries hold; one process a figure

In bf16 the peer has its leanest form: adapters in bf16 too, and the modules in float32 that its loader keeps so. Ours
keep float32 adapters and a float32 residual stream. "loss" is the relative difference of the two losses before the
first step, which shows that they do the same work.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    repeats: int = 8
    """Timed steps of each of the two, after one that is not timed."""
    dim: int = 512
    """Model width; four heads."""
    layers: int = 8
    """Blocks."""
    threads: int = 0
    """CPU threads; 0: as many as torch takes."""
    json: Path | None = None
    """File for the figures, e.g. benchmarks/results/training_step.json."""
    child: str = ""
    """Used by the benchmark itself: what this process measures."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from core.files import atomic_path
from memory.runners import run_checkpointed, run_plain
from networks.lora import create_network
from wan_ext.configs import DiTConfig, get_variant
from wan_ext.dit import WanDiT, init_weights, storage_dtype

LATENTS = (1, 16, 5, 32, 32)  # 5 * 16 * 16 = 1,280 tokens
TEXT = (1, 512, 512)
RANK = 16
OURS, PEER = "ours", "diffusers + peft"
CASES = [(dtype, checkpointing) for dtype in ("float32", "bfloat16") for checkpointing in (False, True)]

Loss = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is measured of one implementation in one case."""

    seconds: float
    saved_bytes: int
    peak_bytes: int
    resident_bytes: int
    loss: float


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        what, name, dtype, checkpointing = options.child.split(",")
        checkpointed = checkpointing == "True"
        if what == "time":
            result = take_turns(options, dtype, checkpointed)
        else:
            result = resident_growth(*build(name, options, dtype, checkpointed))
        print(json.dumps(result))
        return

    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.repeats} repeats; ours : {PEER} = ratio\n")
    print(f"{'case':<26}{'seconds':>24}{'saved MiB':>22}{'peak MiB':>22}{'resident MiB':>22}{'loss':>10}")
    results = {}
    for dtype, checkpointing in CASES:
        figures = measure(options, dtype, checkpointing)
        case = dtype + (" checkpointed" if checkpointing else "")
        results[case] = {name: asdict(found) for name, found in figures.items()}
        print(row(case, figures[OURS], figures[PEER]), flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        setting = {"dim": options.dim, "layers": options.layers, "repeats": options.repeats, "rank": RANK}
        machine = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        with atomic_path(options.json) as file:
            file.write_text(json.dumps({**setting, **machine, "cases": results}, indent=2) + "\n")


def measure(options: Options, dtype: str, checkpointing: bool) -> dict[str, Figures]:
    """Both implementations in one case: one process for the times, one for the memory of each."""

    def child(what: str, name: str):
        own = ["--child", f"{what},{name},{dtype},{checkpointing}", "--repeats", str(options.repeats)]
        size = ["--dim", str(options.dim), "--layers", str(options.layers), "--threads", str(options.threads)]
        # Tensors are given back to the system when they are freed, so that resident memory is what is in use.
        env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(2**16)} if what == "memory" else {})
        command = [sys.executable, __file__, *own, *size]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
        return json.loads(done.stdout.splitlines()[-1])

    timed = child("time", "both")
    return {name: Figures(**timed[name], resident_bytes=child("memory", name)) for name in (OURS, PEER)}


def row(case: str, ours: Figures, peer: Figures) -> str:
    def pair(a: float, b: float, form: str) -> str:
        return f"{a:{form}} : {b:{form}} = {a / b:.2f}"

    mib = 2**20
    return (
        f"{case:<26}{pair(ours.seconds, peer.seconds, '.2f'):>24}"
        f"{pair(ours.saved_bytes / mib, peer.saved_bytes / mib, '.0f'):>22}"
        f"{pair(ours.peak_bytes / mib, peer.peak_bytes / mib, '.0f'):>22}"
        f"{pair(ours.resident_bytes / mib, peer.resident_bytes / mib, '.0f'):>22}"
        f"{abs(ours.loss / peer.loss - 1):>10.0e}"
    )


# ---- the two implementations -----------------------------------------------------------------------------------------


def build(name: str, options: Options, dtype: str, checkpointing: bool) -> tuple[nn.Module, Loss]:
    """A frozen model with adapters, and its loss on fixed inputs."""
    base = base_model(options)
    if name == OURS:
        return build_ours(base, getattr(torch, dtype), checkpointing)
    return build_peer(base, getattr(torch, dtype), checkpointing)


def base_model(options: Options) -> WanDiT:
    """The weights that both start from: random, with a head that is not zero."""
    config = DiTConfig(
        dim=options.dim,
        ffn_dim=options.dim * 11 // 4,
        num_heads=4,
        num_layers=options.layers,
        in_dim=LATENTS[1],
        out_dim=LATENTS[1],
        text_dim=TEXT[2],
    )
    dit = WanDiT(config)
    generator = torch.Generator().manual_seed(0)
    init_weights(dit, generator)
    nn.init.normal_(dit.head.head.weight, std=0.02, generator=generator)
    return dit.requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised latents, timestep, context, velocity."""
    g = torch.Generator().manual_seed(1)
    noised, velocity = torch.randn(LATENTS, generator=g), torch.randn(LATENTS, generator=g)
    return noised, torch.tensor([700.0]), torch.randn(TEXT, generator=g), velocity


def build_ours(base: WanDiT, dtype: torch.dtype, checkpointing: bool) -> tuple[nn.Module, Loss]:
    for name, parameter in base.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, dtype))
    create_network(  # puts the adapters into the model
        base, variant=get_variant("t2v-1.3B"), expert="low", rank=RANK, alpha=RANK, network_args={}
    )
    noised, timestep, context, velocity = inputs()
    run_blocks = run_checkpointed if checkpointing else run_plain

    def loss() -> Tensor:
        predicted = base(noised, timestep=timestep, context=context, run_blocks=run_blocks)
        return nn.functional.mse_loss(predicted, velocity)

    return base.train(), loss


def build_peer(base: WanDiT, dtype: torch.dtype, checkpointing: bool) -> tuple[nn.Module, Loss]:
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from peft import LoraConfig

    c = base.config
    model = WanTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        text_dim=c.text_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(base.state_dict()))
    keep = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not keep & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    noised, timestep, context, velocity = inputs()
    noised, context = noised.to(dtype), context.to(dtype)

    def loss() -> Tensor:
        predicted = model(noised, timestep, context, return_dict=False)[0]
        return nn.functional.mse_loss(predicted.float(), velocity)

    return model, loss


# ---- measuring -------------------------------------------------------------------------------------------------------


def stepper(model: nn.Module, loss: Loss) -> Callable[[], float]:
    """A function that does one training step and returns its loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def take_turns(options: Options, dtype: str, checkpointing: bool) -> dict[str, dict[str, float]]:
    """Seconds of a step (median), loss of the first, bytes saved and at the peak: of both, alternating."""
    built = {name: build(name, options, dtype, checkpointing) for name in (OURS, PEER)}
    saved = {name: saved_bytes(*pair) for name, pair in built.items()}
    steps = {name: stepper(*pair) for name, pair in built.items()}
    losses = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats):
        for name in sorted(steps, reverse=bool(repeat % 2)):  # who goes first alternates too
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "saved_bytes": saved[name],
            "peak_bytes": peak_bytes(steps[name]),
            "loss": losses[name],
        }
        for name in steps
    }


def saved_bytes(model: nn.Module, loss: Loss) -> int:
    """Bytes of the distinct storages that autograd keeps after a forward, other than those of the model.

    Adapters count where a copy of them in another dtype is kept, as do rotary tables and modulation.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()
    total = sum(kept.values())
    del result
    return total


def peak_bytes(step: Callable[[], float]) -> int:
    """The largest sum of what a step has allocated and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def resident_growth(model: nn.Module, loss: Loss) -> int:
    """By how many bytes training steps raise the resident memory of this process at their peak (Linux)."""
    step = stepper(model, loss)
    step()  # loads what the libraries and the optimizer need once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory_status("VmRSS")
    for _ in range(2):
        step()
    return memory_status("VmHWM") - before


def memory_status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    run(main, OPTIONS)
