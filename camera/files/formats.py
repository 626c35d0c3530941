"""Camera files of every format: recognised from their content or named, read into a CameraPath, written from one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from camera.files import colmap, colmap_text, comfy, json_files, nerf, numpy_files, re10k, recammaster, ten, tum
from camera.files.number_lines import no_rows, read_lines
from camera.files.path_notes import comment_notes, mapping_notes
from camera.files.re10k import write_re10k
from camera.files.safetensors_poses import read_pose_safetensors, write_pose_safetensors
from camera.files.settings import KEYS, CameraFileSettings, SourceFrames
from camera.files.tagged import is_tagged_file, read_tagged_file, tagged_pose_frame, write_tagged_file
from camera.files.ten import write_ten
from camera.path import CameraPath, PoseFrame
from core.errors import InputError, listing, nearest
from core.files import read_safetensors_metadata

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
    "ten": Format(read=ten.read_ten, write=write_ten),
    "re10k": Format(read=re10k.read_re10k, write=write_re10k),
    "comfy": Format(read=comfy.read_comfy, write=comfy.write_comfy),
    "tum": Format(read=tum.read_tum, write=tum.write_tum, settings=frozenset({"fov_degrees"})),
    "recammaster": Format(
        read=recammaster.read_recammaster,
        write=recammaster.write_recammaster,
        settings=frozenset({"fov_degrees", "name"}),
    ),
    "nerf": Format(read=nerf.read_nerf, write=nerf.write_nerf),
    "colmap": Format(read=colmap.read_colmap, write=colmap.write_colmap, settings=frozenset({"name"})),
    "arrays": Format(
        read=numpy_files.read_numpy,
        write=numpy_files.write_numpy,
        settings=frozenset({"direction", "axes", "fov_degrees", "size"}),
    ),
    "safetensors": Format(
        read=read_pose_safetensors,
        write=write_pose_safetensors,
        settings=frozenset({"direction", "axes", "fov_degrees", "size"}),
    ),
    "tagged": Format(
        read=read_tagged_file,
        write=write_tagged_file,
        settings=frozenset({"direction", "axes", "fov_degrees", "size"}),  # all but one for the file it may name
    ),
}
_COLUMNS = {
    ten.COLUMNS: "ten",
    re10k.COLUMNS: "re10k",
    comfy.COLUMNS: "comfy",
    tum.COLUMNS: "tum",
}  # of text files


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
    num_frames: int | None = None,
    frame_names: Sequence[str] | None = None,
) -> CameraPath:
    """Read a camera file: as many poses as it has frames, in pose frame "scene" unless the file says "first".

    Args:
        file: a file or folder of a format in docs/cameras.md.
        settings: what the user says about it.
        height: pixels of the video's own frames, before any resize or crop.
        width: pixels of the video's own frames.
        fps: of the video; None takes what the file says, if it does.
        num_frames: of the video; a format that describes a motion in seconds needs it to be as long.
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
                f"{file}: {KEYS[setting]} does nothing for the format {name!r}, which leaves nothing open there; leave "
                "it out"
            )
    names = None if frame_names is None else tuple(frame_names)
    frames = SourceFrames(height=height, width=width, fps=fps, names=names, count=num_frames)
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
    file = Path(file)
    kind = _kind(file)
    if kind == "folder":
        name = recognise(file)
        if name == "colmap":
            model = colmap.model_folder(file)
            return None if model is None else colmap_text.text_notes(model).pose_frame
        return None if name == "arrays" else declared_pose_frame(file / nerf.FILE_NAME)
    if kind == "arrays":
        return numpy_files.load_arrays(file, single="poses")[1].pose_frame
    if kind == "safetensors":
        return mapping_notes(read_safetensors_metadata(file), file).pose_frame
    if kind == "json":
        return json_files.json_notes(json_files.read_json(file), file).pose_frame
    return tagged_pose_frame(file) if is_tagged_file(file) else comment_notes(read_lines(file)).pose_frame


