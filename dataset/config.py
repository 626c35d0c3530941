"""The dataset TOML: musubi-tuner's key names, read into frozen dataclasses; every mistake is named with file and key.

    [model]       the task and the model's files, once for all commands (flags override it)
    [general]     what all data sets share
    [[datasets]]  one folder of videos, or one scene as a folder of frames

`KEYS` is the whole schema: which key stands where, what it accepts, its default. docs/datasets.md describes each.
Imports no torch, so that commands can read a config before they load anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import toml

from camera.files.settings import AXES, CAMERA_FORMATS, CAMERA_SUFFIXES, DIRECTIONS, FOV_AXES, CameraFileSettings
from camera.files.settings import KEYS as SETTING_KEYS
from camera.scale import PER_CLIP, SCALE_RULES, parse_scale_rule
from core.errors import InputError, nearest
from dataset.extraction import EXTRACTIONS, Extraction

MODEL_KEYS = ("task", "ckpt_dir", "dit", "dit_high_noise", "vae", "t5", "tokenizer", "clip")
RESAMPLED_FPS = 16.0  # the rate that source_fps alone asks for, as in musubi-tuner: Wan 14B and 1.3B were trained at it


@dataclass(frozen=True, kw_only=True)
class CameraSettings(CameraFileSettings):
    """How the camera files of a data set are read, and in whose coordinates their poses are cached."""

    pose_frame: Literal["scene", "first"]
    scale: str = "none"  # as camera.scale.parse_scale_rule spells it
    estimate: bool = False  # there is no file: cache_camera.py --estimate finds the camera in the frames
    fps: float | None = None  # poses per second of the camera file; None: one pose for every frame of the source


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """What a folder of videos and a scene of frames have in common: one [[datasets]] table, defaults filled in."""

    table: str  # "[[datasets]] 2", for messages
    folder: Path
    cache_directory: Path
    height: int
    width: int
    batch_size: int
    num_repeats: int
    enable_bucket: bool
    bucket_no_upscale: bool
    target_frames: tuple[int, ...]  # empty for frame_extraction "full"
    frame_extraction: Extraction
    frame_stride: int
    frame_sample: int
    max_frames: int
    source_fps: float | None
    target_fps: float | None
    exclude_clips: Path | None  # a list of clips to leave out
    camera: CameraSettings


@dataclass(frozen=True, kw_only=True)
class VideoDataset(DatasetSettings):
    """A folder of videos, each with a caption file beside it and, where there are cameras, a file of poses."""

    caption_extension: str
    camera_directory: Path | None


@dataclass(frozen=True, kw_only=True)
class FramesDataset(DatasetSettings):
    """One scene: a folder of frames, one prompt, and, where there is a camera, one file of poses."""

    prompt: str
    camera_params: Path | None


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A whole dataset TOML."""

    path: Path
    model: Mapping[str, str]
    datasets: tuple[VideoDataset | FramesDataset, ...]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number of at least 1")
    return value


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
        raise ValueError("a number of frames per second above 0")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text in quotes")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a path in quotes")
    return Path(value).expanduser()


def _extension(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith(".") or len(value) < 2 or "/" in value:
        raise ValueError('a file extension with its dot, such as ".txt"')
    return value


def _size(value: Any) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list) or len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError("[width, height] in whole pixels, or one number for a square")
    return sides[1], sides[0]  # height before width from here on


def _lengths(value: Any) -> tuple[int, ...]:
    lengths = [value] if isinstance(value, int) else value
    if not isinstance(lengths, list) or not lengths or any(type(length) is not int or length < 1 for length in lengths):
        raise ValueError("a list of frame numbers of at least 1, such as [49]")
    return tuple(lengths)


def _angle(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < 180):
        raise ValueError("an angle in degrees between 0 and 180")
    return float(value)


def _scale_rule(value: Any) -> str:
    try:
        return parse_scale_rule(value if isinstance(value, str) else "")
    except InputError:
        hint = nearest(value, SCALE_RULES) if isinstance(value, str) else ""
        raise ValueError(f"a scale rule ({', '.join(SCALE_RULES)}){hint}") from None


