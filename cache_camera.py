"""Step 3: read every clip's camera file, or estimate it, and apply to it what is done to the video.

    python cache_camera.py --dataset_config x.toml
    python cache_camera.py --dataset_config x.toml --estimate    data sets with estimate_camera = true (extra: sfm)

Crop, resize and frame sampling of the clip act on its path; the pose frame (`scene` or `first`) is the data set's.
One safetensors file per clip with c2w, K and their conventions. Needs no model and no GPU.

Clips whose estimate fails get no cache. They are listed with the reason at the end and in CACHE/failed_cameras.txt, all
other clips are cached, and the exit code is 2. With exclude_clips = "CACHE/failed_cameras.txt" in the TOML every
command leaves them out.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset_config: Path
    """Dataset TOML; its [model] table may name the task."""
    task: str | None = None
    """t2v-A14B, i2v-A14B, ti2v-5B, t2v-1.3B, t2v-14B, i2v-14B, t2i-14B or tiny: decides which sizes fit."""
    skip_existing: bool = False
    """Leave caches alone that are current: same camera file, same crop, same conventions, same estimator.
    What is not is written again, and the reason is said."""
    verify: bool = False
    """As --skip_existing, and read every cache whole: a damaged one is written again."""
    prune: bool = False
    """Remove caches that belong to no clip of the config. They are named otherwise."""
    keep_cache: bool = False
    """Keep caches that belong to no clip: the default."""
    estimate: bool = False
    """Estimate the cameras of data sets with estimate_camera = true, from their frames (from 10 s a clip up)."""
    mapper: Literal["incremental", "global"] = "incremental"
    """For --estimate: add frame after frame, or solve for all at once (slower; for clips that the first loses)."""
    seed: int = 0
    """For --estimate: of the random samples of robust fits."""
    estimate_report: Path | None = None
    """For --estimate: JSON file for the figures of every clip."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from tqdm import tqdm

from camera.estimate import EstimateFailed
from core.errors import InputError
from core.files import atomic_path
from core.model_files import resolve_model
from core.processes import Process, this_process
from dataset import cache
from dataset.caching import Todo, find_todo, prune_wanted, say, tidy
from dataset.cameras import read_clip_camera
from dataset.clips import Clip, list_clips, read_excluded
from dataset.config import DatasetConfig, read_dataset_config
from dataset.estimated_cameras import estimate_clip_camera, estimator_name
from wan_ext.configs import get_variant

FAILED = "failed_cameras.txt"
log = logging.getLogger(__name__)


def main(options: Options) -> None:
    config = read_dataset_config(options.dataset_config)
    files = resolve_model({"task": options.task}, table=config.model, table_source=options.dataset_config, needs=())
    variant = get_variant(files.task)
    clips = list_clips(config, spatial_stride=variant.spatial_stride, temporal_stride=variant.vae.stride[0])

    from_files = [clip for clip in clips if clip.camera is not None and not clip.camera.settings.estimate]
    from_frames = [clip for clip in clips if clip.camera is not None and clip.camera.settings.estimate]
    check(options, from_files, from_frames)
    process = this_process()
    tidy(clips, "camera", prune=prune_wanted(options.prune, options.keep_cache), process=process)
    if from_files:
        read_cameras(options, from_files, process)
    if options.estimate:
        estimate_cameras(options, config, from_frames, process)
    elif from_frames:
        print(f"{len(from_frames)} clips have estimate_camera = true and wait for --estimate")


def check(options: Options, from_files: list[Clip], from_frames: list[Clip]) -> None:
    """Refuse what would do nothing."""
    if options.estimate and not from_frames:
        raise InputError(
            f"{options.dataset_config}: --estimate finds the cameras of data sets with estimate_camera = true in their "
            "[[datasets]] table, found none"
        )
    if not from_files and not options.estimate:
        raise InputError(
            f"{options.dataset_config}: no camera file to read; write camera_directory (or camera_params for one "
            "scene) into a [[datasets]] table, or estimate_camera = true and run this command with --estimate"
        )
    given = [
        name
        for name, default in (("mapper", "incremental"), ("seed", 0), ("estimate_report", None))
        if getattr(options, name) != default
    ]
    if given and not options.estimate:
        raise InputError(f"--{given[0]}: does nothing without --estimate")


def find(options: Options, clips: list[Clip], estimator: str | None, process: Process) -> Todo:
    """The cameras that this process caches."""

    def problem(clip: Clip) -> str | None:
        flaw = cache.problem(clip, "camera", encoder=estimator)
        return cache.damage(clip, "camera") if options.verify and flaw is None else flaw

    skip = options.skip_existing or options.verify
    return find_todo(clips, problem, kind="camera", skip_existing=skip, process=process)


