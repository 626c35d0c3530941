"""JSON files of cameras: parsing, and values of them, with errors that name the file and the place in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camera.files.number_lines import read_lines
from camera.files.path_notes import PathNotes, mapping_notes
from core.errors import InputError
from core.files import atomic_path

NOTES_KEY = "camera_path"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: no JSON, a key twice, or something else than an object.
    """
    text = "\n".join(line.text for line in read_lines(file))
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _without_twins(pairs, file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} line {error.lineno}: expected JSON, found a mistake: {error.msg}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON, found what cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object {{...}}, found a {type(content).__name__}")
    return content


def write_json(content: dict[str, Any], file: Path) -> None:
    """Write an object, atomically, in a form that people can read."""
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def json_notes(content: dict[str, Any], file: Path) -> PathNotes:
    """The notes of the object `camera_path`, which other programs do not read.

    Raises:
        InputError: it is no object, or a value is wrong.
    """
    entries = content.get(NOTES_KEY, {})
    if not isinstance(entries, dict):
        raise InputError(f"{file} {NOTES_KEY}: expected an object, found {_shown(entries)}")
    return mapping_notes(entries, file)


def number(value: object, where: str) -> float:
    """A number of a JSON file; NaN and infinity pass and are for the caller to refuse.

    Raises:
        InputError: text, an object, a list, true or false.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{where}: expected a number, found {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def matrix(value: object, where: str) -> Tensor:
    """A 4x4 matrix of a JSON file as a list of rows, float64 [4, 4].

    Raises:
        InputError: another shape, or something else than numbers.
    """
    rows = value if isinstance(value, list) else []
    if len(rows) != 4 or any(not isinstance(row, list) or len(row) != 4 for row in rows):
        raise InputError(f"{where}: expected a 4x4 matrix as a list of four rows, found {_shown(value)}")
    return torch.tensor([[number(entry, where) for entry in row] for row in rows], dtype=torch.float64)


def _without_twins(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{file}: expected every key once, found {twin!r} twice in one object")
    return content


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
