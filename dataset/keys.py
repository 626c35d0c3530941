"""The keys of a data set's TOML: which stand where, what each accepts, its default. docs/datasets.md describes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from camera.files.settings import AXES, CAMERA_FORMATS, DIRECTIONS, FOV_AXES
from camera.scale import SCALE_RULES, parse_scale_rule
from core.errors import InputError, nearest
from dataset.extraction import EXTRACTIONS

MediaKind = Literal["video", "image", "frames"]
ALL_KINDS: tuple[MediaKind, ...] = ("video", "image", "frames")
MOVING: tuple[MediaKind, ...] = ("video", "frames")
SOURCES: dict[str, MediaKind] = {
    "video_directory": "video",
    "video_jsonl_file": "video",
    "image_directory": "image",
    "image_jsonl_file": "image",
    "frames_directory": "frames",
}
"""The keys that say where a data set's media are, of which a table has exactly one."""
ELSEWHERE = {
    "control_directory": "no model here takes a control video; a camera is named by camera_directory",
    "multiple_target": "it belongs to a layered image model",
    "no_resize_control": "no model here takes a control image",
    "control_resolution": "no model here takes a control image",
    "fp_latent_window_size": "it belongs to FramePack",
    "fp_1f_clean_indices": "it belongs to FramePack",
    "fp_1f_target_index": "it belongs to FramePack",
    "fp_1f_no_post": "it belongs to FramePack",
}
"""Keys of musubi-tuner for other models than Wan, and why they stand for nothing here."""
FRAME_RATES = (1e-3, 1e5)  # a time lapse of one frame in a quarter of an hour; the fastest cameras
LARGEST_SIDE = 2**15  # pixels
LARGEST_WEIGHT = 10**6


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number of at least 1")
    return value


def frame_rate(value: Any) -> float:
    slowest, fastest = FRAME_RATES
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (slowest <= value <= fastest):
        raise ValueError(f"a number of frames per second above 0, {slowest:g} to {fastest:g}")
    return float(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text in quotes")
    return value


def some_path(value: Any) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a path in quotes")
    try:
        path = Path(value).expanduser()
        path.resolve(strict=False).exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a ~user who is nobody, a loop
        raise ValueError(f"a path that can be looked for ({error})") from None
    return path


def extension(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\.[^/\0]{1,30}", value):
        raise ValueError('a file extension with its dot, such as ".txt"')
    return value


def image_size(value: Any) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    known = isinstance(sides, list) and len(sides) == 2 and all(type(side) is int for side in sides)
    if not known or not all(1 <= side <= LARGEST_SIDE for side in sides):
        raise ValueError(f"[width, height] in whole pixels of at most {LARGEST_SIDE}, or one number for a square")
    return sides[1], sides[0]  # height before width from here on


def lengths(value: Any) -> tuple[int, ...]:
    lengths = [value] if isinstance(value, int) else value
    if not isinstance(lengths, list) or not lengths or any(type(length) is not int or length < 1 for length in lengths):
        raise ValueError("a list of frame numbers of at least 1, such as [49]")
    return tuple(lengths)


def angle(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < 180):
        raise ValueError("an angle in degrees between 0 and 180")
    return float(value)


def scale_rule(value: Any) -> str:
    try:
        return parse_scale_rule(value if isinstance(value, str) else "")
    except InputError:
        hint = nearest(value, SCALE_RULES) if isinstance(value, str) else ""
        raise ValueError(f"a scale rule ({', '.join(SCALE_RULES)}){hint}") from None


def choice(*known: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in known:
            hint = nearest(value, known) if isinstance(value, str) else ""
            raise ValueError("one of " + ", ".join(f'"{name}"' for name in known) + hint)
        return value

    return read


def share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < 1):
        raise ValueError("a share of at least 0 and below 1")
    return float(value)


def positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value <= LARGEST_WEIGHT):
        raise ValueError(f"a number above 0, at most {LARGEST_WEIGHT}")
    return float(value)


@dataclass(frozen=True)
class Key:
    """One key of the schema."""

    read: Callable[[Any], Any]  # raises ValueError(what was expected)
    default: Any  # in the form that `read` returns; None where the docs say what its absence means
    general: bool = False  # may stand in [general] as well
    kinds: tuple[MediaKind, ...] = ALL_KINDS  # of the data sets that it belongs to


KEYS: dict[str, Key] = {
    "resolution": Key(image_size, (544, 960), general=True),
    "batch_size": Key(whole, 1, general=True),
    "num_repeats": Key(whole, 1, general=True),
    "weight": Key(positive, 1.0),
    "enable_bucket": Key(flag, False, general=True),
    "bucket_no_upscale": Key(flag, False, general=True),
    "caption_extension": Key(extension, ".txt", general=True, kinds=("video", "image")),
    "caption_dropout": Key(share, 0.0, general=True),
    "video_directory": Key(some_path, None, kinds=("video",)),
    "video_jsonl_file": Key(some_path, None, kinds=("video",)),
    "image_directory": Key(some_path, None, kinds=("image",)),
    "image_jsonl_file": Key(some_path, None, kinds=("image",)),
    "frames_directory": Key(some_path, None, kinds=("frames",)),
    "prompt": Key(text, None, kinds=("frames",)),
    "cache_directory": Key(some_path, None),
    "exclude_clips": Key(some_path, None),
    "target_frames": Key(lengths, None, kinds=MOVING),
    "frame_extraction": Key(choice(*EXTRACTIONS), "head", kinds=MOVING),
    "frame_stride": Key(whole, 1, kinds=MOVING),
    "frame_sample": Key(whole, 1, kinds=MOVING),
    "max_frames": Key(whole, 129, kinds=MOVING),
    "source_fps": Key(frame_rate, None, kinds=MOVING),
    "target_fps": Key(frame_rate, None, kinds=MOVING),
    "camera_directory": Key(some_path, None, kinds=("video",)),
    "camera_params": Key(some_path, None, kinds=("frames",)),
    "camera_format": Key(choice(*CAMERA_FORMATS), "auto", kinds=MOVING),
    "camera_direction": Key(choice(*DIRECTIONS), None, kinds=MOVING),
    "camera_axes": Key(choice(*AXES), None, kinds=MOVING),
    "camera_fov": Key(angle, None, kinds=MOVING),
    "camera_name": Key(text, None, kinds=MOVING),
    "camera_size": Key(image_size, None, kinds=MOVING),
    "fov_axis": Key(choice(*FOV_AXES), "horizontal", kinds=MOVING),
    "pose_frame": Key(choice("scene", "first"), None, kinds=MOVING),
    "camera_scale": Key(scale_rule, "none", kinds=MOVING),
    "camera_fps": Key(frame_rate, None, kinds=MOVING),
    "estimate_camera": Key(flag, False, kinds=MOVING),
}
EXTRACTION_KEYS = {"frame_stride": "slide", "frame_sample": "uniform", "max_frames": "full"}
"""The mode of `frame_extraction` that a key belongs to."""
