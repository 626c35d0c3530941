"""Laws of conditioning: the mask is the official one, the first frame stays, cameras add where they belong."""

import pytest
import torch

from wan_ext.condition import (
    CameraCondition,
    add_branch,
    add_camera_latents,
    add_camera_tokens,
    first_frame_condition,
    first_frame_mask,
    first_frame_timestep,
    first_frame_video,
    with_first_frame,
)


def mask_of_the_pipeline(num_frames, height, width):
    """diffusers' WanImageToVideoPipeline.prepare_latents: the same mask by another route (repeat, view, transpose)."""
    mask = torch.ones(1, 1, num_frames, height, width)
    mask[:, :, 1:] = 0
    first = torch.repeat_interleave(mask[:, :, 0:1], dim=2, repeats=4)
    mask = torch.concat([first, mask[:, :, 1:]], dim=2)
    return mask.view(1, -1, 4, height, width).transpose(1, 2)[0]


@pytest.mark.parametrize("num_latent_frames", [1, 2, 5, 21])
def test_mask_equals_the_pipelines(num_latent_frames):
    expected = mask_of_the_pipeline(4 * (num_latent_frames - 1) + 1, 3, 5)
    assert torch.equal(first_frame_mask(num_latent_frames, 3, 5), expected)


def test_condition_is_mask_then_latents():
    latents = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    condition = first_frame_condition(latents)
    assert condition.shape == (20, 3, 4, 6)
    assert torch.equal(condition[4:], latents)
    assert condition[:4, 0].eq(1).all()
    assert condition[:4, 1:].eq(0).all()
    assert first_frame_condition(latents.bfloat16()).dtype == torch.bfloat16


def test_the_known_video_is_the_frame_then_mid_grey():
    frame = torch.rand(3, 8, 8) * 2 - 1
    video = first_frame_video(frame, 5)
    assert video.shape == (3, 5, 8, 8)
    assert torch.equal(video[:, 0], frame)
    assert video[:, 1:].eq(0).all()


def test_first_latent_frame_is_told_timestep_zero():
    timestep = torch.tensor([900.0, 30.0])
    assert first_frame_timestep(timestep, 3).tolist() == [[0, 900, 900], [0, 30, 30]]
    assert timestep.tolist() == [900, 30]


@pytest.mark.parametrize("batched", [True, False])
def test_first_frame_is_put_in_place_and_nothing_else_changes(batched):
    noised, first = torch.randn(2, 48, 3, 2, 2), torch.randn(48, 1, 2, 2)
    before = noised.clone()
    result = with_first_frame(noised, first.expand(2, -1, -1, -1, -1) if batched else first)
    assert torch.equal(result[0, :, :1], first)
    assert torch.equal(result[1, :, :1], first)
    assert torch.equal(result[:, :, 1:], noised[:, :, 1:])
    assert torch.equal(noised, before)


def test_camera_tokens_are_added_by_frame_row_column():
    tokens, vectors = torch.randn(1, 2 * 3 * 4, 5), torch.randn(1, 2, 3, 4, 5)
    added = add_camera_tokens(tokens, CameraCondition(tokens=vectors), (2, 3, 4))
    assert torch.equal(added, tokens + vectors.reshape(1, 24, 5))
    frame = add_camera_tokens(tokens, CameraCondition(tokens=vectors[:, :, :1, :1]), (2, 3, 4))
    assert torch.equal(frame[0, 12:], tokens[0, 12:] + vectors[0, 1, 0, 0])


def test_camera_latents_are_added_to_every_position_of_a_frame_and_dropped_where_not_kept():
    noised, vectors = torch.randn(2, 5, 3, 4, 4), torch.randn(2, 5, 3, 1, 1)
    assert torch.equal(add_camera_latents(noised, CameraCondition(latents=vectors)), noised + vectors)
    dropped = add_camera_latents(noised, CameraCondition(latents=vectors, keep=torch.tensor([0.0, 1.0])))
    assert torch.equal(dropped, torch.stack((noised[0], (noised + vectors)[1])))
    assert add_camera_latents(noised, CameraCondition(tokens=vectors)) is noised


def test_what_a_branch_adds_is_spread_over_frames_or_tokens():
    x = torch.randn(2, 3 * 4, 5)
    frames, tokens = torch.randn(2, 3, 1, 5), torch.randn(2, 1, 12, 5)
    assert torch.equal(add_branch(x, frames, None), x + frames.expand(-1, -1, 4, -1).flatten(1, 2))
    assert torch.equal(add_branch(x, tokens, torch.tensor([1.0, 0.0])), torch.stack((x[0] + tokens[0, 0], x[1])))
    assert add_branch(x, None, None) is x
