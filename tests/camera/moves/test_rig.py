"""Laws of moves: what each keeps and what it changes, where it ends, and that chains and moves at once fit together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from camera.moves.handheld import sway
from camera.moves.text import make_path
from camera.path import CameraPath, rotation_error

EVERY_MOVE = [
    "hold",
    "pan right 40deg",
    "tilt up 25deg",
    "roll cw 30deg",
    "truck right 0.7",
    "pedestal up 0.4",
    "dolly in 0.6",
    "orbit right 50deg radius 2",
    "orbit up 30deg radius 1.5",
    "arc right 60deg radius 2 in 0.5 up 0.7",
    "spiral cw 300deg radius 0.3 at 2 in 0.2",
    "zoom in 2x",
    "zoom to 30deg",
    "dolly zoom in 0.5 at 1.5",
    "handheld 1deg 0.05",
    "preset comfy:Pan Up",
    "preset diffsynth:LeftDown",
]


def make(text: str, num_frames: int = 33, **options: object) -> CameraPath:
    return make_path(text, **{"num_frames": num_frames, "height": 96, "width": 160, "fps": 16, **options})  # type: ignore[arg-type]


def project(path: CameraPath, point: list[float]) -> Tensor:
    """Pixels (x, y) of a point in the first camera's axes, in every frame, [T, 2]."""
    in_camera = torch.linalg.inv(path.c2w) @ torch.tensor([*point, 1.0], dtype=torch.float64)  # [T, 4]
    pixels = torch.einsum("tij,tj->ti", path.K, in_camera[:, :3])
    return pixels[:, :2] / pixels[:, 2:]


def close(found: Tensor, expected: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=torch.float64).expand_as(found), atol=atol, rtol=0
    )


@pytest.mark.parametrize("text", EVERY_MOVE)
def test_every_move_starts_at_the_identity_and_keeps_rotations_rotations(text: str) -> None:
    path = make(text)
    assert torch.equal(path.c2w[0], torch.eye(4, dtype=torch.float64))
    assert path.pose_frame == "first" and path.scale_rule == "none" and path.fps == 16
    assert (rotation_error(path.rotations) < 1e-12).all()
    close(path.K[:, :2, 2], [80.0, 48.0])


@pytest.mark.parametrize(
    ("text", "axis", "sign"),
    [("truck right 0.7", 0, 1), ("pedestal up 0.7", 1, -1), ("dolly in 0.7", 2, 1), ("dolly out 0.7", 2, -1)],
)
def test_a_translation_moves_along_its_axis_and_does_not_turn(text: str, axis: int, sign: int) -> None:
    path = make(text)
    close(path.rotations, torch.eye(3))
    expected = torch.zeros(33, 3, dtype=torch.float64)
    expected[:, axis] = sign * torch.linspace(0, 0.7, 33, dtype=torch.float64)
    close(path.positions, expected)


@pytest.mark.parametrize(
    ("text", "point", "pixel_axis", "sign"),
    [
        ("pan right 20deg", [0, 0, 3], 0, -1),  # the camera turns right: things run to the left
        ("tilt up 20deg", [0, 0, 3], 1, 1),
        ("roll cw 20deg", [1, 0, 3], 1, -1),  # the camera turns clockwise: what is on its right rises
        ("roll ccw 20deg", [1, 0, 3], 1, 1),
    ],
)
def test_a_rotation_stays_on_the_spot_and_the_picture_runs_the_other_way(
    text: str, point: list[float], pixel_axis: int, sign: int
) -> None:
    path = make(text)
    close(path.positions, 0.0)
    assert (sign * project(path, point)[:, pixel_axis].diff() > 0).all()


@pytest.mark.parametrize(
    ("text", "axis", "sign"),
    [("orbit right 50deg radius 2", 0, 1), ("orbit up 30deg radius 2", 1, -1), ("orbit left 400deg radius 2", 0, -1)],
)
def test_an_orbit_keeps_its_distance_and_looks_at_its_centre(text: str, axis: int, sign: int) -> None:
    path = make(text)
    centre = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    close((path.positions - centre).norm(dim=-1), 2.0)
    close(project(path, [0, 0, 2]), [80.0, 48.0])
    assert sign * path.positions[1, axis] > 0


@pytest.mark.parametrize(
    "text",
    ["arc left 60deg radius 2 in 0.5 up 0.7", "spiral ccw 300deg radius 0.3 at 2 in 0.2", "arc 0deg radius 2 up 1"],
)
def test_arc_and_spiral_look_at_their_subject(text: str) -> None:
    close(project(make(text), [0, 0, 2]), [80.0, 48.0])


def test_an_arc_ends_at_its_height_and_distance_and_stays_level() -> None:
    path = make("arc right 60deg radius 2 in 0.5 up 0.7")
    across = path.positions[-1, [0, 2]] - torch.tensor([0.0, 2.0], dtype=torch.float64)
    close(across.norm(), 1.5)
    close(path.positions[-1, 1], -0.7)
    close(path.rotations[:, 1, 0], 0.0)  # the camera's right axis stays level


