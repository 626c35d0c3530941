"""Where a model's files come from: flag before table before the official folder."""

import pytest

from core.errors import InputError
from core.model_files import resolve_model

NO_FLAGS = dict.fromkeys(("task", "ckpt_dir", "dit", "dit_high_noise", "vae", "t5", "tokenizer", "clip"))


@pytest.fixture
def folder(tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        (tmp_path / name).mkdir()
    (tmp_path / "Wan2.1_VAE.pth").touch()
    (tmp_path / "other.safetensors").touch()
    return tmp_path


def test_flag_beats_table_beats_folder(folder):
    table = {"task": "t2v-A14B", "ckpt_dir": str(folder)}
    files = resolve_model(NO_FLAGS, table=table, table_source=None, needs=("dit", "vae"))
    assert files.dit == folder / "low_noise_model"
    assert files.dit_high_noise == folder / "high_noise_model"
    assert files.vae == folder / "Wan2.1_VAE.pth"
    table["vae"] = str(folder / "other.safetensors")
    assert resolve_model(NO_FLAGS, table=table, table_source=None, needs=("vae",)).vae == folder / "other.safetensors"
    flags = NO_FLAGS | {"task": "tiny", "vae": folder / "Wan2.1_VAE.pth"}
    files = resolve_model(flags, table=table, table_source=None, needs=("vae",))
    assert (files.task, files.vae) == ("tiny", folder / "Wan2.1_VAE.pth")


def test_what_is_missing_is_named_with_both_ways_to_give_it(tmp_path):
    with pytest.raises(InputError, match=r"--vae.*\[model\].*vae = .*x\.toml"):
        resolve_model(NO_FLAGS | {"task": "tiny"}, table={}, table_source=tmp_path / "x.toml", needs=("vae",))


def test_a_path_that_does_not_exist_names_its_key(tmp_path):
    table = {"task": "tiny", "vae": str(tmp_path / "nothing.pth")}
    with pytest.raises(InputError, match=r"\[model\] vae.*nothing\.pth"):
        resolve_model(NO_FLAGS, table=table, table_source=tmp_path / "x.toml", needs=("vae",))
    with pytest.raises(InputError, match="Wan2.1_VAE.pth"):
        resolve_model(NO_FLAGS, table={"task": "tiny", "ckpt_dir": str(tmp_path)}, table_source=None, needs=("vae",))


def test_only_paths_that_say_hub_are_downloaded(folder, monkeypatch):
    asked = []

    def download(repository, inside):
        asked.append((repository, inside))
        return str(folder / "Wan2.1_VAE.pth")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    table = {"task": "tiny", "vae": "Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"}
    with pytest.raises(InputError, match="found nothing"):
        resolve_model(NO_FLAGS, table=table, table_source=None, needs=("vae",))
    assert not asked
    files = resolve_model(NO_FLAGS, table=table | {"vae": "hub:" + table["vae"]}, table_source=None, needs=("vae",))
    assert asked == [("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth")]
    assert files.vae == folder / "Wan2.1_VAE.pth"
