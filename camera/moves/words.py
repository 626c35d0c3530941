"""The words of camera moves: a text cut into words, numbers with units and marks, each knowing its place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from core.errors import InputError, nearest

ANGLE, DISTANCE, FACTOR, TIME = "angle", "distance", "factor", "time"
UNITS: dict[str, tuple[str, str, float]] = {
    **dict.fromkeys(("deg", "degree", "degrees", "°"), (ANGLE, "deg", 1.0)),
    **dict.fromkeys(("unit", "units", "m"), (DISTANCE, "units", 1.0)),
    "x": (FACTOR, "x", 1.0),
    **dict.fromkeys(("s", "sec", "second", "seconds"), (TIME, "s", 1.0)),
    "ms": (TIME, "s", 1e-3),
    **dict.fromkeys(("frame", "frames"), (TIME, "frames", 1.0)),
    "%": (TIME, "%", 1.0),
}
"""Unit as written -> quantity, unit as counted, factor."""
EXAMPLES = {ANGLE: "30deg", DISTANCE: "0.5", FACTOR: "2x", TIME: "2s, 30frames or 40%"}

_TOKEN = re.compile(
    r"(?P<preset>preset\s+[^;+\d]*?)(?=\s*(?:[;+\d]|$|\b(?:speed|for|with)\b))"
    r"|(?P<number>-?(?:\d+\.?\d*|\.\d+))(?:\s*(?P<unit>°|%|[a-z]+))?"
    r"|(?P<word>[a-z][a-z-]*)"
    r"|(?P<mark>[;+:,])",
    re.IGNORECASE,
)
_ARTICLE = {ANGLE: "an angle", DISTANCE: "a distance", FACTOR: "a factor", TIME: "a time"}
_EXCERPT = 60  # characters of a long text that a message shows


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What the meaning of a text depends on besides the text.

    Args:
        num_frames: T.
        fps: frames per second; None where no clock belongs to the clip.
        seed: of hand-held sway.
        first_focal: fx of the first frame over half the width.
    """

    num_frames: int
    fps: float | None
    seed: int
    first_focal: float

    @property
    def span(self) -> int:
        """The time from the first frame to the last, in frames."""
        return self.num_frames - 1

    def focal_of(self, fov_degrees: float) -> float:
        """The focal length of a horizontal angle of view, over that of the first frame."""
        if not 0 < fov_degrees < 180:
            raise InputError(f"expected an angle of view between 0 and 180 degrees, found {fov_degrees:g}")
        return 1 / math.tan(math.radians(fov_degrees) / 2) / self.first_focal

    def spoken(self, frames: float) -> str:
        """A time for a message: frames, and seconds where there is a clock."""
        return f"{frames:g} frames" + (f" ({frames / self.fps:.3g} s)" if self.fps else "")


@dataclass(frozen=True, kw_only=True)
class Token:
    """A piece of a text of moves.

    Args:
        kind: "word", "number", "mark", "preset" or "end".
        text: as written; words in small letters.
        at: index of its first character.
        value: of a number.
        unit: of a number, a key of `UNITS`, or None.
    """

    kind: str
    text: str
    at: int
    value: float = 0.0
    unit: str | None = None

    @property
    def quantity(self) -> str | None:
        """What a number measures; None where it has no unit."""
        return UNITS[self.unit][0] if self.unit is not None else None