def test_a_spiral_ends_at_its_radius_after_its_turns() -> None:
    path = make("spiral cw 450deg radius 0.3 at 2")
    close(path.positions[-1], [0.0, 0.3, 0.0])  # a turn and a quarter, clockwise from the right: below the start
    distance = path.positions.norm(dim=-1)
    close(distance, torch.linspace(0, 0.3, 33, dtype=torch.float64))


def test_zoom_narrows_the_view_in_equal_ratios_and_does_not_move() -> None:
    path = make("zoom in 3x")
    close(path.c2w, torch.eye(4))
    ratio = path.K[1:, 0, 0] / path.K[:-1, 0, 0]
    close(ratio, 3 ** (1 / 32))
    close(make("zoom to 30deg").fov_degrees()[-1], 30.0)
    close(make("zoom out 2x").K[-1, 0, 0] * 4, make("zoom in 2x").K[-1, 0, 0])


@pytest.mark.parametrize(
    ("text", "subject"),
    [("dolly zoom in 0.5 at 1.5", 1.5), ("dolly zoom out 2 at 1.5", 1.5), ("dolly zoom in 0.5 ease-in", 1.0)],
)
def test_a_dolly_zoom_keeps_the_size_of_its_subject_and_of_nothing_else(text: str, subject: float) -> None:
    path = make(text)
    size = project(path, [0.2, 0.1, subject]) - project(path, [-0.2, -0.1, subject])
    close(size, size[0])
    behind = project(path, [0.2, 0.1, 5 * subject]) - project(path, [-0.2, -0.1, 5 * subject])
    assert (behind - behind[0]).abs().max() > 1


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("pan right 30deg; dolly in 1", "pan left 30deg; dolly in 1"),
        ("truck right 1 + pan right 20deg", "truck left 1 + pan left 20deg"),
        ("orbit right 70deg radius 2 + tilt up 10deg", "orbit left 70deg radius 2 + tilt up 10deg"),
        ("arc right 70deg radius 2 up 1; roll cw 20deg", "arc left 70deg radius 2 up 1; roll ccw 20deg"),
        ("at 50%: right 1, pan 20deg; at 100%: in 1", "at 50%: left 1, pan left 20deg; at 100%: in 1"),
    ],
)
def test_left_is_the_mirror_image_of_right(text: str, mirrored: str) -> None:
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    close(make(mirrored).c2w, mirror @ make(text).c2w @ mirror)


def test_moves_at_once_do_not_depend_on_their_order() -> None:
    parts = ["pan right 30deg", "tilt up 20deg ease-in", "truck left 1", "orbit right 40deg radius 2", "dolly in 0.5"]
    expected = make(" + ".join(parts))
    close(make(" + ".join(parts[::-1])).c2w, expected.c2w)
    close(make(" + ".join(parts[2:] + parts[:2])).c2w, expected.c2w)


def test_a_head_on_a_track_moves_straight_while_it_turns() -> None:
    path = make("pan right 90deg + truck right 1")
    close(path.positions, make("truck right 1").positions)
    close(path.rotations, make("pan right 90deg").rotations)


def test_an_orbit_with_a_dolly_comes_closer_to_the_centre() -> None:
    path = make("orbit right 90deg radius 2 + dolly in 0.5")
    close((path.positions[-1] - torch.tensor([0, 0, 2.0])).norm(), 1.5)
    close(project(path, [0, 0, 2]), [80.0, 48.0])


def test_a_pan_after_a_tilt_keeps_the_horizon_level() -> None:
    path = make("tilt up 30deg; pan right 80deg")
    close(path.rotations[:, 1, 0], 0.0)


# ---- chains ----------------------------------------------------------------------------------------------------------

CHAIN = (
    "orbit right 90deg radius 2; dolly in 0.5 ease-in-out; handheld 1deg 0.05; zoom in 2x + roll cw 30deg; arc 40deg"
)


def test_a_chain_does_not_jump_at_its_joints() -> None:
    coarse, fine = make(CHAIN, 101), make(CHAIN, 1601, fps=256)
    step = [float(path.c2w.diff(dim=0).abs().max()) for path in (coarse, fine)]
    assert step[1] < 1.3 * step[0] / 16  # a jump would stay, however fine the steps
    zoom = [float(path.K[:, 0, 0].diff().abs().max()) for path in (coarse, fine)]
    assert zoom[1] < 1.3 * zoom[0] / 16


def test_a_path_is_a_function_of_time_not_of_the_number_of_frames() -> None:
    coarse, fine = make(CHAIN, 101, fps=20), make(CHAIN, 201, fps=40)
    close(fine.c2w[::2], coarse.c2w)


