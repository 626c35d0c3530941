"""Camera moves as text: "orbit 90deg; dolly in 0.5 ease-out; hold 1s" becomes a camera path.

    text     = (chain or keys), then at will "with" and a hand-held sway of the whole clip
    chain    = segment ";" segment ...           one after another
    segment  = move "+" move ...                 at once
    move     = name, amounts and their words; a time such as 2s, 30frames or 40%; an easing
    keys     = "at" time ":" place ";" "at" time ":" place ...

camera/moves/grammar.py lists the names and their words, docs/cameras.md describes them. A segment takes the time that
it says; segments that say none share what is left; time that is left at the end is held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from camera.moves.easing import EASINGS, Ease
from camera.moves.grammar import MOVES, Grammar
from camera.moves.key_text import read_key_frames
from camera.moves.presets import Preset, find_preset, preset_intrinsics
from camera.moves.rig import Dolly, Move, Pedestal, Rig, Roll, Segment, Truck, follow
from camera.moves.words import FACTOR, TIME, Clip, Token, Words, example
from camera.path import CameraPath, intrinsics_from_fov
from core.errors import InputError

DEFAULT_FOV_DEGREES = 60.0
ALIASES = {"static": "hold", "hand-held": "handheld", "dolly-zoom": "dolly zoom"}
NAMES = (*MOVES, "preset", *ALIASES)
PRESET = Grammar(amounts={"speed": FACTOR}, keywords={"speed": "speed"}, build=MOVES["hold"].build)


def make_path(
    text: str,
    *,
    num_frames: int,
    height: int,
    width: int,
    fov_degrees: float | None = None,
    fps: float | None = None,
    seed: int = 0,
) -> CameraPath:
    """The camera path that a text of moves describes.

    Args:
        text: moves, such as "orbit 90deg; dolly in 0.5; hold 1s".
        num_frames: T; the first frame is the start of the text, the last one its end.
        height: pixels of the frame.
        width: pixels of the frame.
        fov_degrees: horizontal angle of view of the first frame; None: 60, or that of the presets in the text.
        fps: frames per second; a text that counts seconds or sways needs it.
        seed: of hand-held sway, 0 or more.

    Returns:
        A path in pose frame "first".

    Raises:
        InputError: whatever is wrong with the text; the message names the place and the nearest known word.
    """
    if num_frames < 1:
        raise InputError(f"camera moves: expected at least 1 frame, found {num_frames}")
    if fps is not None and not 0 < fps < np.inf:
        raise InputError(f"camera moves: expected a frame rate above 0, found {fps}")
    if seed < 0:
        raise InputError(f"camera moves: expected a seed of 0 or more, found {seed}")
    if fov_degrees is not None and not 0 < fov_degrees < 180:
        raise InputError(f"camera moves: expected an angle of view between 0 and 180 degrees, found {fov_degrees:g}")
    words = Words(text)
    K = _first_intrinsics(words, height=height, width=width, fov_degrees=fov_degrees)
    clip = Clip(num_frames=num_frames, fps=fps, seed=seed, first_focal=float(K[0, 0]) * 2 / width)
    if words.next.text == "at":
        rig = read_key_frames(words, clip)
    else:
        rig = follow(_chain(words, clip), num_frames=num_frames)
    if words.takes("with"):
        rig = _swaying(words, rig, clip)
    if words.next.kind != "end":
        raise words.wrong(words.next, "';', '+', 'with' or the end")
    every_K = K.repeat(num_frames, 1, 1)  # [T, 3, 3]
    every_K[:, [0, 1], [0, 1]] *= torch.from_numpy(rig.focal)[:, None]
    path = CameraPath(c2w=rig.c2w(), K=every_K, height=height, width=width, fps=fps)
    return path.relative_to_first()


def _first_intrinsics(words: Words, *, height: int, width: int, fov_degrees: float | None) -> Tensor:
    """K of the first frame: of the given angle of view, or of the presets in the text, or of 60 degrees, [3, 3]."""
    presets = [(token, _named_preset(words, token)) for token in words.tokens if token.kind == "preset"]
    if fov_degrees is None and presets:
        focal = presets[0][1].focal
        for token, preset in presets:
            if preset.focal != focal:
                raise words.wrong(token, "presets with one angle of view, or a given angle of view for them all")
        return preset_intrinsics(focal, height=height, width=width)
    degrees = torch.tensor(DEFAULT_FOV_DEGREES if fov_degrees is None else fov_degrees, dtype=torch.float64)
    return intrinsics_from_fov(degrees, height=height, width=width)


# ---- one after another, at once --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A move or a segment as read: moves, presets with their speeds, and the frames that they take, where they say."""

    moves: tuple[Move, ...] = ()
    presets: tuple[tuple[Preset, float], ...] = ()
    frames: float | None = None


def _chain(words: Words, clip: Clip) -> list[Segment]:
    """The segments up to the end or to "with", with their times."""
    read = [_segment(words, clip)]
    while words.takes(";"):
        if words.next.kind != "end" and words.next.text != "with":
            read.append(_segment(words, clip))
    said = sum(segment.frames for segment in read if segment.frames is not None)
    free = sum(segment.frames is None for segment in read)
    left = max(clip.span - said, 0.0)
    if said > clip.span + 1e-6 or (free and said and left < 1e-6):
        raise InputError(
            f"{words.place(0)}: expected moves that fit in {clip.spoken(clip.span)} from the first frame to the last, "
            f"found {clip.spoken(said)}" + (f" and {free} more without a time" if free else "")
        )
    segments: list[Segment] = []
    start = 0.0
    for segment in read:
        frames = left / free if segment.frames is None else segment.frames
        moves = list(segment.moves)
        for preset, speed in segment.presets:
            right, up, forward, clockwise = (frames * speed * step for step in preset.per_frame(clip.num_frames))
            moves += [Truck(distance=right), Pedestal(distance=up), Dolly(distance=forward), Roll(degrees=clockwise)]
        if frames > 0:  # 0 only in a clip of one frame
            segments.append(Segment(moves=tuple(moves), start=start, end=start + frames))
        start += frames
    return segments


