"""Easing: how a move spreads over its time, from 0 at its start to 1 at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

Ease = Literal["linear", "ease-in", "ease-out", "ease-in-out"]

EASINGS: dict[Ease, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda u: u,
    "ease-in": lambda u: u**2,  # starts from rest
    "ease-out": lambda u: 1 - (1 - u) ** 2,  # comes to rest
    "ease-in-out": lambda u: u**2 * (3 - 2 * u),  # both; fastest in the middle, 1.5 times the mean speed
}


def eased(progress: np.ndarray, ease: Ease) -> np.ndarray:
    """The share of a move that is done.

    Args:
        progress: share of the move's time that is over, 0 to 1, [n].
        ease: a name of `EASINGS`.

    Returns:
        0 where progress is 0, 1 where it is 1, never falling in between, [n].
    """
    return EASINGS[ease](progress)
