"""Random numbers depend on their purpose and on nothing else."""

import torch

from core.randomness import generator_for, seed_of


def test_same_purpose_same_numbers_other_purpose_other_numbers():
    draw = [torch.rand(4, generator=generator_for(7, "noise", step, 0)) for step in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_parts_do_not_run_together():
    assert seed_of(1, 12, 3) != seed_of(1, 1, 23)
