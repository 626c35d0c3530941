"""The clips of a config: which frames of which file, at which size, with which caption and camera, cached where.

The list follows from the TOML and the files it names, and from nothing else: what happens to lie in a cache folder does
not become training data, and every command that reads one config sees the same clips in the same order.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import InputError, fail, nearest
from dataset.buckets import Crop, bucket_size, cover_crop
from dataset.config import (
    AnyDataset,
    CameraSettings,
    DatasetConfig,
    DatasetSettings,
    FramesDataset,
    ImageDataset,
    MovingDataset,
    VideoDataset,
)
from dataset.extraction import fit_length, resample, resample_times, same_rate, windows
from dataset.sources import Source, list_sources
from dataset.video import VideoInfo, probe

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CameraFile:
    """A file with one pose for every frame of the source, or poses at a rate of their own, and how it is read.

    Where `settings.estimate` holds there is no such file; the path is then the source's, whose frames show the motion.
    """

    path: Path
    settings: CameraSettings


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One training example. Its three caches are named here and nowhere else.

    The latent and camera caches are named by source file, first frame, number of frames and size, the text cache by
    the source file alone: clips cut from one video share its caption. Suffixes stay in the names, so that a.mp4 and
    a.mov are two clips; files that a list names carry a few digits of their path's hash, so that x/a.mp4 and y/a.mp4
    are two clips.
    """

    dataset: int  # position of its table in the TOML, from 0
    source: Path  # a video, an image, or a folder of frames
    source_name: str  # what its caches are called
    num_source_frames: int
    source_fps: float | None  # of the source, before sampling; None where it has no clock
    frame_indices: tuple[int, ...]  # source frames, strictly increasing
    fps: float | None  # of the clip, after sampling; None where the source has no clock
    times: tuple[float, ...] | None  # seconds of the frames in a source whose frames come at an uneven rate
    crop: Crop
    caption: str
    camera: CameraFile | None
    cache_directory: Path
    batch_size: int
    num_repeats: int
    weight: float  # num_repeats * weight: how often the clip stands in an epoch
    caption_dropout: float  # how often it is trained with the empty caption

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.frame_indices)

    @property
    def height(self) -> int:
        """Pixels of the frames that are encoded."""
        return self.crop.height

    @property
    def width(self) -> int:
        """Pixels of the frames that are encoded."""
        return self.crop.width

    @property
    def name(self) -> str:
        """Which frames of which source, such as room.mp4_00000-017; what exclude_clips lists."""
        return f"{self.source_name}_{self.frame_indices[0]:05d}-{self.num_frames:03d}"

    @property
    def key(self) -> str:
        """What messages call the clip. Unique: data sets have a cache directory each."""
        return (self.cache_directory / f"{self.name}_{self.width:04d}x{self.height:04d}").as_posix()

    @property
    def latent_cache(self) -> Path:
        """File of the latents."""
        return Path(f"{self.key}_latents.safetensors")

    @property
    def camera_cache(self) -> Path:
        """File of the poses and intrinsics of the processed frames."""
        return Path(f"{self.key}_camera.safetensors")

    @property
    def text_cache(self) -> Path:
        """File of the encoded caption."""
        return self.cache_directory / f"{self.source_name}_text.safetensors"


def without_caption(clip: Clip) -> Clip:
    """The clip as caption dropout trains it: the empty caption, whose one text cache serves a whole data set."""
    return replace(clip, caption="", source_name="empty_caption")


def list_clips(
    config: DatasetConfig,
    *,
    spatial_stride: int,
    temporal_stride: int = 4,
    on_problem: Callable[[InputError], None] = fail,
) -> list[Clip]:
    """All clips of a config, in the order of its tables, the names of their sources and their first frames.

    Args:
        config: from `read_dataset_config`.
        spatial_stride: pixels of a token's side (VAE stride times patch): 16, or 32 for ti2v-5B. Sizes are multiples.
        temporal_stride: video frames of a latent frame after the first. Lengths are n * temporal_stride + 1; another
            length in the TOML is rounded down, and a warning says so.
        on_problem: called with what is wrong about a data set or a source; the listing then goes on without it. The
            default raises it.

    Returns:
        At least one clip. A video too short for every length in the TOML gives none, and a warning names it.

    Raises:
        InputError: a folder, caption or camera file is missing, a video cannot be decoded, a size does not fit, or no
            clip is left.
    """
    clips: list[Clip] = []
    for number, dataset in enumerate(config.datasets):
        where = f"{config.path}, {dataset.table}"
        try:
            clips += _clips_of_dataset(where, number, dataset, spatial_stride, temporal_stride, on_problem)
        except InputError as problem:
            on_problem(problem)
    if not clips:
        why = "every video is too short (see above) or excluded"
        on_problem(InputError(f"{config.path}: expected at least one clip, found none; {why}"))
    return clips


