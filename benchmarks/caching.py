"""Caching latents: clips per second against a plain loop, from ten clips to a thousand, and the memory of a long video.

    python benchmarks/caching.py --json benchmarks/results/caching.json          half an hour on one core
    python benchmarks/caching.py --vae Wan2.1_VAE.pth --task t2v-A14B --musubi musubi-tuner --device cuda --sizes 20

Rates: `cache_latents.py` as it is (list, probe, fingerprint, decode ahead, encode, write atomically with provenance)
against the loop that anyone writes first: for one clip after another decode, resize, AutoencoderKLWan.encode of
diffusers, save. Both load the same VAE and run in one process, in turns; a figure is the median of the turns' ratios.
The loop's latents and ours must agree, which shows that they do the same work. A second loop encodes as we do, and so
shows what decoding ahead gains over what is recorded. (Of the tiny VAE whole branches are zero and are skipped.)

Memory: a 60-second 1080p video is filmed and cached at 81 frames of 480x832, in a process of its own. "Beside the
model" is the highest resident memory (the kernel's own count) less what the process held with its libraries imported,
the VAE loaded and one small clip encoded.

--musubi compares with a checkout of musubi-tuner: its wan_cache_latents on the same clips with the same VAE file and
precision, whole processes in turns. Its VAE class has one size, so this needs the real Wan2.1 VAE. It is written after
its documented flags and has not been run where these figures were made.
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    task: str = "tiny"
    """Whose VAE."""
    vae: Path = ROOT / "assets" / "tiny-wan" / "Wan2.1_VAE.safetensors"
    """Its file."""
    device: str = "cpu"
    """Where it runs."""
    sizes: tuple[int, ...] = (10, 100, 1000)
    """Numbers of clips."""
    turns: int = 5
    """Of the smallest number; fewer of larger ones, so that each takes about as long."""
    frames: int = 9
    """Of a clip."""
    seconds: int = 60
    """Of the long video; 0 leaves the memory out."""
    windows: int = 6
    """Clips of 81 frames that are cut from it, evenly spread."""
    musubi: Path | None = None
    """A checkout of musubi-tuner to compare with."""
    musubi_python: Path = Path(sys.executable)
    """The interpreter that has what it needs."""
    work: Path = Path("caching_benchmark")
    """Folder for clips and caches; removed at the end."""
    json: Path | None = None
    """File for the figures, e.g. benchmarks/results/caching.json."""
    child: bool = False
    """Used by the benchmark itself: this process measures the memory."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from core.errors import InputError
from core.files import atomic_path, read_safetensors
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from wan_ext.configs import get_variant
from wan_ext.vae import load_vae

SOURCE, SMALL = (80, 120), (32, 48)  # height, width of the small clips before and after the resize
LONG_SOURCE, LONG = (1080, 1920), (480, 832)
LONG_FRAMES, FPS = 81, 24
DISTINCT = 8  # films; the other files are copies of them
BAR_BYTES = 1.5e9
AGREES = 1e-3


def main(options: Options) -> None:
    if options.child:
        print(json.dumps(memory(options)))
        return
    if options.work.exists():
        raise InputError(f"--work: expected a folder that is not there yet, found {options.work}")
    if options.musubi and options.task == "tiny":
        raise InputError("--musubi: its VAE class has the size of Wan2.1's; give --vae and --task of the real one")
    try:
        report = measure(options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    if options.json:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


def measure(options: Options) -> dict[str, Any]:
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "vae": options.vae.name,
        "frames": options.frames,
        "size": [*SMALL],
        "rates": {},
    }
    for number in options.sizes:
        folder = options.work / str(number)
        config = film_many(folder, number, options)
        if number == options.sizes[0]:
            report["difference"] = difference(config, options)
        turns = max(1, round(options.turns * options.sizes[0] / number))
        found = compare(config, turns, partial(ours, config, options), partial(loop, config, options))
        same = compare(config, turns, partial(ours, config, options), partial(loop, config, options, chunked=False))
        report["rates"][str(number)] = found | {"turns": turns, "ratio_same_encoder": same["ratio"]}
        print(
            f"{number} clips: ours {found['ours']:.3g}, loop {found['theirs']:.3g} clips/s: {found['ratio']:.2f} "
            f"times; {same['ratio']:.2f} times the loop that encodes as we do"
        )
        if options.musubi:
            found = compare_musubi(config, options)
            report["rates"][str(number)]["musubi"] = found
            print(f"  musubi-tuner {found['theirs']:.3g} clips/s: {found['ratio']:.2f} times its rate")
        shutil.rmtree(folder)
    if len(options.sizes) > 1:
        first, last = (report["rates"][str(number)]["ours"] for number in (options.sizes[0], options.sizes[-1]))
        report["held"] = last / first
        print(f"the rate with {options.sizes[-1]} clips is {last / first:.2f} of that with {options.sizes[0]}")
    if options.seconds:
        report["memory"] = long_video(options)
    return report


