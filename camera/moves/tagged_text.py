"""Camera moves in tagged captions, as OmniCam writes them: read with its rates, on the clock of the clip.

    Object: a red car ; Camera: <starttime>0</starttime> <endtime>2</endtime> <speed>high</speed>
    <direction>left</direction> <rotate>stay</rotate> <sep> <starttime>2</starttime> ... <sep>

The camera looks at a subject from about one unit away, five degrees above it, and moves on a sphere round it: left,
right, up and down are orbits; forward and backward change the distance. A segment moves between its times in seconds,
at the clip's frame rate, however long the clip is; time between segments is held. `rotate` may turn the camera about
its line of sight, which is our addition: "clockwise 30" or "anticlockwise 30", degrees over the segment.

Source: OmniCam-Wan. It cuts its 8 samples a second after the 25th, smooths them with a spline, drops segments that it
cannot read and ignores `rotate`; here nothing is cut, smoothed or dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from camera.moves.rig import Rig, turns
from camera.path import CameraPath, intrinsics_from_fov
from core.errors import InputError, nearest

AZIMUTH_PER_SECOND, ELEVATION_PER_SECOND, DISTANCE_PER_SECOND = (
    20.0,
    15.0,
    0.2,
)  # degrees, degrees, units; at speed high
SPEEDS = {"high": 1.0, "low": 0.5}
ANCHOR_FORWARD, ANCHOR_HEIGHT = 1.0029, 0.0877  # of the first camera from its subject: 1.0067 units, 5 degrees up
_FIELDS = ("starttime", "endtime", "speed", "direction", "rotate")
_TAG = re.compile(r"<\s*(/?)\s*([a-zA-Z_]+)\s*>")
_CAMERA = re.compile(r"[;\s]*\bCamera\s*:", re.IGNORECASE)
_OBJECT = re.compile(r"^\s*Object\s*:\s*", re.IGNORECASE)
_TRAJECTORY = re.compile(r"#trajectory\s*:\s*\{([^{}]*)\}")
_ROTATE = re.compile(r"(clockwise|anticlockwise)\s+(\d+(?:\.\d*)?|\.\d+)(?:\s*(?:deg|degrees|°))?", re.IGNORECASE)


def _directions() -> dict[str, tuple[float, float, float]]:
    """Direction -> per second: degrees to the right, degrees up, units nearer.

    The number of a diagonal is its angle from the vertical: leftup30 goes mostly up.
    """
    table = {
        "forward": (0.0, 0.0, DISTANCE_PER_SECOND),
        "backward": (0.0, 0.0, -DISTANCE_PER_SECOND),
        "left": (-AZIMUTH_PER_SECOND, 0.0, 0.0),
        "right": (AZIMUTH_PER_SECOND, 0.0, 0.0),
        "up": (0.0, ELEVATION_PER_SECOND, 0.0),
        "down": (0.0, -ELEVATION_PER_SECOND, 0.0),
    }
    for side in ("left", "right"):
        for height in ("up", "down"):
            for angle in (30, 45, 60):
                across, along = math.sin(math.radians(angle)), math.cos(math.radians(angle))
                table[f"{side}{height}{angle}"] = (across * table[side][0], along * table[height][1], 0.0)
    return table


DIRECTIONS = _directions()


@dataclass(frozen=True, kw_only=True)
class TaggedSegment:
    """One segment: from `start` to `end` seconds at rates per second (degrees right, degrees up, units nearer,
    degrees clockwise)."""

    start: float
    end: float
    rates: tuple[float, float, float, float]


def read_tagged(
    text: str,
    *,
    fps: float,
    height: int,
    width: int,
    num_frames: int | None = None,
    fov_degrees: float | None = None,
) -> CameraPath:
    """The camera path of a tagged text.

    Args:
        text: the whole caption, or its camera part.
        fps: frames per second of the clip.
        height: pixels of the frame.
        width: pixels of the frame.
        num_frames: T of the clip, which must have room for the last end time; None: as many as the text lasts.
        fov_degrees: horizontal angle of view; None: the reference's, a focal length of the longer side of the frame
            (53.13 degrees across a landscape frame).

    Returns:
        A path in pose frame "first".

    Raises:
        InputError: whatever is wrong with the text; the message names the segment.
    """
    if not 0 < fps < math.inf:
        raise InputError(f"tagged camera text: expected a frame rate above 0, found {fps}")
    if fov_degrees is not None and not 0 < fov_degrees < 180:
        raise InputError(f"tagged camera text: expected an angle of view of 0 to 180 degrees, found {fov_degrees:g}")
    segments = tagged_segments(text)
    last = segments[-1].end
    if num_frames is None:
        num_frames = math.ceil(last * fps - 1e-6) + 1
    elif last > num_frames / fps + 1e-6:
        raise InputError(
            f"tagged camera text, segment {len(segments)}: expected an end within the clip's {num_frames / fps:.3g} s "
            f"({num_frames} frames at {fps:g} fps), found {last:g} s"
        )
    states = _states(segments, np.arange(num_frames) / fps)
    if (states[:, 2] >= 1).any():
        raise InputError(
            f"tagged camera text: expected a camera that stays in front of its subject, which the forward moves reach "
            f"in frame {int((states[:, 2] >= 1).argmax())}"
        )
    focal_fov = math.degrees(2 * math.atan(width / (2 * max(height, width))))
    fov = torch.full((num_frames,), fov_degrees or focal_fov, dtype=torch.float64)
    K = intrinsics_from_fov(fov, height=height, width=width)
    path = CameraPath(c2w=_rig(states).c2w(), K=K, height=height, width=width, fps=fps)
    return path.relative_to_first()


def is_tagged(text: str) -> bool:
    """Whether a text has camera tags or names a trajectory file."""
    return any(match[2].lower() in _FIELDS for match in _TAG.finditer(text)) or "#trajectory" in text


def caption_of(text: str) -> str:
    """The part of a tagged text that describes what is seen: for the text encoder, without tags.

    A text without tags comes back as it is, but for white space at its ends.
    """
    if not is_tagged(text):
        return text.strip()
    found = _OBJECT.sub("", text)
    if "#trajectory" in found:
        found = re.split(r"[;\s]*\bCaption\s*:|#trajectory", found, maxsplit=1, flags=re.IGNORECASE)[0]
    else:
        found = found[: _camera_part(found)[0]]
    return found.strip(" ;\t\r\n")


def trajectory_file(text: str) -> Path | None:
    """The camera file that a text names as #trajectory:{file}; None where it names none.

    Raises:
        InputError: the name is missing, or there are several.
    """
    if "#trajectory" not in text:
        return None
    names = [name.strip() for name in _TRAJECTORY.findall(text)]
    if len(names) != 1 or text.count("#trajectory") != 1 or not names[0]:
        raise InputError(f"tagged camera text: expected one #trajectory:{{file}}, found {text.strip()[:60]!r}")
    return Path(names[0])


def tagged_segments(text: str) -> list[TaggedSegment]:
    """The segments of a tagged text, in the order of time.

    Raises:
        InputError: a field is missing, twice, or not what it should be; segments overlap or run backwards in time.
    """
    segments: list[TaggedSegment] = []
    for number, part in enumerate(_parts(text), 1):
        place = f"tagged camera text, segment {number}"
        segment = _segment(_fields(part, place), place)
        if segments and segment.start < segments[-1].end - 1e-9:
            raise InputError(
                f"{place}: expected a start at or after {segments[-1].end:g} s, the end of segment {number - 1}, found "
                f"{segment.start:g} s; segments may not overlap"
            )
        segments.append(segment)
    return segments


def _camera_part(text: str) -> tuple[int, int]:
    """Where the part before the camera ends, and where the segments begin: round the last "Camera:" before a tag."""
    tag = _TAG.search(text)
    first_tag = tag.start() if tag else len(text)
    words = [match for match in _CAMERA.finditer(text) if match.end() <= first_tag]
    return words[-1].span() if words else (first_tag, first_tag)


def _parts(text: str) -> list[str]:
    """The texts of the segments."""
    begins = _camera_part(text)[1]
    parts = re.split(r"<\s*sep\s*>", text[begins:], flags=re.IGNORECASE)
    if not parts[-1].strip():
        parts.pop()  # the text may end with <sep>
    if not parts:
        raise InputError(
            f"tagged camera text: expected segments of {' '.join(f'<{name}>' for name in _FIELDS)}, found "
            f"{text.strip()[:60]!r}"
        )
    return parts


def _fields(part: str, place: str) -> dict[str, str]:
    """Field -> value of one segment."""
    fields: dict[str, str] = {}
    at = 0
    while part[at:].strip():
        tag = _TAG.search(part, at)
        if tag is None or part[at : tag.start()].strip():
            raise InputError(f"{place}: expected a tag, found {part[at:].strip()[:40]!r}")
        name = tag[2].lower()
        if name not in _FIELDS:
            raise InputError(f"{place}: expected {_all_tags()}, found <{tag[1]}{tag[2]}>{nearest(name, _FIELDS)}")
        closing = _TAG.search(part, tag.end())
        if tag[1] or closing is None or closing[1] != "/" or closing[2].lower() != name:
            raise InputError(f"{place}: expected <{name}>...</{name}>, found {part[tag.start() :].strip()[:40]!r}")
        if name in fields:
            raise InputError(f"{place}: expected <{name}> once, found it twice; is a <sep> missing?")
        fields[name] = part[tag.end() : closing.start()].strip()
        at = closing.end()
    missing = [name for name in _FIELDS if name not in fields]
    if missing:
        raise InputError(f"{place}: expected {_all_tags()}, found no <{missing[0]}>")
    return fields


def _segment(fields: dict[str, str], place: str) -> TaggedSegment:
    start, end = _seconds(fields, "starttime", place), _seconds(fields, "endtime", place)
    if end <= start:
        raise InputError(f"{place}: expected an end after its start at {start:g} s, found {end:g} s")
    speed, direction = fields["speed"].lower(), fields["direction"].lower()
    if speed not in SPEEDS:
        raise InputError(f"{place}: expected the speed high or low, found {fields['speed']!r}{nearest(speed, SPEEDS)}")
    if direction not in DIRECTIONS:
        raise InputError(
            f"{place}: expected a direction ({', '.join(DIRECTIONS)}), found {fields['direction']!r}"
            f"{nearest(direction, DIRECTIONS)}"
        )
    right, up, nearer = (SPEEDS[speed] * rate for rate in DIRECTIONS[direction])
    roll = _roll(fields["rotate"], place) / (end - start)
    return TaggedSegment(start=start, end=end, rates=(right, up, nearer, roll))


def _seconds(fields: dict[str, str], name: str, place: str) -> float:
    try:
        value = float(fields[name])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"{place}: expected seconds of 0 or more in <{name}>, found {fields[name]!r}")
    return value


def _roll(text: str, place: str) -> float:
    """Degrees clockwise of a <rotate>."""
    if text.lower() == "stay":
        return 0.0
    match = _ROTATE.fullmatch(text)
    if match is None:
        known = ("stay", "clockwise", "anticlockwise")
        raise InputError(
            f"{place}: expected <rotate> stay, clockwise DEGREES or anticlockwise DEGREES, found {text!r}"
            f"{nearest(text.split()[0].lower() if text else '', known)}"
        )
    return float(match[2]) * (1 if match[1].lower() == "clockwise" else -1)


def _states(segments: Sequence[TaggedSegment], seconds: np.ndarray) -> np.ndarray:
    """Degrees right, degrees up, share of the way to the subject and degrees clockwise at each time, [T, 4]."""
    states = np.zeros((len(seconds), 4))
    for segment in segments:
        moving = np.clip(seconds - segment.start, 0, segment.end - segment.start)  # seconds of this segment so far
        states += moving[:, None] * np.array(segment.rates)
    return states


def _rig(states: np.ndarray) -> Rig:
    """Cameras round the subject at the origin, y up, z from the subject to the first camera; [T, 4] -> T cameras."""
    right, up, nearer, clockwise = states.T
    # Ry and Rx here turn the whole camera about the subject: x to the right, y up, z towards the first camera.
    around = turns("y", right) @ turns("x", -up)  # [T, 3, 3]
    centre = np.stack([0 * nearer, 0 * nearer + ANCHOR_HEIGHT, ANCHOR_FORWARD * (1 - nearer)], 1)  # [T, 3]
    tilt = math.atan2(ANCHOR_HEIGHT, ANCHOR_FORWARD)
    cosine, sine = math.cos(tilt), math.sin(tilt)
    # Columns: right, down and forward of the first camera.
    anchor = np.array([[1.0, 0.0, 0.0], [0.0, -cosine, -sine], [0.0, sine, -cosine]])
    return Rig(
        position=np.einsum("nij,nj->ni", around, centre),
        rotation=around @ anchor @ turns("z", clockwise),
        focal=np.ones(len(states)),
    )


def _all_tags() -> str:
    return ", ".join(f"<{name}>" for name in _FIELDS)
