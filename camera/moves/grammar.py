"""The moves that a text can name: their words, what their numbers measure, and what they become on the rig."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from camera.moves.easing import Ease
from camera.moves.rig import (
    Arc,
    Dolly,
    DollyZoom,
    HandHeld,
    Hold,
    Move,
    Orbit,
    OrbitUp,
    Pan,
    Pedestal,
    Roll,
    Spiral,
    Tilt,
    Truck,
    Zoom,
)
from camera.moves.words import ANGLE, DISTANCE, FACTOR, Clip
from core.errors import InputError

SUBJECT_DISTANCE = 1.0  # of what stands in front of the first camera, where a text does not say
SWAY_DEGREES, SWAY_DISTANCE = 0.5, 0.01  # of a camera in calm hands, where a text does not say

Signs = Mapping[str, int]
LEFT_RIGHT: Signs = {"left": -1, "right": 1}
DOWN_UP: Signs = {"down": -1, "up": 1}
OUT_IN: Signs = {"out": -1, "in": 1}
TURNS: Signs = {"cw": 1, "clockwise": 1, "ccw": -1, "anticlockwise": -1, "counterclockwise": -1}


Values = Mapping[str, float]
Build = Callable[[Values, Ease, Clip], list[Move]]


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """The words of one move.

    Args:
        amounts: slot -> what its number measures.
        build: the moves from the values of the slots; an InputError of it is about the values.
        bare: slots that a number without a word may go to, the first that measures its unit and has no value yet.
        directions: slot -> (word -> sign); the number behind such a word goes to that slot.
        keywords: word -> slot of a number that must be above 0.
        required: slots that must have a value.
    """

    amounts: Mapping[str, str]
    build: Build
    bare: tuple[str, ...] = ()
    directions: Mapping[str, Signs] = field(default_factory=dict)
    keywords: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()

    def direction(self, word: str) -> tuple[str, int] | None:
        """The slot and the sign of a direction word; None where the move has no such direction."""
        found = [(slot, signs[word]) for slot, signs in self.directions.items() if word in signs]
        return found[0] if found else None

    def words(self) -> list[str]:
        """Every word that may follow the name."""
        return [*(word for signs in self.directions.values() for word in signs), *self.keywords]


def _hold(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    return [Hold()]


def _pan(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    return [Pan(degrees=values["angle"], ease=ease)]


def _tilt(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    return [Tilt(degrees=values["angle"], ease=ease)]


def _roll(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    return [Roll(degrees=values["angle"], ease=ease)]


def _truck(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    return [Truck(distance=values["distance"], ease=ease)]


def _pedestal(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    return [Pedestal(distance=values["distance"], ease=ease)]


def _dolly(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    return [Dolly(distance=values["distance"], ease=ease)]


def _orbit(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    radius = values.get("radius", SUBJECT_DISTANCE)
    found: list[Move] = []
    if "angle" in values:
        found.append(Orbit(degrees=values["angle"], radius=radius, ease=ease))
    if "rise" in values:
        found.append(OrbitUp(degrees=values["rise"], radius=radius, ease=ease))
    if not found:
        raise InputError("expected an angle such as 'right 90deg' or 'up 30deg', found none")
    return found


def _arc(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    radius, closer = values.get("radius", SUBJECT_DISTANCE), values.get("closer", 0.0)
    _not_reached(closer, radius, "radius")
    higher = values.get("higher", 0.0)
    return [Arc(degrees=values["angle"], radius=radius, closer=closer, higher=higher, ease=ease)]


def _spiral(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    subject, closer = values.get("subject", SUBJECT_DISTANCE), values.get("closer", 0.0)
    _not_reached(closer, subject, "at")
    return [Spiral(degrees=values["angle"], radius=values["radius"], subject=subject, closer=closer, ease=ease)]


def _zoom(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    if ("factor" in values) == ("to" in values):
        raise InputError("expected either a factor such as 'in 2x', or 'to 30deg'")
    if "to" in values:
        return [Zoom(to_focal=clip.focal_of(values["to"]), ease=ease)]
    factor = values["factor"]
    if abs(factor) < 1:
        raise InputError(f"expected a factor of 1 or more, in or out, found {abs(factor):g}")
    return [Zoom(factor=factor if factor > 0 else -1 / factor, ease=ease)]


def _dolly_zoom(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    subject = values.get("subject", SUBJECT_DISTANCE)
    _not_reached(values["distance"], subject, "at")
    return [DollyZoom(distance=values["distance"], subject=subject, ease=ease)]


def _handheld(values: Values, ease: Ease, clip: Clip) -> list[Move]:
    degrees, distance = values.get("angle", SWAY_DEGREES), values.get("distance", SWAY_DISTANCE)
    if degrees < 0 or distance < 0:
        raise InputError(f"expected a sway of 0 or more, found {degrees:g}deg {distance:g}")
    if clip.fps is None:
        raise InputError("expected a frame rate (fps), because hands sway in seconds; found none")
    return [HandHeld(degrees=degrees, distance=distance, seed=clip.seed, fps=clip.fps)]


def _not_reached(closer: float, distance: float, word: str) -> None:
    if closer >= distance:
        raise InputError(f"the camera reaches its subject: {closer:g} in, of {distance:g}; say a larger '{word}'")


def _one(quantity: str, signs: Signs, build: Build) -> Grammar:
    """The grammar of a move with one number, whose sign a word may give."""
    return Grammar(
        amounts={quantity: quantity}, bare=(quantity,), directions={quantity: signs}, required=(quantity,), build=build
    )


MOVES: dict[str, Grammar] = {
    "hold": Grammar(amounts={}, build=_hold),
    "pan": _one(ANGLE, LEFT_RIGHT, _pan),
    "tilt": _one(ANGLE, DOWN_UP, _tilt),
    "roll": _one(ANGLE, TURNS, _roll),
    "truck": _one(DISTANCE, LEFT_RIGHT, _truck),
    "pedestal": _one(DISTANCE, DOWN_UP, _pedestal),
    "dolly": _one(DISTANCE, OUT_IN, _dolly),
    "orbit": Grammar(
        amounts={"angle": ANGLE, "rise": ANGLE, "radius": DISTANCE},
        bare=("angle",),
        directions={"angle": LEFT_RIGHT, "rise": DOWN_UP},
        keywords={"radius": "radius"},
        build=_orbit,
    ),
    "arc": Grammar(
        amounts={"angle": ANGLE, "closer": DISTANCE, "higher": DISTANCE, "radius": DISTANCE},
        bare=("angle",),
        directions={"angle": LEFT_RIGHT, "closer": OUT_IN, "higher": DOWN_UP},
        keywords={"radius": "radius"},
        required=("angle",),
        build=_arc,
    ),
    "spiral": Grammar(
        amounts={"angle": ANGLE, "closer": DISTANCE, "radius": DISTANCE, "subject": DISTANCE},
        bare=("angle",),
        directions={"angle": TURNS, "closer": OUT_IN},
        keywords={"radius": "radius", "at": "subject"},
        required=("angle", "radius"),
        build=_spiral,
    ),
    "zoom": Grammar(
        amounts={"factor": FACTOR, "to": ANGLE},
        bare=("factor",),
        directions={"factor": OUT_IN},
        keywords={"to": "to"},
        build=_zoom,
    ),
    "dolly zoom": Grammar(
        amounts={"distance": DISTANCE, "subject": DISTANCE},
        bare=("distance",),
        directions={"distance": OUT_IN},
        keywords={"at": "subject"},
        required=("distance",),
        build=_dolly_zoom,
    ),
    "handheld": Grammar(amounts={"angle": ANGLE, "distance": DISTANCE}, bare=("angle", "distance"), build=_handheld),
}
"""Name -> its words."""
