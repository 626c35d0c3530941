"""A caption with camera tags as a camera file: `tagged` among the formats."""

from __future__ import annotations

from pathlib import Path

from camera.files.number_lines import read_lines
from camera.files.path_notes import mapping_notes
from camera.files.safetensors_poses import read_pose_safetensors
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.moves.tagged_text import is_tagged, read_tagged, trajectory_file
from camera.path import CameraPath, PoseFrame
from core.errors import InputError
from core.files import read_safetensors_metadata


def read_tagged_file(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """The path of a tagged text, or of the safetensors file that the text names as #trajectory:{file}.

    Args:
        file: the text; the file that it names is looked for beside it.
        settings: fov_degrees, else as the reference has it; for a named file, as its format takes them.
        frames: of the source; their rate is needed, and their number where the path shall be as long.

    Raises:
        InputError: no tags, no frame rate, or what the tags say; the message names the file.
    """
    text = _text(file)
    if not is_tagged(text):
        raise InputError(f"{file}: expected a text with camera tags, found none; docs/cameras.md shows them")
    try:
        named = trajectory_file(text)
        if named is None:
            return _read(text, settings, frames)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return read_pose_safetensors(file.parent / named, settings, frames)


def write_tagged_file(path: CameraPath, file: Path) -> None:
    """Refuse: the 18 directions and two speeds of tagged text can say few paths."""
    raise InputError(f"{file}: expected another format; a camera path cannot be written as tagged text")


def is_tagged_file(file: Path) -> bool:
    """Whether a text file has camera tags or names a trajectory file."""
    return is_tagged(_text(file))


def tagged_pose_frame(file: Path) -> PoseFrame | None:
    """The pose frame of a tagged text: tags describe a motion; a named file says it itself, or does not."""
    try:
        named = trajectory_file(_text(file))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return "first" if named is None else mapping_notes(read_safetensors_metadata(file.parent / named), file).pose_frame


def _text(file: Path) -> str:
    return "\n".join(line.text for line in read_lines(file))


def _read(text: str, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    if frames.fps is None:
        raise InputError("tagged camera text counts seconds: expected a frame rate (fps), found none")
    if settings.direction or settings.axes or settings.size:
        raise InputError("tagged camera text has no camera_direction, camera_axes or camera_size: leave them out")
    return read_tagged(
        text,
        fps=frames.fps,
        height=frames.height,
        width=frames.width,
        num_frames=frames.count,
        fov_degrees=settings.fov_degrees,
    )
