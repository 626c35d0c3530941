"""A model with 8-bit weights as one safetensors file, which is mapped into memory instead of read.

What: `write_quantized` writes what loading a checkpoint with a recipe would make of it: 8-bit values, scales, and all
other tensors in the dtype that the model keeps them in. `quantized_file` recognises such a file by its metadata, and
`QuantizedFile.fill` gives a meta module its tensors: the same bits as quantising on the fly.

How: first the tensors outside the blocks, then block after block, each of these regions at a multiple of 4096 bytes and
each tensor in it at a multiple of 256 after the one before, in the order of `modules()`. So a region is what
`memory.masters` packs a block into, and filling a transfer buffer reads the file straight on. The format allows no
gaps, so they are tensors too, called padding.0, padding.1 and so on; every reader of safetensors can read the file. On
the host a region's tensors are views of the mapping: pages come from the disk when they are touched first, stay in the
system's page cache while there is room, and are the process's own only where something writes into them (the file never
changes). On a device a region is one transfer.

Metadata: version of this layout, which model, recipe, fingerprint of the checkpoint, and a checksum of the whole
header, so that a damaged one is not believed. The weights themselves have no checksum: reading them would cost what
mapping saves.

Cost: loading reads the header. Writing holds one tensor at a time; the disk holds the file once, reserved at the start.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from core.errors import InputError
from core.files import atomic_path
from memory.arena import aligned, tensor_bytes
from memory.quant import RECIPES, QuantLinear, QuantRecipe
from wan_ext.assemble import assign, report_differences, tensors_of
from wan_ext.checkpoint_files import Checkpoint
from wan_ext.tensor_files import SAFETENSORS_DTYPES, SafetensorsFile, StoredTensor

Model = Literal["dit", "t5"]
MODELS: dict[str, str] = {"dit": "a diffusion transformer (--dit)", "t5": "a text encoder (--t5)"}

VERSION = "1"
KEY = "quantized."  # before each of our keys in the metadata
PADDING = "padding."
REGION_BYTES = 4096
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
QUANTIZED_LEAVES = ("weight", "weight_scale", "weight_transposed")

Report = Callable[[int, int], None]
"""Called with the bytes written so far and all that there will be."""


@dataclass(frozen=True, kw_only=True)
class QuantizedFile:
    """A file of 8-bit weights whose header has been read and holds together."""

    file: SafetensorsFile
    recipe: QuantRecipe
    holds: str
    """Which model it is, for people."""
    source: str
    """Fingerprint of the checkpoint that it was made of."""

    def recipe_for(self, asked: QuantRecipe | None) -> QuantRecipe:
        """The recipe to compute with: the file's own, or the one asked for if its 8-bit numbers are these.

        Raises:
            InputError: the file holds the numbers of another recipe.
        """
        if asked is None:
            return self.recipe
        if not asked.stores_as(self.recipe) or asked.transposed != self.recipe.transposed:
            raise InputError(
                f"{self.file.path}: expected 8-bit weights of recipe {recipe_name(asked)}, found "
                f"{recipe_name(self.recipe)}; leave the recipe away, or quantise the checkpoint again with it"
            )
        return asked

    def fill(
        self,
        module: nn.Module,
        *,
        blocks: Sequence[nn.Module],
        what: str,
        dtype_of: Callable[[str], torch.dtype],
        device: torch.device | str = "cpu",
        is_ignored: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Give a meta module its tensors, frozen: views of the mapped file on the host, copies elsewhere.

        Args:
            module: with linears of this file's recipe.
            blocks: the same parts of it as when the file was written.
            what: what the module is, for messages.
            dtype_of: the precision of a tensor that is not quantised; one that is stored in another is converted.
            device: where the tensors go.
            is_ignored: tensors of the file that may stay unused, by name.

        Raises:
            InputError: the file holds the tensors of another model.
        """
        self._compare(module, what, is_ignored)
        quantized = _quantized_names(module)
        mapping = self._map()
        for names in _regions(module, blocks):
            if not names:
                continue
            stored = [self.file.tensors[name] for name in names]
            start = min(tensor.start for tensor in stored)
            size = max(tensor.start + tensor.num_bytes for tensor in stored) - start
            region = torch.frombuffer(mapping, dtype=torch.uint8, offset=start, count=size).to(device)
            for name, tensor in zip(names, stored, strict=True):
                part = region[tensor.start - start :][: tensor.num_bytes]
                view = part.view(tensor.dtype).view(tensor.shape)
                assign(module, name, view if name in quantized else view.to(dtype_of(name)))

    def _map(self) -> mmap.mmap:
        """The file as memory; what is written into it stays in this process."""
        try:
            with open(self.file.path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise InputError(
                f"{self.file.path}: expected to map {self.file.num_bytes / 1e9:.1f} GB into memory, but the system "
                f"refused ({error.strerror}); allow this process that much address space (ulimit -v, "
                "vm.overcommit_memory)"
            ) from None

    def _compare(self, module: nn.Module, what: str, is_ignored: Callable[[str], bool]) -> None:
        """Refuse the file of another model."""
        expected, found = tensors_of(module), self.file.tensors
        quantized = _quantized_names(module)
        misshapen = []
        for name in expected.keys() & found.keys():
            wanted, stored = expected[name], found[name]
            shape, dtype = tuple(wanted.shape), wanted.dtype
            if name.endswith("weight_scale"):  # scales that a checkpoint brought may be more or fewer, and float32
                runs, width = stored.shape[-1], found[name.removesuffix("_scale")].shape[-1]
                fits = stored.shape == (shape[0], runs) and runs > 0 and width % runs == 0
                fits = fits and stored.dtype.is_floating_point and (self.recipe.scales != "row" or runs == 1)
            else:
                fits = stored.shape == shape and (name not in quantized or stored.dtype == dtype)
            if not fits:
                misshapen.append(f"{name} {stored.dtype} {list(stored.shape)} for {list(shape)}")
        report_differences(
            self.file.path,
            what,
            missing=expected.keys() - found.keys(),
            unused=[name for name in found if name not in expected and not is_padding(name) and not is_ignored(name)],
            misshapen=misshapen,
        )


def quantized_file(checkpoint: Checkpoint, *, model: Model | None) -> QuantizedFile | None:
    """The checkpoint as a file of 8-bit weights, or None if it is a checkpoint of another kind.

    Args:
        checkpoint: of one file, or it is of another kind.
        model: what it must hold; None: anything.

    Raises:
        InputError: it is such a file, but damaged, of another version, or of another model.
    """
    path = checkpoint.path
    if not any(key.startswith(KEY) for key in checkpoint.metadata):
        return None
    file = checkpoint.files[0]
    if len(checkpoint.files) > 1 or not isinstance(file, SafetensorsFile):
        raise InputError(f"{path}: expected one file of 8-bit weights, found it among others; give its own path")
    metadata = {key.removeprefix(KEY): value for key, value in file.metadata.items()}
    version = metadata.get("version")
    if metadata.get("checksum") != _checksum(file.metadata, file.tensors):
        raise InputError(
            f"{file.path}: expected the header that was written with the file, found a damaged one; quantise the "
            "checkpoint again (tools/quantize.py)"
        )
    if version != VERSION:
        raise InputError(
            f"{file.path}: expected 8-bit weights in layout {VERSION}, found layout {version}; quantise the checkpoint "
            "again (tools/quantize.py)"
        )
    end = max(tensor.start + tensor.num_bytes for tensor in file.tensors.values())
    if end != file.num_bytes:
        raise InputError(f"{file.path}: expected {end} bytes, found {file.num_bytes}; copy or write the file again")
    if model is not None and metadata["model"] != model:
        raise InputError(
            f"{file.path}: expected 8-bit weights of {MODELS[model]}, found those of "
            f"{MODELS[metadata['model']]}: {metadata['holds']}; give each file with its own flag"
        )
    recipe = QuantRecipe(**json.loads(metadata["recipe"]))
    return QuantizedFile(file=file, recipe=recipe, holds=metadata["holds"], source=metadata["source"])


def refuse_quantized(checkpoint: Checkpoint, purpose: str) -> None:
    """Refuse a file of 8-bit weights where only a checkpoint serves.

    Args:
        checkpoint: what was given.
        purpose: what it was given for: "to quantise".

    Raises:
        InputError: it is such a file.
    """
    found = quantized_file(checkpoint, model=None)
    if found is not None:
        raise InputError(
            f"{checkpoint.path}: expected a checkpoint {purpose}, found 8-bit weights of recipe "
            f"{recipe_name(found.recipe)} ({found.holds}); give the checkpoint that they were made of"
        )


def write_quantized(
    output: Path,
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    blocks: Sequence[nn.Module],
    model: Model,
    recipe: QuantRecipe,
    holds: str,
    source: str,
    extras: Mapping[str, Tensor] | None = None,
    report: Report | None = None,
) -> None:
    """Write a file of 8-bit weights, atomically.

    Args:
        output: the .safetensors file; an old one of this name is replaced in the end.
        module: a meta module with the dtypes and shapes of the file, such as `wan_ext.assemble.Conversion` leaves it.
        tensors: all of its tensors by name, in any order.
        blocks: the parts of it that lie in one piece, in their order.
        model: which one it is.
        recipe: of its quantised linears.
        holds: which variant and shape it is, for people.
        source: fingerprint of the checkpoint.
        extras: more tensors for the file, by name.
        report: told after each tensor how far it is.

    Raises:
        InputError: there is not enough space on the disk.
    """
    extras = dict(extras or {})
    metadata = {
        f"{KEY}version": VERSION,
        f"{KEY}model": model,
        f"{KEY}recipe": json.dumps(asdict(recipe)),
        f"{KEY}holds": holds,
        f"{KEY}source": source,
    }
    header, places = _header(module, blocks, extras, metadata)
    total = max(place.start + place.num_bytes for place in places.values())
    _require_space(output, total)
    done = 0
    missing = {name for name in places if not is_padding(name)}
    try:
        with atomic_path(output) as temporary, open(temporary, "rb+") as file:
            _reserve(file.fileno(), total)
            file.write(header)
            for name, tensor in _chain(tensors, extras.items()):
                place = places[name]
                assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), name
                file.seek(place.start)
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                missing.remove(name)
                done += place.num_bytes
                if report is not None:
                    report(done, total)
            assert not missing, missing
        if report is not None:
            report(total, total)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{output}: the disk is full at {total / 1e9:.1f} GB; free space or choose another folder"
        ) from None


