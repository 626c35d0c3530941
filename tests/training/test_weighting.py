"""Weightings equal diffusers' and their closed forms; weighted draws are the densities that they are called after."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from core.errors import InputError
from training.step import training_step
from training.weighting import density_of, loss_weights
from wan_ext.flow import interval_probability, sample_sigma, shift_sigma

DRAWS = 40_000
DENSITIES = {
    "logit_normal": {"density": "logit_normal", "logit_mean": 0.3, "logit_std": 0.8},
    "mode": {"density": "mode", "mode_scale": 1.29},
    "mode to the ends": {"density": "mode", "mode_scale": -0.9},
}


def draw(name, *, low=0.0, high=1.0, shift=1.0, number=DRAWS):
    generator = torch.Generator().manual_seed(4)
    return sample_sigma(number, law="sigma", low=low, high=high, shift=shift, **DENSITIES[name], generator=generator)


def by_diffusers(name):
    values = DENSITIES[name]
    generator = torch.Generator().manual_seed(9)
    return compute_density_for_timestep_sampling(
        values["density"],
        DRAWS,
        values.get("logit_mean"),
        values.get("logit_std"),
        values.get("mode_scale"),
        generator=generator,
    )


def distance(a, b):
    """Kolmogorov-Smirnov."""
    both = torch.cat((a, b))
    below_a, below_b = (torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (a, b))
    return (below_a - below_b).abs().max().item()


@pytest.mark.parametrize("scheme", ["cosmap", "sigma_sqrt"])
def test_loss_weights_are_those_of_diffusers(scheme):
    sigma = torch.linspace(0.001, 1, 97)
    torch.testing.assert_close(loss_weights(scheme, sigma), compute_loss_weighting_for_sd3(scheme, sigma))


def test_loss_weights_at_chosen_levels():
    ends_and_middle = torch.tensor([0.0, 0.5, 1.0])
    assert loss_weights("cosmap", ends_and_middle).tolist() == pytest.approx([2 / math.pi, 4 / math.pi, 2 / math.pi])
    assert loss_weights("sigma_sqrt", ends_and_middle).tolist() == pytest.approx([1e6, 4, 1])
    assert all(loss_weights(scheme, ends_and_middle) is None for scheme in ("none", "mode", "logit_normal"))


def test_a_batch_counts_each_clip_by_its_weight():
    latents, noise = torch.randn(2, 3, 4, 1, 2, 2)  # two of [B=3, C, F, H, W]
    batch = SimpleNamespace(latents=latents, c2w=None, K=None, context=None, condition=None, image_context=None)
    expert = SimpleNamespace(clean_first_frame=False, dit=lambda noised, **_: torch.zeros_like(noised), run_blocks=None)
    sigma, weights = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([2.0, 0.0, 1.0])
    of_clips = (noise - latents).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(
        training_step(expert, batch, noise, sigma, weights=weights), (weights * of_clips).sum() / 3
    )
    torch.testing.assert_close(training_step(expert, batch, noise, sigma), of_clips.mean())


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_have_the_density_of_diffusers_draws(name):
    levels = ((by_diffusers(name) * 1000).floor() + 1) / 1000
    assert distance(draw(name), levels) < 2.2 / math.sqrt(DRAWS)  # false alarm: 1 in 10^4
    torch.testing.assert_close(draw(name, shift=5.0), shift_sigma(draw(name), 5.0))


@pytest.mark.parametrize("name", DENSITIES)
def test_restriction_to_an_expert_is_rejection(name):
    low, high, shift = 0.3, 0.875, 2.0
    everywhere = draw(name, shift=shift)
    inside = everywhere[(everywhere >= low) & (everywhere < high)]
    restricted = draw(name, low=low, high=high, shift=shift)
    assert low <= restricted.min() and restricted.max() < high
    assert distance(restricted, inside) < 0.02
    ends = [(0.0, low), (low, high), (high, 1.0)]
    shares = [interval_probability("sigma", low=a, high=b, shift=shift, **DENSITIES[name]) for a, b in ends]
    assert sum(shares) == pytest.approx(1)
    assert shares[1] == pytest.approx(len(inside) / DRAWS, abs=0.01)


def test_mode_of_scale_0_and_a_wide_mean_are_what_they_must_be():
    plain = sample_sigma(DRAWS, law="sigma", generator=torch.Generator().manual_seed(4))
    flat = {"density": "mode", "mode_scale": 0.0}
    assert torch.equal(plain, sample_sigma(DRAWS, law="sigma", **flat, generator=torch.Generator().manual_seed(4)))
    assert draw("logit_normal").mean() > 0.5  # a positive mean is more noise


@pytest.mark.parametrize(
    ("scheme", "law", "mode_scale", "named"),
    [
        ("cosmapp", "shift", None, "mean 'cosmap'"),
        ("mode", "shift", None, "draws of --timestep_sampling sigma, found 'shift'"),
        ("logit_normal", "logit_normal", None, "density of its own"),
        ("cosmap", "sigma", 1.0, "mode_scale 1: does nothing"),
    ],
)
def test_what_cannot_be_is_named(scheme, law, mode_scale, named):
    with pytest.raises(InputError, match=named):
        density_of(scheme, timestep_sampling=law, mode_scale=mode_scale)


@pytest.mark.parametrize("scale", [-1.1, 1.76])
def test_a_mode_that_folds_is_refused(scale):
    with pytest.raises(InputError, match="mode_scale: expected a number in"):
        interval_probability(
            "sigma", low=0.0, high=1.0, **density_of("mode", timestep_sampling="sigma", mode_scale=scale)
        )


def test_schemes_add_to_the_law_what_they_say():
    assert density_of("mode", timestep_sampling="sigma", mode_scale=None) == {"density": "mode", "mode_scale": 1.29}
    assert density_of("cosmap", timestep_sampling="shift", mode_scale=None) == {}
