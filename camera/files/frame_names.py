"""Image names of a reconstruction, matched to the frames of a source or put into their order; what is missing is named.

Reconstructions leave out images that they cannot place. Without them every later pose would belong to another frame, so
a gap is an error: by the names of the source's frames where they are known, else by the numbers in the images' names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from core.errors import InputError, listing

_LAST_NUMBER = re.compile(r"(\d+)(?!.*\d)")


def frame_order(names: Sequence[str], wanted: Sequence[str] | None, *, file: Path) -> list[int]:
    """The positions of the images that are the source's frames, in its order.

    Args:
        names: of the images in the file, folders included.
        wanted: names of the source's frames, in order; None where they have none (a video).
        file: for errors.

    Returns:
        With `wanted`, one position for each of them. Else all positions, by name, numbers in it by their value.

    Raises:
        InputError: a frame without an image of its name, two images of one name, or a gap in the images' numbers.
    """
    if wanted is not None:
        return _matched(names, wanted, file)
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise InputError(f"{file}: expected one pose for each image, found two for {listing(twice)}")
    missing = _gaps(names)
    if missing:
        raise InputError(
            f"{file}: expected a pose for every frame, found none for {listing(missing)}; reconstruct again with these "
            "frames, or leave them out of the video"
        )
    return sorted(range(len(names)), key=lambda index: _natural(names[index]))


def _matched(names: Sequence[str], wanted: Sequence[str], file: Path) -> list[int]:
    """By the whole name, else without folders, else without folders and suffix: the first that all frames agree on."""
    for shorten in (lambda name: name, lambda name: PurePosixPath(name).name, lambda name: PurePosixPath(name).stem):
        positions: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            positions.setdefault(shorten(name), []).append(index)
        found = [positions.get(shorten(name), []) for name in wanted]
        if any(found) and max(map(len, found)) > 1:
            name = next(name for name, indices in zip(wanted, found, strict=True) if len(indices) > 1)
            both = listing(names[index] for index in found[wanted.index(name)])
            raise InputError(f"{file}: expected one image for the frame {name}, found {both}; name one as camera_name")
        if all(found):
            return [indices[0] for indices in found]
    missing = [name for name, indices in zip(wanted, found, strict=True) if not indices]
    raise InputError(
        f"{file}: expected a pose for every frame of the source, found none for {listing(missing)}; reconstruct again "
        "with these frames, or take them out of the folder"
    )


def _gaps(names: Sequence[str]) -> list[str]:
    """The names that lie between the smallest and the largest number at the images' own step, and are not there."""
    numbers: dict[int, str] = {}
    patterns = set()
    for name in names:
        digits = _LAST_NUMBER.search(PurePosixPath(name).stem)
        if digits is None or len(digits[1]) > 15:
            return []
        patterns.add(_LAST_NUMBER.sub("#", PurePosixPath(name).stem))
        numbers[int(digits[1])] = name
    if len(patterns) != 1 or len(numbers) < 3:
        return []  # not one numbered series; the number of poses is compared with the number of frames later
    found = sorted(numbers)
    step = min(after - before for before, after in zip(found, found[1:], strict=False))
    missing = []
    for before, after in zip(found, found[1:], strict=False):
        for number in range(before + step, min(after, before + step * 100), step):  # nobody reads more names
            width = len(_LAST_NUMBER.search(PurePosixPath(numbers[before]).stem)[1])  # type: ignore[index]
            stem = _LAST_NUMBER.sub(f"{number:0{width}d}", PurePosixPath(numbers[before]).stem)
            missing.append(stem + PurePosixPath(numbers[before]).suffix)
    return missing


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key in which frame 10 comes after frame 2."""
    return [(int(part), "") if part.isdecimal() and len(part) < 16 else (-1, part) for part in re.split(r"(\d+)", name)]
