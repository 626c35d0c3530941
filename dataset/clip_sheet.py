"""One clip as a picture: its frames as they are encoded, and the same decoded from the cache, each with its time."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dataset.clips import Clip

if TYPE_CHECKING:
    from PIL import Image

COLUMNS, MARGIN, LINE_HEIGHT, NAME_WIDTH, LEAST_HEIGHT = 7, 6, 15, 74, 96


def clip_sheet(clip: Clip, source: Tensor, decoded: Tensor) -> Image.Image:
    """Draw a clip.

    Args:
        clip: from `list_clips`.
        source: the frames that were encoded, uint8 [T, H, W, 3].
        decoded: the same out of the latent cache, uint8 [T, H, W, 3].

    Returns:
        The picture: name, size, crop and caption; under them seven frames with their number and time, as they went in
        and as they come out.
    """
    from PIL import Image, ImageDraw

    columns = np.unique(np.linspace(0, len(source) - 1, min(COLUMNS, len(source))).round().astype(int))
    height, width = source.shape[1:3]
    factor = max(1, -(-LEAST_HEIGHT // height))
    size = (width * factor, height * factor)
    total = NAME_WIDTH + len(columns) * (size[0] + MARGIN) + MARGIN
    lines = _words(clip, max(40, total // 7))
    top = MARGIN + len(lines) * LINE_HEIGHT + MARGIN
    sheet = Image.new("RGB", (total, top + LINE_HEIGHT + 2 * (size[1] + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * LINE_HEIGHT), line, fill="black")
    for row, (name, frames) in enumerate((("encoded", source), ("from cache", decoded))):
        y = top + LINE_HEIGHT + row * (size[1] + MARGIN)
        draw.text((MARGIN, y), name, fill="black")
        for place, frame in enumerate(columns):
            x = NAME_WIDTH + place * (size[0] + MARGIN)
            if row == 0:
                draw.text((x, top), _time(clip, int(frame)), fill="black")
            picture = Image.fromarray(frames[frame].numpy())
            sheet.paste(picture.resize(size, Image.Resampling.BICUBIC), (x, y))
    return sheet


def _words(clip: Clip, letters: int) -> list[str]:
    crop = clip.crop
    fps = "" if clip.fps is None else f" at {clip.fps:g} frames a second"
    return [
        f"{clip.name}: {clip.num_frames} frames{fps}, {clip.width}x{clip.height}",
        f"source {crop.source_width}x{crop.source_height}, resized to {crop.resized_width}x{crop.resized_height}, "
        f"cut at left {crop.left}, top {crop.top}",
        *textwrap.wrap(f"caption: {clip.caption or '(empty)'}", letters),
    ]


def _time(clip: Clip, frame: int) -> str:
    """Which frame of the source it is, and when that is shown."""
    index = clip.frame_indices[frame]
    return f"frame {index}" if clip.source_fps is None else f"frame {index}, {index / clip.source_fps:.2f} s"