def camera_files(camera: Path) -> list[Path]:
    """Every file that a camera is read from: itself, the members of a folder, and arrays that are read along with it.

    Args:
        camera: a file or folder as `read_camera` takes it.
    """
    if not camera.is_dir():
        beside = numpy_files.intrinsics_beside(camera)
        return [camera] if beside is None else [camera, beside]
    folder = colmap.model_folder(camera) or camera
    members = [file for file in sorted(folder.iterdir()) if file.stem in colmap.MEMBERS and file.is_file()]
    singles = (nerf.FILE_NAME, numpy_files.POSES_FILE, numpy_files.INTRINSICS_FILE)
    return members + [camera / name for name in singles if (camera / name).is_file()]


def recognise(file: Path) -> str:
    """The name of a camera file's format, from its content.

    Args:
        file: or folder.

    Raises:
        InputError: no format, or more than one, has such content.
    """
    kind = _kind(file)
    if kind == "folder":
        return _recognise_folder(file)
    if kind == "json":
        return _recognise_json(file)
    return _recognise_text(file) if kind == "text" else kind


def _kind(file: Path) -> Literal["folder", "arrays", "safetensors", "json", "text"]:
    """What can be told without reading more than the first bytes."""
    if file.is_dir():
        return "folder"
    if not file.is_file():
        raise InputError(f"{file}: expected a camera file, found nothing")
    with open(file, "rb") as opened:
        head = opened.read(64)
    if head.startswith((numpy_files.NPY_MAGIC, numpy_files.NPZ_MAGIC)) or file.suffix in (".npy", ".npz"):
        return "arrays"
    if file.suffix == ".safetensors" or (
        head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size
    ):
        return "safetensors"
    if file.suffix == ".bin" or (file.stem in colmap.MEMBERS and colmap.is_model(file.parent)):
        raise InputError(
            f"{file}: expected a whole COLMAP model, found one of its files; name the folder {file.parent}"
        )
    starts_json = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    return "json" if starts_json or file.suffix == ".json" else "text"


def _recognise_folder(folder: Path) -> str:
    found = {
        "colmap": colmap.model_folder(folder) is not None,
        "nerf": (folder / nerf.FILE_NAME).is_file(),
        "arrays": (folder / numpy_files.POSES_FILE).is_file(),
    }
    names = [name for name, is_there in found.items() if is_there]
    if len(names) == 1:
        return names[0]
    expected = f"a COLMAP model, a {nerf.FILE_NAME} or a {numpy_files.POSES_FILE} in it"
    if names:
        raise InputError(f"{folder}: expected {expected}, found {' and '.join(names)}; name one as {KEYS['format']}")
    raise InputError(f"{folder}: expected a camera file, found a folder without {expected}")


def _recognise_json(file: Path) -> str:
    content = json_files.read_json(file)
    found = {"nerf": nerf.is_nerf(content), "recammaster": recammaster.is_recammaster(content)}
    names = [name for name, fits in found.items() if fits]
    if len(names) == 1:
        return names[0]
    if names:
        raise InputError(
            f"{file}: expected the keys of one format, found those of {' and '.join(names)}; name one as "
            f"{KEYS['format']}"
        )
    raise InputError(
        f"{file}: expected frames with a transform_matrix (nerf) or frame0, frame1, ... (recammaster), found the keys "
        f"{listing(content) if content else 'of an empty object'}; docs/cameras.md shows every format"
    )


def _recognise_text(file: Path) -> str:
    if is_tagged_file(file):
        return "tagged"
    rows = re10k.without_header(read_lines(file))
    if not rows:
        raise no_rows(file)
    num_columns = len(rows[0].fields())
    if num_columns in _COLUMNS:
        return _COLUMNS[num_columns]
    known = ", ".join(f"{count} ({name})" for count, name in sorted(_COLUMNS.items()))
    raise rows[0].error(
        f"expected as many numbers as a format has, {known}, found {num_columns} columns; "
        "docs/cameras.md shows every format"
    )
