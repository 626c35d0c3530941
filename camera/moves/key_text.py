"""Key frames as text: "at 0%: in 0; at 2s: right 0.5, pan left 20deg ease-in-out; at 100%: fov 30"."""

from __future__ import annotations

from dataclasses import replace

from camera.moves.easing import EASINGS
from camera.moves.grammar import DOWN_UP, LEFT_RIGHT, OUT_IN, TURNS, Signs
from camera.moves.key_frames import KeyFrame, follow_key_frames
from camera.moves.rig import Rig
from camera.moves.words import ANGLE, DISTANCE, Clip, Token, Words

_POSITIONS: dict[str, tuple[str, int]] = {
    **{word: ("right", sign) for word, sign in LEFT_RIGHT.items()},
    **{word: ("up", sign) for word, sign in DOWN_UP.items()},
    **{word: ("forward", sign) for word, sign in OUT_IN.items()},
}
_ANGLES: dict[str, Signs] = {"pan": LEFT_RIGHT, "tilt": DOWN_UP, "roll": TURNS}
_WORDS = (*_POSITIONS, *_ANGLES, "fov", *EASINGS)


def read_key_frames(words: Words, clip: Clip) -> Rig:
    """The cameras of the key frames that the words give, from the first "at" to the end or to "with".

    Every place is that of a camera whose path starts at the origin and looks along z; what a key frame does not name
    stays as in the one before.
    """
    keys = [KeyFrame(frame=0.0)]
    while words.next.kind != "end" and words.next.text != "with":
        start = words.take()
        if start.text != "at":
            raise words.wrong(start, "'at', because a text of key frames has no other moves", ["at"])
        time = words.next
        frame = words.time(clip)
        if frame > clip.span + 1e-6:
            raise words.wrong(time, f"a time within {clip.spoken(clip.span)}")
        if frame <= keys[-1].frame and not (frame == 0 and len(keys) == 1):
            raise words.wrong(time, "a time after that of the key frame before")
        if not words.takes(":"):
            raise words.wrong(words.next, "':' after the time of a key frame")
        key = _place(words, replace(keys[-1], frame=frame, ease="linear"), clip)
        keys = [*keys, key] if frame else [key]
        if not words.takes(";") and words.next.kind != "end" and words.next.text != "with":
            raise words.wrong(words.next, "';' between key frames")
    return follow_key_frames(keys, num_frames=clip.num_frames)


def _place(words: Words, key: KeyFrame, clip: Clip) -> KeyFrame:
    """A key frame: the one before it with the values that the words give."""
    values: dict[str, float] = {}
    while words.next.kind != "end" and words.next.text not in (";", "with"):
        token = words.take()
        if token.text == ",":
            continue
        if token.text in EASINGS:
            key = replace(key, ease=next(ease for ease in EASINGS if ease == token.text))
            continue
        if token.text not in _WORDS:
            raise words.wrong(token, f"one of {', '.join(_WORDS)}", _WORDS)
        name, value = _value(words, token, clip)
        words.refuse_twice(token, name in values)
        values[name] = value
    return KeyFrame(
        frame=key.frame,
        right=values.get("right", key.right),
        up=values.get("up", key.up),
        forward=values.get("forward", key.forward),
        pan=values.get("pan", key.pan),
        tilt=values.get("tilt", key.tilt),
        roll=values.get("roll", key.roll),
        focal=values.get("focal", key.focal),
        ease=key.ease,
    )


def _value(words: Words, token: Token, clip: Clip) -> tuple[str, float]:
    """The name of what a word places, and the value behind it."""
    if token.text in _POSITIONS:
        name, sign = _POSITIONS[token.text]
        return name, sign * words.number(DISTANCE, token)
    if token.text in _ANGLES:
        signs = _ANGLES[token.text]
        if words.next.text in signs:
            direction = words.take()
            return token.text, signs[direction.text] * words.number(ANGLE, direction)
        return token.text, words.number(ANGLE, token, signed=True)
    number = words.next
    degrees = words.number(ANGLE, token, above_zero=True)
    if degrees >= 180:
        raise words.wrong(number, "an angle of view below 180 degrees")
    return "focal", clip.focal_of(degrees)
