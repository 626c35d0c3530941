"""Clips as one picture that a person can judge at a glance: a row per clip, time from left to right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

MARGIN, LABEL_HEIGHT = 4, 16


def contact_sheet(rows: Mapping[str, Tensor], *, num_columns: int = 9, min_height: int = 96) -> Image.Image:
    """Evenly spaced frames of each clip, first and last among them, one clip a row.

    Args:
        rows: label -> frames, uint8 [T, H, W, 3]. Small frames are enlarged by a whole factor to min_height.
        num_columns: frames shown of a clip, if it has as many.
        min_height: pixels.

    Returns:
        The picture; a label stands above its row unless it is empty.
    """
    from PIL import Image, ImageDraw

    strips: list[tuple[str, list[Image.Image]]] = []
    for label, frames in rows.items():
        indices = np.linspace(0, len(frames) - 1, min(num_columns, len(frames))).round().astype(int)
        height, width = frames.shape[1:3]
        factor = max(1, -(-min_height // height))
        size = (width * factor, height * factor)
        strips.append(
            (label, [Image.fromarray(frames[i].numpy()).resize(size, Image.Resampling.BICUBIC) for i in indices])
        )

    def strip_height(label: str, images: list[Image.Image]) -> int:
        return images[0].height + MARGIN + (LABEL_HEIGHT if label else 0)

    total_width = max(sum(image.width + MARGIN for image in images) for _, images in strips) + MARGIN
    sheet = Image.new("RGB", (total_width, sum(strip_height(*strip) for strip in strips) + MARGIN), "white")
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for label, images in strips:
        if label:
            draw.text((MARGIN, y), label, fill="black")
            y += LABEL_HEIGHT
        x = MARGIN
        for image in images:
            sheet.paste(image, (x, y))
            x += image.width + MARGIN
        y += images[0].height + MARGIN
    return sheet
