"""Hand-held noise: slow random sway with a sharp upper frequency, the same for the same seed."""

from __future__ import annotations

import numpy as np

LOWEST_HZ, HIGHEST_HZ = 0.3, 3.0  # breathing and balance below, muscle tremor above
_HIGHEST_SHARE_OF_FPS = 0.4  # below 0.5, where a frame rate begins to mistake fast sway for slow
_NUM_WAVES = 12  # of each channel


def sway(seconds: np.ndarray, *, seed: int, fps: float, num_channels: int = 6) -> np.ndarray:
    """Independent channels of smooth noise with frequencies of 0.3 to 3 Hz, and none above 0.4 of the frame rate.

    Each channel is a sum of sine waves whose frequencies, one from each twelfth of the band, and phases are drawn from
    the seed; amplitudes fall as 1 / frequency. It is a function of continuous time: the same seed sways alike at every
    frame rate that has room for the band.

    Args:
        seconds: times, [n].
        seed: draws frequencies and phases.
        fps: frames per second at which the noise will be seen.
        num_channels: C.

    Returns:
        Values whose root mean square over a long time is 1, [n, C].
    """
    highest = min(HIGHEST_HZ, _HIGHEST_SHARE_OF_FPS * fps)
    lowest = min(LOWEST_HZ, 0.1 * highest)
    rng = np.random.default_rng([seed, num_channels])
    place = (np.arange(_NUM_WAVES) + rng.uniform(size=(num_channels, _NUM_WAVES))) / _NUM_WAVES
    frequency = lowest + (highest - lowest) * place  # [C, waves]
    amplitude = 1 / frequency
    amplitude *= np.sqrt(2 / (amplitude**2).sum(1, keepdims=True))  # a sine of amplitude a has the mean square a^2 / 2
    phase = rng.uniform(0, 2 * np.pi, frequency.shape)
    angle = 2 * np.pi * seconds[:, None, None] * frequency + phase  # [n, C, waves]
    return (amplitude * np.sin(angle)).sum(-1)
