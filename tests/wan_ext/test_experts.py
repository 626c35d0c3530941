"""Laws of the mixture of experts: the intervals meet at the boundary and agree with the choice while sampling."""

import pytest

from wan_ext.configs import VARIANTS, get_variant
from wan_ext.experts import expert_at, expert_interval


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_intervals_tile_all_noise_levels(variant):
    intervals = sorted(expert_interval(variant, expert) for expert in variant.experts)
    assert intervals[0][0] == 0
    assert intervals[-1][1] == 1
    assert all(below[1] == above[0] for below, above in zip(intervals, intervals[1:], strict=False))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_an_expert_samples_where_it_was_trained(variant):
    for expert in variant.experts:
        low, high = expert_interval(variant, expert)
        for sigma in (low, (low + high) / 2, high - 1e-3):
            assert expert_at(variant, 1000 * sigma) == expert


def test_the_boundary_and_pure_noise_belong_to_the_high_noise_expert():
    variant = get_variant("t2v-A14B")
    assert [expert_at(variant, timestep) for timestep in (1000, 875, 874, 0)] == ["high", "high", "low", "low"]


def test_a_single_expert_has_no_high_interval():
    with pytest.raises(ValueError, match="high"):
        expert_interval(get_variant("ti2v-5B"), "high")
