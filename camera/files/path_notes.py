"""What a camera file says about its path beside the numbers: pose frame, scale rule, frame rate, mean depth, size.

Text formats carry it in comments, one `# key: value` each (RealEstate10K several in its header line); JSON files in an
object `camera_path`; .npz files as entries and safetensors as metadata of the same names. Other programs skip all of
these, and a reader here gives them back, so that a path survives a way through a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from camera.files.number_lines import Line, number_text
from camera.files.settings import AXES, DIRECTIONS, SourceFrames
from camera.path import CameraPath, PoseFrame
from camera.scale import parse_scale_rule
from core.errors import InputError, nearest

_COMMENT = re.compile(r"\s*(\w+)\s*[:=]\s*(\S+)\s*")


@dataclass(frozen=True, kw_only=True)
class PathNotes:
    """What a file says; None where it says nothing.

    Args:
        pose_frame: "scene" or "first".
        scale_rule: how the positions were scaled (see camera/scale.py).
        fps: frames per second.
        mean_depth: in the units of the positions.
        height: pixels of the frame that intrinsics in pixels belong to.
        width: pixels of that frame.
        fov_degrees: horizontal, in files without other intrinsics.
        direction: "c2w" or "w2c", in files of matrices.
        axes: of the camera, in files of matrices.
    """

    pose_frame: PoseFrame | None = None
    scale_rule: str | None = None
    fps: float | None = None
    mean_depth: float | None = None
    height: int | None = None
    width: int | None = None
    fov_degrees: float | None = None
    direction: str | None = None
    axes: str | None = None

    def texts(self) -> dict[str, str]:
        """The notes that say something, as they are written to a file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value if isinstance(value, str) else number_text(value)
            for name, value in values.items()
            if value is not None
        }


NOTE_KEYS = tuple(field.name for field in fields(PathNotes))


def notes_of(path: CameraPath) -> PathNotes:
    """The notes that every format keeps of a path. The default rule "none" and what is not known are left out."""
    return PathNotes(
        pose_frame=path.pose_frame,
        scale_rule=None if path.scale_rule == "none" else path.scale_rule,
        fps=path.fps,
        mean_depth=path.mean_depth,
    )


def comment_notes(lines: Iterable[Line]) -> PathNotes:
    """The notes in the comments of a text file. Comments that are not `key: value` of a known key are only comments.

    Raises:
        InputError: a value that the key does not take, or two values for one key; names the line.
    """
    values: dict[str, Any] = {}
    for line in lines:
        for comment in line.text.split("#")[1:]:
            found = _COMMENT.fullmatch(comment)
            if found is None or found[1] not in NOTE_KEYS:
                continue
            name, value = found[1], _read_value(found[1], found[2], line.error)
            if values.setdefault(name, value) != value:
                raise line.error(f"expected one {name} for the whole file, found {value} after {values[name]}")
    return PathNotes(**values)


def mapping_notes(entries: Mapping[str, object], file: Path) -> PathNotes:
    """The notes among the entries of a JSON object, an .npz file or a safetensors file's metadata; null says nothing.

    Raises:
        InputError: a value that the key does not take; names file and key.
    """

    def error(message: str) -> InputError:
        return InputError(f"{file}: {message}")

    known = {name: str(entries[name]) for name in NOTE_KEYS if entries.get(name) not in (None, "null")}
    return PathNotes(**{name: _read_value(name, text, error) for name, text in known.items()})


def comment_lines(notes: PathNotes) -> list[str]:
    """The notes as lines of comments."""
    return [f"# {name}: {text}" for name, text in notes.texts().items()]


def path_with_notes(file: Path, c2w: Tensor, K: Tensor, notes: PathNotes, frames: SourceFrames) -> CameraPath:
    """A path with what its file says of it.

    Args:
        file: for errors.
        c2w: [T, 4, 4] float64, OpenCV axes.
        K: [T, 3, 3] float64, in pixels of the source's frames.
        notes: of the file.
        frames: the source's; their fps goes before the file's own.

    Raises:
        InputError: numbers that make no path; names the file and the frame.
    """
    try:
        return CameraPath(
            c2w=c2w,
            K=K,
            height=frames.height,
            width=frames.width,
            fps=frames.fps or notes.fps,
            pose_frame=notes.pose_frame or "scene",
            scale_rule=notes.scale_rule or "none",
            mean_depth=notes.mean_depth,
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _read_value(name: str, text: str, error: Callable[[str], InputError]) -> Any:
    """One value in its own type."""
    choices: dict[str, tuple[str, ...]] = {"pose_frame": ("scene", "first"), "direction": DIRECTIONS, "axes": AXES}
    if name in choices:
        known, word = choices[name], text.lower()
        if word not in known:
            raise error(f"expected {name} {' or '.join(known)}, found {text!r}{nearest(word, known)}")
        return word
    if name == "scale_rule":
        try:
            return parse_scale_rule(text)
        except InputError as problem:
            raise error(str(problem)) from None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    largest = 180 if name == "fov_degrees" else math.inf
    whole = name in ("height", "width")
    if not 0 < number < largest or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise error(f"expected {name}: {kind} above 0{' and below 180' if largest == 180 else ''}, found {text!r}")
    return int(number) if whole else number
