"""Does a video follow the camera path that was asked for? Recovers the camera of each video and compares.

    python tools/evaluate_camera.py --videos out --paths paths                          any video; structure from motion
    python tools/evaluate_camera.py --videos out --paths paths --estimator render --scenes scenes.json   rendered rooms

A video and its path have the same stem (out/a.mp4, paths/a.txt); paths are of any format that docs/cameras.md lists.
Writes OUTPUT/camera.json and a plot for each video, and prints a table. Videos whose camera cannot be found are listed
and counted. docs/measuring.md says what the numbers mean.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    videos: Path
    """Folder of the generated videos."""
    paths: Path
    """Folder of the camera files that were asked for."""
    estimator: Literal["sfm", "render"] = "sfm"
    """sfm: structure from motion. render: alignment with the rendered scene, for the rooms of render_scenes.py."""
    scenes: Path | None = None
    """render: a scenes.json that names the room of each video. Default: beside the videos' folder or in it."""
    scene: int | None = None
    """render: the seed of the one room that all videos show, instead of --scenes."""
    known_start: bool = False
    """render: the first frame was given to the model; start from the first pose of each path (in room coordinates)."""
    pose_frame: Literal["first", "scene"] | None = None
    """first: compare relative to the first frame. scene: compare poses as they stand (render). Default: first for sfm,
    scene for render."""
    scale: Literal["max", "lstsq", "none"] | None = None
    """How lengths are made comparable in pose frame first. Default: max for sfm, none for render, which sees metres."""
    camera_format: str = "auto"
    """Format of the camera files; auto recognises it."""
    no_plots: bool = False
    """Draw no plot of the asked and the recovered path of each video."""
    output: Path | None = None
    """Folder of the results. Default: VIDEOS/camera."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from tqdm import tqdm

from camera.files.formats import read_camera
from camera.path import CameraPath
from core.errors import InputError, listing
from dataset.video import VIDEO_SUFFIXES, probe, read_frames
from evaluation.estimators import Estimator, RenderEstimator, SfmEstimator
from evaluation.rooms import read_rooms, rooms_beside
from evaluation.score import Comparison, VideoScore, plot_recovered, score_video, write_scores
from scenes.align import PathFinder
from scenes.render import Renderer
from scenes.scene import make_scene


def main(options: Options) -> None:
    comparison = settle(options)
    pairs = find_pairs(options.videos, options.paths)
    rooms = room_seeds(options, [video for video, _ in pairs])
    needs_scene = comparison.pose_frame == "scene" or options.known_start
    wanted = {video: read_asked(camera, video, options.camera_format, needs_scene) for video, camera in pairs}
    output = options.output or options.videos / "camera"
    sfm = SfmEstimator() if options.estimator == "sfm" else None
    scores: list[VideoScore] = []
    finder, room = None, None
    for video in tqdm(sorted(wanted, key=lambda video: (rooms.get(video.stem, 0), video)), unit="video"):
        asked, frames = wanted[video], read_frames(video)
        estimator: Estimator
        if sfm is not None:
            estimator = sfm
        else:
            seed = rooms[video.stem]
            if finder is None or room != (seed, asked.height):
                room = (seed, asked.height)
                finder = PathFinder(Renderer(make_scene(seed), asked.height))
            start = asked.c2w[0] if options.known_start else None
            estimator = RenderEstimator(seed, height=asked.height, start=start, finder=finder)
        score, recovered = score_video(video.stem, frames, asked, estimator, comparison)
        scores.append(score)
        if recovered.c2w is not None and not options.no_plots:
            plot_recovered(asked, recovered.c2w, output / f"{video.stem}.png", comparison)
    scores.sort(key=lambda score: score.name)
    file = output / "camera.json"
    write_scores(scores, file, comparison=comparison, estimator=options.estimator)
    print(table(scores, metres=options.estimator == "render" and comparison.scale == "none"))
    print(f"scores: {file}")


def settle(options: Options) -> Comparison:
    """Pose frame and scale. Raises InputError where they do not go with the estimator."""
    render = options.estimator == "render"
    for flag in ("scenes", "scene", "known_start"):
        if getattr(options, flag) not in (None, False) and not render:
            raise InputError(f"--{flag}: does nothing for --estimator sfm; leave it out or give --estimator render")
    if options.scenes is not None and options.scene is not None:
        raise InputError("--scenes --scene: expected one of them, found both")
    pose_frame = options.pose_frame or ("scene" if render else "first")
    if pose_frame == "scene" and not render:
        raise InputError(
            "--pose_frame scene: structure from motion does not know the coordinates of the scene; give first"
        )
    if pose_frame == "scene" and options.scale not in (None, "none"):
        raise InputError(f"--scale {options.scale}: poses are compared as they stand in pose frame scene; leave it out")
    return Comparison(pose_frame=pose_frame, scale=options.scale or ("none" if render else "max"))


def find_pairs(videos: Path, paths: Path) -> list[tuple[Path, Path]]:
    """Each video with its camera file.

    Raises:
        InputError: no videos, a video without a path or with two, a path without a video.
    """
    for flag, folder in (("--videos", videos), ("--paths", paths)):
        if not folder.is_dir():
            raise InputError(f"{flag} {folder}: expected a folder, found {'a file' if folder.exists() else 'nothing'}")
    found = {file.stem: file for file in sorted(videos.iterdir()) if file.suffix.lower() in VIDEO_SUFFIXES}
    if not found:
        raise InputError(f"--videos {videos}: expected videos ({', '.join(VIDEO_SUFFIXES)}), found none")
    cameras: dict[str, list[Path]] = {}
    for file in sorted(paths.iterdir()):
        if file.suffix.lower() not in (*VIDEO_SUFFIXES, ".png", ".jpg") and not file.name.startswith("."):
            cameras.setdefault(file.stem, []).append(file)
    alone = [name for name in found if name not in cameras]
    if alone:
        raise InputError(f"--paths {paths}: expected a camera file for every video, found none for {listing(alone)}")
    if videos.resolve() != paths.resolve() and (unused := [name for name in cameras if name not in found]):
        raise InputError(f"--videos {videos}: expected a video for every camera file, found none for {listing(unused)}")
    for name in found:
        if len(cameras[name]) > 1:
            files = ", ".join(file.name for file in cameras[name])
            raise InputError(f"--paths {paths}: expected one camera file for {name}, found {files}")
    return [(found[name], cameras[name][0]) for name in found]


def room_seeds(options: Options, videos: list[Path]) -> dict[str, int]:
    """The room of each video by its stem, for the estimator render; nothing for sfm.

    Raises:
        InputError: no scenes.json, one that cannot be read, or one that lacks a video.
    """
    if options.estimator != "render":
        return {}
    if options.scene is not None:
        return {video.stem: options.scene for video in videos}
    file = options.scenes or rooms_beside(options.videos)
    if file is None:
        raise InputError(
            f"--scenes: expected the scenes.json of render_scenes.py, found none in {options.videos} or above it; name "
            "it, or give the room's seed with --scene"
        )
    rooms = read_rooms(file)
    missing = [video.stem for video in videos if video.stem not in rooms]
    if missing:
        raise InputError(f"{file}: expected a scene for every video, found none for {listing(missing)}")
    return rooms


def read_asked(camera: Path, video: Path, format: str, needs_scene: bool) -> CameraPath:
    """The asked path, with intrinsics in pixels of the video. Raises InputError for one that does not go with it."""
    info = probe(video)
    asked = read_camera(camera, height=info.height, width=info.width, format=format, fps=info.fps)
    if len(asked) != info.num_frames:
        raise InputError(
            f"{camera}: expected as many poses as {video} has frames ({info.num_frames}), found {len(asked)}; give the "
            "path that this video was generated with"
        )
    if needs_scene and asked.pose_frame != "scene":
        raise InputError(
            f"{camera}: expected a path in room coordinates, found one relative to its first frame; compare with "
            "--pose_frame first, without --known_start"
        )
    return asked


def table(scores: list[VideoScore], *, metres: bool) -> str:
    """Scores for a terminal: a row a video, the medians, and what failed."""
    unit = " m" if metres else ""
    lines = [f"{'video':24} {'RotErr deg':>10} {'TransErr' + unit:>12} {'CamMC':>8}   (mean over frames)"]
    for score in scores:
        if score.errors is None:
            lines.append(f"{score.name:24.24} failed: {score.failure}")
        else:
            errors = score.errors
            lines.append(
                f"{score.name:24.24} {errors.rot_err_mean_degrees:10.3f} {errors.trans_err_mean:12.4f} "
                f"{errors.cam_mc_mean:8.4f}"
            )
    found = sorted(score.errors.rot_err_mean_degrees for score in scores if score.errors is not None)
    shift = sorted(score.errors.trans_err_mean for score in scores if score.errors is not None)
    if found:
        both = sorted(score.errors.cam_mc_mean for score in scores if score.errors is not None)
        middle = [(values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2 for values in (found, shift, both)]
        lines.append(f"{'median':24} {middle[0]:10.3f} {middle[1]:12.4f} {middle[2]:8.4f}")
    lines.append(f"{len(scores)} videos, {len(scores) - len(found)} failed")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, OPTIONS)
