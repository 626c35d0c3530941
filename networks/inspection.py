"""Is the camera in this file? What the tensors of a network file or a checkpoint are, whose they are, whether trained.

Nothing but headers is read of base weights; of what was trained, one tensor at a time. The verdict "untrained" rests on
values, not on names: a part adds nothing as long as one of its matrices is exactly zero everywhere, which is how LoRAs
and zero-started mechanisms begin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from core.errors import InputError, listing
from networks.lora_names import Part, parse_lora_key
from networks.network import BRANCH_PREFIX, ENCODER_PREFIX
from wan_ext.checkpoint_files import bare_name, open_checkpoint
from wan_ext.control_adapter import PREFIX as ADAPTER_PREFIX
from wan_ext.loading import DiTShape, detect_variant
from wan_ext.tensor_files import TensorFile

CAMERA_WORDS = re.compile(r"camera|cam_|_cam|plucker|prope|ucpe|c2ws", re.IGNORECASE)
"""What other trainers call their camera parts."""
BASE_NAMES = re.compile(
    r"(blocks\.\d+\.|patch_embedding\.|text_embedding\.|time_embedding\.|time_projection\.|head\.|img_emb\.|"
    r"condition_embedder\.|proj_out\.|scale_shift_table|scaled_fp8|ref_conv\.)"
)
ROLES = {"camera_encoder": ENCODER_PREFIX, "camera_branches": BRANCH_PREFIX, "control_adapter": ADAPTER_PREFIX}


@dataclass(frozen=True, kw_only=True)
class PartOfFile:
    """One line of the table: tensors that belong together."""

    name: str
    modules: int
    parameters: int
    norm: float
    """Frobenius norm; of a LoRA that of what it adds to the weights, alpha included."""
    untrained: bool
    """One of its matrices is still zero everywhere; of a LoRA: all of them add nothing."""
    ranks: tuple[int, ...] = ()
    is_camera: bool = False


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found in one file."""

    path: Path
    metadata: Mapping[str, str]
    kind: str
    """What the file is, in words."""
    parts: tuple[PartOfFile, ...]
    base_tensors: int = 0
    """Tensors of a whole transformer, of which only the header was read."""
    companion: Inspection | None = None
    """The camera file of a LoRA file, where it is there."""
    companion_note: str = ""
    others: tuple[str, ...] = field(default=())
    """Names that no rule knows."""

    @property
    def camera_parts(self) -> tuple[PartOfFile, ...]:
        """Everything about the camera, here or in the companion."""
        mine = tuple(part for part in self.parts if part.is_camera)
        return mine + (self.companion.camera_parts if self.companion is not None else ())

    @property
    def answer(self) -> str:
        """The one line that answers the question."""
        parts = self.camera_parts
        untrained = [part.name for part in parts if part.untrained]
        if untrained:
            return f"yes, but UNTRAINED: still zero, so nothing is added, in {listing(untrained)}"
        if parts:
            return "yes, and trained: nothing in it is zero"
        if self.metadata.get("injection") == "plucker" and "camera_file" not in self.metadata:
            return "in the base model: trained on a Wan-Fun model whose own camera adapter stayed as it is"
        if self.metadata.get("camera_experts", "both") not in ("both", self.metadata.get("expert", "")):
            return f"no: only the {self.metadata['camera_experts']}-noise expert of this network hears the camera"
        if "camera_file" in self.metadata:
            return f"not here: {self.companion_note}"
        return "no"


def inspect(path: Path | str) -> Inspection:
    """Look into a LoRA, a camera file, an adapter or a checkpoint, of this trainer or another.

    Args:
        path: .safetensors or .pth file, or the folder of a checkpoint.

    Raises:
        InputError: nothing is there, or it is broken.
    """
    checkpoint = open_checkpoint(path)
    loras: dict[str, dict[Part, tuple[TensorFile, str]]] = {}
    camera: dict[str, list[tuple[TensorFile, str]]] = {}
    spellings: set[str] = set()
    base, others = 0, []
    for file in checkpoint.files:
        for stored in file.shapes():
            name, key = bare_name(stored), parse_lora_key(stored)
            role = next((role for role, prefix in ROLES.items() if name.startswith(prefix)), None)
            if role is not None:
                camera.setdefault(_camera_part(role, name), []).append((file, stored))
            elif key is not None:
                loras.setdefault(key.module, {})[key.part] = (file, stored)
                spellings.add(key.spelling)
            elif CAMERA_WORDS.search(name):
                camera.setdefault(_foreign_part(name), []).append((file, stored))
            elif BASE_NAMES.match(name):
                base += 1
            else:
                others.append(stored)
    parts = [*_lora_parts(loras), *(_camera_row(name, tensors) for name, tensors in camera.items())]
    if not parts and not base:
        raise InputError(
            f"{checkpoint.path}: expected a LoRA, a camera file or a Wan transformer, found "
            f"{listing(others, 3)}; is it another model's file?"
        )
    metadata = checkpoint.metadata
    kind = _kind(metadata, spellings, has_camera=bool(camera))
    if base:
        tasks = detect_variant(DiTShape.of_checkpoint(checkpoint)) if "patch_embedding.weight" in checkpoint else ()
        kind = f"Wan transformer ({' or '.join(tasks) or 'no known task'})"
    companion, note = _companion(checkpoint.path, metadata)
    return Inspection(
        path=checkpoint.path,
        metadata=metadata,
        kind=kind,
        parts=tuple(parts),
        base_tensors=base,
        companion=companion,
        companion_note=note,
        others=tuple(sorted(others)),
    )


