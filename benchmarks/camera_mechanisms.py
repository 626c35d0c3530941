"""The bake-off: which way of telling the model its camera makes the video follow it best?

    python benchmarks/camera_mechanisms.py --work bake_off      everything: hours on two cores; goes on where it stopped
    python benchmarks/camera_mechanisms.py --work bake_off --worlds scene --mechanisms plucker_light bias --seeds 1

Every mechanism is trained on the embedded tiny Wan with the same clips, steps and seeds, both experts, next to a LoRA
that hears no camera ("none") and to the model without any training ("base"). Then each films 40 paths that it never
saw, and the videos are measured:

    top-1 of 8   the video is nearer (in pixels) to the rendering of its own path than to those of seven other paths
    RotErr       degrees between the asked camera and the one recovered from the video, mean over its frames
    TransErr     metres between them, likewise (rooms are 4 to 5 metres wide)

Worlds: `scene`, two rooms, in whose coordinates clips and paths are; `place`, one of them, the winner trained for
longer; `first`, rooms never seen, whose first frame is given to the tiny I2V model, poses relative to it; `orbits`, as
`scene`, trained without orbits, tested on orbits.
Results are written to --json, and as tables to --table, where the docs show them.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run

MECHANISMS = (
    "bias",
    "latent_bias",
    "film",
    "plucker",
    "plucker_light",
    "cross_attention",
    "self_attention",
    "ray_attention",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    work: Path
    """Folder of clips, weights and results of single runs; what stands there is not done again."""
    worlds: tuple[Literal["scene", "place", "first", "orbits"], ...] = ("scene", "place", "first", "orbits")
    """What to train and test on."""
    mechanisms: tuple[str, ...] = MECHANISMS
    """For the world `scene`; `place` and `orbits` take the winner of that table, or these where it is not asked for."""
    first_mechanisms: tuple[str, ...] = ("ray_attention", "plucker_light")
    """For the world `first`, in which relative poses are all there is to know."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each mechanism with each seed; outside of `scene` with the first one."""
    steps: int = 600
    """Training steps, of both experts together, in batches of 4."""
    place_steps: int = 4000
    """The same in the world `place`."""
    first_steps: int = 6000
    """The same in the world `first`."""
    rank: int = 16
    """Of the LoRA."""
    first_rank: int = 32
    """The same in the world `first`, whose many rooms are more to learn than one or two."""
    learning_rate: float = 2e-3
    """Of the LoRA."""
    camera_learning_rate: float = 4e-3
    """Of what is new for the camera."""
    shift: float = 7.0
    """Of the law of sigma in training; 7 gives each expert half of the steps."""
    jobs: int = 2
    """Runs beside each other, one thread each."""
    json: Path = ROOT / "benchmarks" / "results" / "camera_mechanisms.json"
    """File for all figures."""
    table: Path = ROOT / "docs" / "mechanisms_measured.md"
    """File for the tables."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from tqdm import tqdm

from benchmarks.mechanisms.runs import BASE, NONE, Run, Training, prepare, train_and_score
from benchmarks.mechanisms.step_time import step_seconds
from benchmarks.mechanisms.table import Row, best_of, summarise, write_table
from benchmarks.mechanisms.worlds import WORLDS
from core.errors import InputError, nearest
from core.files import atomic_path
from networks.mechanisms.registry import INJECTIONS


def main(options: Options) -> None:
    torch.set_num_threads(1)  # the work is in processes of one thread each
    for name in (*options.mechanisms, *options.first_mechanisms):
        if name not in INJECTIONS:
            raise InputError(
                f"--mechanisms: expected some of {', '.join(INJECTIONS)}, found {name!r}{nearest(name, INJECTIONS)}"
            )
    chosen = options.mechanisms
    rows: dict[str, list[Row]] = {}
    for name in options.worlds:
        mechanisms = {"scene": (NONE, *chosen), "first": options.first_mechanisms}.get(name, chosen)
        runs = run_world(options, name, (BASE, *mechanisms))
        rows[name] = summarise([json.loads(each.result_file.read_text()) for each in runs])
        if name == "scene":
            chosen = (best_of(rows[name]).mechanism,)
    seconds = step_seconds([row.mechanism for row in rows[options.worlds[0]] if row.mechanism != BASE])
    with atomic_path(options.json) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "training": {name: vars(training_of(options, name)) for name in rows},
                    "worlds": {name: [vars(row) for row in found] for name, found in rows.items()},
                    "step_seconds_relative_to_none": seconds,
                },
                indent=1,
            )
            + "\n"
        )
    write_table(
        options.table,
        rows,
        seeds=options.seeds,
        trainings={name: training_of(options, name) for name in rows},
        seconds=seconds,
    )
    print(options.table.read_text())


def run_world(options: Options, name: str, mechanisms: tuple[str, ...]) -> list[Run]:
    """Film and cache a world's clips, then all its runs that have no result yet."""
    world = WORLDS[name]
    prepare(world, options.work)
    runs = [
        Run(world=world, mechanism=mechanism, seed=seed, training=training_of(options, name), work=options.work)
        for seed in (options.seeds if name == "scene" else options.seeds[:1])
        for mechanism in mechanisms
    ]
    todo = [each for each in runs if not each.result_file.exists()]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawned) as pool:
        waiting = {pool.submit(train_and_score, each): each for each in todo}
        progress = tqdm(as_completed(waiting), total=len(waiting), desc=name, unit="run")
        for done in progress:
            done.result()
            result = json.loads(waiting[done].result_file.read_text())
            row = summarise([result])[0]
            progress.write(f"{name} {row.mechanism} seed {result['seed']}: {row.in_words()}")
    return runs


def training_of(options: Options, world: str) -> Training:
    """What all runs in a world have in common."""
    return Training(
        steps={"place": options.place_steps, "first": options.first_steps}.get(world, options.steps),
        rank=options.first_rank if world == "first" else options.rank,
        learning_rate=options.learning_rate,
        camera_learning_rate=options.camera_learning_rate,
        shift=options.shift,
    )


if __name__ == "__main__":
    run(main, OPTIONS)
