"""Which room each rendered clip shows: the scenes.json that tools/render_scenes.py writes beside the videos."""

from __future__ import annotations

import json
from pathlib import Path

from core.errors import InputError

FILE_NAME = "scenes.json"


def rooms_beside(folder: Path) -> Path | None:
    """The scenes.json in a folder of videos or in the folder above it."""
    return next((file for file in (folder / FILE_NAME, folder.resolve().parent / FILE_NAME) if file.exists()), None)


def read_rooms(file: Path) -> dict[str, int]:
    """The seed of the room of each clip, by the stem of its video.

    Raises:
        InputError: the file cannot be read as what render_scenes.py writes.
    """
    try:
        return {clip["name"]: int(clip["scene"]) for clip in json.loads(file.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected the list that render_scenes.py writes, cannot read it ({error})") from None