def recipe_name(recipe: QuantRecipe) -> str:
    """What a command line calls a recipe, or its parts where it has no name."""
    return next((name for name, known in RECIPES.items() if known == recipe), str(asdict(recipe)))


def is_padding(name: str) -> bool:
    """Whether a tensor of the file only fills a gap."""
    return name.startswith(PADDING)


def _chain(*parts: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        yield from part


def _quantized_names(module: nn.Module) -> set[str]:
    """Names of the tensors that make up quantised weights."""
    linears = {prefix for prefix, owner in module.named_modules() if isinstance(owner, QuantLinear)}
    return {f"{prefix}.{leaf}" for prefix in linears for leaf in QUANTIZED_LEAVES}


def _regions(module: nn.Module, blocks: Sequence[nn.Module]) -> list[list[str]]:
    """Names of the tensors outside the blocks, and of each block, in the order in which they lie in the file."""
    paths = {id(owner): path for path, owner in module.named_modules()}
    prefixes = [f"{paths[id(block)]}." for block in blocks]
    names = list(tensors_of(module))
    outside = [name for name in names if not name.startswith(tuple(prefixes))]
    return [outside, *([name for name in names if name.startswith(prefix)] for prefix in prefixes)]


def _header(
    module: nn.Module, blocks: Sequence[nn.Module], extras: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """The bytes before the tensors, and where everything lies in the file, padding included."""
    specs = {**tensors_of(module), **extras}
    regions = _regions(module, blocks)
    regions[0] = [*regions[0], *extras]
    places: dict[str, StoredTensor] = {}
    end = 0

    def lay(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        nonlocal end
        size = tensor_bytes(shape, dtype)
        places[name] = StoredTensor(dtype=dtype, shape=shape, start=end, num_bytes=size)
        end += size

    def pad(start: int) -> None:
        if start > end:
            lay(f"{PADDING}{len(places)}", torch.uint8, (start - end,))

    for names in regions:
        pad(-(-end // REGION_BYTES) * REGION_BYTES)
        for name in names:
            pad(aligned(end))
            lay(name, specs[name].dtype, tuple(specs[name].shape))

    def text(start: int) -> bytes:
        moved = {name: _moved(place, start) for name, place in places.items()}
        checksum = {f"{KEY}checksum": _checksum(metadata, moved)}
        entries = {
            name: {
                "dtype": DTYPE_NAMES[place.dtype],
                "shape": list(place.shape),
                "data_offsets": [place.start, place.start + place.num_bytes],
            }
            for name, place in places.items()
        }
        return json.dumps({"__metadata__": {**metadata, **checksum}, **entries}, separators=(",", ":")).encode()

    start = -(-(8 + len(text(0))) // REGION_BYTES) * REGION_BYTES  # a checksum is as long as any other
    header = (start - 8).to_bytes(8, "little") + text(start).ljust(start - 8)
    return header, {name: _moved(place, start) for name, place in places.items()}


def _moved(place: StoredTensor, by: int) -> StoredTensor:
    return StoredTensor(dtype=place.dtype, shape=place.shape, start=place.start + by, num_bytes=place.num_bytes)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> str:
    """What a header says, in 64 hexadecimal digits: metadata but the checksum, and every tensor's place and type."""
    said = {key: value for key, value in metadata.items() if key != f"{KEY}checksum"}
    places = {name: [str(t.dtype), list(t.shape), t.start, t.num_bytes] for name, t in tensors.items()}
    return hashlib.sha256(json.dumps([said, places], sort_keys=True).encode()).hexdigest()


def _require_space(output: Path, num_bytes: int) -> None:
    """Refuse to start what the disk cannot hold."""
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"{output}: expected {num_bytes / 1e9:.1f} GB of free disk space in {folder}, found {free / 1e9:.1f} GB; "
            "free space or choose another folder"
        )


def _reserve(file: int, num_bytes: int) -> None:
    """Take the space on the disk at once, where the file system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, num_bytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(file, num_bytes)
