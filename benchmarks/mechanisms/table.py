"""From the results of single runs to the rows of a table, and to the page of the docs that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.mechanisms.runs import BASE, NONE, Training
from benchmarks.mechanisms.worlds import CANDIDATES, WORLDS
from core.files import atomic_path


@dataclass(frozen=True, kw_only=True)
class Row:
    """A mechanism in one world, over its seeds."""

    mechanism: str
    seeds: int
    videos: int
    """Of all seeds together."""
    top1: float
    """Share of videos that are nearest to the rendering of their own path."""
    top1_of_seeds: tuple[float, ...]
    rotation_degrees: float
    """Median over the videos whose camera was recovered, of the mean over their frames."""
    position_metres: float
    psnr: float
    """Mean over the videos."""
    parameters: int

    def in_words(self) -> str:
        return (
            f"top-1 {self.top1:.1%}, RotErr {self.rotation_degrees:.2f} deg, TransErr {self.position_metres:.3f} m, "
            f"PSNR {self.psnr:.2f} dB"
        )


def summarise(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each mechanism, in the order of their first results."""
    rows = []
    for mechanism in dict.fromkeys(result["mechanism"] for result in results):
        own = [result for result in results if result["mechanism"] == mechanism]
        videos = [video for result in own for video in result["videos"]]
        recovered = [video for video in videos if "rotation_degrees" in video]
        rows.append(
            Row(
                mechanism=mechanism,
                seeds=len(own),
                videos=len(videos),
                top1=statistics.mean(video["top1"] for video in videos),
                top1_of_seeds=tuple(statistics.mean(video["top1"] for video in result["videos"]) for result in own),
                rotation_degrees=statistics.median(video["rotation_degrees"] for video in recovered),
                position_metres=statistics.median(video["position_metres"] for video in recovered),
                psnr=statistics.mean(video["psnr"] for video in videos),
                parameters=own[0]["parameters"],
            )
        )
    return rows


def best_of(rows: Sequence[Row]) -> Row:
    """The mechanism that most videos follow; of equals, the one with the least rotation error."""
    return max(
        (row for row in rows if row.mechanism not in (BASE, NONE)),
        key=lambda row: (round(row.top1, 4), -row.rotation_degrees),
    )


def write_table(
    file: Path,
    rows: Mapping[str, Sequence[Row]],
    *,
    seeds: Sequence[int],
    trainings: Mapping[str, Training],
    seconds: Mapping[str, float],
) -> None:
    """The page of the docs."""
    training = next(iter(trainings.values()))
    lines = [
        "# Mechanisms, measured",
        "",
        f"Printed by `python benchmarks/camera_mechanisms.py --work bake_off --seeds {' '.join(map(str, seeds))}`;",
        "the first lines of that file say what each figure is.",
        "Both experts of the embedded tiny model, 4 clips of 17 frames of 64x96 a step,",
        f"learning rate {training.learning_rate:g}, camera {training.camera_learning_rate:g} (`plucker`: a tenth).",
        f"Chance for top-1 is {1 / CANDIDATES:.1%}. `base` is the model without any training,",
        "`none` a LoRA without a camera, trained like the others.",
    ]
    for name, found in rows.items():
        world = WORLDS[name]
        best = best_of(found).mechanism if any(row.mechanism not in (BASE, NONE) for row in found) else ""
        lines += ["", f"## {HEADINGS[name]}", "", EXPLANATIONS[name], ""]
        lines += [
            "| mechanism | top-1 of 8 | by seed | RotErr (deg) | TransErr (m) | PSNR (dB) | camera parameters | step |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(found, key=lambda row: (-row.top1, row.rotation_degrees)):
            label = f"**{row.mechanism}**" if row.mechanism == best and len(found) > 2 else row.mechanism
            by_seed = ", ".join(f"{share:.1%}" for share in row.top1_of_seeds)
            step = f"{seconds[row.mechanism]:.2f}" if row.mechanism in seconds else ""
            lines.append(
                f"| {label} | {row.top1:.1%} | {by_seed} | {row.rotation_degrees:.2f} | {row.position_metres:.3f} | "
                f"{row.psnr:.2f} | {row.parameters:,} | {step} |"
            )
        lines += [
            "",
            f"{trainings[name].steps} steps of both experts together, LoRA rank {trainings[name].rank}; {world.videos} "
            "videos for each seed.",
        ]
    lines += [
        "",
        "`step`: time of a training step over that of `none`, in turns within one process, median.",
        "RotErr and TransErr: medians over the videos.",
        "",
    ]
    with atomic_path(file) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


HEADINGS = {
    "place": "One room, trained for longer",
    "scene": "Unseen paths through the rooms of the training clips",
    "first": "Rooms never seen, from their first frame",
    "orbits": "A kind of motion never seen",
}
EXPLANATIONS = {
    "place": "Pose frame `scene`, one room, 80 clips: what a LoRA of a captured place is.",
    "scene": "Pose frame `scene`: the camera file says where to stand in a captured place. Two rooms, 80 clips each.",
    "first": "Pose frame `first`: the camera file says how to move. The tiny I2V model, trained on "
    f"{WORLDS['first'].scenes} rooms with two clips each, films 40 other rooms; the eight candidates start from one "
    "view.",
    "orbits": "As the first table, but trained on clips without orbits; all 40 asked paths are orbits.",
}