def read_cameras(options: Options, clips: list[Clip], process: Process) -> None:
    """Cache the cameras that come from files."""
    todo = find(options, clips, None, process)
    say(todo, what="camera paths", process=process)
    for clip in tqdm(todo, total=len(todo.mine), desc="cameras", unit="clip", disable=not process.is_main):
        cache.write_camera(clip, read_clip_camera(clip))


def estimate_cameras(options: Options, config: DatasetConfig, clips: list[Clip], process: Process) -> None:
    """Cache the cameras that are found in frames, and say how far to trust each.

    Raises:
        InputError: clips failed; all others are cached by then.
    """
    estimator = estimator_name(options.mapper, options.seed)
    warn_of_units(config, clips)
    todo = find(options, clips, estimator, process)
    say(todo, what="camera paths to estimate", process=process)
    failed: dict[str, tuple[Clip, str]] = {}
    for clip in tqdm(todo, total=len(todo.mine), desc="estimate", unit="clip", disable=not process.is_main):
        try:
            found = estimate_clip_camera(clip, mapper=options.mapper, seed=options.seed)
        except EstimateFailed as error:
            clip.camera_cache.unlink(missing_ok=True)  # of other frames or another estimator
            failed[clip.key] = (clip, str(error))
            continue
        cache.write_camera(clip, found.path, estimator=estimator, figures=found.figures)
    report(options, clips, {key: reason for key, (_, reason) in failed.items()})
    lists = list_failed(config, [clip for clip, _ in failed.values()], failed)
    if failed:
        for key, (_, reason) in failed.items():
            print(f"no camera: {key}: {reason}")
        raise InputError(
            f"{len(failed)} of {len(clips)} clips have no camera (above) and no cache; all others are cached. To train "
            f"without them, write into their [[datasets]] table: "
            + " and ".join(f'exclude_clips = "{file.as_posix()}"' for file in lists)
        )


def warn_of_units(config: DatasetConfig, clips: list[Clip]) -> None:
    """Say that positions of different clips cannot be compared, where no scale rule makes them comparable."""
    for number in sorted({clip.dataset for clip in clips}):
        dataset = config.datasets[number]
        if dataset.camera.scale == "none" or dataset.camera.scale.startswith("metric:"):
            log.warning(
                f"{config.path}, {dataset.table}: estimated positions have another unit in every clip; camera_scale = "
                f'"mean_depth" (distances in units of the depth that the first frame shows) or "max_norm" makes them '
                f"comparable"
            )


def report(options: Options, clips: list[Clip], failed: dict[str, str]) -> None:
    """Print how far to trust the cameras of all clips, today's and those cached before; write them as JSON if asked."""
    rows: dict[str, dict] = {}
    print("frames  error px  points  confidence  fov       clip")
    for clip in clips:
        if clip.key in failed:
            rows[clip.key] = {"failed": failed[clip.key]}
            print(f"  lost                                         {clip.key}")
            continue
        row = rows[clip.key] = cache.read_estimate(clip)
        note = "  (turns only)" if row["rotation_only"] else ""
        print(
            f"{row['registered']:6d}  {row['reprojection_error_pixels']:8.2f}  {row['points']:6d}  "
            f"{row['confidence']:10.2f}  {row['fov_degrees']:5.1f} deg {clip.key}{note}"
        )
    if options.estimate_report:
        with atomic_path(options.estimate_report) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def list_failed(config: DatasetConfig, clips: list[Clip], failed: dict[str, tuple[Clip, str]]) -> list[Path]:
    """Write the list of failed clips of each data set into its cache folder, as exclude_clips reads it.

    A list that the TOML names already keeps its lines: the clips on it were not tried again.
    """
    lists = []
    for number in sorted({clip.dataset for clip in clips}):
        dataset = config.datasets[number]
        file = dataset.cache_directory / FAILED
        kept = []
        if dataset.exclude_clips is not None and dataset.exclude_clips.resolve() == file.resolve():
            kept = [f"{name}\n" for name in read_excluded(file)]
        new = dict.fromkeys(clip.name for clip in clips if clip.dataset == number)
        reasons = {clip.name: reason for clip, reason in failed.values() if clip.dataset == number}
        with atomic_path(file) as temporary:
            temporary.write_text(
                "".join(kept) + "".join(f"{name}  # {reasons[name]}\n" for name in new), encoding="utf-8"
            )
        lists.append(file)
    return lists


if __name__ == "__main__":
    run(main, OPTIONS)
