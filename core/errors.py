"""The one error that a person who runs a command can cause, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

_LINE_BREAK = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # what str.splitlines splits at


class InputError(ValueError):
    """A file, key, flag or value that the user gave is wrong.

    The message is one line for the person who can fix it: what was expected, what was found, in which file, line or
    key, and what to do. Commands print that line and exit with code 2; every other exception is a defect of ours and
    keeps its traceback. A line break that a file's name or another program's words bring along is shown as its escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_LINE_BREAK.sub(lambda found: repr(found[0])[1:-1], message))


def fail(problem: InputError) -> NoReturn:
    """Raise a problem: what a function does by default with what it finds."""
    raise problem


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to append to a message: " (did you mean 'resolution'?)", or "" when nothing known looks like `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first `limit` names in order, and how many more there are: "a, b, c and 12 more"."""
    names = sorted(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
