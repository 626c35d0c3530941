"""--reuse_musubi_caches: what musubi-tuner has encoded with the same model is taken over, by both commands."""

import pytest
import torch
from safetensors.torch import save_file

import cache_latents
import cache_text
from core.errors import InputError
from core.files import read_safetensors, save_safetensors
from tests.commands.conftest import FRAMES, HEIGHT, TINY, WIDTH

NAMES = {"latents": f"latents_2x{HEIGHT // 8}x{WIDTH // 8}_bfloat16", "context": "varlen_t5_bfloat16"}


@pytest.fixture
def musubi(world):
    """The world's latent and text caches as musubi-tuner would have left them, and none of ours."""
    ours = {}
    for file in world.cache_files:
        if "camera" in file.name:
            continue
        tensors, metadata = read_safetensors(file)
        ours[file.name] = tensors
        stem = file.name.partition(".")[0]
        entries = {"architecture": "wan", "format_version": "1.0.1"}
        if "context" in tensors:
            name, entries["caption1"] = f"{stem}_wan_te", metadata["caption"]
        else:
            name = f"{stem}_00000-{FRAMES:03d}_{WIDTH:04d}x{HEIGHT:04d}_wan"
            entries |= {"width": str(WIDTH), "height": str(HEIGHT), "frame_count": str(FRAMES)}
        stored = {NAMES[key]: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
        save_file(stored, file.parent / f"{name}.safetensors", entries)
        file.unlink()
    return ours


def reuse(world, **options):
    cache_latents.main(cache_latents.Options(dataset_config=world.toml, device="cpu", reuse_musubi_caches=True))
    cache_text.main(cache_text.Options(dataset_config=world.toml, device="cpu", reuse_musubi_caches=True, **options))


@pytest.mark.parametrize("fp8", [False, True])
def test_caches_are_taken_over_and_current(world, musubi, capsys, fp8):
    reuse(world, fp8_t5=fp8)
    output = capsys.readouterr().out
    assert "3 clips taken over" in output and "3 captions taken over" in output
    for name, tensors in musubi.items():
        found, metadata = read_safetensors(world.folder / "cache" / name)
        assert "_wan" in metadata["origin"]
        for key, tensor in tensors.items():
            assert torch.equal(found[key], tensor.to(torch.bfloat16).to(tensor.dtype))
    before = {file: file.stat().st_mtime_ns for file in world.cache_files}
    world.cache(verify=True)
    assert before == {file: file.stat().st_mtime_ns for file in world.cache_files}


def test_what_is_missing_is_encoded_and_said(world, musubi, capsys):
    gone = {file for file in world.cache_files if file.name.startswith("0001") and "_wan" in file.name}
    for file in gone:
        file.unlink()
    reuse(world)
    output = capsys.readouterr().out
    assert len(gone) == 2 and output.count("1 left to encode") == 2 and output.count("encoded: ") == 2
    for name, tensors in musubi.items():
        found, metadata = read_safetensors(world.folder / "cache" / name)
        assert ("origin" in metadata) != name.startswith("0001")
        if name.startswith("0001"):
            assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_another_vae_is_refused(world, musubi, tmp_path):
    tensors, metadata = read_safetensors(TINY / "Wan2.1_VAE.safetensors")
    last = {name: 1.5 * tensors[name] for name in ("conv1.weight", "conv1.bias")}
    save_safetensors(tensors | last, tmp_path / "vae.safetensors", metadata)
    options = {"dataset_config": world.toml, "device": "cpu", "reuse_musubi_caches": True}
    with pytest.raises(InputError, match="another VAE"):
        cache_latents.main(cache_latents.Options(vae=tmp_path / "vae.safetensors", **options))
    assert not [file for file in world.cache_files if file.name.endswith("_latents.safetensors")]
