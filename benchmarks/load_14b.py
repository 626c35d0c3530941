"""One t2v-A14B expert in 8 bits: loaded, written to a file, started from that file. Seconds, and the most memory held.

    python benchmarks/load_14b.py                 28 GB of random bf16 in the native sharded layout, written and removed
    python benchmarks/load_14b.py --layers 2      the same with two of the forty blocks (2 GB)

The checkpoint has the names and shapes of the real one. Three fresh processes, whose high-water mark is read (VmHWM,
Linux), do one thing each: quantise it as they load it, as --quantize RECIPE does; write the file of tools/quantize.py;
and map that file and compute the first block with it. Before each the files are flushed to the disk and dropped from
the page cache, where the system allows that. Seconds count from after the imports. The bars: loading and writing hold
at most 2 GB besides the 8-bit weights, and the first block is done after 5 seconds; the exit code is 1 where one is
missed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path = Path("load_14b_checkpoint")
    """Where the checkpoint is written; must not exist. On a disk, not in a tmpfs."""
    layers: int = 40
    """Blocks; 40 is the real model."""
    recipe: str = "fp8"
    """How the weights become 8 bits; a name of docs/quantization.md."""
    keep: bool = False
    """Leave the checkpoint and the 8-bit file there."""
    json: Path | None = None
    """File for the figures, e.g. benchmarks/results/load_14b.json."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from torch import nn

from core.errors import InputError
from core.files import atomic_path
from memory.quant import parse_recipe
from wan_ext.configs import WanVariant, get_variant
from wan_ext.dit import WanDiT
from wan_ext.loading import load_dit, write_quantized_dit

TASK = "t2v-A14B"
GB = 1e9
SHARD_BYTES = 10 * 10**9
BESIDES_BYTES = 2 * 10**9  # what loading and writing may hold besides the 8-bit weights
RESTART_SECONDS = 5.0
POOL_SIZE = 2**24  # random numbers, read from another place for each tensor
WEIGHT_STD = 1 / 64
BYTES = 2  # of a bfloat16
STEM = "diffusion_pytorch_model"
QUANTIZED = "quantized"  # folder inside of the checkpoint's

