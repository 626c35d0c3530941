"""Laws of flow matching, and of drawing noise levels: restriction is rejection, shares are probabilities."""

import math

import pytest
import torch

from core.errors import InputError
from wan_ext.flow import add_noise, interval_probability, sample_sigma, shift_sigma, velocity_target

LAWS = {
    "uniform": {},
    "sigmoid": {"sigmoid_scale": 1.3},
    "shift": {"shift": 5.0, "sigmoid_scale": 0.8},
    "logit_normal": {"logit_mean": 0.4, "logit_std": 1.5},
    "sigma": {"shift": 3.0},
}
INTERVALS = [(0.875, 1.0), (0.0, 0.875), (0.3, 0.6)]
DRAWS = 40_000


def draw(law, number=DRAWS, seed=0, **interval):
    return sample_sigma(number, law=law, **LAWS[law], **interval, generator=torch.Generator().manual_seed(seed))


def by_definition(law, number):
    """A law written as its definition, with independent random numbers."""
    g = torch.Generator().manual_seed(99)
    n, u = torch.randn(number, generator=g, dtype=torch.float64), torch.rand(number, generator=g, dtype=torch.float64)
    keywords = LAWS[law]
    if law == "uniform":
        return u
    if law == "sigmoid":
        return torch.sigmoid(keywords["sigmoid_scale"] * n)
    if law == "shift":
        sigma = torch.sigmoid(keywords["sigmoid_scale"] * n)
        return keywords["shift"] * sigma / (1 + (keywords["shift"] - 1) * sigma)
    if law == "logit_normal":
        return torch.sigmoid(keywords["logit_mean"] + keywords["logit_std"] * n)
    table = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]  # 1000 levels, noise first
    table = keywords["shift"] * table / (1 + (keywords["shift"] - 1) * table)
    return table[(u * 1000).long()]


def distance(a, b):
    """Kolmogorov-Smirnov: the largest difference of two empirical distribution functions."""
    a, b = a.double().sort().values, b.double().sort().values
    both = torch.cat((a, b)) + 1e-6  # float32 levels of the discrete law on this side of their float64 twins
    below_a, below_b = (torch.searchsorted(x, both, right=True) / len(x) for x in (a, b))
    return (below_a - below_b).abs().max().item()


@pytest.mark.parametrize("law", LAWS)
def test_an_unrestricted_law_is_its_definition(law):
    sigma = draw(law)
    assert distance(sigma, by_definition(law, DRAWS)) < 2.2 / math.sqrt(DRAWS)  # false alarm: 1 in 10^4
    assert torch.equal(sigma, draw(law, low=0.0, high=1.0))


@pytest.mark.parametrize("law", LAWS)
def test_a_law_reads_only_the_parameters_of_its_definition(law):
    """Training hands all of them over, whatever the law."""
    everything = {"shift": 7.0, "sigmoid_scale": 0.3, "logit_mean": -2.0, "logit_std": 3.0} | LAWS[law]
    sigma = sample_sigma(50, law=law, **everything, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sigma, draw(law, number=50))
    probability = interval_probability(law, low=0.2, high=0.7, **everything)
    assert probability == interval_probability(law, low=0.2, high=0.7, **LAWS[law])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_a_restricted_law_is_the_law_with_the_others_rejected(law, low, high):
    free = by_definition(law, 4 * DRAWS)
    kept = free[(free >= low) & ((free < high) | (high == 1))]
    found = draw(law, low=low, high=high)
    assert distance(found, kept) < 1.6 * math.sqrt(1 / len(kept) + 1 / DRAWS)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_every_draw_lies_in_the_interval(law, low, high):
    sigma = draw(law, low=low, high=high)
    assert sigma.min() >= torch.tensor(low)
    assert sigma.max() <= 1 if high == 1 else sigma.max() < high


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_probability_is_the_share_of_free_draws(law, low, high):
    free = by_definition(law, DRAWS)
    share = ((free >= low) & ((free < high) | (high == 1))).double().mean().item()
    probability = interval_probability(law, low=low, high=high, **LAWS[law])
    assert abs(share - probability) < 4 * math.sqrt(0.25 / DRAWS)


@pytest.mark.parametrize("law", LAWS)
def test_probabilities_of_the_experts_add_to_one(law):
    parts = [interval_probability(law, low=low, high=high, **LAWS[law]) for low, high in ((0, 0.9), (0.9, 1))]
    assert sum(parts) == pytest.approx(1)
    assert min(parts) > 0


def test_the_discrete_law_draws_its_levels_and_pure_noise():
    sigma = draw("sigma", low=0.875, high=1.0)
    levels = shift_sigma(torch.arange(1, 1001, dtype=torch.float64) / 1000, 3.0)
    assert (sigma.double()[:, None] - levels[levels >= 0.875]).abs().min(dim=1).values.max() < 1e-7
    assert sigma.max() == 1
    assert draw("sigma", low=0.0, high=0.875).unique().numel() == (levels < 0.875).sum()


def test_draws_are_a_function_of_the_generator():
    assert torch.equal(draw("shift", seed=5), draw("shift", seed=5))
    assert not torch.equal(draw("shift", seed=5), draw("shift", seed=6))


def test_a_uniform_draw_is_its_random_number_moved_into_the_interval():
    assert draw("uniform", number=3, low=0.875, high=1.0).tolist() == pytest.approx(
        (0.875 + 0.125 * torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).tolist()
    )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"law": "sigmoidd"}, "did you mean 'sigmoid'"),
        ({"law": "shift", "shift": 0.0}, "shift must be above 0"),
        ({"law": "logit_normal", "logit_std": -1.0}, "logit_std must be above 0"),
        ({"law": "uniform", "low": 0.6, "high": 0.4}, "interval"),
        ({"law": "uniform", "high": 1.5}, "interval"),
        ({"law": "sigma", "low": 0.0001, "high": 0.0009}, "never draws"),
    ],
)
def test_what_makes_no_law_is_named(keywords, message):
    with pytest.raises(InputError, match=message):
        sample_sigma(1, **keywords, generator=torch.Generator())


def random_latents():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 2, 2, generator=g), torch.randn(2, 4, 3, 2, 2, generator=g)


def test_noise_levels_zero_and_one_are_clean_and_noise():
    latents, noise = random_latents()
    assert torch.equal(add_noise(latents, noise, torch.zeros(2)), latents)
    assert torch.equal(add_noise(latents, noise, torch.ones(2)), noise)


def test_velocity_is_the_derivative_by_sigma():
    latents, noise = (x.double() for x in random_latents())
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    difference = (add_noise(latents, noise, sigma + 1e-3) - add_noise(latents, noise, sigma - 1e-3)) / 2e-3
    torch.testing.assert_close(velocity_target(latents, noise), difference)


def test_each_clip_and_each_frame_has_its_own_noise_level():
    latents, noise = random_latents()
    per_frame = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.25]])
    noised = add_noise(latents, noise, per_frame)
    for clip in range(2):
        for frame in range(3):
            alone = add_noise(latents[clip : clip + 1], noise[clip : clip + 1], per_frame[clip : clip + 1, frame])
            assert torch.equal(noised[clip, :, frame], alone[0, :, frame])


def test_shift_keeps_the_ends_and_is_undone_by_its_inverse():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigma(sigma, 5.0)
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert (shifted[1:-1] > sigma[1:-1]).all()
    torch.testing.assert_close(shift_sigma(shifted, 1 / 5.0), sigma)
