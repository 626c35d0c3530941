"""Make, convert, inspect and plot camera paths, and estimate the path of a video.

    python tools/camera_path.py "orbit 90deg; dolly in 0.5" --frames 81 --output path.txt --plot path.png
    python tools/camera_path.py convert poses.npz path.txt --camera_direction w2c --camera_axes opencv
    python tools/camera_path.py inspect path.txt other.json
    python tools/camera_path.py plot asked.txt generated.txt --output both.png
    python tools/camera_path.py estimate clip.mp4 --output path.txt --plot path.png

The first form is `make`. docs/cameras.md describes the moves and the formats. What looks wrong about a path (jumps,
flips, nothing that moves, an odd angle of view) is a warning that names the frame.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tyro.conf import Positional, subcommand

from camera.files.settings import Axes, CameraFileSettings, CameraFormat, Direction, FovAxis
from core.options import parse_options, run

COMMANDS = ("make", "convert", "inspect", "plot", "estimate")
SUFFIXES = {".txt": "ten", ".safetensors": "safetensors", ".npz": "arrays"}


@dataclass(frozen=True, kw_only=True)
class Written:
    output: Path | None = None
    """Camera file to write."""
    format: CameraFormat = "auto"
    """Format of --output; auto: ten for .txt, arrays for .npz, safetensors for .safetensors."""
    plot: Path | None = None
    """PNG to draw: the cameras in space; position, angle and speed over time."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    camera_format: CameraFormat = "auto"
    """Format of the camera file; auto recognises it from its content."""
    camera_direction: Direction | None = None
    """What matrices without a fixed direction map: camera to world, or world to camera."""
    camera_axes: Axes | None = None
    """The camera's axes in matrices without fixed ones."""
    camera_fov: float | None = None
    """Field of view in degrees, for camera files that hold poses only."""
    camera_name: str | None = None
    """Which camera of a file with several."""
    camera_size: tuple[int, int] | None = None
    """Height and width that intrinsics in pixels belong to, where the file does not say it."""
    fov_axis: FovAxis = "horizontal"
    """What a field of view spans, where the file does not say it."""
    video_size: tuple[int, int] = (480, 832)
    """Height and width in pixels of the frames that the path belongs to."""
    fps: float | None = None
    """Frames per second; default: what the file says, if it does."""


@dataclass(frozen=True, kw_only=True)
class Make(Written):
    """Make a path from moves in words, or from a tagged camera text."""

    text: Positional[str]
    """Moves, such as "orbit 90deg; dolly in 0.5 ease-out; hold 1s", or a text with camera tags."""
    frames: int = 81
    """Number of frames."""
    video_size: tuple[int, int] = (480, 832)
    """Height and width in pixels."""
    fov: float | None = None
    """Horizontal field of view in degrees; default: 60, or that of the presets in the text."""
    fps: float = 16.0
    """Frames per second, for times in seconds and for hand-held sway."""
    seed: int = 0
    """Of hand-held sway."""


@dataclass(frozen=True, kw_only=True)
class Convert(Reading):
    """Read a camera file of any format and write it in another, in another pose frame or scale."""

    source: Positional[Path]
    """Camera file; a COLMAP model is a folder."""
    target: Positional[Path]
    """Camera file to write."""
    format: CameraFormat = "auto"
    """Format to write; auto: ten for .txt, arrays for .npz, safetensors for .safetensors."""
    pose_frame: Literal["keep", "first"] = "keep"
    """first: poses relative to the first frame."""
    scale_rule: str = "none"
    """Rule for the unit of positions: none, max_norm, first_step, metric:FACTOR or mean_depth."""
    plot: Path | None = None
    """PNG to draw: the cameras in space; position, angle and speed over time."""


@dataclass(frozen=True, kw_only=True)
class Inspect(Reading):
    """Print what camera files hold and what looks wrong about them."""

    files: Positional[tuple[Path, ...]]
    """Camera files."""


