"""Which of several candidate videos is nearest to a generated one: a check of camera control that estimates no camera.

Render the asked path and N - 1 other paths in the same scene; where the generated video is nearest to the rendering of
the asked one, it followed it better than any other. A model that does not hear the camera is right in 1 of N videos.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squared_errors(frames: Tensor, candidates: Tensor) -> Tensor:
    """Mean squared error of each candidate, in squared levels of 0 to 255.

    Args:
        frames: uint8 [T, H, W, 3]
        candidates: uint8 [N, T, H, W, 3]

    Returns:
        float64. [N]
    """
    if candidates.shape[1:] != frames.shape or len(candidates) == 0:
        raise ValueError(f"expected candidates of {[*frames.shape]} each, found {[*candidates.shape]}")
    video = frames.float()
    return torch.stack([(candidate.float() - video).square().mean().double() for candidate in candidates])


def closest(frames: Tensor, candidates: Tensor) -> int:
    """The number of the candidate with the least squared error; the first of equals.

    Args:
        frames: uint8 [T, H, W, 3]
        candidates: uint8 [N, T, H, W, 3]
    """
    return int(squared_errors(frames, candidates).argmin())
