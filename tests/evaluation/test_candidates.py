"""The nearest candidate is the one with the least squared error, noise or not."""

import pytest
import torch

from evaluation.candidates import closest, squared_errors


def test_the_true_candidate_is_found_under_noise():
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randint(256, (8, 3, 6, 9, 3), generator=generator, dtype=torch.uint8)
    for index in range(8):
        noise = 60 * torch.randn(candidates[index].shape, generator=generator)
        video = (candidates[index].float() + noise).clamp(0, 255).to(torch.uint8)
        assert closest(video, candidates) == index
    assert closest(candidates[2], candidates[[2, 2, 1]]) == 0


def test_errors_are_squared_levels():
    frames = torch.full((1, 2, 2, 3), 250, dtype=torch.uint8)
    candidates = torch.stack([frames, frames - 250, frames + 5])
    assert squared_errors(frames, candidates).tolist() == [0, 62500, 25]
    with pytest.raises(ValueError, match="expected candidates"):
        closest(frames, frames)
    with pytest.raises(ValueError, match="expected candidates"):
        closest(frames, candidates[:0])
