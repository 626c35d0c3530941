"""Optimizers by name, and the schedule as a function of the step."""

import pytest
import torch

from core.errors import InputError
from networks.optimization import create_optimizer, learning_rate_factor


def one_group():
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5, "name": "lora"}]


@pytest.mark.parametrize("kind", ["AdamW", "adamw", "AdamW8bit", "adamw8bit"])
def test_arguments_and_group_rates_reach_the_optimizer(kind):
    optimizer = create_optimizer(
        kind, one_group(), learning_rate=0.1, optimizer_args={"weight_decay": "0.25", "betas": "0.5,0.75"}
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (0.5, 0.25, (0.5, 0.75))
    before = group["params"][0].detach().clone()
    group["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert (group["params"][0] < before).all()


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        ("AdamW9bit", {}, "AdamW8bit"),
        ("AdamW", {"weight_decay": "much"}, "weight_decay"),
        ("AdamW", {"wheight_decay": "0.1"}, "wheight_decay"),
        ("AdamW", {"betas": "0.9,2.0"}, "beta"),
    ],
)
def test_what_an_optimizer_does_not_take_is_named(kind, arguments, named):
    with pytest.raises(InputError, match=named):
        create_optimizer(kind, one_group(), learning_rate=0.1, optimizer_args=arguments)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_rise_then_fall(schedule):
    factors = [learning_rate_factor(step, schedule=schedule, warmup_steps=10, max_steps=100) for step in range(100)]
    assert all(a < b for a, b in zip(factors[:10], factors[1:11], strict=True))
    assert factors[10] == 1
    assert all(0 <= factor <= 1 for factor in factors)
    if schedule != "constant":
        assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
        assert factors[-1] < 0.02
        assert factors[55] == pytest.approx(0.5, abs=0.01)
