"""A checkpoint as people have it: one file, a folder of shards with an index, or a folder among others.

What a person can get wrong here is answered by name: a shard that is not there, a folder that holds two experts, a web
page saved as a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.errors import InputError, listing
from core.hub import resolve
from wan_ext.tensor_files import TensorFile, open_file, what_it_is

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # how single files of ComfyUI name a diffusion model
SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


class Checkpoint:
    """Named tensors in one file or several, read one at a time.

    Prefixes that single files of ComfyUI put before every name are taken off.
    """

    def __init__(self, path: Path, files: Sequence[TensorFile]):
        self.path = path
        self.files = tuple(files)
        self.metadata: dict[str, str] = {}
        self._home: dict[str, tuple[TensorFile, str]] = {}
        for file in files:
            self.metadata |= file.metadata
            for stored_name in file.shapes():
                self._home[bare_name(stored_name)] = (file, stored_name)
        self._shapes = {bare_name(name): shape for file in files for name, shape in file.shapes().items()}

    def names(self) -> list[str]:
        return list(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        file, stored_name = self._home[name]
        return file.dtype(stored_name)

    def position(self, name: str) -> tuple[str, int]:
        """A sorting key: reading tensors in its order reads each file once from front to back."""
        file, stored_name = self._home[name]
        return str(file.path), file.position(stored_name)

    def get(self, name: str) -> Tensor:
        """One tensor, as stored, in host memory of its own."""
        file, stored_name = self._home[name]
        return file.get(stored_name)

    def will_read(self, name: str) -> None:
        """Announce the next `get`, so that the disk works while the processor does."""
        file, stored_name = self._home[name]
        file.will_read(stored_name)


def open_checkpoint(path: Path | str, *, stems: Sequence[str] = ("diffusion_pytorch_model",)) -> Checkpoint:
    """Open a file, or the weights of a folder.

    In a folder, the index of a sharded checkpoint comes first, then a file called after one of `stems`, then shards
    without an index, then the only weights file there is.

    Args:
        path: .safetensors, .pth, .pt or .bin file; a folder; or "hub:owner/name[/path]" (the one case of a download).
        stems: names, without suffix, under which the wanted weights go in a folder that may hold other models' too.

    Raises:
        InputError: nothing is there, a shard is missing, or a file is not a checkpoint.
    """
    path = resolve(path)
    if path.is_dir():
        return Checkpoint(path, [open_file(file) for file in _weights_of(path, stems)])
    if not path.is_file():
        raise InputError(f"{path}: expected a checkpoint file or folder, found nothing; check the path")
    if path.name.endswith(".index.json"):
        return Checkpoint(path, [open_file(file) for file in _shards_of(path)])
    return Checkpoint(path, [open_file(path)])


def bare_name(name: str) -> str:
    """A tensor's name without the prefix of ComfyUI's single files."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _weights_of(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The files that make up the checkpoint in a folder."""
    indices = sorted(folder.glob("*.index.json"))
    for stem in stems:
        for index in indices:
            if index.name.startswith(stem):
                return _shards_of(index)
    if len(indices) == 1:
        return _shards_of(indices[0])
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".bin") and p.is_file())
    for stem in stems:
        for file in files:
            if file.stem == stem:
                return [file]
    shards = [file for file in files if SHARD.search(file.stem)]
    if shards:
        return _complete(shards)
    if len(files) == 1:
        return files
    if files:
        raise InputError(
            f"{folder}: expected one checkpoint, found {listing(f.name for f in files)}; give the path of the file"
        )
    inside = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and _holds_weights(p)]
    if inside:
        raise InputError(
            f"{folder}: expected the weights of one model, found folders of several ({listing(inside)}); "
            f"give the path of one, such as {folder / inside[0]}"
        )
    raise InputError(f"{folder}: expected a checkpoint (.safetensors or .pth), found none; check the path")


def _holds_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.pth", "*.index.json", "*.bin"))


def _shards_of(index: Path) -> list[Path]:
    """The shards that an index names, all of which must be there."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: expected the index of a sharded checkpoint, {what_it_is(index)}") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index}: {len(missing)} of its {len(names)} shards are missing ({listing(missing)}); "
            f"download them into {index.parent}"
        )
    return [index.parent / name for name in names]


def _complete(shards: list[Path]) -> list[Path]:
    """Shards that came without their index, if their own numbering says that none is missing."""
    totals = {SHARD.search(file.stem).group(2) for file in shards}  # type: ignore[union-attr]
    if totals != {f"{len(shards):05d}"}:
        raise InputError(
            f"{shards[0].parent}: expected {' or '.join(sorted(totals))} shards, found {len(shards)} "
            f"({listing(f.name for f in shards)}); download the missing ones"
        )
    return shards