def _clips_of_dataset(
    where: str,
    number: int,
    dataset: AnyDataset,
    spatial_stride: int,
    temporal_stride: int,
    on_problem: Callable[[InputError], None],
) -> list[Clip]:
    if not dataset.enable_bucket and (dataset.height % spatial_stride or dataset.width % spatial_stride):
        fit = [max(1, round(side / spatial_stride)) * spatial_stride for side in (dataset.width, dataset.height)]
        raise InputError(
            f"{where} resolution: expected width and height in multiples of {spatial_stride}, found "
            f"{dataset.width}x{dataset.height}; the nearest that fits is [{fit[0]}, {fit[1]}], or set "
            f"enable_bucket = true"
        )
    lengths = [1] if isinstance(dataset, ImageDataset) else _lengths(where, dataset, temporal_stride)
    cut: list[Clip] = []
    for source in list_sources(where, dataset, on_problem):
        try:
            if isinstance(dataset, ImageDataset):
                cut.append(_image(where, number, dataset, source, spatial_stride))
            else:
                cut += _clips_of(where, number, dataset, source, lengths, spatial_stride, temporal_stride)
        except InputError as problem:
            on_problem(problem)
    return _without_excluded(where, dataset, cut)


def _lengths(where: str, dataset: MovingDataset, temporal_stride: int) -> list[int]:
    """The clip lengths that the VAE can encode, longest last, each once."""
    name = "max_frames" if dataset.frame_extraction == "full" else "target_frames"
    asked = [dataset.max_frames] if dataset.frame_extraction == "full" else dataset.target_frames
    fitting = {length: fit_length(length, temporal_stride) for length in asked}
    for length, fit in fitting.items():
        if length != fit:
            log.warning(
                f"{where} {name}: {length} is not of the form {temporal_stride}n+1 that the VAE encodes; using {fit}"
            )
    return sorted(set(fitting.values()))


def _image(where: str, number: int, dataset: ImageDataset, source: Source, spatial_stride: int) -> Clip:
    """The one clip of an image."""
    info = probe(source.path)
    if info.num_frames != 1:
        raise InputError(f"{where}: expected an image, found {source.path} of {info.num_frames} frames")
    return _clip(
        number,
        dataset,
        source,
        info,
        crop=_crop(where, dataset, source.path, info, spatial_stride),
        frame_indices=(0,),
        source_fps=None,
        fps=None,
        times=None,
        camera=None,
    )


def _clip(
    number: int,
    dataset: AnyDataset,
    source: Source,
    info: VideoInfo,
    *,
    crop: Crop,
    frame_indices: tuple[int, ...],
    source_fps: float | None,
    fps: float | None,
    times: tuple[float, ...] | None,
    camera: CameraFile | None,
) -> Clip:
    """A clip with what it has from its source and its data set."""
    return Clip(
        dataset=number,
        source=source.path,
        source_name=source.name,
        num_source_frames=info.num_frames,
        source_fps=source_fps,
        frame_indices=frame_indices,
        fps=fps,
        times=times,
        crop=crop,
        caption=source.caption,
        camera=camera,
        cache_directory=dataset.cache_directory,
        batch_size=dataset.batch_size,
        num_repeats=dataset.num_repeats,
        weight=dataset.weight,
        caption_dropout=dataset.caption_dropout,
    )


