"""Which frames of a video become clips: sampling at another frame rate, then windows of a fixed number of frames.

Everything here is arithmetic on frame numbers in presentation order; no video is opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

Extraction = Literal["head", "chunk", "slide", "uniform", "full"]
EXTRACTIONS: tuple[str, ...] = get_args(Extraction)

SAME_RATE_TOLERANCE = 0.02  # 29.97 and 30 frames per second are one rate; 24 and 25 are two


def fit_length(num_frames: int, temporal_stride: int) -> int:
    """The largest length n * temporal_stride + 1 that is at most num_frames: what the VAE can encode (49, not 50)."""
    return (num_frames - 1) // temporal_stride * temporal_stride + 1


def same_rate(source_fps: float, target_fps: float) -> bool:
    """Whether two frame rates differ so little that no frame is dropped or repeated for it."""
    return abs(target_fps / source_fps - 1) < SAME_RATE_TOLERANCE


def resample(num_frames: int, *, source_fps: float, target_fps: float) -> list[int]:
    """The frames shown at the ticks of a slower clock: for each time k / target_fps the nearest source frame.

    Args:
        num_frames: of the source.
        source_fps: frames per second of the source.
        target_fps: frames per second wanted, at most source_fps (or the same rate within 2 %: then all frames).

    Returns:
        Strictly increasing frame numbers; none is further than half a source frame from its tick.
    """
    if same_rate(source_fps, target_fps):
        return list(range(num_frames))
    if target_fps > source_fps:
        raise ValueError(f"{target_fps} frames per second cannot be sampled from {source_fps} without repeating frames")
    frames_per_tick = source_fps / target_fps
    indices: list[int] = []
    while (index := math.floor(len(indices) * frames_per_tick + 0.5)) < num_frames:
        indices.append(index)
    return indices


def resample_times(times: Sequence[float], *, target_fps: float) -> list[int]:
    """The frames of an uneven clock shown at the ticks of an even one: for each time k / target_fps the nearest.

    Args:
        times: when each source frame is shown, seconds after the first, increasing.
        target_fps: frames per second wanted.

    Returns:
        Strictly increasing frame numbers, as far as the last frame.

    Raises:
        ValueError: one frame is the nearest of two ticks, as no other came for longer than a tick; (time, seconds)
            of the gap.
    """
    indices: list[int] = []
    nearest = 0
    while (tick := len(indices) / target_fps) <= times[-1] + 0.5 / target_fps:
        while nearest + 1 < len(times) and abs(times[nearest + 1] - tick) <= abs(times[nearest] - tick):
            nearest += 1
        if indices and indices[-1] == nearest:
            if nearest + 1 == len(times):
                break
            raise ValueError(times[nearest], times[nearest + 1] - times[nearest])
        indices.append(nearest)
    return indices


def windows(
    num_frames: int, *, lengths: Sequence[int], extraction: Extraction, stride: int = 1, samples: int = 1
) -> list[range]:
    """The windows that one video gives.

    Args:
        num_frames: of the video, after `resample`.
        lengths: frames of a window; each length is cut on its own, and one longer than the video gives no window.
            For "full", the longest window that may be cut.
        extraction: "head": the first frames; "chunk": one window after another, the rest is left; "slide": a window
            every `stride` frames; "uniform": `samples` windows spread evenly from the first to the last frame;
            "full": one window from the first frame, as long as `lengths` and the video allow.
        stride: frames between the starts of windows, for "slide".
        samples: number of windows, for "uniform"; windows that would coincide in a short video are cut once.

    Returns:
        Ranges of positions below num_frames, no two alike.
    """
    found: list[range] = []
    for length in lengths:
        last_start = num_frames - length
        if extraction == "full":
            starts = [0]
            length = min(length, num_frames)
        elif last_start < 0:
            starts = []
        elif extraction == "head":
            starts = [0]
        elif extraction == "chunk":
            starts = list(range(0, last_start + 1, length))
        elif extraction == "slide":
            starts = list(range(0, last_start + 1, stride))
        else:
            samples = min(samples, last_start + 1)  # that many are all there are
            starts = [round(last_start * sample / max(1, samples - 1)) for sample in range(samples)]
        found += [range(start, start + length) for start in starts]
    return list(dict.fromkeys(found))
