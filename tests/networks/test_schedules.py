"""Schedules equal transformers' own, step by step; flags that would do nothing are refused."""

import pytest
import torch
from transformers.optimization import get_scheduler

from core.errors import InputError
from networks.schedules import SCHEDULES, make_schedule

STEPS = 60

THEIRS = {
    "constant": ({}, {}),
    "constant_with_warmup": ({"warmup_steps": 7}, {}),
    "linear": ({"warmup_steps": 7}, {}),
    "cosine": ({"warmup_steps": 7}, {}),
    "cosine_with_restarts": ({"warmup_steps": 7, "num_cycles": 3}, {"num_cycles": 3}),
    "polynomial": ({"warmup_steps": 7, "power": 2.5, "min_lr_ratio": 0.25}, {"power": 2.5, "lr_end": 0.5}),
    "inverse_sqrt": ({"warmup_steps": 7, "timescale": 30}, {"timescale": 30}),
    "cosine_with_min_lr": ({"warmup_steps": 7, "min_lr_ratio": 0.2}, {"min_lr_rate": 0.2}),
    "cosine_warmup_with_min_lr": (
        {"warmup_steps": 7, "num_cycles": 3, "min_lr_ratio": 0.2},
        {"num_cycles": 1.5, "min_lr_rate": 0.2},
    ),
    "warmup_stable_decay": (
        {"warmup_steps": 7, "decay_steps": 20, "num_cycles": 3, "min_lr_ratio": 0.1},
        {"num_decay_steps": 20, "num_cycles": 1.5, "min_lr_ratio": 0.1},
    ),
}
"""Our numbers and transformers' words for them; its optimizer has learning rate 2. Ours count half waves."""


def their_factors(name: str, warmup: int, words: dict) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_scheduler(name, optimizer, warmup, STEPS, scheduler_specific_kwargs=words)
    factors = []
    for _ in range(STEPS):
        factors.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"rex"}))
@pytest.mark.parametrize("warms_up", [True, False])
def test_equals_transformers_step_by_step(name, warms_up):
    ours, theirs = THEIRS[name]
    warmup = ours.get("warmup_steps", 0) if warms_up else 0
    schedule = make_schedule(name, max_steps=STEPS, **(ours | {"warmup_steps": warmup}))
    factors = [schedule.factor(step) for step in range(STEPS)]
    assert factors == pytest.approx(their_factors(name, warmup, theirs), abs=1e-12)
    assert all(0 <= factor <= 1 for factor in factors)


@pytest.mark.parametrize("warmup", [0, 7])
def test_inverse_sqrt_takes_its_timescale_from_the_warm_up(warmup):
    schedule = make_schedule("inverse_sqrt", max_steps=STEPS, warmup_steps=warmup)
    assert [schedule.factor(step) for step in range(STEPS)] == pytest.approx(their_factors("inverse_sqrt", warmup, {}))


def test_rex_is_its_formula():
    schedule = make_schedule("rex", max_steps=50, warmup_steps=10, min_lr_ratio=0.2)
    assert [schedule.factor(step) for step in range(11)] == pytest.approx([step / 10 for step in range(11)])
    for step in range(10, 50):
        remaining = (50 - step) / 40
        assert schedule.factor(step) == pytest.approx(0.2 + 0.8 * remaining / (0.1 + 0.9 * remaining))
    falls = [make_schedule("rex", max_steps=50).factor(step) for step in range(51)]
    assert falls[0] == 1 and falls[-1] == 0 and all(a > b for a, b in zip(falls, falls[1:], strict=False))
    assert all(rex >= 1 - step / 50 for step, rex in enumerate(falls))  # above the linear fall, as REX is meant to be


@pytest.mark.parametrize(("share", "steps"), [(0.1, 6), (0.25, 15), (6.0, 6), (1, 1)])
def test_a_share_is_of_the_run(share, steps):
    assert make_schedule("linear", max_steps=STEPS, warmup_steps=share).warmup_steps == steps
    decayed = make_schedule("warmup_stable_decay", max_steps=STEPS, decay_steps=share)
    assert decayed.factor(STEPS - steps) == 1 > decayed.factor(STEPS - 1) or steps == 1
    assert decayed.decay_steps == steps


@pytest.mark.parametrize(
    ("name", "numbers", "named"),
    [
        ("cosin", {}, "mean 'cosine'"),
        ("reduce_lr_on_plateau", {}, "follows the loss"),
        ("constant", {"warmup_steps": 5}, "lr_warmup_steps 5: does nothing .*constant_with_warmup"),
        ("cosine", {"num_cycles": 2}, "num_cycles 2: does nothing .*cosine_with_restarts"),
        ("linear", {"power": 1.0}, "power 1: does nothing .*polynomial"),
        ("linear", {"decay_steps": 0.1}, "decay_steps 0.1: does nothing .*warmup_stable_decay"),
        ("cosine", {"min_lr_ratio": 0.0}, "min_lr_ratio 0: does nothing .*rex"),
        ("rex", {"timescale": 5}, "timescale 5: does nothing .*inverse_sqrt"),
        ("cosine_with_min_lr", {}, "expected --lr_scheduler_min_lr_ratio"),
        ("warmup_stable_decay", {}, "expected --lr_decay_steps"),
        ("warmup_stable_decay", {"decay_steps": 0}, "at least 1 step"),
        ("warmup_stable_decay", {"decay_steps": 40, "warmup_steps": 21}, "within the 60 steps"),
        ("linear", {"warmup_steps": 61}, "within the 60 steps"),
        ("linear", {"warmup_steps": -1}, "found -1"),
        ("linear", {"warmup_steps": 1.5}, "found 1.5"),
        ("rex", {"min_lr_ratio": 1.0}, "below 1"),
        ("polynomial", {"power": 0.0}, "above 0"),
        ("cosine_with_restarts", {"num_cycles": 0}, "at least 1"),
        ("inverse_sqrt", {"timescale": 0}, "at least 1"),
    ],
)
def test_what_a_schedule_does_not_take_is_named(name, numbers, named):
    with pytest.raises(InputError, match=named):
        make_schedule(name, max_steps=STEPS, **numbers)