Shapes = dict[str, tuple[int, ...]]
Step = Callable[[Path, Path, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one process took."""

    seconds: float
    processor_seconds: float
    """What the process computed; the rest it waited, for the disk or for other processes."""
    imports_bytes: int
    """High-water mark before: Python and its libraries, part of the peak."""
    peak_bytes: int


def main(options: Options) -> None:
    """Write a checkpoint, measure in fresh processes, report, remove."""
    parse_recipe(options.recipe)
    variant = variant_with(options.layers)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanDiT(variant.dit).state_dict().items()}
    file_bytes = BYTES * sum(prod(shape) for shape in shapes.values())
    if options.folder.exists():
        raise InputError(f"--folder {options.folder}: expected a path where nothing is, found something; remove it")
    parent = options.folder.resolve().parent
    if not parent.is_dir():
        raise InputError(f"--folder {options.folder}: {parent} is no folder; make it first")
    needed, free = 1.6 * file_bytes + BESIDES_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        print(
            f"not run: {needed / GB:.1f} GB for the checkpoint and the 8-bit file, {free / GB:.1f} GB free in "
            f"{parent}; see --folder"
        )
        return
    quantized = options.folder / QUANTIZED / f"{options.recipe}.safetensors"
    try:
        seconds = write_checkpoint(options.folder, shapes)
        print(f"checkpoint   {file_bytes / GB:6.2f} GB of bf16, written in {seconds:.1f} s", flush=True)
        given = (options.folder, quantized, options.layers, options.recipe)
        figures = {}
        for name, step in (("load", load), ("write", write), ("restart", restart)):
            forget(options.folder)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
                figures[name] = fresh_process.submit(measure, step, *given).result()
        quantized_bytes = quantized.stat().st_size
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    report(figures, file_bytes, quantized_bytes, options)


def variant_with(layers: int) -> WanVariant:
    """The real model, or one with fewer blocks."""
    variant = get_variant(TASK)
    if not 1 <= layers <= variant.dit.num_layers:
        raise InputError(f"--layers: expected 1 to {variant.dit.num_layers}, found {layers}")
    return replace(variant, dit=replace(variant.dit, num_layers=layers))


def measure(step: Step, folder: Path, file: Path, layers: int, recipe: str) -> Figures:
    """Do one thing in this process, which has done nothing else."""
    imports_bytes = high_water_mark()
    start, computed = time.perf_counter(), time.process_time()
    step(folder, file, layers, recipe)
    return Figures(
        seconds=time.perf_counter() - start,
        processor_seconds=time.process_time() - computed,
        imports_bytes=imports_bytes,
        peak_bytes=high_water_mark(),
    )


def load(folder: Path, file: Path, layers: int, recipe: str) -> None:
    """Quantise the checkpoint on the fly."""
    load_dit(folder, variant_with(layers), dtype=torch.bfloat16, recipe=parse_recipe(recipe))


def write(folder: Path, file: Path, layers: int, recipe: str) -> None:
    """Write the 8-bit file."""
    write_quantized_dit(folder, file, recipe=parse_recipe(recipe), variant=variant_with(layers))


def restart(folder: Path, file: Path, layers: int, recipe: str) -> None:
    """Map the 8-bit file and compute everything but the other blocks on a 32 x 32 image."""
    dit = load_dit(file, variant_with(layers), dtype=torch.bfloat16)

    def first_block(blocks: Sequence[nn.Module], x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        return blocks[0](x, *inputs)

    noised, context = torch.zeros(1, dit.config.in_dim, 1, 4, 4), torch.zeros(1, 8, dit.config.text_dim)
    with torch.no_grad():
        dit(noised, timestep=torch.tensor([500.0]), context=context, run_blocks=first_block)


def forget(folder: Path) -> None:
    """Drop files from the page cache, so that reading reads from the disk."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*.safetensors"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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


def report(figures: dict[str, Figures], file_bytes: int, quantized_bytes: int, options: Options) -> None:
    """Print the figures, keep them if asked to, and fail where a bar is missed."""
    misses = 0
    print(f"8-bit file   {quantized_bytes / GB:6.2f} GB, {options.recipe}")
    for name, measured in figures.items():
        held = {"load": quantized_bytes, "write": 0, "restart": 0}[name]
        besides = measured.peak_bytes - held
        held_too_much = name != "restart" and besides > BESIDES_BYTES
        too_slow = name == "restart" and measured.seconds > RESTART_SECONDS
        misses += held_too_much or too_slow
        verdict = {
            "load": f"{besides / GB:.2f} GB besides the weights, at most {BESIDES_BYTES / GB:.0f}",
            "write": f"at most {BESIDES_BYTES / GB:.0f} GB",
            "restart": f"first block done, at most {RESTART_SECONDS:.0f} s",
        }[name]
        print(f"{name:8} {measured.seconds:6.1f} s ({measured.processor_seconds:.1f} s computing)", end="   ")
        print(f"peak {measured.peak_bytes / GB:5.2f} GB ({measured.imports_bytes / GB:.2f} GB imports)", end="   ")
        print(f"{verdict}: {'MISSED' if held_too_much or too_slow else 'ok'}")
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        sizes = {"file_bytes": file_bytes, "quantized_bytes": quantized_bytes}
        what = {"task": TASK, "layers": options.layers, "recipe": options.recipe}
        taken = {name: asdict(measured) for name, measured in figures.items()}
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps({**what, **machine, **sizes, **taken}, indent=2) + "\n")
    if misses:
        sys.exit(1)


if __name__ == "__main__":
    run(main, OPTIONS)
