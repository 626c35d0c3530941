"""Camera files of every format: recognised from their content or named, read into a CameraPath, written from one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from camera.file_settings import CameraFileSettings, SourceFrames
from camera.number_lines import no_rows, read_lines
from camera.path import CameraPath, PoseFrame
from camera.path_notes import comment_notes
from camera.re10k import COLUMNS as RE10K_COLUMNS
from camera.re10k import read_re10k, without_header, write_re10k
from camera.ten_numbers import COLUMNS as TEN_COLUMNS
from camera.ten_numbers import LAYOUT as TEN_LAYOUT
from camera.ten_numbers import read_ten, write_ten
from core.errors import InputError, nearest

__all__ = [
    "FORMATS",
    "CameraFileSettings",
    "Format",
    "camera_files",
    "declared_pose_frame",
    "read_camera",
    "read_camera_file",
    "recognise",
    "write_camera",
    "write_re10k",
    "write_ten",
]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Args:
        read: a path from a file, the user's settings and the source's frames.
        write: a path to a file.
        settings: what the format leaves to the user; any other setting would do nothing and is refused.
    """

    read: Callable[[Path, CameraFileSettings, SourceFrames], CameraPath]
    write: Callable[[CameraPath, Path], None]
    settings: frozenset[str] = frozenset()


FORMATS: dict[str, Format] = {
    "ten": Format(read=read_ten, write=write_ten),
    "re10k": Format(read=read_re10k, write=write_re10k),
}


def read_camera(
    file: Path | str,
    *,
    height: int,
    width: int,
    fov_axis: Literal["horizontal", "vertical"] = "horizontal",
    format: str = "auto",
    fps: float | None = None,
    direction: Literal["c2w", "w2c"] | None = None,
    axes: str | None = None,
    fov_degrees: float | None = None,
    name: str | None = None,
    size: tuple[int, int] | None = None,
    frame_names: Sequence[str] | None = None,
) -> CameraPath:
    """Read a camera file: `read_camera_file` with the settings as keywords, which CameraFileSettings describes."""
    settings = CameraFileSettings(
        format=format,  # type: ignore[arg-type]  # checked there, with a hint for a misspelt name
        fov_axis=fov_axis,
        direction=direction,
        axes=axes,  # type: ignore[arg-type]
        fov_degrees=fov_degrees,
        name=name,
        size=size,
    )
    return read_camera_file(file, settings, height=height, width=width, fps=fps, frame_names=frame_names)


def read_camera_file(
    file: Path | str,
    settings: CameraFileSettings,
    *,
    height: int,
    width: int,
    fps: float | None = None,
    frame_names: Sequence[str] | None = None,
) -> CameraPath:
    """Read a camera file: as many poses as it has frames, in pose frame "scene" unless the file says "first".

    Args:
        file: a file or folder of a format in docs/cameras.md.
        settings: what the user says about it.
        height: pixels of the video's own frames, before any resize or crop.
        width: pixels of the video's own frames.
        fps: of the video; None takes what the file says, if it does.
        frame_names: names of the frames' files, in order, where the source is a folder of images: a format that names
            its images gives the poses of exactly these.

    Returns:
        The path, with intrinsics in pixels of the video's own frames.

    Raises:
        InputError: the file is missing, empty or wrong; the message names the file and the line, frame or key.
    """
    file = Path(file)
    name = recognise(file) if settings.format == "auto" else settings.format
    for setting in ("direction", "axes", "fov_degrees", "name", "size"):
        if getattr(settings, setting) is not None and setting not in FORMATS[name].settings:
            raise InputError(
                f"{file}: camera {setting} does nothing for the format {name!r}, which fixes it; leave it out"
            )
    names = None if frame_names is None else tuple(frame_names)
    frames = SourceFrames(height=height, width=width, fps=fps, names=names)
    return FORMATS[name].read(file, settings, frames)


def write_camera(path: CameraPath, file: Path | str, *, format: str) -> None:
    """Write a path to a file of a format, whole or not at all.

    Args:
        path: any path that the format can hold.
        file: to be written; a folder for "colmap".
        format: a name of `FORMATS`.

    Raises:
        InputError: an unknown format, or a path that it cannot hold.
    """
    if format not in FORMATS:
        raise InputError(f"camera format: expected {' or '.join(FORMATS)}, found {format!r}{nearest(format, FORMATS)}")
    FORMATS[format].write(path, Path(file))


def declared_pose_frame(file: Path | str) -> PoseFrame | None:
    """The pose frame that a camera file itself states; None where it says nothing.

    Raises:
        InputError: the file cannot be read, or states something that is no pose frame.
    """
    return comment_notes(read_lines(Path(file))).pose_frame


def camera_files(camera: Path) -> list[Path]:
    """Every file that a camera consists of: itself, the content of a folder, and arrays that are read along with it.

    Args:
        camera: a file or folder as `read_camera` takes it.
    """
    if camera.is_dir():
        return sorted(file for file in camera.rglob("*") if file.is_file())
    return [camera]


def recognise(file: Path) -> str:
    """The name of a camera file's format, from its content.

    Args:
        file: or folder.

    Raises:
        InputError: no format, or more than one, has such content.
    """
    lines = read_lines(file)
    rows = without_header(lines)
    if not rows:
        raise no_rows(file)
    num_columns = len(rows[0].fields())
    if num_columns == RE10K_COLUMNS:
        return "re10k"
    if num_columns == TEN_COLUMNS:
        return "ten"
    raise rows[0].error(
        f"expected {TEN_COLUMNS} numbers ({TEN_LAYOUT}) or the {RE10K_COLUMNS} of RealEstate10K, found "
        f"{num_columns} columns; docs/cameras.md shows every format"
    )
