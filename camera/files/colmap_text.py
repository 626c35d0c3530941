"""COLMAP's text files: cameras.txt, images.txt, points3D.txt.

cameras.txt   CAMERA_ID MODEL WIDTH HEIGHT PARAMS...
images.txt    IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, and a second line X Y POINT3D_ID ..., which may be blank
points3D.txt  POINT3D_ID X Y Z R G B ERROR IMAGE_ID POINT2D_IDX ...
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from camera.files.colmap_model import Camera, Image, Model
from camera.files.number_lines import Line, number_text, read_lines
from camera.files.path_notes import PathNotes, comment_lines, comment_notes


def read_text_model(folder: Path) -> Model:
    """The model in a folder. points3D.txt may be missing.

    Raises:
        InputError: names the file and the line.
    """
    cameras: dict[int, Camera] = {}
    for line in _content(folder / "cameras.txt"):
        words = line.text.split()
        if len(words) < 5:
            raise line.error(f"expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS..., found {len(words)} words")
        number = _whole(line, words[0], "CAMERA_ID")
        if number in cameras:
            raise line.error(f"expected every camera once, found camera {number} again")
        width, height = (_whole(line, word, name) for word, name in ((words[2], "WIDTH"), (words[3], "HEIGHT")))
        cameras[number] = Camera(words[1], width, height, tuple(_number(line, word) for word in words[4:]))
    points: dict[int, tuple[float, float, float]] = {}
    if (folder / "points3D.txt").is_file():
        for line in _content(folder / "points3D.txt"):
            words = line.text.split()
            if len(words) < 8:
                raise line.error(f"expected POINT3D_ID X Y Z R G B ERROR TRACK..., found {len(words)} words")
            x, y, z = (_number(line, word) for word in words[1:4])
            points[_whole(line, words[0], "POINT3D_ID")] = (x, y, z)
    return Model(cameras, _read_images(folder / "images.txt"), points)


def text_notes(folder: Path) -> PathNotes:
    """What comments in images.txt say of the path; nothing where the model has no such file.

    Raises:
        InputError: names the line.
    """
    file = folder / "images.txt"
    return comment_notes(read_lines(file)) if file.is_file() else PathNotes()


def write_text_model(model: Model, notes: PathNotes, folder: Path) -> None:
    """Write the three files into a folder, with 15 digits; comments in images.txt keep the notes."""
    cameras = ["# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]"]
    for number, camera in model.cameras.items():
        parameters = " ".join(map(number_text, camera.parameters))
        cameras.append(f"{number} {camera.model} {camera.width} {camera.height} {parameters}")
    images = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of POINTS2D[]", *comment_lines(notes)]
    for number, image in enumerate(model.images, start=1):
        pose = " ".join(map(number_text, (*image.quaternion, *image.translation)))
        images += [f"{number} {pose} {image.camera} {image.name}", ""]
    points = ["# POINT3D_ID X Y Z R G B ERROR TRACK[] as (IMAGE_ID, POINT2D_IDX)"]
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_images(file: Path) -> list[Image]:
    images = []
    lines = iter([line for line in read_lines(file) if not line.text.lstrip().startswith("#")])
    for line in lines:
        if not line.text.strip():
            continue
        words = line.text.split(maxsplit=9)
        if len(words) != 10:
            raise line.error(
                f"expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, found {len(words)} words; after each such "
                "line stands one of its points, which may be blank"
            )
        numbers = tuple(_number(line, word) for word in words[1:8])
        second = next(lines, None)
        found = [] if second is None else second.text.split()
        if second is not None and len(found) % 3:
            raise second.error(
                f"expected the points of the image before as triples X Y POINT3D_ID, found {len(found)} words"
            )
        points = np.array(
            [_whole(second, word, "POINT3D_ID") for word in found[2::3]] if second else [], dtype=np.int64
        )
        _whole(line, words[0], "IMAGE_ID")
        place, camera = f"{line.file} line {line.number}", _whole(line, words[8], "CAMERA_ID")
        images.append(Image(place, words[9].strip(), camera, numbers[:4], numbers[4:], points))
    return images


def _content(file: Path) -> list[Line]:
    return [line for line in read_lines(file) if line.text.strip() and not line.text.lstrip().startswith("#")]


def _whole(line: Line, word: str, what: str) -> int:
    digits = word.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 19):
        raise line.error(f"expected {what}, a whole number, found {word!r:.40}")
    return int(word)


def _number(line: Line, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise line.error(f"expected a finite number, found {word!r:.40}")
    return number
