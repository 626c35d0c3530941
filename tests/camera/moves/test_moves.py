"""The text of moves: two ways to write the same are the same, and every mistake is one line with its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camera.moves.grammar import MOVES
from camera.moves.text import NAMES, make_path
from camera.path import CameraPath
from core.errors import InputError


def make(text: str, num_frames: int = 17, **options: object) -> CameraPath:
    return make_path(text, **{"num_frames": num_frames, "height": 48, "width": 80, "fps": 8, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("orbit 90deg; dolly in 0.5; hold 1s", "  ORBIT right 90 degrees radius 1 ;Dolly 0.5m;hold for 8 frames; "),
        ("pan left 30deg", "pan -30°"),
        ("roll ccw 30", "roll anticlockwise 30deg"),
        ("roll -30", "roll counterclockwise 30"),
        ("dolly zoom in .5", "dolly-zoom 0.50 units at 1"),
        ("zoom out 2x", "zoom out 2"),
        ("hold", "static 100%"),
        ("handheld 0.5deg 0.01", "hand-held"),
        ("truck right 1 ease-out 50%", "truck 50% ease-out 1"),
        ("orbit right 20 up 10 radius 2", "orbit up 10 radius 2 + orbit right 20 radius 2"),
        ("at 50%: right 1; at 100%: pan 10", "at 50 %: right 1 ; at 16frames: , pan right 10deg, right 1"),
        ("preset comfy:Anti Clockwise (ACW) speed 0.5", "preset COMFY : acw speed .5x for 100%"),
    ],
)
def test_two_ways_to_write_the_same(text: str, same: str) -> None:
    torch.testing.assert_close(make(text).c2w, make(same).c2w, atol=1e-12, rtol=0)
    torch.testing.assert_close(make(text).K, make(same).K, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("text", "character", "says"),
    [
        ("", 1, "expected a move"),
        ("pann 30", 1, "did you mean 'pan'"),
        ("orbit 90deg; doly in 1", 14, "did you mean 'dolly'"),
        ("orbit 90deg; dolly sideways 1", 20, "found 'sideways'"),
        ("orbit lefft 3", 7, "did you mean 'left'"),
        ("pan", 4, "for pan an angle such as 30deg, found the end"),
        ("pan right", 10, "an angle such as 30deg after 'right', found the end"),
        ("pan 30m", 5, "for pan an angle"),
        ("truck right 30deg", 13, "a distance such as 0.5 after 'right'"),
        ("pan left -30", 10, "a number from 0 after 'left'"),
        ("pan 30 40", 8, "found '40'"),
        ("pan 30 right 40", 8, "each value once"),
        ("pan 30 1s 2s", 11, "each value once"),
        ("pan 30 linear ease-in", 15, "each value once"),
        ("pan 30 easein", 8, "did you mean 'ease-in'"),
        ("pan 30furlongs", 7, "expected a unit"),
        ("pan nan", 5, "found 'nan'"),
        ("pan 1e400", 6, "expected a unit"),
        ("pan (30)", 5, "found '('"),
        ("pan 30 @", 8, "found '@'"),
        ("pan 30 for", 11, "a time such as 2s"),
        ("pan 30 for 2", 12, "a time such as 2s"),
        ("pan 30 0s", 8, "a time above 0"),
        ("hold ease-in", 6, "for hold a time"),
        ("pan 30 + pan 20", 1, "Pan twice"),
        ("hold; pan 30 1s + tilt 5 2s", 7, "one time"),
        ("pan 30 3s", 1, "fit in 16 frames (2 s) from the first frame to the last, found 24 frames (3 s)"),
        ("hold 2s; pan 30", 1, "1 more without a time"),
        ("orbit", 1, "right 90deg"),
        ("orbit 30 radius 0", 17, "above 0 after 'radius'"),
        ("orbit 30 radius -1", 17, "above 0 after 'radius'"),
        ("arc 30 in 2", 1, "reaches its subject"),
        ("spiral 90", 10, "after 'radius'"),
        ("spiral 90 radius 0.1 in 3 at 2", 1, "reaches its subject"),
        ("dolly zoom in 1", 1, "reaches its subject"),
        ("zoom", 1, "factor"),
        ("zoom in 2x to 30deg", 1, "either"),
        ("zoom in 0.5", 1, "1 or more"),
        ("zoom to 190", 1, "between 0 and 180"),
        ("handheld -1deg", 1, "0 or more"),
        ("pan 30 with", 12, "handheld after 'with'"),
        ("pan 30 with hold", 13, "handheld after 'with'"),
        ("pan 30 with handheld; hold", 21, "found ';'"),
        ("pan 30: tilt", 7, "found ':'"),
        ("preset comfy:Zoom", 1, "did you mean 'comfy:Zoom In'"),
        ("preset comfi:Zoom In", 1, "did you mean 'comfy:Zoom In'"),
        ("hold; preset Zoom In", 7, "a colon"),
        ("preset comfy:Zoom In; preset videox:Zoom_In", 23, "one angle of view"),
        ("preset comfy:CW speed -1", 23, "above 0"),
        ("at 2s in 1", 7, "':'"),
        ("at: in 1", 3, "a time such as"),
        ("at 3s: in 1", 4, "within 16 frames (2 s)"),
        ("at 1s: in 1; at 1s: in 2", 17, "a time after"),
        ("at 1s: in 1; pan 3", 14, "no other moves"),
        ("at 1s: in 1 in 2", 13, "each value once"),
        ("at 1s: inn 1", 8, "did you mean 'in'"),
        ("at 1s: fov 180", 12, "below 180"),
        ("at 1s: pan right -3", 18, "from 0"),
        ("at 1s: in 1 at 2s: in 2", 13, "found 'at'"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(text: str, character: int, says: str) -> None:
    with pytest.raises(InputError) as caught:
        make(text)
    message = str(caught.value)
    assert f'camera moves "{text}", character {character}: ' in message
    assert says in message and "\n" not in message


def test_the_place_in_a_long_text_is_shown() -> None:
    text = "; ".join(["pan 1deg"] * 20 + ["pan 1degs"] + ["pan 1deg"] * 20)
    with pytest.raises(InputError, match=r'"\.\.\.deg; pan.*1degs.*\.\.\.", character 206: expected a unit'):
        make(text)


@pytest.mark.parametrize("text", ["hold 1s", "handheld", "at 1s: in 1", "pan 3 with handheld"])
def test_seconds_need_a_clock(text: str) -> None:
    with pytest.raises(InputError, match="fps"):
        make(text, fps=None)
    make("pan 30 50%; hold 3frames; at 3".split("; at")[0], fps=None)


@pytest.mark.parametrize(
    "options", [{"num_frames": 0}, {"fps": 0.0}, {"fps": float("nan")}, {"fov_degrees": 180.0}, {"seed": -1}]
)
def test_numbers_that_make_no_clip_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="camera moves: expected"):
        make("pan 30", **options)


def test_the_angle_of_view_is_the_given_one() -> None:
    for text in ("pan 3", "preset comfy:CW"):
        torch.testing.assert_close(make(text, fov_degrees=40).fov_degrees(), torch.full((17,), 40.0).double())
    torch.testing.assert_close(make("pan 3").fov_degrees(), torch.full((17,), 60.0).double())


PIECES = [
    *NAMES,
    *"; + : , with for at 1s 40% 3frames 30deg 0.5 2x -1 right up in radius to ease-in linear".split(),
    "x(",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_is_a_path_or_an_input_error(pieces: list[str]) -> None:
    try:
        path = make(" ".join(pieces))
    except InputError:
        return
    assert len(path) == 17


def test_every_move_has_a_name_that_is_read() -> None:
    for name, grammar in MOVES.items():
        with pytest.raises(InputError, match=f"for {name} "):
            make(f"{name} nonsense")
        assert set(grammar.required) | set(grammar.bare) <= set(grammar.amounts)
