"""Validation while training: it is written and logged, changes nothing of the training, and cannot end it."""

import json
from dataclasses import replace

import pytest
import torch

from core.errors import InputError
from core.files import read_safetensors
from evaluation import validation
from evaluation.validation import comparison_for, curves_of
from wan_ext.configs import VARIANTS


class Blind:
    """A stand-in for the alignment with a scene: sees the identity everywhere."""

    def __init__(self, renderer) -> None:
        pass

    def recover(self, frames, *, K, start):
        assert frames.dtype == torch.uint8
        return torch.eye(4, dtype=torch.float64).repeat(len(frames), 1, 1), 0.5


class Broken(Blind):
    def recover(self, frames, *, K, start):
        raise RuntimeError("no light")


@pytest.fixture
def held_out(world, monkeypatch):
    """The world with the rooms of its clips, and options that validate on its own clips."""
    scenes = [{"name": f"{index:04d}", "scene": 5} for index in range(3)]
    (world.folder / "scenes.json").write_text(json.dumps(scenes))
    monkeypatch.setitem(VARIANTS, "tiny", replace(VARIANTS["tiny"], steps=2))
    monkeypatch.setattr(validation, "PathFinder", Blind)
    monkeypatch.setattr(validation, "Renderer", lambda scene, height: None)
    monkeypatch.setattr(validation, "plot_recovered", lambda *_: None)
    return {"validate_camera_every": 2, "validation_config": world.toml, "validate_camera_estimator": "render"}


def same_weights(one, other):
    return all(
        torch.equal(tensor, read_safetensors(other / file.name)[0][name])
        for file in one.glob("net_*.safetensors")
        for name, tensor in read_safetensors(file)[0].items()
    )


def test_training_is_the_same_with_it_and_without(world, held_out):
    options = {"network_dropout": 0.3, "max_train_steps": 3}
    plain = world.train("plain", **options)
    validated = world.train("validated", **options, **held_out)
    assert same_weights(plain, validated)
    files = sorted(file.name for file in (validated / "validation").glob("*.json"))
    assert files == ["step00000002.json", "step00000003.json"]
    content = json.loads((validated / "validation" / files[0]).read_text())
    assert len(content["videos"]) == 3
    assert content["pose_frame"] == "scene"
    assert content["summary"]["trans_err_mean"]["of"] == 3


def test_one_expert_is_filmed_with_the_others_base(world, held_out):
    folder = world.train("low", experts="low", max_train_steps=1, **held_out)
    assert (folder / "validation/step00000001.json").exists()


def test_a_failed_validation_is_said_and_training_goes_on(world, held_out, monkeypatch, capsys):
    monkeypatch.setattr(validation, "PathFinder", Broken)
    folder = world.train("broken", max_train_steps=2, **held_out)
    assert (folder / "net_low_noise.safetensors").exists()
    assert "validation at step 2 failed: RuntimeError: no light" in capsys.readouterr().out


def test_what_cannot_be_validated_is_refused_first(world, held_out):
    with pytest.raises(InputError, match="both or none"):
        world.train("half", validate_camera_every=2)
    with pytest.raises(InputError, match="hears no camera"):
        world.train("deaf", network_module="networks.lora", network_args=(), **held_out)
    (world.folder / "scenes.json").unlink()
    with pytest.raises(InputError, match="scenes.json"):
        world.train("lost", **held_out)


def test_paths_are_compared_in_metres_only_where_both_have_them():
    assert comparison_for("render", "scene", "none").pose_frame == "scene"
    assert comparison_for("render", "first", "none").scale == "none"
    for estimator, frame, rule in (("sfm", "scene", "none"), ("render", "scene", "metric:2"), ("sfm", "first", "none")):
        assert vars(comparison_for(estimator, frame, rule)) == {"pose_frame": "first", "scale": "max"}
    lost = {"failed": 2, "videos": 2, "rot_err_mean_degrees": None, "trans_err_mean": None}
    assert curves_of(lost) == {"validation/failed_share": 1.0}
