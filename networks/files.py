"""Network files: a LoRA that ComfyUI and diffusers load, and the camera encoder in a file beside it.

    NAME_high_noise.safetensors  NAME_high_noise_camera.safetensors      of a mixture's experts
    NAME_low_noise.safetensors   NAME_low_noise_camera.safetensors
    NAME.safetensors             NAME_camera.safetensors                 of a model with one expert

Two files, because loaders of LoRAs refuse a file with keys that they do not know. The LoRA's metadata name the camera
file (`camera_file`), and a number drawn from both files' weights (`pair_id`) holds them together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from core.errors import InputError, nearest
from core.files import read_safetensors, read_safetensors_header, read_safetensors_metadata, save_safetensors
from networks import lora
from networks.network import Network
from wan_ext.configs import Expert, WanVariant, get_variant
from wan_ext.dit import WanDiT

NETWORK_MODULES = ("networks.lora", "networks.lora_camera")


def import_network_module(name: str) -> ModuleType:
    """The module that is called so. Raises InputError: there is none."""
    if name not in NETWORK_MODULES:
        hint = nearest(name, NETWORK_MODULES)
        raise InputError(f"--network_module: expected {' or '.join(NETWORK_MODULES)}, found {name!r}{hint}")
    return import_module(name)


def save_network(
    network: Network,
    folder: Path,
    name: str,
    run_metadata: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Write a network's files.

    The camera file is written first: a LoRA file never names one that is not there yet. A camera file of an earlier
    save under the same name fails the check of `pair_id` until its new LoRA file stands.

    Args:
        network: of one expert.
        folder: made if missing.
        name: of the run; the expert and the suffix are appended.
        run_metadata: what the run says of itself (settings, data set, prompt, ...). The network's own keys win.
        dtype: of the weights in the file.

    Returns:
        The LoRA file and, where there is a camera encoder, its file.
    """
    lora_file, camera_file = network_paths(folder, name, network.settings.task, network.settings.expert)
    lora_weights, camera_weights = _cast(network.lora_state(), dtype), _cast(network.camera_state(), dtype)
    metadata = {"modelspec.title": name, **run_metadata, **network.metadata(), "format": "pt"}
    if not camera_weights:
        save_safetensors(lora_weights, lora_file, metadata)
        return [lora_file]
    metadata["pair_id"] = _content_id(lora_weights | camera_weights)
    save_safetensors(camera_weights, camera_file, metadata | {"lora_file": lora_file.name})
    save_safetensors(lora_weights, lora_file, metadata | {"camera_file": camera_file.name})
    return [lora_file, camera_file]


def network_paths(folder: Path, name: str, task: str, expert: Expert) -> tuple[Path, Path]:
    """The LoRA file and the camera file of one expert."""
    stem = f"{name}_{expert}_noise" if get_variant(task).boundary is not None else name
    return Path(folder) / f"{stem}.safetensors", Path(folder) / f"{stem}_camera.safetensors"


def read_network_file(path: Path) -> dict[str, str]:
    """The metadata of a LoRA file, without its weights.

    Raises:
        InputError: not a safetensors file, or the camera half of a pair.
    """
    metadata = read_safetensors_metadata(path)
    if "lora_file" in metadata:
        raise InputError(
            f"{path}: expected a LoRA file, found the camera encoder that belongs to {metadata['lora_file']}; give "
            f"that file, which names this one"
        )
    return metadata


def network_rank(path: Path) -> tuple[Expert | None, int]:
    """The expert that a LoRA file is for (None: any), and its largest rank, from its header alone."""
    metadata = read_network_file(path)
    tensors, _ = read_safetensors_header(path)
    ranks = [shape[0] for name, (_, shape) in tensors.items() if name.endswith(("lora_A.weight", "lora_down.weight"))]
    return metadata.get("expert"), max(ranks, default=0)  # type: ignore[return-value]  # one of two words


def load_network(
    dit: WanDiT, path: Path, *, variant: WanVariant, expert: Expert, multiplier: float = 1.0
) -> Network | None:
    """Put a saved network on one expert.

    Args:
        dit: the expert; its linears are replaced.
        path: the LoRA file; the camera file is found beside it.
        variant: the task.
        expert: which expert the DiT is.
        multiplier: strength of the LoRA in use.

    Returns:
        The network, frozen and in evaluation mode; None where the file is of the task's other expert. A LoRA of another
        tool, whose metadata name no expert, is for any.

    Raises:
        InputError: broken or missing files, a network of another task or model, weights that do not fit. It names the
            file; the DiT is unchanged.
    """
    path = Path(path)
    metadata = read_network_file(path)
    if metadata.get("task") == variant.name and metadata.get("expert", expert) != expert:
        return None
    weights, _ = read_safetensors(path)
    module = lora
    if "task" in metadata:  # this trainer's
        name = metadata.get("ss_network_module", "")
        if name not in NETWORK_MODULES:
            raise InputError(
                f"{path}: metadata ss_network_module: expected {' or '.join(NETWORK_MODULES)}, found {name!r}; the "
                f"file comes from another version of this trainer"
            )
        module = import_module(name)
    if "camera_file" in metadata:
        weights |= read_camera_half(path, metadata)
    try:
        return module.load_network(dit, weights, metadata, variant=variant, expert=expert, multiplier=multiplier)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_camera_half(path: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of the camera file that a LoRA file names.

    Args:
        path: the LoRA file.
        metadata: of it, with a camera_file among them.

    Raises:
        InputError: the camera file is missing, broken, or of another save.
    """
    camera_file = path.parent / Path(metadata["camera_file"]).name
    if not camera_file.is_file():
        raise InputError(
            f"{path}: expected its camera encoder beside it in {camera_file.name}, found none; copy it there too"
        )
    weights, camera_metadata = read_safetensors(camera_file)
    if camera_metadata.get("pair_id") != metadata.get("pair_id"):
        raise InputError(
            f"{camera_file}: expected the camera encoder that was saved with {path.name}, found that of another save; "
            f"copy the two files together"
        )
    return weights


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in the dtype of the file, on the CPU; alphas stay float32, in which every alpha is exact."""
    return {
        name: tensor.cpu() if name.endswith(".alpha") else tensor.to("cpu", dtype) for name, tensor in state.items()
    }


def _content_id(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"