def compare(config: Path, turns: int, ours: Callable[[], None], theirs: Callable[[], None]) -> dict[str, float]:
    """Median clips per second of both and of their ratios, each turn on an empty cache."""
    number = len(list((config.parent / "videos").glob("*.mp4")))
    seconds: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for turn in range(turns):
        for command in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            shutil.rmtree(config.parent / "cache", ignore_errors=True)
            started = time.perf_counter()
            command()
            seconds[command].append(time.perf_counter() - started)
    ratios = [slow / fast for fast, slow in zip(seconds[ours], seconds[theirs], strict=True)]
    return {
        "ours": number / statistics.median(seconds[ours]),
        "theirs": number / statistics.median(seconds[theirs]),
        "ratio": statistics.median(ratios),
    }


def ours(config: Path, options: Options) -> None:
    """cache_latents.py in this process."""
    command = runpy.run_path(str(ROOT / "cache_latents.py"))
    command["main"](
        command["Options"](dataset_config=config, task=options.task, vae=options.vae, device=options.device)
    )


def loop(config: Path, options: Options, *, chunked: bool = True) -> None:
    """One clip after another, nothing recorded; encoded by diffusers' own way, in chunks, or by ours."""
    variant = get_variant(options.task)
    vae = load_vae(options.vae, variant.vae, device=options.device)
    mean = torch.tensor(variant.vae.latents_mean)[:, None, None, None]
    std = torch.tensor(variant.vae.latents_std)[:, None, None, None]
    cache = config.parent / "cache"
    cache.mkdir()
    height, width = SMALL
    for file in sorted((config.parent / "videos").glob("*.mp4")):
        frames = []
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                image = frame.to_image()
                frames.append(np.array(image.resize((width, height), Image.Resampling.LANCZOS)))
                if len(frames) == options.frames:
                    break
        video = torch.from_numpy(np.stack(frames)).float().permute(3, 0, 1, 2)[None] / 127.5 - 1  # [1, 3, T, H, W]
        with torch.no_grad():
            if chunked:
                latents = (vae.network.encode(video.to(options.device)).latent_dist.mean[0].cpu() - mean) / std
            else:
                latents = vae.encode(video.to(options.device))[0].cpu()
        save_file({"latents": latents.contiguous()}, cache / f"{file.stem}_plain.safetensors")


def difference(config: Path, options: Options) -> float:
    """The largest difference of the first clip's latents, ours against the loop's."""
    ours(config, options)
    cache = config.parent / "cache"
    mine = read_safetensors(next(iter(sorted(cache.glob("*_latents.safetensors")))))[0]["latents"]
    shutil.rmtree(cache)
    loop(config, options)
    plain = read_safetensors(next(iter(sorted(cache.glob("*_plain.safetensors")))))[0]["latents"]
    largest = float((mine - plain).abs().max())
    if largest > AGREES:
        raise InputError(f"the loop's latents and ours differ by {largest:.2g}, expected at most {AGREES}")
    return largest


def compare_musubi(config: Path, options: Options) -> dict[str, float]:
    """Whole processes: ours against musubi-tuner's wan_cache_latents, both in float32."""
    assert options.musubi is not None
    script = options.musubi / "src" / "musubi_tuner" / "wan_cache_latents.py"
    if not script.is_file():
        raise InputError(f"--musubi: expected a checkout of musubi-tuner with {script}, found nothing there")
    device = ("--vae", options.vae, "--vae_dtype", "float32", "--device", options.device)
    environment = os.environ | {"PYTHONPATH": str(options.musubi / "src")}

    def start(interpreter: Path, file: Path, *arguments: object) -> None:
        words = [str(interpreter), str(file), "--dataset_config", str(config), *map(str, arguments)]
        found = subprocess.run(words, env=environment, capture_output=True, text=True)
        if found.returncode:
            raise InputError(f"{' '.join(words)} failed: {found.stderr.strip()[-500:]}")

    return compare(
        config,
        1,
        lambda: start(Path(sys.executable), ROOT / "cache_latents.py", "--task", options.task, *device),
        lambda: start(options.musubi_python, script, *device, "--batch_size", 1),
    )


