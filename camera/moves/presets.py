"""The camera presets of VideoX-Fun, DiffSynth and ComfyUI, under their names and with their numbers.

What they call Pan is a truck or a pedestal: the camera moves and does not turn. What they call Zoom is a dolly. Over
the 81 frames that they were made for, the three move alike, but for DiffSynth's In and Out, which are half as fast.

Sources: the files asset/*.txt of VideoX-Fun; generate_camera_coordinates of DiffSynth-Studio; the node
WanCameraEmbedding of ComfyUI.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import InputError, nearest

UNITS_PER_CLIP, DEGREES_PER_CLIP = 1.5, 60.0  # base_T_norm and base_angle: of a clip of n frames, (n - 1) / n is seen
FRAMES_OF_FILES = 81  # a step of 1.5 / 81 = 1 / 54 a frame
SOURCE_HEIGHT, SOURCE_WIDTH = 720, 1280  # the frame that normalised focal lengths of these presets belong to


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A steady motion.

    Args:
        right: as a multiple of 1.5 units per clip.
        up: as a multiple of 1.5 units per clip.
        forward: as a multiple of 1.5 units per clip.
        clockwise: as a multiple of 60 degrees per clip.
        frames: of the clip that this motion takes; None: the whole clip, however many frames it has.
        focal: fx over the width and fy over the height of a 1280x720 frame.
    """

    right: float = 0.0
    up: float = 0.0
    forward: float = 0.0
    clockwise: float = 0.0
    frames: int | None
    focal: tuple[float, float]

    def per_frame(self, num_frames: int) -> tuple[float, float, float, float]:
        """Units to the right, up and forward, and degrees clockwise, from one frame of a clip to the next."""
        share = 1 / (self.frames or num_frames)
        return (
            self.right * UNITS_PER_CLIP * share,
            self.up * UNITS_PER_CLIP * share,
            self.forward * UNITS_PER_CLIP * share,
            self.clockwise * DEGREES_PER_CLIP * share,
        )


def _family(
    motions: dict[str, tuple[float, float, float, float]], *, frames: int | None, focal: tuple[float, float]
) -> dict[str, Preset]:
    return {
        name: Preset(right=right, up=up, forward=forward, clockwise=clockwise, frames=frames, focal=focal)
        for name, (right, up, forward, clockwise) in motions.items()
    }


_VIDEOX_FOCAL = (0.532139961, 0.946026558)  # square pixels in a 16:9 frame, 86.4 degrees from left to right
FAMILIES: dict[str, dict[str, Preset]] = {
    "videox": _family(
        {
            "Pan_Left": (-1, 0, 0, 0),
            "Pan_Right": (1, 0, 0, 0),
            "Pan_Up": (0, 1, 0, 0),
            "Pan_Down": (0, -1, 0, 0),
            "Pan_Left_Up": (-1, 1, 0, 0),
            "Pan_Left_Down": (-1, -1, 0, 0),
            "Pan_Right_Up": (1, 1, 0, 0),
            "Pan_Right_Down": (1, -1, 0, 0),
            "Zoom_In": (0, 0, 2, 0),
            "Zoom_Out": (0, 0, -2, 0),
            "ACW": (0, 0, 0, -1),
            "CW": (0, 0, 0, 1),
        },
        frames=FRAMES_OF_FILES,
        focal=_VIDEOX_FOCAL,
    ),
    "diffsynth": _family(
        {
            "Left": (-1, 0, 0, 0),
            "Right": (1, 0, 0, 0),
            "Up": (0, 1, 0, 0),
            "Down": (0, -1, 0, 0),
            "LeftUp": (-1, 1, 0, 0),
            "LeftDown": (-1, -1, 0, 0),
            "RightUp": (1, 1, 0, 0),
            "RightDown": (1, -1, 0, 0),
            "In": (0, 0, 1, 0),
            "Out": (0, 0, -1, 0),
        },
        frames=FRAMES_OF_FILES,
        focal=_VIDEOX_FOCAL,
    ),
    "comfy": _family(
        {
            "Static": (0, 0, 0, 0),
            "Pan Left": (-1, 0, 0, 0),
            "Pan Right": (1, 0, 0, 0),
            "Pan Up": (0, 1, 0, 0),
            "Pan Down": (0, -1, 0, 0),
            "Zoom In": (0, 0, 2, 0),
            "Zoom Out": (0, 0, -2, 0),
            "Anti Clockwise (ACW)": (0, 0, 0, -1),
            "ClockWise (CW)": (0, 0, 0, 1),
        },
        frames=None,
        focal=(0.5, 0.5),
    ),
}
PRESETS: dict[str, Preset] = {
    f"{family}:{name}": preset for family, presets in FAMILIES.items() for name, preset in presets.items()
}
"""By full name, such as "comfy:Zoom In"."""


def find_preset(name: str) -> Preset:
    """The preset of a name; capitals, spaces, "_" and "-" do not matter, and "comfy:ACW" stands for its long name.

    Raises:
        InputError: no preset has that name; the message names the nearest one.
    """
    known = {_plain(full): full for full in PRESETS}
    known |= {_plain(full.split(":")[0] + ":" + full[full.index("(") :]): full for full in PRESETS if "(" in full}
    if _plain(name) in known:
        return PRESETS[known[_plain(name)]]
    hint = nearest(_plain(name), known)
    for plain, full in known.items():
        hint = hint.replace(repr(plain), repr(full))
    raise InputError(
        f"camera preset: expected one of {', '.join(FAMILIES)}, a colon and its name for it, such as 'comfy:Zoom In', "
        f"found {name!r}{hint}"
    )


def preset_intrinsics(focal: tuple[float, float], *, height: int, width: int) -> Tensor:
    """Intrinsics of a preset in a frame of any shape.

    The focal lengths belong to a 1280x720 frame, which is resized until it covers the asked frame, and cropped at its
    centre. ComfyUI's 0.5 and 0.5 are not square: 427 and 240 pixels at 832x480.

    Args:
        focal: fx over the width, fy over the height.
        height: pixels.
        width: pixels.

    Returns:
        K, [3, 3] float64.
    """
    scale = max(height / SOURCE_HEIGHT, width / SOURCE_WIDTH)
    fx, fy = focal[0] * SOURCE_WIDTH * scale, focal[1] * SOURCE_HEIGHT * scale
    return torch.tensor([[fx, 0, width / 2], [0, fy, height / 2], [0, 0, 1]], dtype=torch.float64)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9:]", "", name.casefold())
