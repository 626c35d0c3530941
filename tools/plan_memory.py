"""What a training step or a forward pass will need, before anything is loaded: device memory, host memory, seconds.

    python tools/plan_memory.py --task t2v-A14B --frames 81 --size 480x832 --rank 32 --vram 24GB --ram 64GB --gpu 4090
    python tools/plan_memory.py --task t2v-A14B --generate --vram 12GB        a video instead of a training step
    python tools/plan_memory.py --task t2v-A14B                               for this machine

Prints what the planner chooses and why, peak device memory and host memory by part, transfers, and time with the rates
of a card. When nothing fits, it says how much would be needed and which settings, changed alone, would fit. Training
and generation plan in the same way.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    task: str
    """t2v-A14B, i2v-A14B, ti2v-5B, t2v-1.3B, t2v-14B, i2v-14B, t2i-14B, tiny, tiny-i2v,
    fun-camera-A14B, fun-camera-5B, fun-camera-1.3B or fun-camera-14B."""
    frames: int | None = None
    """Frames of the longest clip, 4 n + 1. Default: the task's."""
    size: str | None = None
    """Height x width of the largest clip in pixels, such as 480x832. Default: the task's."""
    batch_size: int = 1
    """Clips of a batch."""
    generate: bool = False
    """Plan a forward pass of generation instead of a training step."""
    rank: int = 32
    """Rank of the LoRA (--network_dim)."""
    experts: Literal["both", "high", "low"] = "both"
    """Which experts of a mixture are trained in one run."""
    optimizer_type: str = "AdamW8bit"
    """AdamW8bit, AdamW or another of train_network.py's."""
    recipe: str = "fp8"
    """How the blocks' linears are kept: none, fp8, int8, int8_rotated, int8_w8a8 ... (docs/quantization.md)"""
    from_file: bool = False
    """The weights come from a file of tools/quantize.py, whose blocks can be streamed without being in host memory."""
    blocks_to_swap: int | None = None
    """Streamed blocks of each expert. Default: what the planner chooses."""
    vram: str | None = None
    """Device memory, such as 24GB or 23.5GiB. Default: that of --gpu, or what is free here."""
    ram: str | None = None
    """Host memory, such as 64GB. Default: this machine's."""
    gpu: str | None = None
    """Card whose rates give the seconds: 3090, 4060ti, 4090, 4090-x8, 5090, h100 or h200. Default: the one here."""
    json: Path | None = None
    """Also write the plan here."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from core.errors import InputError
from core.files import atomic_path
from memory.card import find_card
from memory.machine import host_bytes, parse_bytes
from memory.plan import MemoryPlan
from memory.plan_table import plan_record, plan_table
from wan_ext.configs import get_variant
from wan_ext.planning import plan_generation, plan_training


def main(options: Options) -> None:
    plan, note = plan_for(options)
    print(plan_table(plan))
    if note:
        print(f"\nnote: {note}")
    if options.json is not None:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps(plan_record(plan), indent=1) + "\n", encoding="utf-8")


def plan_for(options: Options) -> tuple[MemoryPlan, str | None]:
    """The plan of the options, and what was assumed for it."""
    variant = get_variant(options.task)
    for name in ("batch_size", "rank"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected at least 1, found {getattr(options, name)}")
    height, width = (variant.height, variant.width) if options.size is None else read_size(options.size)
    frames = variant.num_frames if options.frames is None else options.frames
    recipe = None if options.recipe == "none" else options.recipe
    card = find_card(vram=options.vram, gpu=options.gpu)
    ram = host_bytes() if options.ram is None else parse_bytes(options.ram, "--ram")
    if options.generate:
        plan = plan_generation(
            variant,
            frames=frames,
            height=height,
            width=width,
            recipe=recipe,
            vram_bytes=card.vram_bytes,
            ram_bytes=ram,
            rates=card.rates,
            from_file=options.from_file,
            blocks_to_swap=options.blocks_to_swap,
        )
        return plan, card.note
    if options.experts not in ("both", *variant.experts):
        raise InputError(f"--experts {options.experts}: {variant.name} has one expert, called low")
    plan = plan_training(
        variant,
        frames=frames,
        height=height,
        width=width,
        batch_size=options.batch_size,
        rank=options.rank,
        experts=variant.experts if options.experts == "both" else (options.experts,),
        recipe=recipe,
        vram_bytes=card.vram_bytes,
        ram_bytes=ram,
        rates=card.rates,
        optimizer=options.optimizer_type,
        from_file=options.from_file,
        blocks_to_swap=options.blocks_to_swap,
    )
    return plan, card.note


def read_size(text: str) -> tuple[int, int]:
    """Height and width out of "480x832" or "480*832"."""
    found = re.fullmatch(r"(\d+)[x*](\d+)", text.strip().lower())
    if found is None:
        raise InputError(f"--size: expected height x width such as 480x832, found {text!r}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    run(main, OPTIONS)
