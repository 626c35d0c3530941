"""What a run leaves behind: rows by section, written to disk after each; a clock; sections that may fail.

How: a `Records` is one JSON file. It is written after every row, atomically, so that a crash, or a clock that runs out,
costs the row that was under way. `section` notes its seconds and, where an exception ends it, the traceback; what comes
after goes on. `Clock.fits` says whether something of so many seconds still ends in time; what does not is noted.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.files import atomic_path

SPARE = 3.0
"""Seconds before the end in which nothing begins."""


class Clock:
    """Counts down to a moment of `time.time()`."""

    def __init__(self, until: float) -> None:
        self.until = until

    @property
    def left(self) -> float:
        return self.until - time.time() - SPARE

    def fits(self, seconds: float) -> bool:
        return seconds <= self.left


class Records:
    """Sections and their rows.

    Args:
        path: of the JSON file.
        clock: of the run.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self.clock = path, clock
        self.sections: dict[str, dict[str, Any]] = {}
        self.save()

    def save(self) -> None:
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps(self.sections, indent=1) + "\n")

    def add(self, section: str, row: dict[str, Any]) -> dict[str, Any]:
        """Note a row and write it to the disk."""
        self._of(section)["rows"].append(row)
        self.save()
        told = {key: value for key, value in row.items() if not isinstance(value, (dict, list))}
        print(f"{section}: " + ", ".join(f"{key} {_short(value)}" for key, value in told.items()), flush=True)
        return row

    def skip(self, section: str, what: str, seconds: float) -> None:
        """Note what the clock has no time for."""
        note = f"{what}: takes about {seconds:.0f} s, {max(0.0, self.clock.left):.0f} s were left"
        self._of(section)["skipped"].append(note)
        self.save()
        print(f"{section}: skipped {note}", flush=True)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Run the body as a part of a section; an exception is noted and goes no further."""
        found, started = self._of(name), time.time()
        try:
            yield
            status = "done"
        except Exception as error:
            found["errors"].append("".join(traceback.format_exception(error)))
            print(f"{name}: failed\n{found['errors'][-1]}", flush=True)
            traceback.clear_frames(error.__traceback__)  # which would keep tensors alive
            status = "failed"
        if found["status"] != "failed":
            found["status"] = status
        found["seconds"] += time.time() - started
        self.save()
        tidy()

    def _of(self, name: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"status": "begun", "seconds": 0.0, "rows": [], "skipped": [], "errors": []}
        return self.sections.setdefault(name, empty)


def tidy() -> None:
    """Give back what nothing refers to. Between measurements only: it waits for the device."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
