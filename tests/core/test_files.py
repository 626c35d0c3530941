"""Laws of files: whole or absent, and identified by their content."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from core.errors import InputError
from core.files import (
    Writer,
    atomic_folder,
    atomic_path,
    fingerprint,
    read_safetensors,
    read_safetensors_header,
    read_safetensors_metadata,
    remove_abandoned,
    save_safetensors,
    this_writer,
)


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_path_appears_only_when_complete(tmp_path):
    target = tmp_path / "deep" / "a.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"x")
        assert not target.exists()
        assert temporary.suffix == ".bin"
    assert target.read_bytes() == b"x"


def test_what_a_dead_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"whole")
    code = "import os, sys; from core.files import atomic_path\nwith atomic_path(sys.argv[1]): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "left.safetensors")], check=False)
    (left,) = tmp_path.glob(".left.*")
    with atomic_path(tmp_path / "new.safetensors") as living:
        assert remove_abandoned(tmp_path) == [left]
        assert living.exists() and not left.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.safetensors", "new.safetensors"]
    assert remove_abandoned(tmp_path) == [] == remove_abandoned(tmp_path / "nowhere")


def test_a_writer_is_dead_only_where_that_is_known():
    here = this_writer()
    assert Writer.parse(str(here)) == here and not here.is_dead()
    assert replace(here, boot="other").is_dead() and replace(here, start="1").is_dead()
    assert not replace(here, machine="other", boot="other").is_dead()
    assert Writer.parse("x") is None and Writer.parse("") is None


def test_atomic_folder_replaces_as_a_whole(tmp_path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "state") as folder:
            (folder / content).write_text(content)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["two"]
    with pytest.raises(RuntimeError):
        with atomic_folder(tmp_path / "state") as folder:
            (folder / "three").write_text("three")
            raise RuntimeError
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_safetensors_round_trip(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    save_safetensors(tensors, tmp_path / "x.safetensors", {"k": "v"})
    back, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == read_safetensors_metadata(tmp_path / "x.safetensors") == {"k": "v"}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_the_header_tells_dtypes_and_shapes(tmp_path):
    save_safetensors({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x", {"k": "v"})
    assert read_safetensors_header(tmp_path / "x") == ({"a": ("F32", (2, 3)), "b": ("BF16", (4,))}, {"k": "v"})


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
@pytest.mark.parametrize("read", [read_safetensors, read_safetensors_header])
def test_truncated_safetensors_name_the_file(tmp_path, keep, read):
    path = tmp_path / "x.safetensors"
    save_safetensors({"a": torch.zeros(100)}, path, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="x.safetensors"):
        read(path)


def test_fingerprint_depends_on_content_alone(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    assert fingerprint(one) == fingerprint(two)
    two.write_bytes(b"Same")
    assert fingerprint(one) != fingerprint(two)


def test_fingerprint_of_a_large_file_sees_its_ends(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(70 * 2**20)
    before = fingerprint(path)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert fingerprint(path) != before