def _kind(metadata: Mapping[str, str], spellings: set[str], *, has_camera: bool) -> str:
    """What a file without base weights is."""
    if "task" in metadata:
        whose = f"of this trainer ({metadata.get('ss_network_module')})"
        what = "camera file" if "lora_file" in metadata else "LoRA"
        return f"{what} {whose}, {metadata.get('expert')}-noise expert of {metadata['task']}"
    if spellings:
        module = metadata.get("ss_network_module")
        return f"LoRA in the names of {' and '.join(sorted(spellings))}" + (f", made by {module}" if module else "")
    return "camera weights" if has_camera else "weights"


def _companion(path: Path, metadata: Mapping[str, str]) -> tuple[Inspection | None, str]:
    """The camera file that belongs to a LoRA file, and a note on it."""
    if "lora_file" in metadata:
        return None, f"belongs to {metadata['lora_file']}"
    if "camera_file" not in metadata:
        return None, ""
    file = path.parent / Path(metadata["camera_file"]).name
    if not file.is_file():
        return None, f"the camera file {file.name} is missing beside this file; copy it there"
    found = inspect(file)
    if found.metadata.get("pair_id") != metadata.get("pair_id"):
        return None, f"the camera file {file.name} is of another save; copy the two together"
    return found, f"the camera file {file.name} is beside this file and belongs to it"


def _lora_parts(loras: Mapping[str, Mapping[Part, tuple[TensorFile, str]]]) -> Iterator[PartOfFile]:
    """A line for the LoRAs on each kind of linear: self_attn, cross_attn, ffn, others."""
    groups: dict[str, list[str]] = {}
    for module in loras:
        words = module.split(".")
        groups.setdefault(words[2] if words[0] == "blocks" and len(words) > 2 else words[0], []).append(module)
    for group, modules in groups.items():
        squares, parameters, zero, ranks = [], 0, 0, set()
        for module in modules:
            tensors = {part: file.get(stored).float() for part, (file, stored) in loras[module].items()}
            parameters += sum(tensor.numel() for part, tensor in tensors.items() if part != "alpha")
            if "down" not in tensors or "up" not in tensors:
                continue
            ranks.add(tensors["down"].shape[0])
            squares.append(lora_norm(tensors["down"], tensors["up"], tensors.get("alpha")) ** 2)
            zero += not squares[-1]
        yield PartOfFile(
            name=f"LoRA {group}",
            modules=len(modules),
            parameters=parameters,
            norm=math.sqrt(sum(squares)),
            untrained=zero == len(modules),
            ranks=tuple(sorted(ranks)),
        )


def lora_norm(down: Tensor, up: Tensor, alpha: Tensor | None) -> float:
    """Frobenius norm of alpha / rank * up @ down, without making the product: trace(down down^T up^T up).

    Args:
        down: [rank, in] or a convolution's [rank, in, 1, 1]
        up: [out, rank]
        alpha: one number; None: the rank.
    """
    down, up = down.flatten(1).double(), up.flatten(1).double()
    rank = down.shape[0]
    scale = 1.0 if alpha is None else alpha.item() / rank
    return abs(scale) * math.sqrt(max(0.0, ((down @ down.T) * (up.T @ up)).sum().item()))


def _camera_part(role: str, name: str) -> str:
    """The line that a tensor of a camera mechanism stands in: a module; all blocks together."""
    module = name.rpartition(".")[0]
    return re.sub(r"^camera_branches\.\d+\.", "camera_branches.*.", module) if role == "camera_branches" else module


def _foreign_part(name: str) -> str:
    """The same for a mechanism that is not ours."""
    return re.sub(r"\.\d+\.", ".*.", name.rpartition(".")[0])


def _camera_row(name: str, tensors: list[tuple[TensorFile, str]]) -> PartOfFile:
    """A line of the table for the tensors of one module of a camera mechanism, of all blocks."""
    square, parameters, untrained = 0.0, 0, 0
    for file, stored in tensors:
        shape = file.shapes()[stored]
        tensor = file.get(stored).to(torch.float32)
        norm = torch.linalg.vector_norm(tensor).item()
        untrained += len(shape) > 1 and norm == 0
        square, parameters = square + norm**2, parameters + prod(shape)
    return PartOfFile(
        name=name,
        modules=len({stored.rpartition(".")[0] for _, stored in tensors}),
        parameters=parameters,
        norm=math.sqrt(square),
        untrained=untrained > 0,
        is_camera=True,
    )