@dataclass(frozen=True, kw_only=True)
class Plot(Reading):
    """Draw camera files over one another."""

    files: Positional[tuple[Path, ...]]
    """Camera files."""
    output: Path
    """PNG to draw."""
    pose_frame: Literal["keep", "first"] = "first"
    """first: every path relative to its own first frame."""


@dataclass(frozen=True, kw_only=True)
class Estimate(Written):
    """Find the camera of every frame of a video by structure from motion (needs pycolmap, the extra `sfm`)."""

    video: Positional[Path]
    """Video file."""
    fov: float | None = None
    """Horizontal field of view in degrees, where it is known."""
    focal: float | None = None
    """The same as a focal length in pixels of the video."""
    mapper: Literal["incremental", "global"] = "incremental"
    """How cameras and points are solved for."""
    seed: int = 0
    """Of the random samples of robust fits."""


Options = (
    Annotated[Make, subcommand("make")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Plot, subcommand("plot")]
    | Annotated[Estimate, subcommand("estimate")]
)


def with_command(words: list[str]) -> list[str]:
    """The command line with its command: `make` where it starts with a text."""
    return words if not words or words[0] in (*COMMANDS, "-h", "--help") else ["make", *words]


if __name__ == "__main__":
    sys.argv[1:] = with_command(sys.argv[1:])
    OPTIONS = parse_options(Options, __doc__)  # type: ignore[arg-type]  # a union of dataclasses is a choice of commands

import torch

from camera.files.formats import FORMATS, declared_pose_frame, read_camera_file, write_camera
from camera.moves.tagged_text import is_tagged, read_tagged
from camera.moves.text import make_path
from camera.path import CameraPath
from camera.plausible import implausible, turn_between
from camera.plots import plot_path
from camera.scale import apply_scale
from core.errors import InputError


def main(options: Make | Convert | Inspect | Plot | Estimate) -> None:
    if isinstance(options, Make):
        make(options)
    elif isinstance(options, Convert):
        convert(options)
    elif isinstance(options, Inspect):
        inspect(options)
    elif isinstance(options, Plot):
        plot(options)
    else:
        estimate(options)


def make(options: Make) -> None:
    height, width = size_of(options.video_size)
    format = format_of(options.output, options.format) if options.output else None
    if is_tagged(options.text):
        path = read_tagged(
            options.text,
            fps=options.fps,
            height=height,
            width=width,
            num_frames=options.frames,
            fov_degrees=options.fov,
        )
    else:
        path = make_path(
            options.text,
            num_frames=options.frames,
            height=height,
            width=width,
            fov_degrees=options.fov,
            fps=options.fps,
            seed=options.seed,
        )
    finish(path, options.text, options.output, format, options.plot)


def convert(options: Convert) -> None:
    format = format_of(options.target, options.format)
    path = read(options.source, options)
    if options.pose_frame == "first":
        path = path.relative_to_first()
    finish(apply_scale(path, options.scale_rule), str(options.target), options.target, format, options.plot)


def inspect(options: Inspect) -> None:
    if not options.files:
        raise InputError("inspect: expected camera files, found none")
    for file in options.files:
        path = read(file, options)
        declared = declared_pose_frame(file)
        describe(path, str(file))
        print(f"  pose frame           {declared or 'not stated in the file; coordinates are taken as they are'}")
        print(f"  scale rule           {path.scale_rule}")


def plot(options: Plot) -> None:
    if not options.files:
        raise InputError("plot: expected camera files, found none")
    names = names_of(options.files)
    paths = {name: read(file, options) for name, file in zip(names, options.files, strict=True)}
    if options.pose_frame == "first":
        paths = {name: path.relative_to_first() for name, path in paths.items()}
    for name, path in paths.items():
        warn(path, name)
    plot_path(paths, options.output)


