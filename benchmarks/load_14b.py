"""Loading one t2v-A14B expert in 8 bits: seconds, and the most memory that the process ever holds.

    python benchmarks/load_14b.py                 28 GB of random bf16 in the native sharded layout, written and removed
    python benchmarks/load_14b.py --layers 2      the same with two of the forty blocks (2 GB)

The checkpoint has the names and shapes of the real one. It is flushed to the disk and dropped from the page cache where
the system allows that, then loaded as `--fp8_scaled` loads it, in a fresh process whose high-water mark is read
(VmHWM, Linux). The bar: peak <= quantised size + 2 GB; the exit code is 1 where it is missed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path = Path("load_14b_checkpoint")
    """Where the checkpoint is written; must not exist. On a disk, not in a tmpfs."""
    layers: int = 40
    """Blocks; 40 is the real model."""
    keep: bool = False
    """Leave the checkpoint there."""
    json: Path | None = None
    """File for the figures, e.g. benchmarks/results/load_14b.json."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch

from core.errors import InputError
from core.files import atomic_path
from memory.quant import RECIPES
from wan_ext.configs import WanVariant, get_variant
from wan_ext.dit import WanDiT
from wan_ext.loading import load_dit

TASK = "t2v-A14B"
GB = 1e9
SHARD_BYTES = 10 * 10**9
BESIDES_BYTES = 2 * 10**9  # what a load may hold besides its result
POOL_SIZE = 2**24  # random numbers, read from another place for each tensor
WEIGHT_STD = 1 / 64
BYTES = 2  # of a bfloat16
STEM = "diffusion_pytorch_model"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one load took."""

    seconds: float
    file_bytes: int
    quantized_bytes: int
    imports_bytes: int
    """High-water mark before loading: Python and its libraries, part of the peak."""
    peak_bytes: int

    @property
    def besides_bytes(self) -> int:
        return self.peak_bytes - self.quantized_bytes


def main(options: Options) -> None:
    """Write, load in a fresh process, report, remove."""
    variant = variant_with(options.layers)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanDiT(variant.dit).state_dict().items()}
    file_bytes = BYTES * sum(prod(shape) for shape in shapes.values())
    if options.folder.exists():
        raise InputError(f"--folder {options.folder}: expected a path where nothing is, found something; remove it")
    parent = options.folder.resolve().parent
    if not parent.is_dir():
        raise InputError(f"--folder {options.folder}: {parent} is no folder; make it first")
    free = shutil.disk_usage(parent).free
    if free < file_bytes + BESIDES_BYTES:
        print(
            f"not run: {file_bytes / GB:.1f} GB for the checkpoint, {free / GB:.1f} GB free in {parent}; see --folder"
        )
        return
    try:
        seconds = write_checkpoint(options.folder, shapes)
        print(f"written      {file_bytes / GB:6.2f} GB in {seconds:.1f} s", flush=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
            figures = fresh_process.submit(measure_load, options.folder, options.layers).result()
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    report(figures, options)


def variant_with(layers: int) -> WanVariant:
    """The real model, or one with fewer blocks."""
    variant = get_variant(TASK)
    if not 1 <= layers <= variant.dit.num_layers:
        raise InputError(f"--layers: expected 1 to {variant.dit.num_layers}, found {layers}")
    return replace(variant, dit=replace(variant.dit, num_layers=layers))


def measure_load(folder: Path, layers: int) -> Figures:
    """Load the checkpoint in this process, which has done nothing else."""
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    imports_bytes = high_water_mark()
    start = time.perf_counter()
    dit = load_dit(folder, variant_with(layers), dtype=torch.bfloat16, recipe=RECIPES["fp8"])
    seconds = time.perf_counter() - start
    quantized_bytes = sum(tensor.nbytes for tensor in dit.state_dict().values())
    return Figures(
        seconds=seconds,
        file_bytes=file_bytes,
        quantized_bytes=quantized_bytes,
        imports_bytes=imports_bytes,
        peak_bytes=high_water_mark(),
    )


def high_water_mark() -> int:
    """Most bytes that were ever resident in this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise InputError("this system does not report VmHWM; run the benchmark on Linux")


def write_checkpoint(folder: Path, shapes: Shapes) -> float:
    """Write random weights of these shapes as safetensors shards with an index; returns seconds."""
    start = time.perf_counter()
    folder.mkdir()
    shards = list(split(shapes))
    numbers = (torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(0)) * WEIGHT_STD).bfloat16()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, shard, numbers)
        weight_map |= dict.fromkeys(shard, name)
    total = BYTES * sum(prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return time.perf_counter() - start


def split(shapes: Shapes) -> Iterator[Shapes]:
    """Consecutive tensors of at most SHARD_BYTES together."""
    shard: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        if shard and size + BYTES * prod(shape) > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += BYTES * prod(shape)
    yield shard


def write_shard(path: Path, shapes: Shapes, numbers: torch.Tensor) -> None:
    """One safetensors file, written front to back: a header with the place of each tensor, then their bytes."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + BYTES * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place, (name, shape) in enumerate(shapes.items()):
            is_norm = ".norm" in name and name.endswith("weight")
            values = 1 + numbers if is_norm else numbers  # norms scale by about one
            pieces = memoryview(values.view(torch.uint8).numpy())
            left, at = BYTES * prod(shape), place * 1_000_003 % POOL_SIZE * BYTES
            while left:
                piece = pieces[at : at + left]
                file.write(piece)
                left, at = left - len(piece), 0
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that loading reads from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(figures: Figures, options: Options) -> None:
    """Print the figures, keep them if asked to, and fail where the bar is missed."""
    holds = figures.besides_bytes <= BESIDES_BYTES
    print(f"loaded       {figures.seconds:6.1f} s   {figures.file_bytes / figures.seconds / GB:.2f} GB/s of bf16 read")
    print(f"quantised    {figures.quantized_bytes / GB:6.2f} GB")
    print(
        f"peak         {figures.peak_bytes / GB:6.2f} GB   {figures.imports_bytes / GB:.2f} GB of it after the imports"
    )
    verdict = "ok" if holds else "MISSED"
    print(f"besides      {figures.besides_bytes / GB:6.2f} GB   at most {BESIDES_BYTES / GB:.0f}: {verdict}")
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        with atomic_path(options.json) as temporary:
            temporary.write_text(
                json.dumps({"task": TASK, "layers": options.layers, **machine, **asdict(figures)}, indent=2) + "\n"
            )
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    run(main, OPTIONS)
