"""Validation of held-out clips: each is filmed with what belongs to it, in its own room, and the curves are medians."""

from dataclasses import fields, replace

import pytest
import torch

from evaluation import validation
from evaluation.validation import CameraValidation, HeldOutClip
from scenes.motion import film
from scenes.scene import make_scene
from wan_ext.configs import VARIANTS

ROOMS = (1, 2, 9, 9)
SHAPES = {
    "context": (1, 4, 8),
    "condition": (1, 20, 2, 2, 3),
    "image_context": (1, 7, 5),
    "first_latents": (1, 16, 1, 2, 3),
}


class Vae:
    """A decoder that remembers where it was."""

    def __init__(self) -> None:
        self.device, self.visits = "home", []

    def to(self, device):
        self.device = device
        self.visits.append(device)
        return self


class Finder:
    """A stand-in for the alignment: finds the asked path, shifted by a tenth of the room's number."""

    made: list[int] = []

    def __init__(self, renderer) -> None:
        self.room = renderer
        Finder.made.append(renderer)

    def recover(self, frames, *, K, start):
        c2w = asked_path().c2w.clone()
        c2w[:, 0, 3] += self.room / 10
        return c2w, 0.5


def asked_path():
    return film(make_scene(0), 1, num_frames=5, height=16, width=24, move="truck")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Four clips, and how each was filmed."""
    generator = torch.Generator().manual_seed(0)
    clips = [
        HeldOutClip(
            name=f"clip{index}",
            asked=asked_path(),
            room=room,
            **{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()},
        )
        for index, room in enumerate(ROOMS)
    ]
    filmed, drawn = [], []
    Finder.made = []
    monkeypatch.setattr(validation, "PathFinder", Finder)
    monkeypatch.setattr(validation, "Renderer", lambda room, height: room)
    monkeypatch.setattr(validation, "make_scene", lambda seed: seed)
    monkeypatch.setattr(validation, "film_paths", lambda experts, **how: filmed.append(how) or torch.zeros(1))
    monkeypatch.setattr(
        validation, "decode_frames", lambda vae, latents: torch.zeros(1, 5, 16, 24, 3, dtype=torch.uint8)
    )
    monkeypatch.setattr(validation, "plot_recovered", lambda asked, c2w, file, comparison: drawn.append(file))

    def make(seed: int = 0, clips=clips, vae=None) -> CameraValidation:
        variant = replace(VARIANTS["tiny"], steps=6, shift=4.5)
        how = {"variant": variant, "vae": vae or Vae(), "estimator": "render", "folder": tmp_path, "device": "there"}
        return CameraValidation(clips, seed=seed, **how)

    make.clips, make.filmed, make.drawn = clips, filmed, drawn
    return make


def test_every_clip_is_filmed_with_what_belongs_to_it(world):
    world()({}, 7)
    assert len(world.filmed) == len(world.clips)
    for clip, how in zip(world.clips, world.filmed, strict=True):
        assert torch.equal(how["conditions"].prompt, clip.context)
        for name in ("condition", "image_context", "first_latents"):
            assert torch.equal(getattr(how["conditions"], name), getattr(clip, name))
        cameras = how["cameras"]
        assert torch.equal(cameras.c2w[0], clip.asked.c2w) and torch.equal(cameras.K[0], clip.asked.K)
        assert (cameras.height, cameras.width) == (16, 24)
        assert (how["sampling"].steps, how["sampling"].shift, how["device"]) == (6, 4.5, "there")
    assert {field.name for field in fields(HeldOutClip)} == {"name", "asked", "room", *SHAPES}


def test_the_noise_of_a_clip_is_its_own_and_the_same_every_time(world):
    once = world()
    once({}, 1)
    once({}, 2)
    world(seed=1)({}, 1)
    seeds = [how["seeds"] for how in world.filmed]
    assert seeds[:4] == seeds[4:8] and len(set(seeds[:4])) == 4
    assert not set(seeds[:4]) & set(seeds[8:])


def test_clips_are_looked_for_in_their_own_rooms_and_curves_are_medians(world):
    run = world()
    curves = run({}, 3)
    assert curves["validation/trans_err"] == pytest.approx(0.55)  # of 0.1, 0.2, 0.9 and 0.9
    assert curves["validation/rot_err_degrees"] == pytest.approx(0, abs=1e-4)
    assert curves["validation/failed_share"] == 0
    assert [file.name for file in world.drawn] == [f"clip{index}.png" for index in range(4)]
    assert {file.parent.name for file in world.drawn} == {"step00000003"}
    assert Finder.made == [1, 2, 9]  # a room of two clips in a row is rendered once
    assert list(run._finders) == [9]  # and only one is kept


def test_the_decoder_goes_home_whatever_happens(world, monkeypatch):
    vae = Vae()
    world(vae=vae)({}, 1)
    assert vae.visits == ["there", "home"] * 4

    def broken(vae, latents):
        raise RuntimeError("no memory")

    monkeypatch.setattr(validation, "decode_frames", broken)
    with pytest.raises(RuntimeError):
        world(vae=vae)({}, 2)
    assert vae.device == "home"
