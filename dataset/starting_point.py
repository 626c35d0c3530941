"""A dataset TOML to start from: what lies in a folder or list, and the keys that fit it, each with a comment."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError
from dataset.extraction import fit_length
from dataset.keys import MediaKind
from dataset.video import FRAME_SUFFIXES, VIDEO_SUFFIXES, VideoInfo, probe

LONGEST = 81  # frames of a clip that Wan was trained with
AREA = 832 * 480


@dataclass(frozen=True, kw_only=True)
class SourceDescription:
    """What a folder or list holds."""

    path: Path
    key: str  # of the TOML: video_directory, video_jsonl_file or frames_directory
    kind: MediaKind
    infos: tuple[VideoInfo, ...]
    captions_missing: int = 0

    @property
    def shortest(self) -> int:
        return min(info.num_frames for info in self.infos)

    @property
    def fps(self) -> float | None:
        """The commonest rate."""
        rates = Counter(round(info.fps, 3) for info in self.infos if info.fps)
        return rates.most_common(1)[0][0] if rates else None

    def summary(self) -> str:
        """One line for a person."""
        sizes = Counter(f"{info.width}x{info.height}" for info in self.infos)
        shown = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(3))
        missing = f"; {self.captions_missing} without a caption" if self.captions_missing else ""
        what = "frames of one scene" if self.kind == "frames" else "videos"
        number = self.infos[0].num_frames if self.kind == "frames" else len(self.infos)
        return f"{number} {what} ({shown if self.kind != 'frames' else next(iter(sizes))}){missing}"


def describe_source(path: Path) -> SourceDescription:
    """Look at a folder of videos, a list of videos, or a folder of frames.

    Raises:
        InputError: it is none of them, or a video cannot be read.
    """
    if path.suffix == ".jsonl":
        videos = [Path(line["video_path"]) for line in _json_lines(path)]
        infos = tuple(probe(video) for video in videos)
        return SourceDescription(path=path, key="video_jsonl_file", kind="video", infos=infos)
    if not path.is_dir():
        raise InputError(
            f"{path}: expected a folder of videos, a folder of frames, or a .jsonl list, found "
            f"{'another file' if path.exists() else 'nothing'}"
        )
    videos = sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
    if videos:
        infos = tuple(probe(video) for video in videos)
        missing = sum(not video.with_suffix(".txt").is_file() for video in videos)
        return SourceDescription(path=path, key="video_directory", kind="video", infos=infos, captions_missing=missing)
    if any(file.suffix.lower() in FRAME_SUFFIXES for file in path.iterdir()):
        return SourceDescription(path=path, key="frames_directory", kind="frames", infos=(probe(path),))
    raise InputError(f"{path}: expected videos ({', '.join(VIDEO_SUFFIXES)}) or frames in it, found none")


def _json_lines(path: Path) -> list[dict]:
    if not path.is_file():
        raise InputError(f"{path}: expected a list, found nothing")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: expected one JSON object, found a mistake ({error})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("video_path"), str):
            raise InputError(f'{path}, line {number}: expected {{"video_path": ...}}, found {line.strip()[:40]}')
        entries.append(entry)
    if not entries:
        raise InputError(f"{path}: expected lines, found none")
    return entries


def starting_toml(
    source: SourceDescription,
    *,
    task: str,
    cameras: Path | None,
    prompt: str | None,
    fps: float,
    spatial_stride: int,
    temporal_stride: int,
    output: Path,
) -> str:
    """A TOML that `read_dataset_config` takes, with a comment beside every key.

    Args:
        source: what it is for.
        task: written into [model].
        cameras: folder of camera files, or the camera file of one scene.
        prompt: caption of one scene.
        fps: frames per second that the task was trained at.
        spatial_stride: multiples that width and height must be of.
        temporal_stride: frames of a latent frame.
        output: where it will lie; its name goes into the name of the cache folder.

    Raises:
        InputError: a scene without a prompt, cameras for a list, videos of fewer frames than a clip takes.
    """
    if source.kind == "frames" and not prompt:
        raise InputError("--prompt: expected the caption of the scene, found none")
    if source.kind == "video" and prompt:
        raise InputError("--prompt: belongs to one scene of frames; a video has a caption file beside it")
    if source.key == "video_jsonl_file" and cameras is not None:
        raise InputError('--cameras: does nothing with a list; name each camera file in its line, as "camera"')
    info = source.infos[0]
    slowed = source.fps is not None and source.fps > 1.02 * fps
    frames = int(source.shortest * fps / source.fps) if slowed and source.fps else source.shortest
    length = fit_length(min(frames, LONGEST), temporal_stride)
    if length < 1:
        raise InputError(f"{source.path}: expected videos of at least one frame")
    scale = (AREA / (info.height * info.width)) ** 0.5
    width, height = (
        max(1, round(side * min(scale, 1) / spatial_stride)) * spatial_stride for side in (info.width, info.height)
    )
    lines = [
        f"# {source.summary()}. docs/datasets.md describes every key.",
        "",
        "[model]",
        f"task = {_quoted(task)}",
        '# ckpt_dir = "..."              # folder in the layout that Wan\'s authors publish; or --vae, --t5, --dit',
        "",
        "[general]",
        f"resolution = [{width}, {height}]       # width, height; with enable_bucket only their product counts",
        "enable_bucket = true           # keep each video's aspect",
        "batch_size = 1",
        "",
        "[[datasets]]",
        f"{source.key} = {_quoted(source.path.as_posix())}",
    ]
    if source.kind == "frames":
        lines.append(f"prompt = {_quoted(prompt or '')}")
    camera_key = "camera_params" if source.kind == "frames" else "camera_directory"
    if cameras is not None:
        lines.append(f"{camera_key} = {_quoted(cameras.as_posix())}")
    elif source.kind == "video" and source.key == "video_directory":
        lines.append(
            '# camera_directory = "cameras"   # one camera file NAME.* for each NAME.mp4, one pose a frame; or'
        )
        lines.append("# estimate_camera = true         # find the cameras in the frames: cache_camera.py --estimate")
    lines += [
        f"cache_directory = {json.dumps(f'cache/{output.stem}')}",
        f"target_frames = [{length}]           # 4n + 1; the shortest source has {source.shortest} frames"
        + (f", {frames} at {fps:g} a second" if slowed else ""),
        'frame_extraction = "head"      # or "chunk", "slide", "uniform", "full"',
    ]
    if slowed:
        lines.append(f"target_fps = {fps:g}               # what {task} was trained at; the source has {source.fps:g}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False)
