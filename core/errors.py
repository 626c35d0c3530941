"""The one error that a person who runs a command can cause, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn


class InputError(ValueError):
    """A file, key, flag or value that the user gave is wrong.

    The message is one line for the person who can fix it: what was expected, what was found, in which file, line or
    key, and what to do. Commands print that line and exit with code 2; every other exception is a defect of ours and
    keeps its traceback.
    """


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
