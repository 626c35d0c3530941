"""The dataset TOML: musubi-tuner's key names, read into frozen dataclasses; every mistake is named with file and key.

    [model]       the task and the model's files, once for all commands (flags override it)
    [general]     what all data sets share
    [[datasets]]  one folder or list of videos or images, or one scene as a folder of frames

`dataset.keys.KEYS` is the whole schema: which key stands where, what it accepts, its default. docs/datasets.md
describes each. Imports no torch, so that commands can read a config before they load anything.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from camera.files.settings import CAMERA_SUFFIXES, CameraFileSettings
from camera.files.settings import KEYS as SETTING_KEYS
from camera.scale import PER_CLIP
from core.errors import InputError, nearest
from dataset.extraction import Extraction
from dataset.keys import ELSEWHERE, EXTRACTION_KEYS, KEYS, SOURCES, MediaKind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL_KEYS = ("task", "ckpt_dir", "dit", "dit_high_noise", "vae", "t5", "tokenizer", "clip")
RESAMPLED_FPS = 16.0  # the rate that source_fps alone asks for, as in musubi-tuner: Wan 14B and 1.3B were trained at it
CAMERA_FILE_KEYS = {key: setting for setting, key in SETTING_KEYS.items()}  # key -> field of CameraFileSettings
CAMERA_KEYS = (*CAMERA_FILE_KEYS, "pose_frame", "camera_scale", "camera_fps")
ESTIMATE_KEYS = ("camera_fov", "fov_axis", "pose_frame", "camera_scale")  # those that act without a camera file


@dataclass(frozen=True, kw_only=True)
class CameraSettings(CameraFileSettings):
    """How the camera files of a data set are read, and in whose coordinates their poses are cached."""

    pose_frame: Literal["scene", "first"]
    scale: str = "none"  # as camera.scale.parse_scale_rule spells it
    estimate: bool = False  # there is no file: cache_camera.py --estimate finds the camera in the frames
    fps: float | None = None  # poses per second of the camera file; None: one pose for every frame of the source


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """What all data sets have in common: one [[datasets]] table, defaults filled in."""

    table: str  # "[[datasets]] 2", for messages
    cache_directory: Path
    height: int
    width: int
    batch_size: int
    num_repeats: int
    weight: float  # num_repeats * weight is how often a clip stands in an epoch
    caption_dropout: float  # how often a clip is trained with the empty caption
    enable_bucket: bool
    bucket_no_upscale: bool
    exclude_clips: Path | None  # a list of clips to leave out


@dataclass(frozen=True, kw_only=True)
class MovingDataset(DatasetSettings):
    """Videos or frames: which frames become clips, and how cameras are read."""

    target_frames: tuple[int, ...]  # empty for frame_extraction "full"
    frame_extraction: Extraction
    frame_stride: int
    frame_sample: int
    max_frames: int
    source_fps: float | None
    target_fps: float | None
    camera: CameraSettings


@dataclass(frozen=True, kw_only=True)
class VideoDataset(MovingDataset):
    """A folder of videos, each with a caption file beside it and, where there are cameras, a file of poses.

    Or a list of them: one JSON object a line, which names video, caption and camera file.
    """

    folder: Path | None
    jsonl_file: Path | None  # one of the two is given
    caption_extension: str
    camera_directory: Path | None


@dataclass(frozen=True, kw_only=True)
class FramesDataset(MovingDataset):
    """One scene: a folder of frames, one prompt, and, where there is a camera, one file of poses."""

    folder: Path
    prompt: str
    camera_params: Path | None


@dataclass(frozen=True, kw_only=True)
class ImageDataset(DatasetSettings):
    """A folder of images, each with a caption file beside it, or a list of them: clips of one frame."""

    folder: Path | None
    jsonl_file: Path | None  # one of the two is given
    caption_extension: str


AnyDataset = VideoDataset | FramesDataset | ImageDataset


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A whole dataset TOML."""

    path: Path
    model: Mapping[str, str]
    datasets: tuple[AnyDataset, ...]