# ---- clips -----------------------------------------------------------------------------------------------------------


def film_many(folder: Path, number: int, options: Options) -> Path:
    """Small videos with captions, and the TOML that both programs read."""
    (folder / "videos").mkdir(parents=True)
    for index in range(number):
        file = folder / "videos" / f"{index:04d}.mp4"
        if index < DISTINCT:
            film(file, *SOURCE, options.frames, seed=index)
        else:
            shutil.copy(folder / "videos" / f"{index % DISTINCT:04d}.mp4", file)
        file.with_suffix(".txt").write_text("drifting colours")
    return write_toml(folder, SMALL, [options.frames], "head", 1)


def write_toml(folder: Path, size: tuple[int, int], frames: list[int], extraction: str, samples: int) -> Path:
    lines = [
        "[general]",
        f"resolution = [{size[1]}, {size[0]}]",
        'caption_extension = ".txt"',
        "batch_size = 1",
        "[[datasets]]",
        f'video_directory = "{folder.resolve()}/videos"',
        f'cache_directory = "{folder.resolve()}/cache"',
        f"target_frames = {frames}",
        f'frame_extraction = "{extraction}"',
        *([f"frame_sample = {samples}"] if extraction == "uniform" else []),
    ]
    config = folder / "dataset.toml"
    config.write_text("\n".join(lines) + "\n")
    return config


def film(file: Path, height: int, width: int, num_frames: int, *, seed: int) -> None:
    """A window that drifts over smooth colours with grain, in H.264 as phones write it (frames that need others)."""
    chance = np.random.default_rng(seed)
    coarse = chance.integers(0, 256, (12, 18, 3), dtype=np.uint8)
    size = (width + num_frames % 200 + 200, height + 200)
    field = np.array(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    field += chance.integers(-12, 13, field.shape, dtype=np.int16)
    colours = field.clip(0, 255).astype(np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"preset": "ultrafast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            left = abs((2 * number + 200) % 400 - 200)
            window = np.ascontiguousarray(colours[left // 2 : left // 2 + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode())


# ---- memory ----------------------------------------------------------------------------------------------------------


def long_video(options: Options) -> dict[str, Any]:
    """Film it, and cache it in a process of its own."""
    folder = options.work / "long"
    (folder / "videos").mkdir(parents=True)
    film(folder / "videos" / "long.mp4", *LONG_SOURCE, options.seconds * FPS, seed=0)
    (folder / "videos" / "long.txt").write_text("drifting colours")
    write_toml(folder, LONG, [LONG_FRAMES], "uniform", options.windows)
    words = [sys.executable, __file__, "--child", "--work", str(options.work), "--task", options.task]
    words += ["--vae", str(options.vae), "--device", options.device]
    output = subprocess.run(words, capture_output=True, text=True)
    if output.returncode:
        raise InputError(f"the process that measures memory failed: {output.stderr.strip()[-500:]}")
    found = json.loads(output.stdout.splitlines()[-1])
    found |= {"seconds": options.seconds, "windows": options.windows, "bar_bytes": BAR_BYTES}
    beside = found["peak_bytes"] - found["model_bytes"]
    found["beside_bytes"] = beside
    verdict = "below" if beside < BAR_BYTES else "ABOVE"
    print(f"{options.seconds} s of 1080p at 81 frames: {beside / 1e9:.2f} GB beside the model, {verdict} 1.5 GB")
    return found


def memory(options: Options) -> dict[str, float]:
    """Resident bytes with the model loaded, and the most while the long video is cached."""
    config = options.work / "long" / "dataset.toml"
    command = runpy.run_path(str(ROOT / "cache_latents.py"))
    variant = get_variant(options.task)
    vae = load_vae(options.vae, variant.vae, device=options.device)
    vae.encode(torch.zeros(1, 3, 5, 32, 32))
    list_clips(read_dataset_config(config), spatial_stride=16)  # ffmpeg and its tables
    model = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far no longer counts
    command["main"](
        command["Options"](dataset_config=config, task=options.task, vae=options.vae, device=options.device)
    )
    return {"model_bytes": model, "peak_bytes": resident("VmHWM")}


def resident(entry: str) -> int:
    """Bytes that Linux counts for this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{entry}:")).split()[1])


if __name__ == "__main__":
    run(main, OPTIONS)