def test_a_segment_of_a_chain_is_the_move_alone_from_where_the_chain_stands() -> None:
    chain = make("pan right 30deg 10frames; orbit right 40deg radius 2 14frames; hold 8frames")
    alone = make("orbit right 40deg radius 2", 15)
    close(chain.c2w[10:25], chain.c2w[10] @ alone.c2w)
    close(chain.c2w[24:], chain.c2w[24])


def test_times_are_taken_as_said_shared_where_not_said_and_held_at_the_end() -> None:
    path = make("truck right 1 25%; truck right 1; truck right 1", 33)
    close(path.positions[[8, 20, 32], 0], [1.0, 2.0, 3.0])
    path = make("dolly in 1 1s", 33)
    close(path.positions[[8, 16, 24, 32], 2], [0.5, 1.0, 1.0, 1.0])
    path = make("dolly in 1 for 500ms; hold; dolly out 1 50 %", 33)
    close(path.positions[[8, 16, 24, 32], 2], [1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("ease", "quarter", "half"),
    [("linear", 0.25, 0.5), ("ease-in", 1 / 16, 0.25), ("ease-out", 7 / 16, 0.75), ("ease-in-out", 5 / 32, 0.5)],
)
def test_easing_changes_the_speed_and_not_the_way(ease: str, quarter: float, half: float) -> None:
    path = make(f"truck right 1 {ease}", 33)
    close(path.positions[[0, 8, 16, 32], 0], [0.0, quarter, half, 1.0])
    assert (path.positions[:, 0].diff() > 0).all()
    key_frames = make(f"at 100%: right 1 {ease}", 33)
    close(key_frames.c2w, path.c2w)


def test_a_clip_of_one_frame_is_where_the_text_starts() -> None:
    for text in [*EVERY_MOVE, CHAIN]:
        close(make(text, 1).c2w, torch.eye(4))


# ---- key frames ------------------------------------------------------------------------------------------------------


def test_key_frames_are_met_at_their_times() -> None:
    path = make("at 25%: right 1, up 0.5; at 1s: in 2 pan right 370deg ease-out; at 100%: out 1 tilt -20 fov 30", 33)
    close(path.positions[[8, 16, 32]], torch.tensor([[1, -0.5, 0], [1, -0.5, 2], [1, -0.5, -1.0]]))
    close(path.rotations[16], make("pan right 10deg").rotations[-1])
    close(path.rotations[32], make("pan right 10deg; tilt down 20deg").rotations[-1])
    close(path.fov_degrees()[[0, 16, 32]], [60.0, 60.0, 30.0])
    turned = torch.atan2(path.rotations[8:17, 0, 2], path.rotations[8:17, 2, 2])
    assert np.unwrap(turned.numpy())[-1] > 2 * np.pi  # a whole turn and ten degrees, not ten degrees


def test_key_frames_may_start_anywhere() -> None:
    moved = make("at 0%: right 1 pan 90deg; at 100%: right 1 in 1", 9)
    close(moved.c2w, make("truck left 1", 9).c2w)  # forward in the axes of the keys is left of a camera turned right


# ---- hand-held -------------------------------------------------------------------------------------------------------


def test_handheld_is_a_function_of_its_seed() -> None:
    first, again, other = (make("handheld", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.c2w, again.c2w)
    assert (first.c2w - other.c2w).abs().max() > 1e-3


def test_sway_has_its_band_and_its_size() -> None:
    rate, seconds = 64.0, 512
    noise = sway(np.arange(int(rate * seconds)) / rate, seed=1, fps=rate)
    power = np.abs(np.fft.rfft(noise * np.hanning(len(noise))[:, None], axis=0)) ** 2
    frequency = np.fft.rfftfreq(len(noise), 1 / rate)
    outside = (frequency > 3.05) | (frequency < 0.25)
    assert power[outside].sum() < 1e-6 * power.sum()
    np.testing.assert_allclose(np.sqrt((noise**2).mean(0)), 1, rtol=0.02)


def test_sway_does_not_alias_at_a_low_frame_rate() -> None:
    noise = sway(np.arange(1 << 14) / 4.0, seed=1, fps=4)
    power = np.abs(np.fft.rfft(noise * np.hanning(len(noise))[:, None], axis=0)) ** 2
    assert power[np.fft.rfftfreq(len(noise), 1 / 4) > 1.65].sum() < 1e-6 * power.sum()


def test_handheld_with_a_move_sways_about_that_move() -> None:
    plain, swaying = make("dolly in 1; pan 30deg"), make("dolly in 1; pan 30deg with handheld 0.5deg 0.01")
    difference = (swaying.positions - plain.positions).norm(dim=-1)
    assert 0.002 < difference.max() < 0.1
    assert torch.equal(make("dolly in 1 with handheld 0deg 0").c2w, make("dolly in 1").c2w)
    close(make("dolly in 1 with handheld").c2w, make("dolly in 1 + handheld").c2w)
