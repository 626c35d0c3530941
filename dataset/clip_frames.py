"""The frames of clips as they are encoded: decoded, resized and cropped, several clips of one video in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from core.errors import InputError
from dataset.buckets import Crop
from dataset.clips import Clip
from dataset.video import decode, resize_frame


def read_clip(clip: Clip) -> tuple[Tensor, Crop]:
    """The frames of a clip at the size it is trained at.

    Args:
        clip: from `list_clips`.

    Returns:
        frames uint8 [T, H, W, 3] in RGB, and the resize and crop that were applied to every one.

    Raises:
        InputError: the source cannot be decoded, or its frames are not of the size found when the clip was listed.
    """
    ((_, frames),) = read_clips([clip])
    return frames, clip.crop


def read_clips(
    clips: Sequence[Clip], resize: Callable[[np.ndarray, Crop], np.ndarray] | None = None
) -> Iterator[tuple[Clip, Tensor]]:
    """The frames of several clips of one source, decoded in one pass.

    Memory holds the clips that are begun and not yet complete; frames that they share are held once.

    Args:
        clips: of one source and one crop.
        resize: brings a frame to its size; None: `resize_frame`.

    Yields:
        Each clip when its last frame is decoded, with its frames, uint8 [T, H, W, 3] in RGB.

    Raises:
        InputError: as `read_clip`.
    """
    source, crop = clips[0].source, clips[0].crop
    if any(clip.source != source or clip.crop != crop for clip in clips):
        raise ValueError("read_clips: expected clips of one source and one crop")
    users: dict[int, list[int]] = {}
    for place, clip in enumerate(clips):
        for index in clip.frame_indices:
            users.setdefault(index, []).append(place)
    begun: dict[int, list[np.ndarray]] = {}
    wanted = sorted(users)
    for index, frame in zip(wanted, decode(source, wanted), strict=True):
        if frame.shape[:2] != (crop.source_height, crop.source_width):
            raise InputError(
                f"{source}: expected {crop.source_width}x{crop.source_height} pixels in every frame, found "
                f"{frame.shape[1]}x{frame.shape[0]} in frame {index}; make all frames one size"
            )
        small = (resize or resize_frame)(frame, crop)
        for place in users[index]:
            frames = begun.setdefault(place, [])
            frames.append(small)
            if len(frames) == clips[place].num_frames:
                yield clips[place], _stacked(begun.pop(place))  # [T, H, W, 3]


def _stacked(frames: list[np.ndarray]) -> Tensor:
    """Frames in one tensor, each let go when it is copied: one clip in memory, not two."""
    clip = np.empty((len(frames), *frames[0].shape), dtype=np.uint8)
    for place in reversed(range(len(frames))):
        clip[place] = frames.pop()
    return torch.from_numpy(clip)