def _clips_of(
    where: str,
    number: int,
    dataset: VideoDataset | FramesDataset,
    source: Source,
    lengths: Sequence[int],
    spatial_stride: int,
    temporal_stride: int,
) -> list[Clip]:
    """The clips of one video or scene, shortest first, then by first frame."""
    info = probe(source.path)
    frames, fps = _sampled_frames(where, dataset, source.path, info)
    if dataset.frame_extraction == "full":
        lengths = [fit_length(min(lengths[0], len(frames)), temporal_stride)]
    found = windows(
        len(frames),
        lengths=lengths,
        extraction=dataset.frame_extraction,
        stride=dataset.frame_stride,
        samples=dataset.frame_sample,
    )
    if not found:
        sampled = " after sampling" if len(frames) < info.num_frames else ""
        log.warning(
            f"{where}: {source.path} gives no clip: it has {len(frames)} frames{sampled} and the shortest clip asked "
            f"for has {lengths[0]}"
        )
    crop = _crop(where, dataset, source.path, info, spatial_stride)
    file = source.path if dataset.camera.estimate else source.camera
    camera = None if file is None else CameraFile(path=file, settings=dataset.camera)
    clips = []
    for window in found:
        indices = tuple(frames[position] for position in window)
        uneven = info.times if dataset.source_fps is None else None
        clips.append(
            _clip(
                number,
                dataset,
                source,
                info,
                crop=crop,
                frame_indices=indices,
                source_fps=dataset.source_fps or info.fps,
                fps=fps,
                times=uneven and tuple(uneven[index] for index in indices),
                camera=camera,
            )
        )
    return clips


def read_excluded(file: Path) -> dict[str, int]:
    """The clips that a list leaves out, each with its line: `Clip.name` one a line; " #" starts a comment.

    Raises:
        InputError: no such file, or no text.
    """
    if not file.is_file():
        raise InputError(f"{file}: expected a list of clips to leave out, found nothing")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected text in UTF-8, found a byte that is not, at {error.start}") from None
    names = {re.split(r"(?:^|\s)#", line)[0].strip(): number for number, line in enumerate(lines, 1)}
    names.pop("", None)
    return names


def _without_excluded(where: str, dataset: DatasetSettings, clips: list[Clip]) -> list[Clip]:
    """The clips that the data set's list of exclusions does not name."""
    if dataset.exclude_clips is None:
        return clips
    excluded = read_excluded(dataset.exclude_clips)
    known = {clip.name for clip in clips}
    for name, line in excluded.items():
        if name not in known:
            raise InputError(
                f"{where} exclude_clips: {dataset.exclude_clips}, line {line}: expected a clip of this data set, such "
                f"as {next(iter(known), 'room.mp4_00000-017')}, found {name!r}{nearest(name, known)}; remove the line"
            )
    return [clip for clip in clips if clip.name not in excluded]


def _sampled_frames(
    where: str, dataset: MovingDataset, source: Path, info: VideoInfo
) -> tuple[list[int], float | None]:
    """Source frames at the rate wanted, and that rate."""
    source_fps = dataset.source_fps or info.fps
    target_fps = dataset.target_fps
    if target_fps is None or source_fps is None:
        return list(range(info.num_frames)), source_fps
    if info.times is not None and dataset.source_fps is None:
        try:
            return resample_times(info.times, target_fps=target_fps), target_fps
        except ValueError as gap:
            time, seconds = gap.args
            raise InputError(
                f"{where} target_fps: {source} has frames at an uneven rate, none for {seconds:.3f} s after {time:.2f} "
                f"s, found {target_fps:g}, a frame every {1 / target_fps:.3f} s; frames are left out, never repeated"
            ) from None
    if same_rate(source_fps, target_fps):
        return list(range(info.num_frames)), source_fps
    if target_fps > source_fps:
        raise InputError(
            f"{where} target_fps: expected at most the {source_fps:g} frames per second of {source}, found "
            f"{target_fps:g}; frames are left out, never repeated"
        )
    return resample(info.num_frames, source_fps=source_fps, target_fps=target_fps), target_fps


def _crop(where: str, dataset: DatasetSettings, source: Path, info: VideoInfo, step: int) -> Crop:
    height, width = dataset.height, dataset.width
    if dataset.enable_bucket:
        size = bucket_size(
            source_height=info.height,
            source_width=info.width,
            area=height * width,
            step=step,
            no_upscale=dataset.bucket_no_upscale,
        )
        if size is None:
            raise InputError(
                f"{where}: {source} of {info.width}x{info.height} pixels has no size in multiples of {step} at the "
                f"area of {width}x{height}; raise resolution or leave the video out"
            )
        height, width = size
    return cover_crop(source_height=info.height, source_width=info.width, height=height, width=width)
