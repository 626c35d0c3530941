"""Camera files of every format: recognised from their content or named, read into a CameraPath, written from one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from camera import re10k, ten_numbers
from camera.number_lines import Line, no_rows, read_lines
from camera.path import CameraPath
from camera.re10k import write_re10k
from camera.ten_numbers import FOV_AXES, write_ten
from core.errors import InputError, nearest

__all__ = ["FORMATS", "CameraFormat", "read_camera", "recognise", "write_re10k", "write_ten"]

CameraFormat = Literal["ten", "re10k"]
FORMATS: tuple[CameraFormat, ...] = ("ten", "re10k")


def read_camera(
    file: Path | str,
    *,
    height: int,
    width: int,
    fov_axis: str = "horizontal",
    format: str = "auto",
    fps: float | None = None,
) -> CameraPath:
    """Read a camera file: as many poses as it has lines for frames, in pose frame "scene".

    Args:
        file: a 10-number file or a RealEstate10K / CameraCtrl .txt.
        height: pixels of the video's own frames, before any resize or crop.
        width: pixels of the video's own frames.
        fov_axis: "horizontal" or "vertical": what the field of view of a 10-number file spans. A line
            `# fov_axis: ...` in the file goes before it, because it belongs to those numbers.
        format: "ten", "re10k", or "auto" to recognise it from the content.
        fps: of the video.

    Returns:
        The path, with intrinsics in pixels of the video's own frames.

    Raises:
        InputError: the file is missing, empty or wrong; the message names the file and the line.
    """
    if fov_axis not in FOV_AXES:
        raise InputError(f"fov_axis: expected horizontal or vertical, found {fov_axis!r}{nearest(fov_axis, FOV_AXES)}")
    if format not in ("auto", *FORMATS):
        known = ("auto", *FORMATS)
        raise InputError(f"camera format: expected {' or '.join(known)}, found {format!r}{nearest(format, known)}")
    lines = read_lines(Path(file))
    if (recognise(lines) if format == "auto" else format) == "re10k":
        return re10k.read_re10k(lines, height=height, width=width, fps=fps)
    return ten_numbers.read_ten(lines, height=height, width=width, fov_axis=fov_axis, fps=fps)


def recognise(lines: list[Line]) -> CameraFormat:
    """The format of a camera file by the number of columns in its first row.

    Args:
        lines: of the whole file.

    Raises:
        InputError: no row of numbers, or one that no known format has.
    """
    rows = re10k.without_header(lines)
    if not rows:
        raise no_rows(lines[0].file)
    num_columns = len(rows[0].fields())
    if num_columns == re10k.COLUMNS:
        return "re10k"
    if num_columns == ten_numbers.COLUMNS:
        return "ten"
    raise rows[0].error(
        f"expected {ten_numbers.COLUMNS} numbers ({ten_numbers.LAYOUT}) or the {re10k.COLUMNS} of RealEstate10K, found "
        f"{num_columns} columns; docs/cameras.md shows every format"
    )
