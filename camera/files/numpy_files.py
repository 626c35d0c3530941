"""NumPy files of poses: an .npz of named arrays, or an .npy of matrices; poses.npy has intrinsics.npy beside it."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camera.files.matrices import focal_and_centre
from camera.files.path_notes import NOTE_KEYS, PathNotes, mapping_notes, notes_of
from camera.files.pose_arrays import path_from_arrays, with_conventions
from camera.files.settings import CameraFileSettings, SourceFrames
from camera.path import CameraPath
from core.errors import InputError
from core.files import atomic_path

NPY_MAGIC = b"\x93NUMPY"
NPZ_MAGIC = b"PK\x03\x04"
POSES_FILE, INTRINSICS_FILE = "poses.npy", "intrinsics.npy"  # of lingbot's folders

_UNREADABLE = (
    *(ValueError, OSError, EOFError, KeyError, SyntaxError, MemoryError, OverflowError, TypeError),
    *(NotImplementedError, RuntimeError, IndexError, AttributeError, zipfile.BadZipFile, zlib.error),
)  # what numpy and zipfile raise on damaged content


def intrinsics_beside(file: Path) -> Path | None:
    """The file of intrinsics that is read along with a file of poses, where it is there.

    poses.npy has intrinsics.npy; pose/NAME.npz, as ViPE writes it, has intrinsics/NAME.npz beside the folder.
    """
    beside = file.with_name(INTRINSICS_FILE) if file.name == POSES_FILE else None
    if file.parent.name == "pose" and file.suffix == ".npz":
        beside = file.parent.parent / "intrinsics" / file.name
    return beside if beside is not None and beside.is_file() else None


def read_numpy(file: Path, settings: CameraFileSettings, frames: SourceFrames) -> CameraPath:
    """A path from an .npz, an .npy, or a folder with poses.npy.

    Args:
        file: the file or folder.
        settings: direction, axes, size and fov_degrees count where the file does not say them.
        frames: of the source.

    Raises:
        InputError: a damaged file, or as `path_from_arrays`.
    """
    if file.is_dir():
        file = file / POSES_FILE
    arrays, notes = load_arrays(file, single="poses")
    beside = intrinsics_beside(file)
    if beside is not None:
        others, _ = load_arrays(beside, single="intrinsics")
        found = others.get("intrinsics", others.get("data"))
        if found is None:
            raise InputError(f"{beside}: expected an array intrinsics or data, found {', '.join(others) or 'none'}")
        arrays = {**arrays, "intrinsics": found}
    return path_from_arrays(file, arrays, notes, settings, frames, normalised=False)


def write_numpy(path: CameraPath, file: Path) -> None:
    """Write any path as an .npz: c2w [T, 4, 4], intrinsics [T, 4] in pixels, and entries with all its conventions.

    Raises:
        InputError: another suffix; an .npy holds one array and nothing of what it means.
    """
    if file.suffix != ".npz":
        raise InputError(f"{file}: expected a name that ends with .npz, found {file.suffix or 'no suffix'}; rename it")
    texts: dict[str, Any] = dict(with_conventions(notes_of(path), path, "c2w").texts())
    with atomic_path(file) as temporary:
        np.savez(temporary, c2w=path.c2w.numpy(), intrinsics=focal_and_centre(path.K).numpy(), **texts)


def load_arrays(file: Path, *, single: str) -> tuple[dict[str, Tensor], PathNotes]:
    """The arrays of numbers in a file, as float64, and its notes.

    Args:
        file: .npz or .npy.
        single: what the array of an .npy is called.

    Raises:
        InputError: the file is missing or damaged, or an array that is needed does not hold numbers.
    """
    if not file.is_file():
        raise InputError(f"{file}: expected a NumPy file, found {'a folder' if file.is_dir() else 'nothing'}")
    try:
        loaded = np.load(file, allow_pickle=False)
        found = {single: loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except _UNREADABLE as error:
        raise InputError(
            f"{file}: expected a whole .npy or .npz of numbers, found what cannot be read "
            f"({' '.join(str(error).split())[:120]}); write it again"
        ) from None
    arrays = {
        name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
        for name, array in found.items()
        if array.dtype.kind in "fiu"
    }
    texts = {name: str(array.item()) for name, array in found.items() if name in NOTE_KEYS and array.size == 1}
    return arrays, mapping_notes(texts, file)
