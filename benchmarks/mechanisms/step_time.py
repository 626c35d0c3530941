"""How much a mechanism adds to a training step: all of them in turns within one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.mechanisms.runs import NONE, ROOT
from benchmarks.mechanisms.worlds import HEIGHT, WIDTH, WORLDS, stacked, test_cases
from networks import lora, lora_camera
from wan_ext.configs import get_variant
from wan_ext.loading import load_dit

BATCH_SIZE, REPEATS, RANK = 4, 15, 16


def step_seconds(mechanisms: Sequence[str]) -> dict[str, float]:
    """Time of forward and backward over that of a LoRA without camera, the median of the repeats' ratios."""
    steps = {mechanism: _step(mechanism) for mechanism in dict.fromkeys((NONE, *mechanisms))}
    times: dict[str, list[float]] = {mechanism: [] for mechanism in steps}
    for repeat in range(REPEATS + 1):
        for mechanism, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat:  # the first one warms up
                times[mechanism].append(time.perf_counter() - started)
    return {
        mechanism: round(statistics.median(a / b for a, b in zip(taken, times[NONE], strict=True)), 3)
        for mechanism, taken in times.items()
    }


def _step(mechanism: str) -> Callable[[], None]:
    """A step of the tiny model's high-noise expert with a mechanism."""
    variant = get_variant("tiny")
    dit = load_dit(ROOT / "assets" / "tiny-wan" / "high_noise_model", variant, dtype=torch.float32)
    module, arguments = (lora, {}) if mechanism == NONE else (lora_camera, {"injection": mechanism})
    network = module.create_network(
        dit, variant=variant, expert="high", rank=RANK, alpha=RANK, network_args=arguments, pose_frame="scene"
    )
    c2w, K = stacked([case.asked for case in test_cases(WORLDS["scene"])[:BATCH_SIZE]])
    latents = torch.randn(BATCH_SIZE, 16, 5, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    context = torch.zeros(BATCH_SIZE, variant.dit.text_len, variant.dit.text_dim)

    def step() -> None:
        velocity = dit(
            latents,
            timestep=torch.full((BATCH_SIZE,), 900.0),
            context=context,
            camera=network.encode_camera(c2w, K, HEIGHT, WIDTH),
        )
        velocity.square().mean().backward()
        network.zero_grad(set_to_none=True)

    return step
