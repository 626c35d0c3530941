"""A generated video on disk, with a contact sheet and a record of everything that decided it beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from core.files import atomic_path
from dataset.contact_sheet import contact_sheet
from dataset.video import write_frames, write_video


def write_results(frames: Tensor, target: Path, *, fps: float, record: Mapping[str, object]) -> list[Path]:
    """Write a video or numbered frames, a contact sheet (NAME_sheet.png) and a record (NAME.json).

    Args:
        frames: RGB, uint8 [T, H, W, 3].
        target: a video (out.mp4), a pattern of frames (frames/%04d.png), or a folder; the time names a video in it.
        fps: frames per second of the video.
        record: must go into JSON; paths and the like become text.

    Returns:
        The video or the pattern, the contact sheet, the record.

    Raises:
        InputError: a pattern without one number field, or a size that no video can have.
    """
    if "%" in target.name:
        write_frames(frames, target)
        stem = target.resolve().parent  # beside the folder of frames, not among them
    else:
        if target.suffix.lower() != ".mp4":
            target = target / f"{time.strftime('%Y%m%d-%H%M%S')}.mp4"
        write_video(frames, target, fps=fps)
        stem = target.with_suffix("")
    sheet, record_file = stem.with_name(stem.name + "_sheet.png"), stem.with_name(stem.name + ".json")
    with atomic_path(sheet) as temporary:
        contact_sheet({"": frames}).save(temporary)
    with atomic_path(record_file) as temporary:
        temporary.write_text(json.dumps(record, indent=2, default=str, ensure_ascii=False), encoding="utf-8")
    return [target, sheet, record_file]
