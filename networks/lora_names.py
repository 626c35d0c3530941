"""What trainers call the tensors of a LoRA on Wan: one module name behind five spellings.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight     ComfyUI, and this trainer
    lora_unet_blocks_0_self_attn_q.lora_down.weight        musubi-tuner and other trainers of kohya's line
    transformer.blocks.0.attn1.to_q.lora_A.weight          diffusers
    base_model.model.blocks.0.self_attn.q.lora_A.weight    PEFT
    blocks.0.self_attn.q.lora_A.default.weight             DiffSynth-Studio

lora_A (or lora_down) [rank, in] comes first, lora_B (or lora_up) [out, rank] second; a missing alpha means the rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from wan_ext.key_maps import ATTENTIONS, BLOCK_MODULES, PROJECTIONS, dit_diffusers_name

Part = Literal["down", "up", "alpha"]

SUFFIXES: dict[str, Part] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
PREFIXES = {
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "lora_unet__": "kohya",
    "lora_unet_": "kohya",
    "transformer_2.": "diffusers",
    "transformer.": "diffusers",
    "base_model.model.": "PEFT",
    "": "DiffSynth",
}
"""Prefix -> whose spelling it is; the first that fits counts."""
IN_BLOCK = re.compile(r"blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)")
IN_DIFFUSERS_BLOCK = re.compile(r"blocks\.(\d+)\.(attn[12])\.(.+)")


@dataclass(frozen=True, kw_only=True)
class LoraKey:
    """What one key of a LoRA file means."""

    module: str
    """Native name of the linear: blocks.0.self_attn.q"""
    part: Part
    spelling: str
    """Whose names these are."""


def parse_lora_key(key: str) -> LoraKey | None:
    """The meaning of a key in any of the spellings; None: it is no part of a LoRA."""
    suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name = key.removesuffix(suffix)
    prefix, spelling = next((prefix, whose) for prefix, whose in PREFIXES.items() if name.startswith(prefix))
    return LoraKey(module=_native(name[len(prefix) :]), part=SUFFIXES[suffix], spelling=spelling)


def diffusers_lora_key(module: str, part: Literal["down", "up"]) -> str:
    """The key of a native module in diffusers' spelling."""
    name = dit_diffusers_name(f"{module}.weight").removesuffix(".weight")
    return f"transformer.{name}.{'lora_A' if part == 'down' else 'lora_B'}.weight"


def _native(name: str) -> str:
    """A module's native name from kohya's underscores or diffusers' words; other names stay as they are."""
    if found := IN_BLOCK.fullmatch(name):
        return f"blocks.{found[1]}.{found[2]}.{found[3]}"
    if found := IN_DIFFUSERS_BLOCK.fullmatch(name):
        attentions = {theirs: ours for ours, theirs in ATTENTIONS.items()}
        projections = {theirs: ours for ours, theirs in PROJECTIONS.items()}
        return f"blocks.{found[1]}.{attentions[found[2]]}.{projections.get(found[3], found[3])}"
    for ours, theirs in BLOCK_MODULES.items():
        if name.startswith("blocks.") and name.endswith(f".{theirs}") and theirs.startswith("ffn"):
            return f"{name.removesuffix(theirs)}{ours}"
    return name
