"""Which of a mixture's two experts is responsible for which noise.

The high-noise expert takes the timesteps from the boundary up, the low-noise expert those below it. A model without a
boundary has one expert, called "low", for all of them.
Source: Wan-Video/Wan2.2 `wan/text2video.py` (`_prepare_model_for_timestep`).
"""

from __future__ import annotations

from wan_ext.configs import Expert, WanVariant


def expert_interval(variant: WanVariant, expert: Expert) -> tuple[float, float]:
    """The sigmas [low, high) that an expert is trained on; the upper end 1 is included.

    Raises:
        ValueError: the variant has no such expert.
    """
    if expert not in variant.experts:
        raise ValueError(f"{variant.name} has the experts {variant.experts}, not {expert!r}")
    if variant.boundary is None:
        return 0.0, 1.0
    return (variant.boundary, 1.0) if expert == "high" else (0.0, variant.boundary)


def expert_at(variant: WanVariant, timestep: float) -> Expert:
    """The expert that predicts the velocity at a timestep (1000 * sigma) while sampling."""
    return "high" if variant.boundary is not None and timestep >= variant.boundary * 1000 else "low"