class Words:
    """A text of moves, read from left to right.

    Raises:
        InputError: a character or a unit that no move has; the message names its place.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._cut())
        self._next = 0

    @property
    def next(self) -> Token:
        """The token that comes next, which stays where it is."""
        return self.tokens[self._next]

    @property
    def after_next(self) -> Token:
        """The token behind the next one."""
        return self.tokens[min(self._next + 1, len(self.tokens) - 1)]

    def take(self) -> Token:
        """The next token; the one behind it is next from now on."""
        token = self.next
        self._next = min(self._next + 1, len(self.tokens) - 1)
        return token

    def takes(self, *texts: str) -> bool:
        """Take the next token if it is one of these words or marks, and say whether it was."""
        found = self.next.kind in ("word", "mark") and self.next.text in texts
        if found:
            self.take()
        return found

    def number(self, quantity: str, after: Token, *, signed: bool = False, above_zero: bool = False) -> float:
        """Take the number behind a word.

        Args:
            quantity: what it measures; a number without a unit measures that too.
            after: the word.
            signed: the number may be negative.
            above_zero: the number may not be 0.
        """
        token = self.take()
        if token.kind != "number" or (token.unit is not None and token.quantity != quantity):
            raise self.wrong(token, f"{example(quantity)} after {after.text!r}")
        if (token.value < 0 and not signed) or (token.value == 0 and above_zero):
            raise self.wrong(token, f"a number {'above' if above_zero else 'from'} 0 after {after.text!r}")
        return token.value

    def time(self, clip: Clip) -> float:
        """Take a time, and give it in frames."""
        token = self.take()
        if token.kind != "number" or token.unit is None or token.quantity != TIME:
            raise self.wrong(token, example(TIME))
        if token.value < 0:
            raise self.wrong(token, "a time of 0 or more")
        _, unit, factor = UNITS[token.unit]
        if unit == "s" and clip.fps is None:
            raise self.wrong(token, "frames or %, because no frame rate (fps) is given")
        return token.value * factor * {"s": clip.fps or 0.0, "frames": 1.0, "%": clip.span / 100}[unit]

    def refuse_twice(self, token: Token, seen: bool) -> None:
        """Raise where a value was given before."""
        if seen:
            raise self.wrong(token, "each value once")

    def wrong(self, token: Token, expected: str, known: Iterable[str] = ()) -> InputError:
        """An error that names the place of a token in the text, and the known word that looks like it."""
        found = "the end" if token.kind == "end" else repr(token.text)
        return InputError(f"{self.place(token.at)}: expected {expected}, found {found}{nearest(token.text, known)}")

    def place(self, at: int) -> str:
        """Where a character stands, for a message."""
        start = max(0, min(at - _EXCERPT // 2, len(self.text) - _EXCERPT))
        shown = self.text[start : start + _EXCERPT]
        shown = ("..." if start else "") + shown + ("..." if start + _EXCERPT < len(self.text) else "")
        return f'camera moves "{shown}", character {at + 1}'

    def _cut(self) -> Iterable[Token]:
        at = 0
        while at < len(self.text):
            if self.text[at].isspace():
                at += 1
                continue
            match = _TOKEN.match(self.text, at)
            if match is None:
                token = Token(kind="mark", text=self.text[at], at=at)
                raise self.wrong(token, "a move, a number, or one of ; + : ,")
            if match["number"] is not None:
                token = self._number(match, at)
            else:
                kind = str(match.lastgroup)
                token = Token(kind=kind, text=match[0].lower() if kind == "word" else match[0], at=at)
            yield token
            at += len(token.text)
        yield Token(kind="end", text="", at=len(self.text))

    def _number(self, match: re.Match[str], at: int) -> Token:
        unit = match["unit"].lower() if match["unit"] else None
        end = match.end("number")
        if unit is not None and unit not in UNITS:
            if match.end("number") == match.start("unit"):  # "3q": a unit that is none; "3 q" is a number and a word
                wrong = Token(kind="word", text=match["unit"], at=match.start("unit"))
                raise self.wrong(wrong, "a unit (deg, m, x, s, frames, %)", UNITS)
            unit = None
        elif unit is not None:
            end = match.end()
        return Token(kind="number", text=self.text[at:end], at=at, value=float(match["number"]), unit=unit)


def example(quantity: str) -> str:
    """What a message says is expected: "an angle such as 30deg"."""
    return f"{_ARTICLE[quantity]} such as {EXAMPLES[quantity]}"
