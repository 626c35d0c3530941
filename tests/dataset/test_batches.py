"""Laws of batches: every clip its number of times, the order a function of its arguments, sizes never mixed."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_dataset import T5, VAE, edit, latents

from core.errors import InputError
from dataset import cache
from dataset.batches import TrainingSet
from dataset.cameras import read_clip_camera
from dataset.clips import without_caption

CONTEXT_LENGTHS = (3, 9, 5)
# Seed 3, epoch 2. If this changes, a run cannot be resumed or repeated with another version.
EXPECTED_ORDER = [(9, 5), (14, 12, 13), (2, 10), (4, 8), (7, 11), (0, 1), (13, 14, 12), (6, 3)]


def cached(clips, **extra):
    """Write all caches of some clips, each recognisable by its numbers."""
    for index, clip in enumerate(clips):
        parts = {name: value(clip) for name, value in extra.items()}
        cache.write_latents(clip, latents(clip, seed=index), encoder=VAE, crop=clip.crop, **parts)
        length = CONTEXT_LENGTHS[len(clip.caption) % 3]
        cache.write_text(clip, torch.full((length, 8), 1.0 + len(clip.caption)), encoder=T5)
        if clip.camera is not None:
            cache.write_camera(clip, read_clip_camera(clip))
    return clips


@pytest.fixture
def clips(world):
    """15 clips of two data sets in three sizes, with batch sizes 2 and 3 and 1 and 2 repeats."""
    world.add_video("b.mp4")
    world.add_video("cc.mp4")
    first = world.table(target_frames=[5, 9], frame_extraction="uniform", frame_sample=2, batch_size=2)
    second_keys = {"resolution": [96, 64], "target_frames": [9], "batch_size": 3, "num_repeats": 2}
    second = world.table(cache_directory=world.root / "cache2", **second_keys)
    return cached(world.clips(first + second))


@pytest.fixture
def training_set(clips):
    return TrainingSet(clips, need_camera=True, vae=VAE, text_encoder=T5)


def flat(groups):
    return [index for group in groups for index in group]


def test_in_one_process_every_clip_stands_exactly_its_number_of_times(training_set):
    for epoch in range(3):
        counts = Counter(flat(training_set.batches(seed=7, epoch=epoch)))
        assert counts == {index: clip.num_repeats for index, clip in enumerate(training_set.clips)}


@pytest.mark.parametrize(("weight", "fewest", "most"), [(0.4, 0, 1), (1.0, 1, 1), (2.5, 2, 3)])
def test_a_weight_is_how_often_a_clip_stands_in_an_epoch_on_average(world, weight, fewest, most):
    for number in range(5):
        world.add_video(f"{number}.mp4")
    clips = cached(world.clips(weight=weight))
    training_set = TrainingSet(clips, need_camera=True)
    counts: Counter[int] = Counter()
    for epoch in range(40):
        order = flat(training_set.batches(seed=0, epoch=epoch))
        assert len(order) == math.ceil(len(clips) * weight)  # every epoch is as long as the others
        assert all(fewest <= order.count(index) <= most for index in range(len(clips)))
        counts.update(order)
    expected = 40 * len(order) / len(clips)
    assert all(0.6 * expected < counts[index] < 1.4 * expected for index in range(len(clips)))


def test_a_dropped_caption_is_the_empty_one(world):
    world.add_video("a.mp4")
    world.add_video("b.mp4")
    clips = cached(world.clips(caption_dropout=0.5))
    with pytest.raises(InputError, match=r"empty_caption_text.*cache_text.py"):
        TrainingSet(clips, need_camera=True)
    cache.write_text(without_caption(clips[0]), torch.full((1, 8), -1.0), encoder=T5)
    training_set = TrainingSet(clips, need_camera=True)
    plain, dropped = training_set.load([0, 1]), training_set.load([0, 1], dropped=(False, True))
    assert torch.equal(dropped.context[0], plain.context[0])
    assert (dropped.context[1, :1] == -1).all() and (dropped.context[1, 1:] == 0).all()
    assert torch.equal(dropped.latents, plain.latents)
    draws = [training_set.draw_dropped([0, 1], torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert 0.4 < sum(map(sum, draws)) / 400 < 0.6
    assert draws[7] == training_set.draw_dropped([0, 1], torch.Generator().manual_seed(7))
    never = TrainingSet(cached(world.clips()), need_camera=True)
    assert not any(any(never.draw_dropped([0, 1], torch.Generator().manual_seed(seed))) for seed in range(50))


def test_a_run_that_resumes_reads_what_an_uninterrupted_one_reads(clips):
    for clip in clips:
        cache.write_text(without_caption(clip), torch.full((1, 8), -1.0), encoder=T5)
    training_set = TrainingSet([replace(clip, caption_dropout=0.5) for clip in clips], need_camera=True)
    per_epoch = len(training_set.batches(seed=1, epoch=0, rank=1, world_size=2))
    given = {"seed": 1, "rank": 1, "world_size": 2}
    count = 2 * per_epoch + 1
    whole = list(training_set.in_order(first=0, count=count, **given))
    order = [group for epoch in range(3) for group in training_set.batches(epoch=epoch, **given)]
    assert [batch.keys for batch in whole] == [
        tuple(training_set.clips[index].key for index in group) for group in order[:count]
    ]
    for first in (1, per_epoch, per_epoch + 2):
        for ours, theirs in zip(training_set.in_order(first=first, count=3, **given), whole[first:], strict=False):
            assert ours.keys == theirs.keys and torch.equal(ours.context, theirs.context)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 20])
def test_processes_share_an_epoch_out(training_set, world_size):
    whole = training_set.batches(seed=7, epoch=1)
    ranks = [training_set.batches(seed=7, epoch=1, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(groups) for groups in ranks}) == 1  # nobody waits for a step that another does not take
    in_turn = [groups[step] for step in range(len(ranks[0])) for groups in ranks]
    assert in_turn[: len(whole)] == whole  # disjoint, and together exactly the epoch
    surplus = in_turn[len(whole) :]
    assert len(surplus) < world_size and all(group in whole for group in surplus)


def test_the_order_is_a_function_of_seed_epoch_and_rank(clips):
    arguments = {"seed": 3, "epoch": 2, "rank": 1, "world_size": 2}
    order = TrainingSet(clips, need_camera=True).batches(**arguments)
    torch.manual_seed(99)
    again = TrainingSet(clips, need_camera=True)
    again.batches(seed=5, epoch=0)
    assert again.batches(**arguments) == order
    for change in ({"seed": 4}, {"epoch": 3}, {"rank": 0}):
        assert again.batches(**(arguments | change)) != order


def test_the_order_is_the_same_on_every_machine(clips):
    assert TrainingSet(clips, need_camera=True).batches(seed=3, epoch=2) == EXPECTED_ORDER


def test_resuming_in_the_middle_gives_the_rest(clips, training_set):
    whole = [training_set.load(group).keys for group in training_set.batches(seed=7, epoch=0)]
    resumed = TrainingSet(clips, need_camera=True)
    rest = [resumed.load(group).keys for group in resumed.batches(seed=7, epoch=0)[3:]]
    assert rest == whole[3:]


def test_a_batch_holds_one_size_and_is_full_except_at_the_end_of_a_size(training_set):
    groups = training_set.batches(seed=7, epoch=0)
    sizes = {}
    for group in groups:
        clips = [training_set.clips[index] for index in group]
        bucket = {(clip.dataset, clip.num_frames, clip.height, clip.width) for clip in clips}
        assert len(bucket) == 1 and len(group) <= clips[0].batch_size
        sizes.setdefault(bucket.pop(), []).append((len(group), clips[0].batch_size))
    assert len(sizes) == 3
    for found in sizes.values():
        assert sum(size < full for size, full in found) <= 1


def test_epochs_mix_batches_anew(training_set):
    together = {frozenset(group) for group in training_set.batches(seed=7, epoch=0)}
    assert together != {frozenset(group) for group in training_set.batches(seed=7, epoch=1)}


def test_a_batch_is_what_the_caches_hold(training_set):
    for group in training_set.batches(seed=7, epoch=0):
        batch = training_set.load(group)
        clips = [training_set.clips[index] for index in group]
        assert batch.keys == tuple(clip.key for clip in clips)
        assert (batch.height, batch.width) == (clips[0].height, clips[0].width)
        assert batch.condition is None and batch.image_context is None
        longest = max(len(cache.read_text(clip)) for clip in clips)
        assert batch.context.shape == (len(clips), longest, 8) and batch.context.dtype == torch.bfloat16
        for row, clip in enumerate(clips):
            assert torch.equal(batch.latents[row], cache.read_latents(clip).latents)
            context, path = cache.read_text(clip), cache.read_camera(clip)
            assert torch.equal(batch.context[row, : len(context)], context)
            assert not batch.context[row, len(context) :].any()
            assert torch.equal(batch.c2w[row], path.c2w) and torch.equal(batch.K[row], path.K)


def test_a_batch_moves_as_a_whole(training_set):
    moved = training_set.load((0,)).to("meta")
    for name in ("latents", "context", "c2w", "K"):
        assert getattr(moved, name).is_meta
    assert moved.keys == (training_set.clips[0].key,) and moved.condition is None


def test_without_cameras_none_are_needed(world):
    clips = cached(world.clips(camera_directory=None))
    batch = TrainingSet(clips, need_camera=False).load((0,))
    assert batch.c2w is None and batch.K is None


def test_first_frame_channels_and_clip_features_come_along(world):
    clips = cached(
        world.clips(),
        condition=lambda clip: torch.ones(20, *latents(clip).shape[1:]),
        image_context=lambda clip: torch.ones(257, 4),
    )
    batch = TrainingSet(clips, need_camera=True, condition_channels=20, image_context=True).load((0, 0))
    assert batch.condition.shape == (2, 20, 5, 6, 8) and batch.image_context.shape == (2, 257, 4)


def test_sources_are_not_needed_after_the_start(world):
    """A run does not die because a drive with the videos is taken away."""
    clips = cached(world.clips())
    training_set = TrainingSet(clips, need_camera=True)
    clips[0].source.unlink()
    clips[0].camera.path.unlink()
    assert training_set.load((0,)).keys == (clips[0].key,)


def refusal(clips, **keys):
    with pytest.raises(InputError) as caught:
        TrainingSet(clips, **({"need_camera": True} | keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["latents", "text", "camera"])
def test_every_cache_is_verified_before_training(clips, kind):
    file = cache.cache_path(clips[7], kind)
    file.write_bytes(file.read_bytes()[:-1])
    message = refusal(clips)
    assert clips[7].key.rsplit("_", 2)[0] in message or kind == "text"
    assert str(file) in message and f"cache_{kind}.py" in message


def test_all_bad_clips_are_counted(clips):
    for clip in clips[4:9]:
        clip.latent_cache.unlink()
    message = refusal(clips)
    assert clips[4].key in message and f"5 of {len(clips)} clips" in message


def test_the_models_files_must_be_those_of_the_caches(clips):
    assert "another VAE" in refusal(clips, vae="sha256:x")
    assert "another text encoder" in refusal(clips, text_encoder="sha256:x")
    assert "48 channels" in refusal(clips, latent_channels=48)
    assert "width 4096" in refusal(clips, context_width=4096)
    assert "first-frame" in refusal(clips, condition_channels=20)
    TrainingSet(clips, need_camera=True, vae=VAE, text_encoder=T5, latent_channels=16, context_width=8)


def test_caches_of_two_encoders_do_not_mix(clips):
    edit(clips[5].latent_cache, encoder="sha256:other")
    assert "another VAE" in refusal(clips) and clips[5].key in refusal(clips)


def test_cameras_in_two_pose_frames_do_not_mix(world):
    text = world.table(pose_frame="scene") + world.table(cache_directory=world.root / "cache2", pose_frame="first")
    message = refusal(cached(world.clips(text)))
    assert "pose_frame" in message and '"scene"' in message and '"first"' in message


def test_the_pose_frame_of_the_set_is_known(world):
    assert TrainingSet(cached(world.clips(pose_frame="scene")), need_camera=True).pose_frame == "scene"


def test_a_missing_camera_is_named(world):
    clips = cached(world.clips(camera_directory=None))
    assert "camera_directory" in refusal(clips)


def test_a_cache_exchanged_during_training_is_found(clips, training_set):
    edit(clips[0].latent_cache, {"latents": torch.zeros_like(latents(clips[0]))})
    with pytest.raises(InputError, match="exchanged"):
        training_set.load((0,))
    edit(clips[1].latent_cache, encoder="sha256:other")
    with pytest.raises(InputError, match="another VAE"):
        training_set.load((1,))


def test_two_caches_of_one_shape_that_change_places_during_training_are_found(clips, training_set):
    """Their provenance differs in the source alone, which is not read again."""
    one, other = next((a, b) for a in clips for b in clips if a.source != b.source and a.num_frames == b.num_frames)
    for kind in ("latents", "camera"):
        files = cache.cache_path(one, kind), cache.cache_path(other, kind)
        contents = [file.read_bytes() for file in files]
        files[0].write_bytes(contents[1])
        with pytest.raises(InputError, match="exchanged"):
            training_set.load((clips.index(one),))
        files[0].write_bytes(contents[0])
        training_set.load((clips.index(one),))
