"""How large each camera mechanism is on the full models, and what it adds to their computation.

    python benchmarks/mechanism_sizes.py                         the tables of docs/mechanisms.md
    python benchmarks/mechanism_sizes.py --tasks t2v-1.3B

Nothing is computed and no weight exists: modules and activations live on torch's meta device, as shapes alone.

    parameters    of the encoder, and of the branches of all blocks; of one expert
    of the model  the same as a share of the expert's own parameters
    computation   multiplications and additions in matrix products, convolutions and attention that the mechanism adds
                  to one forward of the expert on one clip of the task's size, as a share of the expert's own
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    tasks: tuple[str, ...] = ("t2v-A14B", "ti2v-5B")
    """Models by their task."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from networks.mechanisms.features import CameraEncoder
from networks.mechanisms.registry import INJECTIONS, build_camera
from networks.mechanisms.settings import CameraSettings, read_camera_settings
from wan_ext.condition import CameraBranch, CameraCondition
from wan_ext.configs import WanVariant, get_variant
from wan_ext.dit import WanDiT

CHOICES: dict[str, dict[str, str]] = {
    **{name: {"injection": name} for name in INJECTIONS},
    "self_attention, camera_rank=full": {"injection": "self_attention", "camera_rank": "full"},
    "ray_attention, camera_absolute=no": {"injection": "ray_attention", "camera_absolute": "no"},
}
"""Rows of the table: network arguments by name."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mechanism on one model."""

    name: str
    encoder: int
    branches: int
    """Parameters of all blocks."""
    of_model: float
    """Share of the parameters of the expert."""
    of_computation: float
    """Share of the computation of a forward."""


def measure(task: str) -> list[Row]:
    """One row for each mechanism on one model."""
    variant = get_variant(task)
    with torch.device("meta"):
        dit = WanDiT(variant.dit)
        own_parameters, own_flops = num_parameters(dit), forward_flops(dit, variant)
        rows = []
        for name, network_args in CHOICES.items():
            settings = read_camera_settings(
                network_args,
                injection=network_args["injection"],
                defaults=INJECTIONS[network_args["injection"]].defaults,
                variant=variant,
                pose_frame="scene",
                scale_rule="none",
            )
            encoder, branches = build_camera(settings, variant, generator=None, device="meta")
            of_encoder, of_branches = num_parameters(encoder), sum(map(num_parameters, branches.values()))
            flops = mechanism_flops(encoder, branches, variant, settings)
            rows.append(
                Row(
                    name=name,
                    encoder=of_encoder,
                    branches=of_branches,
                    of_model=(of_encoder + of_branches) / own_parameters,
                    of_computation=flops / own_flops,
                )
            )
    return rows


def forward_flops(dit: WanDiT, variant: WanVariant) -> int:
    """Of one forward of the expert without a camera."""
    config, (frames, rows, columns) = variant.dit, latent_size(variant)
    noised = torch.empty(1, config.in_dim, frames, rows, columns)
    context = torch.empty(1, config.text_len, config.text_dim)
    return counted(lambda: dit(noised, timestep=torch.empty(1), context=context))


def mechanism_flops(
    encoder: CameraEncoder, branches: dict[int, CameraBranch], variant: WanVariant, settings: CameraSettings
) -> int:
    """Of the encoder once, and of each branch at its seam."""
    frames, rows, columns = latent_size(variant)
    c2w, K = torch.empty(1, variant.num_frames, 4, 4), torch.empty(1, variant.num_frames, 3, 3)
    conditions: list[CameraCondition] = []
    total = counted(lambda: conditions.append(encoder(c2w, K, variant.height, variant.width)))
    if not branches:
        return total
    features = conditions[0].features
    assert features is not None
    num_tokens = frames * rows * columns // (variant.dit.patch_size[1] * variant.dit.patch_size[2])
    x = torch.empty(1, num_tokens, variant.dit.dim)
    q = x.unflatten(-1, (variant.dit.num_heads, -1))
    branch = next(iter(branches.values()))
    in_self_attention = INJECTIONS[settings.injection].seam == "self_attn"

    def at_the_seam() -> None:
        if in_self_attention:
            branch.before(x, features)
        branch.after(x, x, q, features)

    return total + len(branches) * counted(at_the_seam)


def counted(call: Callable[[], object]) -> int:
    """Multiplications and additions of a call."""
    no_autocast = patch.object(torch, "autocast", lambda _, enabled: nullcontext())  # it does not know the meta device
    with torch.no_grad(), no_autocast, FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def latent_size(variant: WanVariant) -> tuple[int, int, int]:
    """Frames, rows and columns of the latents of one clip of the task's size."""
    stride_t, stride_h, stride_w = variant.vae.stride
    return (variant.num_frames - 1) // stride_t + 1, variant.height // stride_h, variant.width // stride_w


def num_parameters(module: nn.Module) -> int:
    """Of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def table(task: str, rows: list[Row]) -> str:
    """Markdown."""
    variant = get_variant(task)
    size = f"{variant.num_frames} frames of {variant.width} x {variant.height}"
    lines = [
        f"**{task}**, {size}:",
        "",
        "| injection | encoder | branches | of the model | computation |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.encoder / 1e6:,.1f} M | {row.branches / 1e6:,.1f} M | {row.of_model:.2%} | "
            f"+{row.of_computation:.2%} |"
        )
    return "\n".join(lines)


def main(options: Options) -> None:
    print("\n\n".join(table(task, measure(task)) for task in options.tasks))


if __name__ == "__main__":
    run(main, OPTIONS)
