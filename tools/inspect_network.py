"""Is the camera in my LoRA file? What a weights file holds: modules, ranks, camera mechanism, norms, and its companion.

    python tools/inspect_network.py out/my_camera_high_noise.safetensors
    python tools/inspect_network.py somebody_elses_lora.safetensors another_one.safetensors

Reads files of this trainer, musubi-tuner, diffusers, ComfyUI, PEFT and DiffSynth-Studio, and whole checkpoints with a
camera adapter, of which only headers and the camera's own tensors are read. A part that is still zero is called
untrained.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Weights files, or folders of checkpoints in shards."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from core.errors import InputError
from networks.inspection import Inspection, PartOfFile, inspect

FACTS = {
    "task": "task",
    "expert": "expert",
    "injection": "injection",
    "camera_blocks": "camera blocks",
    "camera_experts": "experts that hear the camera",
    "camera_dropout": "camera dropout",
    "train_control_adapter": "model's own adapter trained",
    "pose_frame": "pose frame",
    "scale_rule": "scale rule",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "prompt": "prompt",
    "ss_steps": "steps",
    "ss_sd_model_name": "trained on",
}
"""Metadata that is shown, and what it is called."""


def main(options: Options) -> None:
    if not options.files:
        raise InputError("expected a file to inspect, found none; python tools/inspect_network.py FILE")
    print("\n\n".join(describe(inspect(file)) for file in options.files))


def describe(found: Inspection) -> str:
    """Everything about one file, as text."""
    lines = [str(found.path), f"  what it is    {found.kind}", f"  camera        {found.answer}"]
    if found.companion_note:
        lines.append(f"  companion     {found.companion_note}")
    lines += [f"  {label:13} {found.metadata[key]}" for key, label in FACTS.items() if found.metadata.get(key)]
    parts = [*found.parts, *(found.companion.parts if found.companion else ())]
    if parts:
        lines += ["", f"  {'part':44} {'modules':>8} {'rank':>8} {'parameters':>13} {'norm':>11}"]
        lines += [f"  {row(part)}" for part in parts]
    if found.base_tensors:
        lines.append(f"  and {found.base_tensors:,} tensors of the transformer itself, which were not read")
    if found.others:
        lines.append(f"  and {len(found.others):,} tensors that no rule knows, such as {found.others[0]}")
    return "\n".join(lines)


def row(part: PartOfFile) -> str:
    """One line of the table."""
    ranks = "-".join(str(rank) for rank in sorted({part.ranks[0], part.ranks[-1]})) if part.ranks else ""
    mark = "  untrained" if part.untrained else ""
    return f"{part.name:44} {part.modules:>8,} {ranks:>8} {part.parameters:>13,} {part.norm:>11.4g}{mark}"


if __name__ == "__main__":
    run(main, OPTIONS)
