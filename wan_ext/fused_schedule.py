"""Which parts of a block exist at the same time: the choices that trade memory for time, and how heads are grouped."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InputError

FFN_TOKENS = 8192
"""Tokens for which the feed-forward's hidden values exist at one time at most: larger products are no faster."""
SHRINK = 7 / 8
"""Heads of a group over those of the group before it."""


@dataclass(frozen=True, kw_only=True)
class BlockSchedule:
    """Which parts of a block exist at the same time."""

    head_groups: int = 1
    """In how many groups of heads attention runs."""
    token_chunk: int | None = None
    """Tokens that cross-attention and the feed-forward take at a time; None: all (the feed-forward: 8,192)."""
    keep_attention: bool = False
    """Whether attention's output and log-sum-exp are kept for backward (2 L D + 4 L N bytes), which spares a forward of
    attention."""

    def __post_init__(self) -> None:
        if self.head_groups < 1:
            raise InputError(f"head_groups: expected 1 or more, found {self.head_groups}")
        if self.token_chunk is not None and self.token_chunk < 1:
            raise InputError(f"token_chunk: expected 1 or more tokens, or None, found {self.token_chunk}")


def head_slices(heads: int, groups: int) -> list[slice]:
    """Heads in groups, each about 7/8 of the one before it.

    Args:
        heads: N.
        groups: how many.

    Raises:
        InputError: more groups than heads.
    """
    if groups > heads:
        raise InputError(f"head_groups: expected at most {heads}, the heads of this model, found {groups}")
    total = (1 - SHRINK**groups) / (1 - SHRINK)
    ends = [0]
    for group in range(1, groups + 1):
        share = (1 - SHRINK**group) / (1 - SHRINK) / total
        ends.append(max(ends[-1] + 1, min(round(heads * share), heads - (groups - group))))
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
