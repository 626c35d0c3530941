"""Steps whose gradient is no number: skipped, counted, named; ten in a row end the run.

A step is bad if the norm of its gradient is not finite. That norm is the same on every process, so they all skip
together. Weights, optimizer and average stay as they were; the count of steps goes on, and with it the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import listing

IN_A_ROW = 10


class BadSteps:
    """What has been skipped in a run."""

    def __init__(self) -> None:
        self.count = 0
        self._row: list[tuple[int, tuple[str, ...]]] = []

    def good(self) -> None:
        """A step was taken."""
        self._row.clear()

    def bad(self, step: int, *, expert: str, loss: float, grad_norm: float, clips: Sequence[str]) -> str:
        """Note a step that was skipped.

        Args:
            step: its number.
            expert: whose step it was.
            loss: its mean loss.
            grad_norm: inf or nan.
            clips: names of this process's clips in it.

        Returns:
            What to tell the user.
        """
        self.count += 1
        self._row.append((step, tuple(clips)))
        return (
            f"step {step}: skipped, the {expert}-noise gradient is {grad_norm} at loss {loss:g} (clips: "
            f"{listing(sorted(set(clips)), 8)}); {len(self._row)} in a row, {self.count} in all"
        )

    @property
    def too_many(self) -> str | None:
        """Why the run must end, with the clips that caused it; None: it need not."""
        if len(self._row) < IN_A_ROW:
            return None
        clips = sorted({clip for _, of_step in self._row for clip in of_step})
        return (
            f"steps {self._row[0][0]} to {self._row[-1][0]}: expected finite gradients, found none in {IN_A_ROW} steps "
            f"in a row (clips: {listing(clips, 40)}); lower --learning_rate, or look at those clips"
        )
