"""Make the tiny mixture of experts that ships in assets/tiny-wan: rendered clips, VAE, text encoder, two DiT experts.

    python tools/make_tiny_wan.py --work tiny_work --output assets/tiny-wan
    python tools/make_tiny_wan.py --stages vae --vae_steps 500     one stage only; it goes on from its checkpoint
    python tools/make_tiny_wan.py --stages high --threads 1        the two experts can train beside each other
    python tools/make_tiny_wan.py --stages evaluate                figures and contact sheets of what stands in --output

Runs on a CPU: an estimated two hours on two undisturbed cores at the default sizes. Ctrl-C at any time; the same
command goes on from the last checkpoint in --work.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run

Stage = Literal["vae", "text", "both", "high", "low", "i2v_high", "i2v_low", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path = ROOT / "assets" / "tiny-wan"
    """Folder of the finished model, in Wan2.2's native layout."""
    i2v_output: Path = ROOT / "assets" / "tiny-wan-i2v"
    """Folder of the two experts that continue a first frame; VAE and text encoder are those of --output."""
    work: Path = Path("tiny_work")
    """Folder of rendered clips, cached latents and checkpoints, about 1 GB."""
    stages: tuple[Stage, ...] = ("vae", "text", "both", "high", "low", "i2v_high", "i2v_low", "evaluate")
    """What to do; `both` is the model on all noise levels from which the experts `high` and `low` start, from which
    `i2v_high` and `i2v_low` start in turn."""
    vae_scenes: int = 200
    """Rooms that the VAE learns from, three clips each."""
    vae_steps: int = 1500
    """Steps of the decoder."""
    vae_lr: float = 1e-3
    """Highest learning rate of the decoder."""
    text_steps: int = 1500
    """Steps of the text encoder."""
    dit_scenes: int = 600
    """Rooms that the experts learn from, three clips each."""
    dit_steps: int = 2000
    """Steps of the model on all noise levels, from which both experts start."""
    expert_steps: int = 1800
    """Steps of each expert on its own noise levels."""
    i2v_steps: int = 2400
    """Steps of each expert that continues a first frame."""
    dit_lr: float = 1e-3
    """Highest learning rate of the experts and of the model that they start from."""
    batch_size: int = 16
    """Clips in a step of the DiT."""
    guidance_scale: float | None = None
    """Guidance of the generated contact sheet; the variant's when not given."""
    threads: int | None = None
    """Threads to compute with; all cores when not given."""
    seed: int = 0
    """Of every weight, order and noise."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch

from tools.tiny_wan.stages import dit_stage, evaluate_stage, i2v_stage, text_stage, vae_stage
from wan_ext.configs import Expert


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if "vae" in options.stages:
        vae_stage(
            options.output,
            options.work,
            num_scenes=options.vae_scenes,
            steps=options.vae_steps,
            learning_rate=options.vae_lr,
            seed=options.seed,
        )
    if "text" in options.stages:
        text_stage(options.output, options.work, steps=options.text_steps, seed=options.seed)
    experts: dict[str, Expert | None] = {"both": None, "high": "high", "low": "low"}
    for stage, expert in experts.items():
        if stage in options.stages:
            dit_stage(
                options.output,
                options.work,
                expert=expert,
                num_scenes=options.dit_scenes,
                steps=options.dit_steps if expert is None else options.expert_steps,
                learning_rate=options.dit_lr,
                batch_size=options.batch_size,
                seed=options.seed,
            )
    i2v_experts: dict[str, Expert] = {"i2v_high": "high", "i2v_low": "low"}
    for stage, i2v_expert in i2v_experts.items():
        if stage in options.stages:
            i2v_stage(
                options.output,
                options.i2v_output,
                options.work,
                expert=i2v_expert,
                num_scenes=options.dit_scenes,
                steps=options.i2v_steps,
                learning_rate=options.dit_lr,
                batch_size=options.batch_size,
                seed=options.seed,
            )
    if "evaluate" in options.stages:
        evaluate_stage(
            options.output, options.i2v_output, options.work, scale=options.guidance_scale, seed=options.seed
        )


if __name__ == "__main__":
    run(main, OPTIONS)
