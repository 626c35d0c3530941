"""Export a network: the camera adapter inside a copy of its base model, the LoRA in ComfyUI's and diffusers' names.

    python tools/export_network.py --network_weights out/mine_high_noise.safetensors out/mine_low_noise.safetensors \\
        --dit_high_noise Wan2.2-I2V-A14B/high_noise_model --dit Wan2.2-I2V-A14B/low_noise_model --output export
    python tools/export_network.py --network_weights out/mine_high_noise.safetensors --lora_only --output export

Writes into one folder, with a README.md that says what is what. Only injection=plucker can be run by ComfyUI; the LoRA
of any network, of other trainers too, can be exported with --lora_only. A copy of a 28 GB base takes 28 GB of disk and
little memory.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    network_weights: tuple[Path, ...]
    """LoRA files; the camera file of each is found beside it."""
    dit: Path | None = None
    """The low-noise expert, or the only one, that the network was trained on."""
    dit_high_noise: Path | None = None
    """The high-noise expert."""
    lora_only: bool = False
    """Leave the camera out."""
    output: Path
    """Folder to write."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from collections.abc import Mapping

from torch import Tensor

from core.errors import InputError
from core.files import atomic_path, read_safetensors, save_safetensors
from networks.export import check_exportable, comfyui_lora, diffusers_lora, merge_adapter
from networks.files import read_camera_half, read_network_file
from wan_ext.configs import get_variant

DROPPED = ("camera_file", "pair_id", "ss_training_options")
"""Metadata that do not hold for an exported file, or say where files of the author's machine are."""


def main(options: Options) -> None:
    if not options.network_weights:
        raise InputError("--network_weights: expected the LoRA files of a network, found none")
    lines: list[str] = []
    for path in options.network_weights:
        metadata = read_network_file(path)
        try:
            lines += export(path, metadata, options)
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    with atomic_path(options.output / "README.md") as temporary:
        temporary.write_text("# Exported network\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"README:        {options.output / 'README.md'}")


def export(path: Path, metadata: Mapping[str, str], options: Options) -> list[str]:
    """Write the files of one network; returns the lines about them for the README."""
    weights, _ = read_safetensors(path)
    kept = {key: value for key, value in metadata.items() if key not in DROPPED}
    lines = [f"## {path.stem}", ""]
    if not options.lora_only and metadata.get("injection") and hears_camera(metadata):
        camera = read_camera_half(path, metadata) if "camera_file" in metadata else {}
        lines += export_base(path, metadata, camera, kept, options)
    for tool, state in (("comfyui", comfyui_lora(weights)), ("diffusers", diffusers_lora(weights))):
        file = options.output / f"{path.stem}_lora_{tool}.safetensors"
        save_safetensors(state, file, {**kept, "format": "pt"})
        print(f"LoRA:          {file}")
    expert = f"of the {metadata['expert']}-noise expert" if "expert" in metadata else "that it was trained on"
    lines += [
        f"- `{path.stem}_lora_comfyui.safetensors`: the LoRA for ComfyUI, into `models/loras`; for the base {expert}.",
        f"- `{path.stem}_lora_diffusers.safetensors`: the same for `WanPipeline.load_lora_weights`"
        f"{' with `load_into_transformer_2=True`' if is_second(metadata) else ''}; alpha is multiplied in.",
        "",
    ]
    return lines


def export_base(
    path: Path, metadata: Mapping[str, str], camera: Mapping[str, Tensor], kept: Mapping[str, str], options: Options
) -> list[str]:
    """Write the base model with the camera adapter in it; returns the lines about it."""
    check_exportable(metadata, camera)
    variant = get_variant(metadata["task"])
    high = metadata["expert"] == "high"
    flag, base = ("--dit_high_noise", options.dit_high_noise) if high else ("--dit", options.dit)
    if base is None:
        raise InputError(
            f"{flag}: expected the base model that the camera adapter goes into, found none; give it, or --lora_only "
            f"to leave the camera out"
        )
    file = options.output / f"{path.stem}_base_with_camera.safetensors"
    merge_adapter(base, camera, file, variant=variant, metadata=kept)
    print(f"base + camera: {file}")
    lines = [
        f"- `{file.name}`: {base.name} with the trained camera adapter in it, for ComfyUI's `models/diffusion_models`; "
        f"ComfyUI recognises it by `control_adapter.*`, and the node that makes camera conditions works on it.",
        f"- The camera learnt pose frame `{metadata['pose_frame']}` and scale rule `{metadata['scale_rule']}`.",
    ]
    if metadata["pose_frame"] != "first":
        lines.append(
            "- ComfyUI's camera nodes give poses relative to the first frame. This network learnt the coordinates of "
            "one place, so they mean something else to it unless the path starts at that place's origin."
        )
    if variant.dit.in_dim == variant.dit.out_dim:
        lines.append(
            "- The base is text-to-video: it got 20 more input channels with zero weights, because ComfyUI asks for "
            "36. A start image given to it changes nothing."
        )
    return lines


def hears_camera(metadata: Mapping[str, str]) -> bool:
    """Whether this expert has a part of the camera mechanism."""
    return metadata.get("camera_experts", "both") in ("both", metadata.get("expert"))


def is_second(metadata: Mapping[str, str]) -> bool:
    """Whether diffusers calls this expert transformer_2."""
    return metadata.get("expert") == "low" and "task" in metadata and get_variant(metadata["task"]).boundary is not None


if __name__ == "__main__":
    run(main, OPTIONS)
