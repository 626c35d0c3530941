"""Three caches per clip, left alone when current, written again when not."""

import pytest
import torch

import cache_camera
import cache_latents
import cache_text
from core.errors import InputError
from core.files import read_safetensors, save_safetensors
from tests.commands.conftest import TINY


def content(files):
    """What caches hold: metadata without the path of the source and the checksum, which counts it, and the tensors."""
    found = {}
    for file in files:
        tensors, metadata = read_safetensors(file)
        for name in ("source", "checksum"):
            metadata.pop(name, None)
        found[file.name] = (
            metadata,
            {name: x.contiguous().view(torch.uint8).numpy().tobytes() for name, x in tensors.items()},
        )
    return found


def times(files):
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_every_clip_has_three_caches(cached_once):
    assert len(cached_once.cache_files) == 3 * 3
    latents, _ = read_safetensors(next(f for f in cached_once.cache_files if "latents" in f.name))
    assert latents["latents"].shape == (16, 2, 4, 6)
    assert latents["latents"].std() > 0.1


def test_skip_existing_leaves_current_caches_alone(world):
    before = times(world.cache_files)
    world.cache(skip_existing=True)
    assert times(world.cache_files) == before


def test_skip_existing_writes_what_is_no_longer_current(world):
    before = times(world.cache_files)
    (world.folder / "videos/0000.txt").write_text("another caption")
    camera = world.folder / "cameras/0001.txt"
    lines = camera.read_text().splitlines()
    camera.write_text("\n".join([*lines[:-1], lines[-2]]) + "\n")
    broken = next(f for f in world.cache_files if f.name.startswith("0002") and "latents" in f.name)
    broken.write_bytes(broken.read_bytes()[:-7])
    world.cache(skip_existing=True)
    after = times(world.cache_files)
    changed = {name for name in after if after[name] != before[name]}
    assert {(name[:4], name.rsplit("_", 1)[1]) for name in changed} == {
        ("0000", "text.safetensors"),
        ("0001", "camera.safetensors"),
        ("0002", "latents.safetensors"),
    }


def test_what_is_written_again_is_said(world, capsys):
    (world.folder / "videos/0000.txt").write_text("another caption")
    world.cache(skip_existing=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("written again: ")]
    assert len(lines) == 1 and "0000" in lines[0] and "another caption" in lines[0]


def test_verify_reads_what_a_header_does_not_show(world, capsys):
    """A NaN in the middle of a file: its header, size and provenance are in order."""
    file = next(f for f in world.cache_files if f.name.startswith("0001") and "latents" in f.name)
    whole, before = content([file]), times(world.cache_files)
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    world.cache(skip_existing=True)
    assert content([file]) != whole
    world.cache(verify=True)
    assert content([file]) == whole and "NaN" in capsys.readouterr().out
    after = times(world.cache_files)
    assert {name for name in after if after[name] != before[name]} == {file.name}


def test_orphans_are_named_and_removed_on_request_only(world, capsys):
    others = [world.cache_files[0].parent / name for name in ("x_wan.safetensors", "y_latents.safetensors", "z.txt")]
    for other in others:
        other.write_bytes(b"of another program")
    (world.folder / "videos/0002.mp4").unlink()
    (world.folder / "videos/0002.txt").unlink()
    orphans = {f.name for f in world.cache_files if f.name.startswith("0002")}
    world.cache(skip_existing=True)
    assert all(name in {f.name for f in world.cache_files} for name in orphans) and len(orphans) == 3
    assert "--prune" in capsys.readouterr().out
    world.cache(skip_existing=True, prune=True)
    assert not orphans & {f.name for f in world.cache_files} and all(other.exists() for other in others)
    with pytest.raises(InputError, match="--prune --keep_cache"):
        world.cache(prune=True, keep_cache=True)


@pytest.mark.parametrize("skip_existing", [False, True])
def test_processes_share_the_clips_and_finish_for_each_other(world, monkeypatch, skip_existing):
    """Rank 1 of 2 runs first and alone: with --skip_existing it does the other's share too."""
    whole = content(world.cache_files)
    for file in world.cache_files:
        file.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    world.cache(skip_existing=skip_existing)
    first = {file.name for file in world.cache_files}
    assert first == set(whole) if skip_existing else 0 < len(first) < len(whole)
    monkeypatch.setenv("RANK", "0")
    world.cache(skip_existing=skip_existing)
    assert content(world.cache_files) == whole


def test_another_vae_makes_latents_stale(world, tmp_path):
    before = times(world.cache_files)
    options = {"dataset_config": world.toml, "device": "cpu", "skip_existing": True}
    tensors, metadata = read_safetensors(TINY / "Wan2.1_VAE.safetensors")
    name = max(tensors, key=lambda name: tensors[name].abs().sum())
    save_safetensors(tensors | {name: tensors[name] * 1.01}, tmp_path / "vae.safetensors", metadata)
    cache_latents.main(cache_latents.Options(vae=tmp_path / "vae.safetensors", **options))
    changed = {name for name, time in times(world.cache_files).items() if time != before[name]}
    assert len(changed) == 3
    assert all("latents" in name for name in changed)


def test_precisions_agree(world):
    """8-bit text features are close to the full ones, and not the same."""
    file = next(f for f in world.cache_files if f.name.startswith("0000") and "text" in f.name)
    full, _ = read_safetensors(file)
    cache_text.main(cache_text.Options(dataset_config=world.toml, fp8_t5=True, t5_cpu=True))
    eight, _ = read_safetensors(file)
    a, b = full["context"].float(), eight["context"].float()
    assert not torch.equal(a, b)
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_camera_caches_hold_the_processed_intrinsics(world):
    world.toml.write_text(world.toml.read_text().replace("[48, 32]", "[32, 32]"))
    cache_camera.main(cache_camera.Options(dataset_config=world.toml))
    square = [f for f in world.cache_files if "0032x0032_camera" in f.name]
    wide = [f for f in world.cache_files if "0048x0032_camera" in f.name]
    assert len(square) == len(wide) == 3
    for a, b in zip(square, wide, strict=True):
        k_square, k_wide = read_safetensors(a)[0]["K"], read_safetensors(b)[0]["K"]
        assert torch.equal(k_square[:, 0, 0], k_wide[:, 0, 0])  # the crop changes no focal length
        assert torch.equal(k_square[:, 0, 2], k_wide[:, 0, 2] - 8)  # and moves the principal point
