"""Which tokens of which clips are computed together where a computation goes through them some at a time.

A span is all tokens of all clips, or consecutive tokens of one clip: either way its rows lie together in memory. Where
latent frames differ (in their modulation, in their camera), a span holds whole frames, or a part of one.

Shapes: B clips, F latent frames, L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

EVERYTHING = slice(None)


class Span(NamedTuple):
    """Some tokens."""

    clips: slice = EVERYTHING
    tokens: slice = EVERYTHING
    frames: slice = EVERYTHING
    """The latent frames in which the tokens lie."""
    first_row: int = 0
    """The place of the first token among all tokens of all clips."""

    @property
    def is_everything(self) -> bool:
        return self.clips == self.tokens == EVERYTHING

    def of(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> a view of the span's tokens."""
        return x if self.is_everything else x[self.clips, self.tokens]

    def of_frames(self, x: Tensor) -> Tensor:
        """[1|B, 1|F, ...] -> a view of the span's clips and frames, with those axes of length 1 as they are."""
        x = x if x.shape[0] == 1 else x[self.clips]
        return x if x.shape[1] == 1 else x[:, self.frames]

    def put(self, target: Tensor | None, value: Tensor, like: Tensor) -> Tensor:
        """Put a result of the span's tokens into a tensor for all, which is made like another the first time."""
        if self.is_everything:
            return value
        if target is None:
            target = value.new_empty(*like.shape[:2], *value.shape[2:])
        self.of(target).copy_(value)
        return target


def token_spans(batch: int, tokens: int, *, frames: int = 1, limit: int | None = None) -> list[Span]:
    """All tokens in spans of at most a number of them.

    Args:
        batch: B.
        tokens: L.
        frames: F where frames differ, else 1.
        limit: tokens of a span at most; None: everything at once.

    Returns:
        In the order of the tokens.
    """
    if limit is None or limit >= batch * tokens:
        return [Span()]
    of_frame = tokens // frames
    if limit >= of_frame and frames > 1:  # whole frames
        step = limit // of_frame
        pieces = [
            (a * of_frame, min(a + step, frames) * of_frame, a, min(a + step, frames)) for a in range(0, frames, step)
        ]
    else:  # parts of a frame
        pieces = [
            (frame * of_frame + a, frame * of_frame + min(a + limit, of_frame), frame, frame + 1)
            for frame in range(frames)
            for a in range(0, of_frame, limit)
        ]
    return [
        Span(
            clips=slice(clip, clip + 1),
            tokens=slice(start, end),
            frames=slice(first, last),
            first_row=clip * tokens + start,
        )
        for clip in range(batch)
        for start, end, first, last in pieces
    ]
