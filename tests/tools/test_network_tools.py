"""tools/inspect_network.py and tools/export_network.py on files of small networks: text, files, one line of error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import core.options
from core.errors import InputError
from core.files import read_safetensors
from networks.files import save_network
from networks.inspection import inspect
from tests.networks.cases import VARIANTS, disturb, make_dit, make_network
from tools import export_network, inspect_network
from wan_ext import configs
from wan_ext.loading import save_dit

I2V = VARIANTS["I2V"]


@pytest.fixture
def small_models(monkeypatch) -> None:
    """The tasks' names mean the small models of the tests."""
    for variant in VARIANTS.values():
        monkeypatch.setitem(configs.VARIANTS, variant.name, variant)


def saved(folder: Path, kind: str = "plucker", *, expert: str = "high", trained: bool = True, **changes) -> Path:
    network = make_network(make_dit(I2V), I2V, kind, expert=expert, **changes)
    if trained:
        disturb(network)
    return save_network(network, folder, "mine", {"prompt": "a room"})[0]


def export(output: Path, *weights: Path, **options) -> None:
    export_network.main(export_network.Options(network_weights=weights, output=output, **options))


# ---- inspect --------------------------------------------------------------------------------------------------------


def test_the_table_answers_the_question(tmp_path: Path) -> None:
    path = saved(tmp_path, "film")
    text = inspect_network.describe(inspect(path))
    lines = text.splitlines()
    assert lines[0] == str(path)
    assert lines[1].endswith("LoRA of this trainer (networks.lora_camera), high-noise expert of i2v-A14B")
    assert lines[2].endswith("yes, and trained: nothing in it is zero")
    for word in ("injection     film", "pose frame    scene", "scale rule    none", "camera blocks 0-1", "a room"):
        assert word in text
    rows = {line.split()[0]: line for line in lines if line.startswith("  camera_")}
    assert any(name.startswith("camera_branches.*.") for name in rows) and "untrained" not in text

    text = inspect_network.describe(inspect(saved(tmp_path / "new", "film", trained=False)))
    assert "yes, but UNTRAINED" in text and "camera_branches.*.scale_shift" in text
    assert all("untrained" in line for line in text.splitlines() if line.startswith("  LoRA "))


def test_several_files_and_exit_codes(tmp_path: Path, capsys) -> None:
    path = saved(tmp_path, "bias")
    inspect_network.main(inspect_network.Options(files=(path, path)))
    assert capsys.readouterr().out.count("yes, and trained") == 2
    path.write_bytes(path.read_bytes()[:100])
    for files in ((path,), (tmp_path / "none.safetensors",), ()):
        with pytest.raises(SystemExit) as ended:
            core.options.run(inspect_network.main, inspect_network.Options(files=files))
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1


# ---- export ---------------------------------------------------------------------------------------------------------


def test_both_experts_in_one_folder(small_models, tmp_path: Path) -> None:
    weights = [saved(tmp_path, expert=expert) for expert in ("high", "low")]
    for seed, expert in enumerate(("high", "low")):
        save_dit(make_dit(I2V, seed=seed), tmp_path / expert)
    export(tmp_path / "out", *weights, dit=tmp_path / "low", dit_high_noise=tmp_path / "high")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"README.md"} | {
        f"mine_{expert}_noise_{what}.safetensors"
        for expert in ("high", "low")
        for what in ("base_with_camera", "lora_comfyui", "lora_diffusers")
    }
    readme = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in names - {"README.md"})
    assert "pose frame `scene`" in readme and readme.count("load_into_transformer_2=True") == 1
    for seed, expert in enumerate(("high", "low")):
        merged, metadata = read_safetensors(tmp_path / "out" / f"mine_{expert}_noise_base_with_camera.safetensors")
        camera, _ = read_safetensors(tmp_path / f"mine_{expert}_noise_camera.safetensors")
        base = make_dit(I2V, seed=seed).state_dict()
        assert merged.keys() == base.keys() | camera.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in (base | camera).items())
        assert metadata["pose_frame"] == "scene" and "camera_file" not in metadata
    assert inspect(tmp_path / "out" / "mine_low_noise_base_with_camera.safetensors").answer.startswith("yes")


def test_the_lora_alone_of_any_network(small_models, tmp_path: Path) -> None:
    export(tmp_path / "out", saved(tmp_path, "film"), lora_only=True)
    assert len(list((tmp_path / "out").glob("*_lora_*.safetensors"))) == 2
    assert not list((tmp_path / "out").glob("*base*"))
    export(tmp_path / "again", tmp_path / "out" / "mine_high_noise_lora_diffusers.safetensors", lora_only=True)
    first, _ = read_safetensors(tmp_path / "out" / "mine_high_noise_lora_diffusers.safetensors")
    again, _ = read_safetensors(tmp_path / "again" / "mine_high_noise_lora_diffusers_lora_diffusers.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(small_models, tmp_path: Path) -> None:
    save_dit(make_dit(I2V), tmp_path / "base")
    film, plucker = saved(tmp_path / "film", "film"), saved(tmp_path / "plucker")
    for weights, options, message in (
        ((film,), {"dit_high_noise": tmp_path / "base"}, "injection film: expected plucker"),
        ((plucker,), {}, "--dit_high_noise: expected the base model"),
        ((plucker,), {"dit_high_noise": tmp_path / "film"}, "expected"),
        ((), {}, "--network_weights: expected the LoRA files"),
        ((plucker.with_name("mine_high_noise_camera.safetensors"),), {}, "expected a LoRA file, found the camera"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            export(tmp_path / "out", *weights, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_the_expert_that_hears_no_camera_has_its_lora_exported(small_models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(
        configs.VARIANTS, I2V.name, replace(I2V, boundary=0.9)
    )  # two experts, one of which hears the camera
    network = make_network(
        make_dit(I2V), I2V, expert="low", network_args={"injection": "plucker", "camera_experts": "high"}
    )
    disturb(network)
    export(tmp_path / "out", save_network(network, tmp_path, "mine", {})[0])
    assert not list((tmp_path / "out").glob("*base*"))
