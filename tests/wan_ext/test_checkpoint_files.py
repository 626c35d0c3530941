"""Laws of checkpoint files: every layout reads back what was written, and every broken one says what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import InputError
from wan_ext.checkpoint_files import open_checkpoint

TENSORS = {
    "blocks.0.q.weight": torch.arange(12.0).view(3, 4),
    "blocks.0.q.bias": torch.arange(3.0).bfloat16(),
    "blocks.1.q.weight": torch.arange(12.0).view(4, 3).half(),
    "scale": torch.tensor(0.5),
    "fp8": torch.arange(8.0).to(torch.float8_e4m3fn),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "empty": torch.zeros(0),
}


def assert_holds_all(checkpoint) -> None:
    assert sorted(checkpoint.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        found = checkpoint.get(name)
        assert found.dtype == tensor.dtype == checkpoint.dtype(name)
        assert found.shape == tensor.shape == checkpoint.shape(name)
        assert torch.equal(found.float(), tensor.float())


def write_shards(folder, *, index: bool) -> None:
    folder.mkdir()
    names = sorted(TENSORS)
    parts = [names[:3], names[3:]]
    files = [f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: TENSORS[name] for name in part}, folder / file)
    if index:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_every_layout_reads_back_what_was_written(tmp_path):
    save_file(TENSORS, tmp_path / "one.safetensors", metadata={"author": "us"})
    save_file({f"model.diffusion_model.{n}": t for n, t in TENSORS.items()}, tmp_path / "comfy.safetensors")
    torch.save(TENSORS, tmp_path / "new.pth")
    torch.save({"state_dict": TENSORS}, tmp_path / "nested.pth")
    write_shards(tmp_path / "shards", index=True)
    write_shards(tmp_path / "no_index", index=False)
    for path in sorted(tmp_path.iterdir()):
        assert_holds_all(open_checkpoint(path))
    assert_holds_all(open_checkpoint(tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json"))
    assert open_checkpoint(tmp_path / "one.safetensors").metadata["author"] == "us"


def test_files_from_before_zip_are_read(tmp_path):
    old = {name: tensor for name, tensor in TENSORS.items() if name != "fp8"}  # there was no fp8 then
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path / "old.pt")
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in old.items())


def test_the_wanted_file_of_a_folder_is_found_among_others(tmp_path):
    save_file(TENSORS, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "models_t5.safetensors")
    assert_holds_all(open_checkpoint(tmp_path))
    assert open_checkpoint(tmp_path, stems=("models_t5",)).names() == ["x"]


def test_a_tensor_read_from_a_pth_owns_its_memory(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.ones(5000)}, path)
    tensor = open_checkpoint(path).get("w")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tensor, torch.ones(5000))


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssFile:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of this process")
def test_reading_a_pth_leaves_no_mapping_in_memory(tmp_path):
    torch.save({f"w{i}": torch.zeros(2**20) for i in range(12)}, tmp_path / "w.pth")  # 48 MB
    checkpoint = open_checkpoint(tmp_path / "w.pth")
    checkpoint.get("w0")
    before = resident_file_bytes()
    for name in checkpoint.names():
        checkpoint.get(name)
    assert resident_file_bytes() - before < 2**23


def test_names_and_shapes_are_known_without_reading_weights(tmp_path, monkeypatch):
    from wan_ext.tensor_files import SafetensorsFile

    save_file(TENSORS, tmp_path / "one.safetensors")
    monkeypatch.setattr(SafetensorsFile, "get", None)
    checkpoint = open_checkpoint(tmp_path / "one.safetensors")
    assert checkpoint.shapes()["blocks.0.q.weight"] == (3, 4)
    assert sorted(checkpoint.names(), key=checkpoint.position)[0] in TENSORS


def broken_files(folder) -> dict[str, str]:
    """Files with something wrong, and what the error must say about each."""
    whole = folder / "whole.safetensors"
    save_file(TENSORS, whole)
    data = whole.read_bytes()
    torch.save(TENSORS, folder / "whole.pth")
    pth = (folder / "whole.pth").read_bytes()
    torch.save({"model": object.__new__(_Stranger)}, folder / "objects.pth")
    torch.save({"step": 3}, folder / "numbers.pth")
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    contradiction = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    content = {
        "half.safetensors": (data[: len(data) - 5], "truncated: expected .* bytes, found"),
        "headless.safetensors": (data[:20], "truncated"),
        "empty.safetensors": (b"", "found an empty file"),
        "page.safetensors": (b"<!DOCTYPE html><html>Sign in</html>", "found a web page"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "model.gguf": (b"GGUF" + bytes(60), "GGUF"),
        "noise.safetensors": (bytes(range(1, 200)), "truncated or of another type"),
        "json.safetensors": ((9).to_bytes(8, "little") + b"[1, 2, 3]", "expected a safetensors file"),
        "f4.safetensors": (len(header).to_bytes(8, "little") + header + b"\0", "tensor x: .* found F4"),
        "lies.safetensors": (len(contradiction).to_bytes(8, "little") + contradiction + bytes(8), "contradicts itself"),
        "half.pth": (pth[: len(pth) // 2], "expected a whole PyTorch file"),
        "page.pth": (b"<html></html>", "found a web page"),
        "noise.pth": (bytes(range(1, 200)), "expected a PyTorch file"),
        "broken.index.json": (b"{", "expected the index"),
    }
    for name, (bytes_, _) in content.items():
        (folder / name).write_bytes(bytes_)
    return {name: message for name, (_, message) in content.items()} | {
        "objects.pth": "Python objects",
        "numbers.pth": "expected a dictionary of tensors",
        "nowhere.safetensors": "found nothing",
    }


class _Stranger:
    """A class that a checkpoint has no business to hold."""


def test_broken_files_say_what_they_are(tmp_path):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(InputError, match=message) as error:
            open_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(error.value), name
        assert "\n" not in str(error.value), name


def test_folders_without_one_model_say_what_they_hold(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="expected a checkpoint .* found none"):
        open_checkpoint(tmp_path / "nothing")

    two = tmp_path / "two"
    for name in ("low_noise_model", "high_noise_model"):
        (two / name).mkdir(parents=True)
        save_file(TENSORS, two / name / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"several \(high_noise_model, low_noise_model\)"):
        open_checkpoint(two)

    several = tmp_path / "several"
    several.mkdir()
    save_file(TENSORS, several / "a.safetensors")
    save_file(TENSORS, several / "b.safetensors")
    with pytest.raises(InputError, match=r"found a\.safetensors, b\.safetensors; give the path"):
        open_checkpoint(several)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path, index):
    write_shards(tmp_path / "model", index=index)
    (tmp_path / "model" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    message = r"1 of its 2 shards are missing \(diffusion.*00002-of" if index else "expected 00002 shards, found 1"
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "model")


def test_the_hub_is_asked_only_when_the_path_says_so(tmp_path, monkeypatch):
    asked = []
    save_file(TENSORS, tmp_path / "w.safetensors")

    def download(repository, path):
        asked.append((repository, path))
        return str(tmp_path / "w.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match="found nothing"):
        open_checkpoint("Wan-AI/model/w.safetensors")
    assert asked == []
    assert_holds_all(open_checkpoint("hub:Wan-AI/model/split/w.safetensors"))
    assert asked == [("Wan-AI/model", "split/w.safetensors")]
    with pytest.raises(InputError, match="expected hub:owner/name/path"):
        open_checkpoint("hub:Wan-AI/model")  # a whole repository


def test_a_failed_download_is_one_line(monkeypatch):
    def fail(repository, path):
        raise OSError("cannot reach the hub\nand a long story")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(
        InputError, match=r"^hub:a/b/c\.pth: cannot be downloaded from the hub \(cannot reach the hub\)$"
    ):
        open_checkpoint("hub:a/b/c.pth")
