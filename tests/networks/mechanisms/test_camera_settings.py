"""Choices of a mechanism: read from network arguments, written and read back, refused where nothing uses them."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from core.errors import InputError
from networks.mechanisms.registry import INJECTIONS, default_injection
from networks.mechanisms.settings import (
    OPTIONS,
    CameraSettings,
    camera_settings_from_metadata,
    read_camera_settings,
)
from wan_ext.configs import VARIANTS, get_variant

ROOT = Path(__file__).parents[3]
VALUES = {
    "camera_hidden": "64",
    "camera_rank": "64",
    "camera_blocks": "3-19",
    "camera_absolute": "yes",
    "camera_experts": "low",
    "camera_dropout": "0.1",
}


def read(args: dict[str, str], *, task: str = "t2v-A14B", pose_frame: str = "scene") -> CameraSettings:
    return read_camera_settings(
        args,
        injection=args["injection"],
        defaults=INJECTIONS[args["injection"]].defaults,
        variant=get_variant(task),
        pose_frame=pose_frame,
        scale_rule="metric:0.5",
    )


def everything(injection: str) -> dict[str, str]:
    used = INJECTIONS[injection].defaults.options
    return {"injection": injection} | {name: value for name, value in VALUES.items() if name in used}


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("pose_frame", ["scene", "first"])
def test_settings_survive_their_metadata(injection: str, chosen: bool, pose_frame: str) -> None:
    settings = read(everything(injection) if chosen else {"injection": injection}, pose_frame=pose_frame)
    assert camera_settings_from_metadata(settings.metadata(), injections=INJECTIONS) == settings
    assert (settings.scale_rule, settings.pose_frame, settings.injection) == ("metric:0.5", pose_frame, injection)
    arguments = {name: str(value) for name, value in settings.arguments().items()}
    assert read(arguments, pose_frame=pose_frame) == settings


def test_every_choice_arrives() -> None:
    settings = read(everything("ray_attention"))
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    assert given == given | {
        "hidden": 64, "rank": 64, "blocks": (3, 19), "absolute": True, "experts": "low", "dropout": 0.1,
    }  # fmt: skip
    assert list(settings.block_numbers) == list(range(3, 20))
    assert read({"injection": "self_attention", "camera_rank": "full"}).rank == "full"
    assert read({"injection": "film"}).blocks == (0, 39) and read({"injection": "film"}, task="ti2v-5B").blocks == (
        0,
        29,
    )
    assert read({"injection": "film", "camera_blocks": "7"}).blocks == (7, 7)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_an_option_that_the_mechanism_does_not_use_is_refused(injection: str) -> None:
    defaults = INJECTIONS[injection].defaults
    for name, value in VALUES.items():
        if name not in defaults.options:
            with pytest.raises(InputError, match=f"{name}: injection {injection} uses .*, found {name}"):
                read({"injection": injection, name: value})
    assert set(defaults.options) <= set(OPTIONS)


@pytest.mark.parametrize(
    ("injection", "args", "message"),
    [
        ("film", {"camera_blocks": "0-40"}, "camera_blocks: expected a range between 0 and 39 .*, found '0-40'"),
        ("film", {"camera_blocks": "5-3"}, "camera_blocks: expected a range"),
        ("film", {"camera_blocks": "-3"}, "camera_blocks: expected a range"),
        ("film", {"camera_blocks": "1-2-3"}, "camera_blocks: expected a range"),
        ("film", {"camera_rank": "full"}, "camera_rank: expected a whole number of at least 1, found 'full'"),
        ("self_attention", {"camera_rank": "half"}, "camera_rank: expected a whole number"),
        ("bias", {"camera_dropout": "1"}, "camera_dropout: expected a share from 0 to below 1, found '1'"),
        ("bias", {"camera_dropout": "often"}, "camera_dropout: expected a share"),
        ("bias", {"camera_experts": "lo"}, "camera_experts: expected one of high, low, both, found 'lo'"),
        ("ray_attention", {"camera_absolute": "1"}, "camera_absolute: expected one of yes, no"),
        (
            "ray_attention",
            {"camera_absolute": "no", "camera_hidden": "64"},
            "camera_hidden: without camera_absolute=yes",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(injection: str, args: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read({"injection": injection} | args)


def test_a_model_of_one_expert_has_no_high_one() -> None:
    with pytest.raises(InputError, match="ti2v-5B has one expert, called low; found high"):
        read({"injection": "bias", "camera_experts": "high"}, task="ti2v-5B")


def test_a_mechanism_of_another_version_is_named() -> None:
    metadata = read({"injection": "film"}).metadata() | {"injection": "flim"}
    with pytest.raises(InputError, match="found flim .did you mean 'film'"):
        camera_settings_from_metadata(metadata, injections=INJECTIONS)
    assert camera_settings_from_metadata({"pose_frame": "scene"}, injections=INJECTIONS) is None


@pytest.mark.parametrize(("pose_frame", "world"), [("scene", "scene"), ("first", "first")])
def test_the_default_is_the_mechanism_whose_videos_followed_best(pose_frame: str, world: str) -> None:
    """The figures that the documentation shows decide, not taste."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "camera_mechanisms.json").read_text())
    rows = [row for row in figures["worlds"][world] if row["mechanism"] in INJECTIONS]
    best = max(rows, key=lambda row: (row["top1"], -row["rotation_degrees"]))
    assert default_injection(VARIANTS["t2v-A14B"], pose_frame) == best["mechanism"]
    assert default_injection(VARIANTS["fun-camera-A14B"], pose_frame) == "plucker"
