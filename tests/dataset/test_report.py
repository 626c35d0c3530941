"""Laws of the report: every problem at once, and what is said to be missing is what the commands would write."""

import pytest
import torch
from tiny_dataset import T5, VAE, World, latents

from core.errors import InputError
from dataset import cache
from dataset.cameras import read_clip_camera
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from dataset.report import Encoders, as_json, report

ENCODERS = Encoders(
    spatial_stride=16,
    temporal_stride=4,
    latent_stride=8,
    latent_channels=16,
    condition_channels=0,
    image_context=False,
    context_width=8,
    vae=VAE,
    text_encoder=T5,
)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        world.add_video(name)
    return world


def write_caches(clip) -> None:
    cache.write_latents(clip, latents(clip), encoder=VAE, crop=clip.crop)
    tokens = len(clip.caption.split()) + 1
    cache.write_text(clip, torch.zeros(tokens, 8), encoder=T5)
    cache.write_camera(clip, read_clip_camera(clip))


def test_a_sound_data_set_has_the_clips_of_the_commands_and_no_problem(world):
    config = read_dataset_config(world.toml())
    found = report(config, ENCODERS)
    assert [each.clip for each in found.clips] == list_clips(config, spatial_stride=16)
    assert not found.problems


def test_every_problem_is_found_at_once(world):
    (world.videos / "a.txt").unlink()
    (world.videos / "b.mp4").write_bytes(b"no video")
    lines = (world.cameras / "c.txt").read_text().splitlines()
    (world.cameras / "c.txt").write_text("\n".join(lines[:-1]))
    config = read_dataset_config(world.toml())
    found = report(config, ENCODERS)
    words = ("caption beside every video, missing: .*a.txt", "b.mp4", "c.txt")
    assert len(found.problems) == len(words)
    for problem, word in zip(found.problems, words, strict=True):
        assert "\n" not in problem and pytest.raises(InputError, match=word).matches(InputError(problem))
    assert [each.clip.source.name for each in found.clips] == ["c.mp4"]
    with pytest.raises(InputError, match="a.txt"):  # the commands stop at the first
        list_clips(config, spatial_stride=16)


def test_what_is_to_be_written_is_what_the_caches_weigh(world):
    config = read_dataset_config(world.toml())
    before = report(config, ENCODERS)
    assert before.pixels_to_encode == sum(17 * 48 * 64 for _ in before.clips)
    for each in before.clips:
        assert each.latents and each.text and each.camera
        write_caches(each.clip)
    after = report(config, ENCODERS)
    assert (after.bytes_to_write, after.pixels_to_encode) == (0, 0)
    assert all(each.latents is each.text is each.camera is None for each in after.clips)
    data = sum(16 * 5 * 6 * 8 * 4 + 17 * 25 * 8 for _ in after.clips)  # without the captions, which are estimates
    assert data < before.bytes_to_write < 1.1 * data


def test_a_stale_cache_says_why(world):
    config = read_dataset_config(world.toml())
    for each in report(config, ENCODERS).clips:
        write_caches(each.clip)
    (world.videos / "b.txt").write_text("another caption")
    stale = [each for each in report(config, ENCODERS).clips if each.text]
    assert [each.clip.source.name for each in stale] == ["b.mp4"] and "another caption" in str(stale[0].text)


def test_an_odd_camera_is_a_warning_and_no_problem(world):
    lines = (world.cameras / "a.txt").read_text().splitlines()
    poses = [number for number, line in enumerate(lines) if line and line[0] in "-0123456789"]
    for number in poses:
        lines[number] = lines[poses[0]]
    (world.cameras / "a.txt").write_text("\n".join(lines))
    found = report(read_dataset_config(world.toml()), ENCODERS)
    assert not found.problems and any("a.txt" in warning for warning in found.warnings)


def test_the_plain_values_name_every_clip(world):
    found = report(read_dataset_config(world.toml()), ENCODERS)
    values = as_json(found)
    assert [clip["name"] for clip in values["clips"]] == [each.clip.name for each in found.clips]
