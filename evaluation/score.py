"""Scores of videos against the paths that were asked for: one row a video, a summary that counts failures, files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from camera.metrics import PathErrors, ScaleMatch, matched_scale, path_errors, relative_to_first
from camera.path import CameraPath, PoseFrame
from camera.plots import plot_path
from core.files import atomic_path
from evaluation.estimators import Estimator, Recovered, as_path

SUMMARISED = (
    "rot_err_mean_degrees",
    "rot_err_median_degrees",
    "rot_err_sum_radians",
    "trans_err_mean",
    "trans_err_sum",
    "cam_mc_mean",
    "cam_mc_sum",
    "ate_rmse",
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How paths are compared; see `camera.metrics.path_errors`."""

    pose_frame: PoseFrame
    """ "first": both relative to their first frame. "scene": as they stand, in the coordinates of the place."""
    scale: ScaleMatch = "max"
    """Of pose frame "first"; "scene" compares metres with metres."""


@dataclass(frozen=True, kw_only=True)
class VideoScore:
    """One video: its errors, or why it has none."""

    name: str
    errors: PathErrors | None
    failure: str | None = None
    figures: dict[str, float] | None = None


def score_video(
    name: str, frames: Tensor, asked: CameraPath, estimator: Estimator, comparison: Comparison
) -> tuple[VideoScore, Recovered]:
    """Estimate a video's camera and compare it with the asked path.

    Args:
        name: of the video.
        frames: uint8 [T, H, W, 3]
        asked: T poses, K in pixels of H x W.
        estimator: recovers the camera; it is not told the asked poses.
        comparison: pose frame and scale.
    """
    recovered = estimator.recover(frames, asked.K)
    errors = None
    if recovered.c2w is not None:
        absolute = comparison.pose_frame == "scene"
        errors = path_errors(
            recovered.c2w, asked.c2w, relative=not absolute, scale="none" if absolute else comparison.scale
        )
    return VideoScore(name=name, errors=errors, failure=recovered.failure, figures=recovered.figures), recovered


def summarise(scores: Sequence[VideoScore]) -> dict[str, object]:
    """Median and mean of each error over the videos that have one, and how many have none."""
    found = [score.errors.as_dict() for score in scores if score.errors is not None]
    summary: dict[str, object] = {"videos": len(scores), "failed": len(scores) - len(found)}
    for name in SUMMARISED:
        values = [value for errors in found if (value := errors[name]) is not None]
        summary[name] = (
            {"median": statistics.median(values), "mean": statistics.fmean(values), "of": len(values)}
            if values
            else None
        )
    return summary


def write_scores(
    scores: Sequence[VideoScore], file: Path, *, comparison: Comparison, estimator: str
) -> dict[str, object]:
    """Write all scores and their summary as JSON; returns the summary."""
    summary = summarise(scores)
    content = {
        "estimator": estimator,
        **asdict(comparison),
        "summary": summary,
        "videos": [asdict(score) for score in scores],
    }
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return summary


def plot_recovered(asked: CameraPath, recovered: Tensor, file: Path, comparison: Comparison) -> None:
    """Draw the asked path and the recovered one over each other, as they are compared (scale by least squares).

    Args:
        asked: T poses.
        recovered: c2w [T, 4, 4].
        file: the PNG.
        comparison: pose frame and scale; any scale but "none" is drawn as "lstsq", in the asked path's unit.
    """
    target = asked.c2w
    if comparison.pose_frame == "first":
        scale: ScaleMatch = "none" if comparison.scale == "none" else "lstsq"
        recovered, target = matched_scale(relative_to_first(recovered), relative_to_first(target), scale)
    plot_path({"asked": as_path(target, asked), "recovered from the video": as_path(recovered, asked)}, file)
