"""Tagged camera text: the reference's geometry, times on the clip's clock, and errors that name their segment."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from camera.moves.tagged_text import (
    ANCHOR_FORWARD,
    ANCHOR_HEIGHT,
    DIRECTIONS,
    caption_of,
    is_tagged,
    read_tagged,
    tagged_segments,
    trajectory_file,
)
from camera.path import CameraPath
from core.errors import InputError


def segment(
    start: object = 0, end: object = 3, speed: str = "high", direction: str = "left", rotate: str = "stay"
) -> str:
    return (
        f"<starttime>{start}</starttime> <endtime>{end}</endtime> <speed>{speed}</speed> "
        f"<direction>{direction}</direction> <rotate>{rotate}</rotate>"
    )


def text(*segments: str) -> str:
    return "Object: a red car, at night ; Camera: " + " <sep> ".join(segments) + " <sep>"


def read(written: str, num_frames: int | None = 25, fps: float = 8) -> CameraPath:
    return read_tagged(written, fps=fps, height=64, width=96, num_frames=num_frames)


# Columns of the first camera's rotation in the coordinates of the reference: right, down, forward.
DISTANCE = (ANCHOR_FORWARD**2 + ANCHOR_HEIGHT**2) ** 0.5
COSINE, SINE = ANCHOR_FORWARD / DISTANCE, ANCHOR_HEIGHT / DISTANCE
FIRST = torch.tensor([[1.0, 0, 0], [0, -COSINE, -SINE], [0, SINE, -COSINE]], dtype=torch.float64)
FIRST_CENTRE = torch.tensor([0.0, ANCHOR_HEIGHT, ANCHOR_FORWARD], dtype=torch.float64)
SUBJECT = -FIRST.T @ FIRST_CENTRE  # in the first camera's axes: straight ahead


def centres(path: CameraPath) -> Tensor:
    """Camera centres in the coordinates of the reference: subject at the origin, y up, [T, 3]."""
    return path.positions @ FIRST.T + FIRST_CENTRE


def close(found: Tensor, expected: object, atol: float) -> None:
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=torch.float64).expand_as(found), atol=atol, rtol=0
    )


@pytest.mark.parametrize(
    ("direction", "centre"),
    [
        ("forward", (0, 0.0877, 0.4012)),
        ("backward", (0, 0.0877, 1.6046)),
        ("left", (-0.8685, 0.0877, 0.5014)),
        ("right", (0.8685, 0.0877, 0.5014)),
        ("up", (0, 0.7712, 0.6471)),
        ("down", (0, -0.6471, 0.7712)),
        ("leftdown30", (-0.4174, -0.5625, 0.7230)),
    ],
)
def test_three_seconds_end_where_the_reference_ends(direction: str, centre: tuple[float, float, float]) -> None:
    path = read(text(segment(direction=direction)))
    close(centres(path)[-1], centre, atol=1e-4)
    assert torch.equal(path.c2w[0], torch.eye(4, dtype=torch.float64)) and path.pose_frame == "first"


@pytest.mark.parametrize("direction", [name for name in DIRECTIONS if "ward" not in name])
def test_orbits_keep_their_distance_and_look_at_the_subject(direction: str) -> None:
    path = read(text(segment(direction=direction), segment(3, 3.1, direction="left")), num_frames=32)
    in_camera = torch.linalg.inv(path.c2w) @ torch.cat([SUBJECT, SUBJECT.new_ones(1)])
    close(in_camera[:, :3], [0, 0, DISTANCE], atol=1e-12)
    assert len(DIRECTIONS) == 18


def test_left_is_the_mirror_image_of_right() -> None:
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    for name in DIRECTIONS:
        if "left" in name:
            left = read(text(segment(direction=name, rotate="clockwise 20")))
            right = read(text(segment(direction=name.replace("left", "right"), rotate="anticlockwise 20")))
            close(right.c2w, mirror @ left.c2w @ mirror, atol=1e-12)


def test_low_is_half_as_fast() -> None:
    for direction in DIRECTIONS:
        fast, slow = (read(text(segment(0, 2, speed, direction)), 33, 16) for speed in ("high", "low"))
        close(slow.c2w[::2], fast.c2w[:17], atol=1e-12)


@pytest.mark.parametrize("fps", [4.0, 8.0, 24.0])
def test_times_are_those_of_the_clip(fps: float) -> None:
    path = read(text(segment(1, 2, direction="backward"), segment(3, 5, direction="forward")), int(6 * fps) + 1, fps)
    height = centres(path)[:, 2] / ANCHOR_FORWARD
    seconds = torch.tensor([0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    close(
        height[(seconds * fps).long()], torch.tensor([1, 1, 1.1, 1.2, 1.2, 1, 0.8, 0.8], dtype=torch.float64), atol=1e-9
    )


def test_nothing_is_cut_after_three_seconds() -> None:
    parts = [segment(1, 2), segment(2, 3, direction="up"), segment(3, 4, direction="leftdown30")]
    path = read(text(*parts), 81, 16)
    moving = path.c2w.diff(dim=0).abs().amax((1, 2)) > 1e-6
    assert moving[16:64].all() and not moving[:16].any() and not moving[64:].any()


def test_without_a_number_of_frames_the_path_lasts_as_long_as_the_text() -> None:
    assert len(read(text(segment(0, 2.5)), None)) == 21
    close(read(text(segment(0, 2.5)), None).c2w, read(text(segment(0, 2.5)), 21).c2w, atol=0)
    assert len(read(text(segment(0, 0.28)), None, fps=25)) == 8  # though 0.28 * 25 is a little above 7


def test_a_text_may_last_as_long_as_the_last_frame_is_shown() -> None:
    assert len(read(text(segment(0, 3.125)), 25)) == 25
    with pytest.raises(InputError, match="expected an end within"):
        read(text(segment(0, 3.13)), 25)


def test_rotate_rolls_over_its_segment_and_stays_rolled() -> None:
    path = read(text(segment(0, 1, rotate="clockwise 30"), segment(2, 3, rotate="anticlockwise 50.5")))
    still = read(text(segment(0, 1), segment(2, 3)))
    close(path.positions, still.positions, atol=1e-12)
    roll = still.rotations.mT @ path.rotations
    degrees = torch.rad2deg(torch.atan2(roll[:, 1, 0], roll[:, 0, 0]))
    close(degrees[[0, 4, 8, 12, 16, 20, 24]], torch.tensor([0, 15, 30, 30, 30, 4.75, -20.5]).double(), atol=1e-9)


def test_the_angle_of_view_is_the_reference_s_or_the_given_one() -> None:
    close(read(text(segment())).fov_degrees(), 53.130102, atol=1e-5)
    for height, width in ((64, 96), (96, 64)):
        path = read_tagged(text(segment()), fps=8, height=height, width=width)
        close(path.K[:, [0, 1], [0, 1]], 96, atol=1e-9)  # the longer side, however the frame is held
    given = read_tagged(text(segment()), fps=8, height=64, width=96, num_frames=25, fov_degrees=70)
    close(given.fov_degrees(), 70.0, atol=1e-9)


def test_form_does_not_matter() -> None:
    plain = text(segment(0, 2), segment(2, 3))
    for other in (
        plain.replace("Object: a red car, at night ; Camera: ", ""),
        plain.replace(" ; Camera: ", ";camera:"),
        plain.removesuffix(" <sep>"),
        plain.replace("> <", ">\n<"),
        plain.replace(">high<", "> High <").replace(">left<", "> LEFT <"),
        re.sub("<[^>]*>", lambda tag: tag[0].upper(), plain),
    ):
        assert tagged_segments(other) == tagged_segments(plain)
        assert is_tagged(other)
    rolled = text(segment(rotate="clockwise 30"))
    for degrees in ("30.", "30 deg", "30deg", "30 degrees", "30°"):
        assert tagged_segments(rolled.replace(" 30", f" {degrees}")) == tagged_segments(rolled)


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (segment(2, 3, direction="leftup35"), "did you mean 'leftup45'"),
        (segment(2, 3, direction="sideways"), "expected a direction"),
        (segment(2, 3, speed="medium"), "speed high or low, found 'medium'"),
        (segment(2, 3, rotate="clockwize 30"), "did you mean 'clockwise'"),
        (segment(2, 3, rotate="clockwise"), "clockwise DEGREES"),
        (segment(2, 3, rotate=""), "found ''"),
        (segment(1, 3), "at or after 2 s, the end of segment 1, found 1 s"),
        (segment(3, 2), "an end after its start at 3 s, found 2 s"),
        (segment(3, 3), "an end after its start"),
        (segment("two", 3), "seconds of 0 or more in <starttime>, found 'two'"),
        (segment(2, "nan"), "in <endtime>, found 'nan'"),
        (segment(2, "inf"), "in <endtime>, found 'inf'"),
        (segment(-1, 3), "found '-1'"),
        (segment(2, 99), "within the clip's 3.12 s (25 frames at 8 fps), found 99 s"),
        (segment(2, 3).replace(" <rotate>stay</rotate>", ""), "found no <rotate>"),
        (segment(2, 3).replace("</speed>", ""), "expected <speed>...</speed>"),
        (segment(2, 3).replace("<speed>", "<sped>"), "did you mean 'speed'"),
        (segment(2, 3) + " and then " + segment(3, 3.1), "expected a tag, found 'and then"),
        (segment(2, 3) + segment(3, 3.1), "is a <sep> missing?"),
        (segment(2, 3) + " quickly", "expected a tag, found 'quickly'"),
        ("", "found no <starttime>"),
    ],
)
def test_a_mistake_names_its_segment(second: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text(segment(0, 2), second))
    message = str(caught.value)
    assert "tagged camera text, segment 2: " in message and says in message and "\n" not in message


@pytest.mark.parametrize("written", ["", "a red car", "Object: a car ; Camera:", "Camera: <sep>", "left for 3 seconds"])
def test_a_text_without_segments_is_refused(written: str) -> None:
    with pytest.raises(InputError, match="tagged camera text"):
        read(written)


def test_a_camera_may_not_drive_through_its_subject() -> None:
    with pytest.raises(InputError, match="reach in frame 40"):
        read(text(segment(0, 6, direction="forward")), 49)


@pytest.mark.parametrize("wrong", [{"fps": 0.0}, {"fps": float("inf")}, {"fov_degrees": 180.0}])
def test_numbers_that_make_no_clip_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="tagged camera text: expected"):
        read_tagged(text(segment()), **{"fps": 8.0, "height": 64, "width": 96, **wrong})  # type: ignore[arg-type]


# ---- the other parts of a caption ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "caption"),
    [
        (text(segment()), "a red car, at night"),
        ("Object: a dog ;" + segment(), "a dog"),
        ("object: a dog;camera: " + segment(), "a dog"),
        (segment() + " <sep>", ""),
        (
            "  a plain caption; with a semicolon: and Camera shake \n",
            "a plain caption; with a semicolon: and Camera shake",
        ),
        ("Object:a bed; Caption: The camera moves according to the #trajectory:{/d/a.safetensors}.", "a bed"),
        ("a bed #trajectory:{a.safetensors}", "a bed"),
        (text(segment()).replace("a red car", "a Camera: on a stand"), "a Camera: on a stand, at night"),
    ],
)
def test_the_caption_is_what_is_seen(written: str, caption: str) -> None:
    assert caption_of(written) == caption
    assert not is_tagged(caption)


def test_the_file_of_a_trajectory() -> None:
    named = "Object:a bed ; Caption: The camera moves according to the #trajectory:{/d/my clip.safetensors}."
    assert str(trajectory_file(named)) == "/d/my clip.safetensors"
    assert trajectory_file(text(segment())) is None
    for wrong in ("#trajectory", "#trajectory:{}", "#trajectory:{a} #trajectory:{b}", "#trajectory:{a"):
        with pytest.raises(InputError, match="one #trajectory"):
            trajectory_file(wrong)


def test_rates_are_the_reference_s() -> None:
    rates = {segment_.rates for segment_ in tagged_segments(text(segment(0, 1), segment(1, 2, direction="rightup60")))}
    assert (-20.0, 0.0, 0.0, 0.0) in rates
    assert any(abs(right - 20 * 0.8660254) < 1e-6 and abs(up - 7.5) < 1e-6 for right, up, _, _ in rates)
    assert all(a.end <= b.start for a, b in pairwise(tagged_segments(text(segment(0, 1), segment(1, 2)))))