def estimate(options: Estimate) -> None:
    from camera.estimate import estimate_path
    from dataset.video import decode, probe

    format = format_of(options.output, options.format) if options.output else None
    video = probe(options.video)
    estimated = estimate_path(
        decode(options.video, range(video.num_frames)),
        fov_degrees=options.fov,
        focal=options.focal,
        fps=video.fps,
        mapper=options.mapper,
        seed=options.seed,
    )
    finish(estimated.path, str(options.video), options.output, format, options.plot)
    print(f"  registered           {estimated.registered} of {video.num_frames} frames")
    print(f"  reprojection error   {estimated.reprojection_error_pixels:.3g} pixels over {estimated.num_points} points")
    print(f"  confidence           {estimated.confidence:.2f}")


# ---- what the commands share -----------------------------------------------------------------------------------------


def finish(path: CameraPath, name: str, output: Path | None, format: str | None, plot_file: Path | None) -> None:
    """Write what was asked for, and say what it is."""
    if output is not None and format is not None:
        write_camera(path, output, format=format)
    if plot_file is not None:
        plot_path({name: path}, plot_file)
    describe(path, name)


def read(file: Path, options: Reading) -> CameraPath:
    """The path of a camera file."""
    height, width = size_of(options.video_size)
    if options.fps is not None and not options.fps > 0:
        raise InputError(f"--fps: expected a number above 0, found {options.fps}")
    settings = CameraFileSettings(
        format=options.camera_format,
        fov_axis=options.fov_axis,
        direction=options.camera_direction,
        axes=options.camera_axes,
        fov_degrees=options.camera_fov,
        name=options.camera_name,
        size=options.camera_size,
    )
    return read_camera_file(file, settings, height=height, width=width, fps=options.fps)


def size_of(video_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    if min(video_size) < 1:
        raise InputError(f"--video_size: expected a height and a width above 0, found {video_size[0]} {video_size[1]}")
    return video_size


def format_of(file: Path, format: str) -> str:
    """The format to write a file in."""
    found = SUFFIXES.get(file.suffix.lower()) if format == "auto" else format
    if found is None or found not in FORMATS:
        raise InputError(
            f"{file}: expected a name that ends in {', '.join(SUFFIXES)}, found {file.suffix or 'no ending'!r}; name "
            f"the format with --format, one of {', '.join(FORMATS)}"
        )
    return found


def names_of(files: tuple[Path, ...]) -> list[str]:
    """A name of each file for a legend: its own, with as many folders as tell them apart."""
    for depth in range(1, 8):
        names = ["/".join(file.parts[-depth:]) for file in files]
        if len(set(names)) == len(names):
            return names
    return [f"{index + 1}: {file}" for index, file in enumerate(files)]


def describe(path: CameraPath, name: str) -> None:
    """Print the figures of a path, and on stderr what looks wrong about it."""
    steps = path.positions.diff(dim=0).norm(dim=-1)
    turns = turn_between(path.rotations[:-1], path.rotations[1:])
    away = (path.positions - path.positions[0]).norm(dim=-1)
    turned = turn_between(path.rotations[:1], path.rotations)
    rate, per = (path.fps, "s") if path.fps else (1.0, "frame")
    clock = f", {path.fps:g} fps, {(len(path) - 1) / path.fps:.3g} s from the first to the last" if path.fps else ""
    print(name)
    print(f"  frames               {len(path)} of {path.height}x{path.width}{clock}")
    print(f"  sees                 {span(path.fov_degrees())} degrees from left to right")
    print(
        f"  way                  {float(steps.sum()):.4g} units, at most {float(away.max()):.4g} from the first camera"
    )
    print(f"  turn                 {float(turns.sum()):.4g} degrees, at most {float(turned.max()):.4g} from the first")
    if len(path) > 1:
        print(f"  speed                {span(steps * rate)} units/{per}, {span(turns * rate)} degrees/{per}")
    warn(path, name)


def warn(path: CameraPath, name: str) -> None:
    """Print on stderr what looks wrong about a path."""
    for warning in implausible(path):
        print(f"warning: {name}: {warning}", file=sys.stderr)


def span(values: torch.Tensor) -> str:
    """The smallest and the largest of some values."""
    low, high = (f"{float(value):.4g}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    run(main, OPTIONS)
