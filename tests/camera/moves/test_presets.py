"""Presets of other tools: where they end, how wide they see, in numbers that those tools publish."""

from __future__ import annotations

import pytest
import torch

from camera.moves.presets import FAMILIES, PRESETS, find_preset
from camera.moves.text import make_path
from camera.path import CameraPath
from core.errors import InputError

# w2c translations of the last of 81 lines of VideoX-Fun's files: 80 steps of 1/54, twice that for Zoom.
VIDEOX_LAST_W2C = {
    "Pan_Left": (1.4814814814814814, 0, 0),
    "Pan_Right": (-1.4814814814814814, 0, 0),
    "Pan_Up": (0, 1.4814814814814814, 0),
    "Pan_Down": (0, -1.4814814814814814, 0),
    "Pan_Left_Up": (1.4814814814814814, 1.4814814814814814, 0),
    "Pan_Left_Down": (1.4814814814814814, -1.4814814814814814, 0),
    "Pan_Right_Up": (-1.4814814814814814, 1.4814814814814814, 0),
    "Pan_Right_Down": (-1.4814814814814814, -1.4814814814814814, 0),
    "Zoom_In": (0, 0, -2.962962962962963),
    "Zoom_Out": (0, 0, 2.962962962962963),
    "ACW": (0, 0, 0),
    "CW": (0, 0, 0),
}
# Frames 1 and 80 of ACW.txt: the first two numbers of the w2c rotation.
ACW_SECOND, ACW_LAST = (0.9999164298554373, -0.012928004685808521), (0.5111541954058733, -0.8594890275733451)


def make(name: str, num_frames: int = 81, height: int = 480, width: int = 832) -> CameraPath:
    return make_path(f"preset {name}", num_frames=num_frames, height=height, width=width)


@pytest.mark.parametrize(("name", "translation"), VIDEOX_LAST_W2C.items())
def test_videox_ends_where_its_files_end(name: str, translation: tuple[float, float, float]) -> None:
    w2c = torch.linalg.inv(make(f"videox:{name}").c2w)
    torch.testing.assert_close(w2c[-1, :3, 3], torch.tensor(translation, dtype=torch.float64), atol=1e-9, rtol=0)
    step = w2c[1:, :3, 3] - w2c[:-1, :3, 3]
    torch.testing.assert_close(step, step[:1].expand_as(step), atol=1e-12, rtol=0)


def test_videox_rolls_as_its_files() -> None:
    for name, sign in (("ACW", 1), ("CW", -1)):
        w2c = torch.linalg.inv(make(f"videox:{name}").c2w)
        for frame, (cosine, sine) in ((1, ACW_SECOND), (80, ACW_LAST)):
            expected = torch.tensor([[cosine, sign * sine], [-sign * sine, cosine]], dtype=torch.float64)
            torch.testing.assert_close(w2c[frame, :2, :2], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_frames", [81, 33])
def test_comfy_takes_the_whole_clip_whatever_its_length(num_frames: int) -> None:
    share = (num_frames - 1) / num_frames
    ends = {"Zoom In": (0, 0, 3), "Zoom Out": (0, 0, -3), "Pan Up": (0, -1.5, 0), "Pan Right": (1.5, 0, 0)}
    for name, end in ends.items():
        found = make(f"comfy:{name}", num_frames).positions[-1]
        torch.testing.assert_close(found, share * torch.tensor(end, dtype=torch.float64), atol=1e-12, rtol=0)
    angle = torch.tensor(share * torch.pi / 3, dtype=torch.float64)
    clockwise = make("comfy:ClockWise (CW)", num_frames).rotations[-1]
    torch.testing.assert_close(clockwise[1, 0], angle.sin(), atol=1e-12, rtol=0)
    assert torch.equal(make("comfy:Static", num_frames).c2w[-1], torch.eye(4, dtype=torch.float64))


def test_videox_and_diffsynth_keep_their_step_and_diffsynth_zooms_half_as_fast() -> None:
    for name in ("videox:Pan_Left", "diffsynth:Left"):
        for num_frames in (33, 81, 121):
            expected = torch.tensor([-(num_frames - 1) / 54, 0, 0], dtype=torch.float64)
            torch.testing.assert_close(make(name, num_frames).positions[-1], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(2 * make("diffsynth:In").positions, make("videox:Zoom_In").positions)


@pytest.mark.parametrize(
    ("name", "size", "focal"),
    [
        ("videox:CW", (480, 832), (454.0928, 454.0928)),
        ("videox:CW", (720, 1280), (681.1391, 681.1391)),
        ("videox:CW", (832, 480), (832 / 720 * 681.1391,) * 2),
        ("diffsynth:Up", (480, 832), (454.0928, 454.0928)),
        ("comfy:CW", (480, 832), (426.6667, 240.0)),
        ("comfy:CW", (720, 1280), (640.0, 360.0)),
        ("comfy:CW", (480, 1280), (640.0, 360.0)),
    ],
)
def test_focal_lengths(name: str, size: tuple[int, int], focal: tuple[float, float]) -> None:
    K = make(name, 5, *size).K
    torch.testing.assert_close(K[0].diagonal()[:2], torch.tensor(focal, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(K[-1, :2, 2], torch.tensor([size[1] / 2, size[0] / 2], dtype=torch.float64))


def test_every_family_has_its_names() -> None:
    assert {family: len(presets) for family, presets in FAMILIES.items()} == {"videox": 12, "diffsynth": 10, "comfy": 9}
    for name, preset in PRESETS.items():
        assert find_preset(name.upper().replace("_", " ")) is preset


def test_an_unknown_preset_is_named_with_its_neighbour() -> None:
    with pytest.raises(InputError, match="found 'videox:Pan_Lft' .did you mean 'videox:Pan_Left'"):
        find_preset("videox:Pan_Lft")
