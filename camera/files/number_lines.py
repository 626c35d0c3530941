"""Text files of numbers, one row a line: decoding, comments, separators, and errors that name the file and the line."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Line:
    """One line of a text file.

    Args:
        file: where it stands.
        number: counted from 1.
        text: without the line break, with its comment.
    """

    file: Path
    number: int
    text: str

    def error(self, expected_found_advice: str) -> InputError:
        """An InputError that starts with this line's place."""
        return InputError(f"{self.file} line {self.number}: {expected_found_advice}")

    def fields(self) -> list[str]:
        """The row's fields, without a comment that follows `#`.

        Spaces and tabs separate fields, or commas do, never both in one line: "1,5 2,5" may mean two numbers or four.

        Raises:
            InputError: separators are mixed, or nothing stands between two commas.
        """
        content = self.text.partition("#")[0].strip()
        if "," not in content:
            return content.split()
        fields = [field.strip() for field in content.split(",")]
        for field in fields:
            if not field:
                raise self.error("expected a number on both sides of every comma, found nothing; take the comma out")
            if len(field.split()) > 1:
                raise self.error(
                    f"expected commas or spaces between numbers, found both around {field!r}; use one of them, and a "
                    "point as the decimal sign"
                )
        return fields

    def numbers(self, expected_count: int, layout: str) -> list[float]:
        """The row as finite numbers.

        Args:
            expected_count: of the format.
            layout: what they are, for the error.

        Raises:
            InputError: another count, text, or a number that is not finite.
        """
        fields = self.fields()
        for column, field in enumerate(fields, start=1):
            if _NOT_FINITE.fullmatch(field) or (_NUMBER.fullmatch(field) and not math.isfinite(float(field))):
                raise self.error(f"expected finite numbers, found {field!r} in column {column}; mend that frame")
            if not _NUMBER.fullmatch(field):
                raise self.error(f"expected numbers, found {field!r} in column {column}; comments start with #")
        if len(fields) != expected_count:
            raise self.error(f"expected {expected_count} numbers ({layout}), found {len(fields)}")
        return [float(field) for field in fields]


def is_number(field: str) -> bool:
    """Whether a field is meant as a number, "nan" and "inf" included."""
    return bool(_NUMBER.fullmatch(field) or _NOT_FINITE.fullmatch(field))


def read_lines(file: Path) -> list[Line]:
    """The lines of a text file, blank ones and comments included.

    UTF-8 with or without a byte-order mark, or UTF-16 with one; any kind of line break.

    Raises:
        InputError: the file is missing or not text.
    """
    if not file.is_file():
        raise InputError(f"{file}: expected a camera file, found {'a folder' if file.is_dir() else 'nothing'}")
    data = file.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{file} line {line}: expected text in UTF-8, found byte 0x{data[error.start]:02x}; save it as plain text"
        ) from None
    return [Line(file, number, text) for number, text in enumerate(re.split(r"\r\n|\r|\n", text), start=1)]


def content_lines(lines: list[Line]) -> list[Line]:
    """The lines that are neither blank nor only a comment."""
    return [line for line in lines if line.text.partition("#")[0].strip()]


def number_text(number: float) -> str:
    """A number as it is written to a camera file: 15 digits, the most that survive a float64 as they are; no "-0"."""
    return f"{number + 0.0:.15g}"


def read_rows(
    lines: list[Line], expected_count: int, layout: str, check: Callable[[Line, list[float]], None]
) -> list[list[float]]:
    """The numbers of every line.

    Args:
        lines: with content.
        expected_count: numbers a line.
        layout: what they are, for errors.
        check: raises InputError where a row's numbers make no camera.

    Raises:
        InputError: names the file and the line.
    """
    rows = []
    for line in lines:
        row = line.numbers(expected_count, layout)
        check(line, row)
        rows.append(row)
    return rows


def no_rows(file: Path) -> InputError:
    """The error of a camera file without any camera."""
    return InputError(f"{file}: expected a row of numbers for every frame, found none; write the cameras again")