def _segment(words: Words, clip: Clip) -> _Read:
    """Moves joined by "+"."""
    first = words.next
    parts = [_move(words, clip)]
    while words.takes("+"):
        parts.append(_move(words, clip))
    moves = tuple(move for part in parts for move in part.moves)
    for move in moves:
        if sum(type(other) is type(move) for other in moves) > 1:
            name = type(move).__name__
            raise InputError(f"{words.place(first.at)}: expected each move once at once (+), found {name} twice")
    times = {part.frames for part in parts if part.frames is not None}
    if len(times) > 1:
        raise InputError(f"{words.place(first.at)}: expected one time for moves at once (+), found {len(times)}")
    presets = tuple(preset for part in parts for preset in part.presets)
    return _Read(moves=moves, presets=presets, frames=times.pop() if times else None)


def _swaying(words: Words, rig: Rig, clip: Clip) -> Rig:
    """A rig in hands: what follows the word "with"."""
    name = words.next
    moves = _move(words, clip).moves if ALIASES.get(name.text, name.text) == "handheld" else ()
    if not moves:
        raise words.wrong(name, "handheld after 'with'", ["handheld", "hand-held"])
    frames = np.append(np.arange(clip.num_frames, dtype=np.float64), 0.0)
    at_first = Rig(
        position=np.append(rig.position, rig.position[:1], 0),
        rotation=np.append(rig.rotation, rig.rotation[:1], 0),
        focal=np.append(rig.focal, rig.focal[:1]),
    )
    swaying = moves[0].applied(at_first, np.ones(len(frames)), frames)
    return Rig(position=swaying.position[:-1], rotation=swaying.rotation[:-1], focal=swaying.focal[:-1])


# ---- one move --------------------------------------------------------------------------------------------------------


def _move(words: Words, clip: Clip) -> _Read:
    """A name and what follows it."""
    name = words.take()
    if name.kind == "preset":
        values, frames, _ = _amounts(words, "preset", PRESET, clip)
        return _Read(presets=((_named_preset(words, name), values.get("speed", 1.0)),), frames=frames)
    known = ALIASES.get(name.text, name.text)
    if known == "dolly" and words.takes("zoom"):
        known = "dolly zoom"
    if name.kind != "word" or known not in MOVES:
        raise words.wrong(name, f"a move ({', '.join(MOVES)}, preset)", NAMES)
    grammar = MOVES[known]
    values, frames, ease = _amounts(words, known, grammar, clip)
    for slot in grammar.required:
        if slot not in values:
            keyword = next((f" after {word!r}" for word, target in grammar.keywords.items() if target == slot), "")
            raise words.wrong(words.next, f"for {known} {example(grammar.amounts[slot])}{keyword}")
    try:
        return _Read(moves=tuple(grammar.build(values, ease, clip)), frames=frames)
    except InputError as error:
        raise InputError(f"{words.place(name.at)}: {known}: {error}") from None


def _named_preset(words: Words, token: Token) -> Preset:
    try:
        return find_preset(token.text[len("preset") :].strip())
    except InputError as error:
        raise InputError(f"{words.place(token.at)}: {error}") from None


def _amounts(words: Words, name: str, grammar: Grammar, clip: Clip) -> tuple[dict[str, float], float | None, Ease]:
    """What follows the name of a move: numbers by slot, the time in frames, the easing."""
    values: dict[str, float] = {}
    frames: float | None = None
    ease: Ease | None = None
    while words.next.kind != "end" and words.next.text not in (";", "+", "with"):
        token = words.next
        direction = grammar.direction(token.text)
        if direction is not None:
            slot, sign = direction
            words.take()
            words.refuse_twice(token, slot in values)
            values[slot] = sign * words.number(grammar.amounts[slot], token)
        elif token.text in grammar.keywords:
            slot = grammar.keywords[words.take().text]
            words.refuse_twice(token, slot in values)
            values[slot] = words.number(grammar.amounts[slot], token, above_zero=True)
        elif token.text == "for" or token.quantity == TIME:
            words.takes("for")
            words.refuse_twice(token, frames is not None)
            number = words.next
            frames = words.time(clip)
            if frames == 0 and clip.span:
                raise words.wrong(number, "a time above 0")
        elif token.text in EASINGS and name not in ("hold", "preset", "handheld"):
            words.refuse_twice(token, ease is not None)
            words.take()
            ease = next(known for known in EASINGS if known == token.text)
        elif token.kind == "number" and (slot := _slot(token, grammar, values)):
            values[slot] = words.take().value
        else:
            raise words.wrong(token, f"for {name} {_expected(grammar)}", [*grammar.words(), *EASINGS, "for", "with"])
    return values, frames, ease or "linear"


def _slot(token: Token, grammar: Grammar, values: dict[str, float]) -> str:
    """The slot that a number without a word goes to; "" where there is none."""
    fitting = (slot for slot in grammar.bare if token.unit is None or grammar.amounts[slot] == token.quantity)
    return next((slot for slot in fitting if slot not in values), "")


def _expected(grammar: Grammar) -> str:
    amounts = [example(grammar.amounts[slot]) for slot in grammar.bare]
    words = [", ".join(grammar.words())] if grammar.words() else []
    return " or ".join([*amounts, *words, example(TIME)])