def read_dataset_config(path: Path | str) -> DatasetConfig:
    """Read and check a dataset TOML. Relative paths in it are relative to the current directory.

    Args:
        path: the TOML file.

    Returns:
        The config, with [general] and the defaults written into every data set.

    Raises:
        InputError: no such file, no TOML, an unknown key, a wrong value, a key that would do nothing, two data sets
            with one cache directory; the message names the file, the table and the key.
    """
    path = Path(path)
    content = _parse(path)
    for name in content:
        if name not in ("model", "general", "datasets"):
            hint = nearest(name, ("model", "general", "datasets"))
            if name in KEYS:
                hint = (
                    "; it belongs into [general] or [[datasets]]"
                    if KEYS[name].general
                    else "; it belongs into [[datasets]]"
                )
            raise InputError(f"{path}: unknown table or key {name!r} at the top level{hint}")
    model = _model_table(path, content.get("model", {}))
    general = content.get("general", {})
    _require_table(path, "[general]", general)
    shared = _read_table(path, "[general]", general, known=[name for name, key in KEYS.items() if key.general])
    tables = content.get("datasets", [])
    if not isinstance(tables, list) or not tables:
        raise InputError(
            f"{path}: expected at least one [[datasets]] table with one of {', '.join(SOURCES)}, found none"
        )
    datasets = tuple(_dataset(path, f"[[datasets]] {number}", table, shared) for number, table in enumerate(tables, 1))
    if general.get("bucket_no_upscale") and not any(dataset.enable_bucket for dataset in datasets):
        raise InputError(f"{path}, [general] bucket_no_upscale: does nothing without enable_bucket = true; remove one")
    _require_own_caches(path, datasets)
    return DatasetConfig(path=path, model=model, datasets=datasets)


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: expected a dataset TOML, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, found a byte that is not, at {error.start}") from None
    except tomllib.TOMLDecodeError as error:  # says the line and column at its end
        raise InputError(f"{path}: expected TOML, found a mistake: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise InputError(f"{path}: expected TOML, found what cannot be read ({error})") from None


def _require_table(path: Path, where: str, table: Any) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{path}, {where}: expected a table, found {table!r}")


def _model_table(path: Path, table: Any) -> dict[str, str]:
    _require_table(path, "[model]", table)
    for name, value in table.items():
        if name not in MODEL_KEYS:
            raise InputError(f"{path}, [model]: unknown key {name!r}{nearest(name, MODEL_KEYS)}")
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{path}, [model] {name}: expected text in quotes, found {value!r}")
    return dict(table)


def _read_table(path: Path, where: str, table: Mapping[str, Any], *, known: list[str]) -> dict[str, Any]:
    """The given keys, each in its own type."""
    values = {}
    for name, value in table.items():
        if name in ELSEWHERE:
            raise InputError(f"{path}, {where} {name}: {ELSEWHERE[name]}; remove it")
        if name not in known:
            hint = nearest(name, known)
            if name in KEYS and where == "[general]":
                hint = "; it belongs into a [[datasets]] table"
            elif name in KEYS:
                owners = [source for source, kind in SOURCES.items() if kind in KEYS[name].kinds]
                hint = f"; it belongs to a data set with {' or '.join(owners)}"
            raise InputError(f"{path}, {where}: unknown key {name!r}{hint}")
        try:
            values[name] = KEYS[name].read(value)
        except ValueError as error:
            raise InputError(f"{path}, {where} {name}: expected {error}, found {value!r}") from None
    return values


def _dataset(path: Path, where: str, table: Any, shared: Mapping[str, Any]) -> AnyDataset:
    _require_table(path, where, table)
    sources = [key for key in SOURCES if key in table]
    if len(sources) != 1:
        unknown = [f"{name!r}{nearest(name, KEYS)}" for name in table if name not in KEYS and name not in ELSEWHERE]
        raise InputError(
            f"{path}, {where}: expected one of {', '.join(SOURCES)}, found {' and '.join(sources) or 'none'}"
            + (f"; unknown key {unknown[0]}" if unknown else "")
        )
    kind = SOURCES[sources[0]]
    known = [name for name, key in KEYS.items() if kind in key.kinds]
    given = _read_table(path, where, table, known=known)
    _require_effect(path, where, given, {**shared, **given}, kind)

    values = {name: KEYS[name].default for name in known} | {k: v for k, v in shared.items() if k in known} | given
    folder, jsonl_file = values.get(f"{kind}_directory"), values.get(f"{kind}_jsonl_file")
    settings: dict[str, Any] = {
        "table": where,
        "cache_directory": values["cache_directory"] or folder,
        "height": values["resolution"][0],
        "width": values["resolution"][1],
    }
    for name in (
        *("batch_size", "num_repeats", "weight", "caption_dropout"),
        *("enable_bucket", "bucket_no_upscale", "exclude_clips"),
    ):
        settings[name] = values[name]
    if kind == "image":
        extension = values["caption_extension"]
        return ImageDataset(folder=folder, jsonl_file=jsonl_file, caption_extension=extension, **settings)
    settings |= _moving(values, kind)
    if kind == "frames":
        return FramesDataset(
            folder=values["frames_directory"],
            prompt=values["prompt"],
            camera_params=values["camera_params"],
            **settings,
        )
    if folder is not None:
        _require_cameras_beside_captions(path, where, values)
    return VideoDataset(
        folder=folder,
        jsonl_file=jsonl_file,
        caption_extension=values["caption_extension"],
        camera_directory=values["camera_directory"],
        **settings,
    )


def _moving(values: Mapping[str, Any], kind: MediaKind) -> dict[str, Any]:
    """The settings of a data set whose clips have more than one frame."""
    source_fps, target_fps = values["source_fps"], values["target_fps"]
    if target_fps is None and source_fps is not None:
        target_fps = min(source_fps, RESAMPLED_FPS)
    settings: dict[str, Any] = {
        name: values[name] for name in ("frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
    }
    return settings | {
        "target_fps": target_fps,
        "target_frames": values["target_frames"] or (),
        "camera": CameraSettings(
            **{field: values[key] for key, field in CAMERA_FILE_KEYS.items()},
            pose_frame=values["pose_frame"] or _default_pose_frame(values, kind),
            scale=values["camera_scale"],
            fps=values["camera_fps"],
            estimate=values["estimate_camera"],
        ),
    }


def _default_pose_frame(values: Mapping[str, Any], kind: MediaKind) -> Literal["scene", "first"]:
    return "first" if kind == "video" or values.get("estimate_camera") else "scene"


def _require_cameras_beside_captions(path: Path, where: str, values: Mapping[str, Any]) -> None:
    """Refuse a folder in which a caption and a camera file would be one file."""
    folder, cameras, extension = values["video_directory"], values["camera_directory"], values["caption_extension"]
    same_folder = cameras is not None and cameras.resolve() == folder.resolve()
    if same_folder and extension in CAMERA_SUFFIXES and values["camera_format"] != "tagged":
        raise InputError(
            f"{path}, {where} camera_directory: camera files and captions would be the same NAME{extension} in "
            f"{folder}; move the camera files, set another caption_extension, or, where captions carry camera "
            'tags, camera_format = "tagged"'
        )


def _require_effect(
    path: Path, where: str, given: Mapping[str, Any], merged: Mapping[str, Any], kind: MediaKind
) -> None:
    """Refuse what is missing, and what is given but would change nothing."""

    def refuse(name: str, problem: str) -> None:
        raise InputError(f"{path}, {where} {name}: {problem}")

    listed = next((name for name in given if name.endswith("_jsonl_file")), None)
    if listed and "cache_directory" not in given:
        refuse("cache_directory", f"not given; expected a folder for the caches of what {listed} lists")
    if listed and "caption_extension" in given:
        refuse("caption_extension", f"does nothing with {listed}, whose lines hold the captions")
    if given.get("bucket_no_upscale") and not merged.get("enable_bucket", False):
        refuse("bucket_no_upscale", "does nothing without enable_bucket = true")
    if kind == "image":
        return
    extraction = merged.get("frame_extraction", KEYS["frame_extraction"].default)
    if extraction == "full" and "target_frames" in given:
        refuse("target_frames", 'does nothing with frame_extraction = "full", which takes whole videos; set max_frames')
    if extraction != "full" and "target_frames" not in given:
        refuse("target_frames", 'not given; expected a list of clip lengths such as [49], or frame_extraction = "full"')
    for name, owner in EXTRACTION_KEYS.items():
        if name in given and extraction != owner:
            refuse(name, f'does nothing with frame_extraction = "{extraction}"; it belongs to "{owner}"')
    cameras = "camera_params" if kind == "frames" else "camera_directory"
    if listed and cameras in given:
        refuse(cameras, f'does nothing with {listed}; name each camera file in its line, as "camera"')
    estimated = given.get("estimate_camera", False)
    if estimated and cameras in given:
        refuse("estimate_camera", f"cameras come from {cameras} or from the frames, found both; remove one")
    for name in CAMERA_KEYS:
        if name in given and cameras not in given and not estimated and not listed:
            refuse(name, f"does nothing without {cameras} or estimate_camera = true")
        if name in given and estimated and name not in ESTIMATE_KEYS:
            refuse(name, "does nothing with estimate_camera = true, which reads no camera file")
    if estimated and "fov_axis" in given and "camera_fov" not in given:
        refuse("fov_axis", "does nothing without camera_fov, which estimate_camera = true may leave out")
    if estimated and given.get("pose_frame") == "scene":
        refuse(
            "pose_frame",
            'expected "first" with estimate_camera = true, found "scene"; each clip gets coordinates of its own',
        )
    if kind == "frames":
        if "prompt" not in given:
            refuse("prompt", "not given; expected the caption of the scene, as text in quotes")
        for name in ("target_fps", "camera_fps"):
            if name in given and "source_fps" not in given:
                refuse(name, "frames in a folder have no frame rate; give source_fps as well")
    pose_frame = given.get("pose_frame") or _default_pose_frame(given, kind)
    if given.get("camera_scale") in PER_CLIP and pose_frame != "first":
        refuse(
            "camera_scale",
            f'expected none, metric:FACTOR or mean_depth with pose_frame = "{pose_frame}", found '
            f'"{given["camera_scale"]}", which would give every clip coordinates of its own',
        )


def _require_own_caches(path: Path, datasets: tuple[AnyDataset, ...]) -> None:
    owners: dict[Path, DatasetSettings] = {}
    for dataset in datasets:
        other = owners.setdefault(dataset.cache_directory.resolve(), dataset)
        if other is not dataset:
            raise InputError(
                f"{path}, {dataset.table} cache_directory: {dataset.cache_directory} is already the cache of "
                f"{other.table}; give each data set its own"
            )
