"""Settings: the user goes before the network, the network before the task; networks of two kinds do not go together."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InputError
from networks.video_settings import leading_metadata, settle
from wan_ext.configs import get_variant

VARIANT = get_variant("tiny")
METADATA = {"prompt": "a room", "height": "64", "width": "96", "num_frames": "17", "fps": "8"}
CAMERA = {"injection": "bias", "pose_frame": "first", "scale_rule": "none"}


def settled(metadata=METADATA, variant=VARIANT, **given):
    return settle(given, variant=variant, metadata=metadata, network="net.safetensors")


def test_the_user_goes_before_the_file_and_the_file_before_the_task():
    settings, sources = settled(width=48, height=None, steps=3)
    assert (settings.width, settings.height, settings.fps) == (48, 64, 8)
    assert (settings.steps, settings.shift) == (3, VARIANT.shift)
    assert sources["width"] == sources["steps"] == "given"
    assert sources["height"] == "from net.safetensors"
    assert sources["shift"] == "default of tiny"
    assert vars(settings).keys() == sources.keys()


def test_zero_and_nothing_are_not_the_same():
    settings, sources = settled(seed=0, guidance_scale=0.0, negative_prompt="")
    assert (settings.seed, settings.guidance_scale, settings.negative_prompt) == (0, 0.0, "")
    assert sources["seed"] == sources["guidance_scale"] == sources["negative_prompt"] == "given"


def test_without_a_network_the_task_decides():
    settings, sources = settled(metadata={}, prompt="a room")
    assert (settings.height, settings.num_frames) == (VARIANT.height, VARIANT.num_frames)
    assert set(sources.values()) == {"given", "default of tiny"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prompt": ""}, "--prompt"),
        ({"height": 30}, "multiples of 16, found 30 96; the nearest that fits is 32 96"),
        ({"width": 0}, "multiples of 16"),
        ({"num_frames": 0}, "video_length"),
        ({"steps": 0}, "infer_steps"),
        ({"boundary": 1.5}, "timestep_boundary"),
        ({"boundary": 0.0}, "timestep_boundary"),
        ({"camera_guidance": -1.0}, "camera_guidance"),
        ({"camera_guidance": float("nan")}, "camera_guidance"),
    ],
)
def test_what_cannot_be_filmed_is_named(given, named):
    with pytest.raises(InputError, match=named):
        settled(**given)


def test_one_expert_has_no_boundary():
    with pytest.raises(InputError, match="two experts"):
        settled(variant=replace(VARIANT, boundary=None), boundary=0.9)


def test_the_network_with_a_camera_leads():
    files = {Path("style.safetensors"): {"prompt": "style"}, Path("camera.safetensors"): CAMERA}
    assert leading_metadata(files) == ("camera.safetensors", CAMERA)
    assert leading_metadata({Path("style.safetensors"): {}}) == ("style.safetensors", {})
    assert leading_metadata({}) == ("", {})


@pytest.mark.parametrize(("key", "value"), [("pose_frame", "scene"), ("scale_rule", "max_norm")])
def test_networks_of_two_conventions_do_not_go_together(key, value):
    low, lora = Path("low.safetensors"), Path("style.safetensors")
    files = {Path("high.safetensors"): CAMERA, lora: {}, low: CAMERA | {key: value}}
    with pytest.raises(InputError, match=rf"low\.safetensors: .*high\.safetensors.*'{CAMERA[key]}', found '{value}'"):
        leading_metadata(files)
    assert leading_metadata(files | {low: CAMERA})[0] == "high.safetensors"
