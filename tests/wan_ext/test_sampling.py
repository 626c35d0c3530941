"""Laws of sampling: the official schedules and trajectories, exact velocities lead to the data, experts take turns."""

import pytest
import torch
from safetensors.torch import load_file

from core.errors import InputError
from tests.wan_ext.models import GOLDEN
from wan_ext.configs import get_variant
from wan_ext.experts import expert_at
from wan_ext.sampling import guidance, sample, sigmas, timesteps

SOLVERS = ("unipc", "dpm++", "euler")
RECORDED = load_file(GOLDEN / "schedulers.safetensors")
KEYS = sorted(key.removesuffix("_final") for key in RECORDED if key.endswith("_final"))


def curved(latents, timestep):
    """The velocity field of the recorded trajectories."""
    return torch.tanh(latents @ RECORDED["A"]) * (1 + timestep / 1000)


def test_the_recorded_solvers_are_all_here():
    assert {key.split("_")[0] for key in KEYS} == {"unipc", "dpm++"}
    assert len(KEYS) == 10


@pytest.mark.parametrize("key", KEYS)
def test_official_schedules_and_trajectories(key):
    solver, steps, shift = key.split("_")
    arguments = {"solver": solver, "steps": int(steps), "shift": float(shift)}
    assert (sigmas(**arguments) - RECORDED[f"{key}_sigmas"]).abs().max() <= 1e-6
    assert torch.equal(timesteps(**arguments), RECORDED[f"{key}_timesteps"])
    assert (sample(curved, RECORDED["x0"], **arguments) - RECORDED[f"{key}_final"]).abs().max() <= 5e-6


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_the_exact_velocity_of_a_clip_leads_to_it(solver, steps):
    g = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(1, 4, 3, 2, 2, generator=g), torch.randn(1, 4, 3, 2, 2, generator=g)
    start = sigmas(solver, steps, 5.0)[0].float()
    result = sample(
        lambda latents, timestep: noise - clean,
        (1 - start) * clean + start * noise,
        solver=solver,
        steps=steps,
        shift=5.0,
    )
    torch.testing.assert_close(result, clean, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_steps_come_closer(solver):
    """On a field that does not read the integer timestep, so that only the solver errs."""

    def field(latents, timestep):
        return torch.tanh(latents @ RECORDED["A"])

    # unipc starts below sigma 1, so each solver is measured against itself.
    exact, few, many = (sample(field, RECORDED["x0"], solver=solver, steps=n, shift=3.0) for n in (640, 8, 40))
    assert (many - exact).norm() < 0.5 * (few - exact).norm()


@pytest.mark.parametrize("solver", SOLVERS)
def test_schedules_fall_from_noise_to_zero(solver):
    levels = sigmas(solver, 30, 5.0)
    assert levels.shape == (31,)
    assert (levels.diff() < 0).all()
    assert levels[-1] == 0
    assert levels[0] == 1 or solver == "unipc"
    assert torch.equal(timesteps(solver, 30, 5.0), levels[:-1] * 1000) or solver != "euler"


@pytest.mark.parametrize(("task", "high_steps"), [("t2v-A14B", 26), ("i2v-A14B", 15), ("ti2v-5B", 0)])
def test_experts_take_turns_by_the_timestep_they_are_told(task, high_steps):
    variant = get_variant(task)
    chosen = []

    def velocity(latents, timestep):
        chosen.append(expert_at(variant, timestep))
        return torch.zeros_like(latents)

    sample(velocity, torch.zeros(1, 1, 1, 1, 1), solver="unipc", steps=40, shift=variant.shift)
    assert chosen == ["high"] * high_steps + ["low"] * (40 - high_steps)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_must_hold_holds_before_every_velocity_and_at_the_end(solver):
    seen = []

    def velocity(latents, timestep):
        seen.append(latents[0, 0].item())
        return torch.ones_like(latents)

    def constrain(latents):
        return torch.cat((torch.full_like(latents[:, :1], 7.0), latents[:, 1:]), dim=1)

    result = sample(velocity, torch.randn(1, 3), solver=solver, steps=5, shift=2.0, constrain=constrain)
    assert seen == [7.0] * 5
    assert result[0, 0] == 7


def test_progress_is_told_after_each_step():
    told = []
    result = sample(
        curved, RECORDED["x0"], solver="euler", steps=3, shift=1.0, on_step=lambda done, x: told.append((done, x))
    )
    assert [done for done, _ in told] == [1, 2, 3]
    assert told[-1][1] is result


@pytest.mark.parametrize("solver", SOLVERS)
def test_latents_stay_float32_whatever_the_velocity_is(solver):
    result = sample(
        lambda latents, timestep: latents.bfloat16(), RECORDED["x0"].bfloat16(), solver=solver, steps=2, shift=1.0
    )
    assert result.dtype == torch.float32


def test_guidance_one_is_the_prompt_and_zero_is_none():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert guidance(cond, uncond, 1.0) == cond
    assert guidance(cond, uncond, 0.0) == uncond
    assert guidance(cond, uncond, 2.0) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "dpm+", "steps": 4, "shift": 1.0}, r"did you mean 'dpm\+\+'"),
        ({"solver": "unipc", "steps": 0, "shift": 1.0}, "at least 1 step"),
        ({"solver": "unipc", "steps": 4, "shift": 0.0}, "shift above 0"),
    ],
)
def test_what_makes_no_schedule_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        sigmas(**arguments)
