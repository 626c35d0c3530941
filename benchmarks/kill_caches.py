"""Killed anywhere and nothing lost: SIGKILL the caching commands at random moments, run them again, compare.

    python benchmarks/kill_caches.py                       200 kills: about 20 minutes on two cores
    python benchmarks/kill_caches.py --kills 10

A small data set is filmed and cached once undisturbed. Then the three commands are started again and again on an empty
cache folder, with --skip_existing, and killed: every second time at a random moment of their run, else while a file is
being written. When the kills are used up, each runs once to its end. Then every cache must be there, hold the same
numbers and provenance as the undisturbed one, and no temporary file may be left.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = 200
    """SIGKILLs, of the three commands in turn."""
    clips: int = 8
    """Clips of the data set."""
    seed: int = 0
    """Of the moments."""
    work: Path = Path("kill_caches")
    """Folder for the data set; removed at the end."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from tqdm import tqdm

from core.errors import InputError
from core.files import TEMPORARY, read_safetensors

COMMANDS = ("latents", "text", "camera")
SHORTEST, LONGER = 0.5, 1.2  # of the undisturbed time; the first half of it is imports


def main(options: Options) -> None:
    if options.work.exists():
        raise InputError(f"--work: expected a folder that is not there yet, found {options.work}")
    try:
        kill_and_compare(options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)


def kill_and_compare(options: Options) -> None:
    folder = options.work.resolve() / "data"
    start(
        ROOT / "tools" / "render_scenes.py",
        *("--output", folder, "--scenes", 1, "--clips_per_scene", options.clips, "--supersample", 1),
    ).wait()
    seconds = {}
    for name in COMMANDS:
        started = time.perf_counter()
        require(cache_command(name, folder).wait() == 0, f"cache_{name}.py failed undisturbed")
        seconds[name] = time.perf_counter() - started
    whole = content(folder)
    shutil.rmtree(folder / "cache")

    chance = random.Random(options.seed)
    unfinished = left = 0
    for number in tqdm(range(options.kills), desc="kills", unit="kill"):
        name = COMMANDS[number % len(COMMANDS)]
        process = cache_command(name, folder)
        if number % 2:
            wait_for_a_temporary(process, folder)
        else:
            time.sleep(chance.uniform(SHORTEST, LONGER) * seconds[name])
        unfinished += process.poll() is None
        process.kill()
        process.wait()
        left += len(temporaries(folder))
        if len(list((folder / "cache").glob(f"*_{name}.safetensors"))) == expected(whole, name):
            for file in (folder / "cache").glob(f"*_{name}.safetensors"):  # complete: begin anew
                file.unlink()
    for name in COMMANDS:
        require(cache_command(name, folder).wait() == 0, f"cache_{name}.py failed after the kills")
    found = content(folder)
    require(found.keys() == whole.keys(), f"caches differ: {sorted(found.keys() ^ whole.keys())}")
    differing = [name for name in whole if found[name] != whole[name]]
    require(not differing, f"contents differ: {differing}")
    require(not temporaries(folder), f"temporary files left: {temporaries(folder)}")
    print(
        f"{options.kills} kills, {unfinished} of them in mid-run, {left} half-written files seen after them; "
        f"{len(whole)} caches complete and identical to those of an undisturbed run, no temporary file left"
    )


def wait_for_a_temporary(process: subprocess.Popen, folder: Path) -> None:
    """Until a file is being written: the moment at which a kill can do harm."""
    before = set(temporaries(folder))
    while process.poll() is None and not set(temporaries(folder)) - before:
        time.sleep(0.0005)


def cache_command(name: str, folder: Path) -> subprocess.Popen:
    options = ("--dataset_config", folder / "dataset.toml", "--skip_existing")
    return start(ROOT / f"cache_{name}.py", *options, *(("--device", "cpu") if name != "camera" else ()))


def start(script: Path, *arguments: object) -> subprocess.Popen:
    words = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def content(folder: Path) -> dict[str, tuple]:
    """Numbers and metadata of every cache."""
    found = {}
    for file in sorted((folder / "cache").glob("*.safetensors")):
        tensors, metadata = read_safetensors(file)
        numbers = {name: (str(x.dtype), tuple(x.shape), x.double().numpy().tobytes()) for name, x in tensors.items()}
        found[file.name] = (numbers, metadata)
    return found


def temporaries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob(f".*{TEMPORARY}*"))


def expected(whole: dict[str, tuple], name: str) -> int:
    return sum(file.endswith(f"_{name}.safetensors") for file in whole)


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InputError(otherwise)


if __name__ == "__main__":
    run(main, OPTIONS)