def _choice(*known: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in known:
            hint = nearest(value, known) if isinstance(value, str) else ""
            raise ValueError("one of " + ", ".join(f'"{name}"' for name in known) + hint)
        return value

    return read


@dataclass(frozen=True)
class Key:
    """One key of the schema."""

    read: Callable[[Any], Any]  # raises ValueError(what was expected)
    default: Any  # in the form that `read` returns; None where the docs say what its absence means
    general: bool = False  # may stand in [general] as well
    kind: Literal["any", "video", "frames"] = "any"  # which kind of data set it belongs to


KEYS: dict[str, Key] = {
    "resolution": Key(_size, (544, 960), general=True),
    "batch_size": Key(_whole, 1, general=True),
    "num_repeats": Key(_whole, 1, general=True),
    "enable_bucket": Key(_flag, False, general=True),
    "bucket_no_upscale": Key(_flag, False, general=True),
    "caption_extension": Key(_extension, ".txt", general=True, kind="video"),
    "video_directory": Key(_path, None, kind="video"),
    "frames_directory": Key(_path, None, kind="frames"),
    "cache_directory": Key(_path, None),
    "target_frames": Key(_lengths, None),
    "frame_extraction": Key(_choice(*EXTRACTIONS), "head"),
    "frame_stride": Key(_whole, 1),
    "frame_sample": Key(_whole, 1),
    "max_frames": Key(_whole, 129),
    "source_fps": Key(_rate, None),
    "target_fps": Key(_rate, None),
    "exclude_clips": Key(_path, None),
    "camera_directory": Key(_path, None, kind="video"),
    "camera_params": Key(_path, None, kind="frames"),
    "camera_format": Key(_choice(*CAMERA_FORMATS), "auto"),
    "camera_direction": Key(_choice(*DIRECTIONS), None),
    "camera_axes": Key(_choice(*AXES), None),
    "camera_fov": Key(_angle, None),
    "camera_name": Key(_text, None),
    "camera_size": Key(_size, None),
    "fov_axis": Key(_choice(*FOV_AXES), "horizontal"),
    "pose_frame": Key(_choice("scene", "first"), None),
    "camera_scale": Key(_scale_rule, "none"),
    "camera_fps": Key(_rate, None),
    "estimate_camera": Key(_flag, False),
    "prompt": Key(_text, None, kind="frames"),
}
CAMERA_FILE_KEYS = {key: setting for setting, key in SETTING_KEYS.items()}  # key -> field of CameraFileSettings
CAMERA_KEYS = (*CAMERA_FILE_KEYS, "pose_frame", "camera_scale", "camera_fps")
ESTIMATE_KEYS = ("camera_fov", "fov_axis", "pose_frame", "camera_scale")  # those that act without a camera file
EXTRACTION_KEYS = {"frame_stride": "slide", "frame_sample": "uniform", "max_frames": "full"}


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
            f"{path}: expected at least one [[datasets]] table with a video_directory or a frames_directory, found none"
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
        return toml.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, found a byte that is not, at {error.start}") from None
    except toml.TomlDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: expected TOML, found a mistake: {error.msg}") from None
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:  # what toml 0.10 raises on some
        raise InputError(f"{path}: expected TOML, found a mistake that the parser cannot place ({error!r})") from None


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
        if name not in known:
            hint = nearest(name, known)
            if name in KEYS and where == "[general]":
                hint = "; it belongs into a [[datasets]] table"
            elif name in KEYS:
                hint = f"; it belongs to a data set with {KEYS[name].kind}_directory"
            raise InputError(f"{path}, {where}: unknown key {name!r}{hint}")
        try:
            values[name] = KEYS[name].read(value)
        except ValueError as error:
            raise InputError(f"{path}, {where} {name}: expected {error}, found {value!r}") from None
    return values


def _dataset(path: Path, where: str, table: Any, shared: Mapping[str, Any]) -> VideoDataset | FramesDataset:
    _require_table(path, where, table)
    kinds = [kind for kind in ("video", "frames") if f"{kind}_directory" in table]
    if len(kinds) != 1:
        unknown = [f"{name!r}{nearest(name, KEYS)}" for name in table if name not in KEYS]
        raise InputError(
            f"{path}, {where}: expected either video_directory (a folder of videos) or frames_directory (one scene as "
            f"a folder of frames), found {'both' if kinds else 'neither'}"
            + (f"; unknown key {unknown[0]}" if unknown else "")
        )
    known = [name for name, key in KEYS.items() if key.kind in ("any", kinds[0])]
    given = _read_table(path, where, table, known=known)
    _require_effect(path, where, given, {**shared, **given})

    values = {name: KEYS[name].default for name in known} | {k: v for k, v in shared.items() if k in known} | given
    height, width = values["resolution"]
    source_fps, target_fps = values["source_fps"], values["target_fps"]
    if target_fps is None and source_fps is not None:
        target_fps = min(source_fps, RESAMPLED_FPS)
    settings: dict[str, Any] = {
        "table": where,
        "height": height,
        "width": width,
        "target_fps": target_fps,
        "target_frames": values["target_frames"] or (),
        "camera": CameraSettings(
            **{field: values[key] for key, field in CAMERA_FILE_KEYS.items()},
            pose_frame=values["pose_frame"]
            or ("first" if kinds == ["video"] or values["estimate_camera"] else "scene"),
            scale=values["camera_scale"],
            fps=values["camera_fps"],
            estimate=values["estimate_camera"],
        ),
    }
    for name in (
        *("batch_size", "num_repeats", "enable_bucket", "bucket_no_upscale"),
        *("frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps"),
        "exclude_clips",
    ):
        settings[name] = values[name]
    if kinds == ["video"]:
        folder = values["video_directory"]
        camera_directory, extension = values["camera_directory"], values["caption_extension"]
        shared_folder = camera_directory is not None and camera_directory.resolve() == folder.resolve()
        if shared_folder and extension in CAMERA_SUFFIXES and values["camera_format"] != "tagged":
            raise InputError(
                f"{path}, {where} camera_directory: camera files and captions would be the same NAME{extension} in "
                f"{folder}; move the camera files, set another caption_extension, or, where captions carry camera "
                'tags, camera_format = "tagged"'
            )
        return VideoDataset(
            folder=folder,
            cache_directory=values["cache_directory"] or folder,
            caption_extension=extension,
            camera_directory=camera_directory,
            **settings,
        )
    folder = values["frames_directory"]
    return FramesDataset(
        folder=folder,
        cache_directory=values["cache_directory"] or folder,
        prompt=values["prompt"],
        camera_params=values["camera_params"],
        **settings,
    )


def _require_effect(path: Path, where: str, given: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
    """Refuse what is missing, and what is given but would change nothing."""

    def refuse(name: str, problem: str) -> None:
        raise InputError(f"{path}, {where} {name}: {problem}")

    extraction = merged.get("frame_extraction", KEYS["frame_extraction"].default)
    if extraction == "full" and "target_frames" in given:
        refuse("target_frames", 'does nothing with frame_extraction = "full", which takes whole videos; set max_frames')
    if extraction != "full" and "target_frames" not in given:
        refuse("target_frames", 'not given; expected a list of clip lengths such as [49], or frame_extraction = "full"')
    for name, owner in EXTRACTION_KEYS.items():
        if name in given and extraction != owner:
            refuse(name, f'does nothing with frame_extraction = "{extraction}"; it belongs to "{owner}"')
    if given.get("bucket_no_upscale") and not merged.get("enable_bucket", False):
        refuse("bucket_no_upscale", "does nothing without enable_bucket = true")
    cameras = "camera_directory" if "video_directory" in given else "camera_params"
    estimated = given.get("estimate_camera", False)
    if estimated and cameras in given:
        refuse("estimate_camera", f"cameras come from {cameras} or from the frames, found both; remove one")
    for name in CAMERA_KEYS:
        if name in given and cameras not in given and not estimated:
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
    if "frames_directory" in given:
        if "prompt" not in given:
            refuse("prompt", "not given; expected the caption of the scene, as text in quotes")
        if "target_fps" in given and "source_fps" not in given:
            refuse("target_fps", "frames in a folder have no frame rate; give source_fps as well")
        if "camera_fps" in given and "source_fps" not in given:
            refuse("camera_fps", "frames in a folder have no frame rate; give source_fps as well")
    pose_frame = given.get("pose_frame", "first" if "video_directory" in given or estimated else "scene")
    if given.get("camera_scale") in PER_CLIP and pose_frame != "first":
        refuse(
            "camera_scale",
            f'expected none, metric:FACTOR or mean_depth with pose_frame = "{pose_frame}", found '
            f'"{given["camera_scale"]}", which would give every clip coordinates of its own',
        )


def _require_own_caches(path: Path, datasets: tuple[VideoDataset | FramesDataset, ...]) -> None:
    owners: dict[Path, DatasetSettings] = {}
    for dataset in datasets:
        other = owners.setdefault(dataset.cache_directory.resolve(), dataset)
        if other is not dataset:
            raise InputError(
                f"{path}, {dataset.table} cache_directory: {dataset.cache_directory} is already the cache of "
                f"{other.table}; give each data set its own"
            )
