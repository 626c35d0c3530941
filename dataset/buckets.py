"""Which size a clip is trained at, and the resize and crop that bring its frames there. Numbers only, no pixels.

A frame is scaled, keeping its aspect, until it covers the size; what stands over is cut off evenly on both sides. The
scaling moves coordinates by a plain factor, resized / source, because pixel centres sit at +0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How frames were brought to their size: source, resized, then cut at (top, left) to height x width."""

    source_height: int
    source_width: int
    resized_height: int
    resized_width: int
    top: int
    left: int
    height: int
    width: int


def cover_crop(*, source_height: int, source_width: int, height: int, width: int) -> Crop:
    """Resize until the frame covers height x width, then keep the centre.

    Args:
        source_height: pixels of the source frame; source_width likewise.
        height: pixels of the result; width likewise.

    Returns:
        The numbers of the resize and the crop. One side of the resized frame equals the result's side exactly; the
        other is rounded to a whole pixel.
    """
    scale = max(height / source_height, width / source_width)
    resized_height = max(height, round(source_height * scale))
    resized_width = max(width, round(source_width * scale))
    return Crop(
        source_height=source_height,
        source_width=source_width,
        resized_height=resized_height,
        resized_width=resized_width,
        top=(resized_height - height) // 2,
        left=(resized_width - width) // 2,
        height=height,
        width=width,
    )


def bucket_sizes(*, area: int, step: int) -> list[tuple[int, int]]:
    """All (height, width) of about `area` pixels, in multiples of `step`, with aspects from 1:4 to 4:1.

    The width runs over all multiples of `step` between half and twice the square root of the area; the height is what
    the area leaves, rounded down.
    """
    side = math.sqrt(area)
    first, last = math.ceil(side / 2 / step), math.floor(2 * side / step)
    sizes = ((area // (width * step) // step * step, width * step) for width in range(max(1, first), last + 1))
    return [(height, width) for height, width in sizes if height > 0]


def bucket_size(
    *, source_height: int, source_width: int, area: int, step: int, no_upscale: bool = False
) -> tuple[int, int] | None:
    """The bucket for a source: the one whose aspect is nearest, and of equals the largest.

    Args:
        source_height: pixels of the source frame; source_width likewise.
        area: pixels wanted.
        step: what height and width must be multiples of.
        no_upscale: never enlarge a frame. Only buckets inside the source are then taken; where there is none, the
            source's own size (reduced to `area` if it is larger), rounded down to `step`.

    Returns:
        (height, width), or None where nothing fits: an area or a source smaller than one step.
    """
    sizes = bucket_sizes(area=area, step=step)
    if no_upscale:
        sizes = [(height, width) for height, width in sizes if height <= source_height and width <= source_width]
        if not sizes:
            scale = min(1.0, math.sqrt(area / (source_height * source_width)))
            height, width = (int(size * scale) // step * step for size in (source_height, source_width))
            return (height, width) if height and width else None
    if not sizes:
        return None
    aspect = math.log(source_width / source_height)
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0]) - aspect), -size[0] * size[1]))
