"""Optimizers by name: what reaches them, what they refuse, and the two points of the schedule-free ones."""

import sys

import pytest
import torch

from core.errors import InputError
from networks.optimization import OPTIMIZERS, create_optimizer, optimizer_name, restored, weights_in_use
from wan_ext.costs import OPTIMIZER_BYTES

SCHEDULE_FREE = [name for name in OPTIMIZERS if name.endswith("ScheduleFree")]


def one_group(rate=0.5):
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": rate, "name": "lora"}]


def step(optimizer, number=0):
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            generator = torch.Generator().manual_seed(100 * number + place)
            parameter.grad = torch.rand(parameter.shape, generator=generator) + 0.1
    optimizer.step()


@pytest.mark.parametrize("kind", ["AdamW", "adamw", "AdamW8bit", "adamw8bit", "Lion8bit", "AdamWScheduleFree"])
def test_arguments_and_group_rates_reach_the_optimizer(kind):
    optimizer = create_optimizer(
        kind, one_group(), learning_rate=0.1, optimizer_args={"weight_decay": "0.25", "betas": "0.5,0.75"}
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (0.5, 0.25, (0.5, 0.75))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_every_optimizer_steps_against_the_gradient_as_far_as_its_rate(name):
    moved = []
    for rate in (0.01, 0.02):
        optimizer = create_optimizer(name, one_group(rate), learning_rate=rate, optimizer_args={})
        weights = optimizer.param_groups[0]["params"][0]
        for number in range(12):  # RAdam holds still for the first five
            step(optimizer, number)
        assert (weights < 1).all()
        moved.append((1 - weights).sum().item())
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.15) or name == "Prodigy"  # which finds its own
    assert moved[1] > moved[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_name_and_the_class_that_it_stands_for_are_the_same(name):
    made = [create_optimizer(kind, one_group(), learning_rate=0.5, optimizer_args={}) for kind in (name, name.upper())]
    assert type(made[0]) is type(made[1])
    assert optimizer_name(OPTIMIZERS[name]) == name


def test_any_class_of_any_library():
    arguments = {"momentum": "0.5", "nesterov": "True"}
    optimizer = create_optimizer("torch.optim.SGD", one_group(), learning_rate=0.1, optimizer_args=arguments)
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["nesterov"]) == (0.5, True)


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        ("AdamW9bit", {}, "mean 'AdamW8bit'"),
        ("AdamW", {"weight_decay": "much"}, "expected weight_decay=NUMBER"),
        ("AdamW", {"wheight_decay": "0.1"}, "takes betas, .*mean 'weight_decay'"),
        ("Adafactor", {"beta2": "0.1"}, "takes eps, .*beta1"),
        ("AdamW", {"lr": "0.1"}, "that is --learning_rate"),
        ("AdamW", {"betas": "0.9,2.0"}, "beta"),
        ("Adafactor", {"relative_step": "True"}, "manual"),
        ("torch.optim.SDG", {}, "class SDG in torch.optim"),
        ("torch.nn.Linear", {}, "expected a torch.optim.Optimizer"),
        ("no_such_library.Adam", {}, "no_such_library"),
    ],
)
def test_what_an_optimizer_does_not_take_is_named(kind, arguments, named):
    with pytest.raises(InputError, match=named):
        create_optimizer(kind, one_group(), learning_rate=0.1, optimizer_args=arguments)


@pytest.mark.parametrize("name", ["AdamW8bit", "Prodigy", "AdamWScheduleFree"])
def test_a_library_that_is_not_there_is_named(name, monkeypatch):
    library = OPTIMIZERS[name].split(".")[0]
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.optim", None)
    with pytest.raises(InputError, match=f"expected the library {library}.*pip install {library}"):
        create_optimizer(name, one_group(), learning_rate=0.1, optimizer_args={})


def test_prodigy_takes_one_learning_rate():
    with pytest.raises(InputError, match="found 0.5 and 1; leave out camera_lr and loraplus_lr_ratio"):
        create_optimizer("prodigy", [*one_group(0.5), *one_group(1.0)], learning_rate=1, optimizer_args={})


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for value in state.values() for tensor in tensors_in(value)] if isinstance(state, dict) else []


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_a_state_is_no_larger_than_a_plan_says(name):
    weights = torch.nn.Parameter(torch.ones(32, 8192))
    groups = [{"params": [weights], "lr": 0.01}]
    optimizer = create_optimizer(name, groups, learning_rate=0.01, optimizer_args={})
    step(optimizer)
    kept = sum(tensor.nbytes for tensor in tensors_in(optimizer.state_dict()["state"])) / weights.numel()
    assert kept <= 1.02 * OPTIMIZER_BYTES[name]
    assert kept >= 0.95 * OPTIMIZER_BYTES[name] or name == "Adafactor"  # of a rank above 4


# ---- two points ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_the_weights_in_use_are_the_average_and_looking_at_them_changes_nothing(name):
    def train(looks):
        optimizer = create_optimizer(name, one_group(0.03), learning_rate=0.03, optimizer_args={})
        weights = optimizer.param_groups[0]["params"][0]
        seen = []
        for number in range(20):
            step(optimizer, number)
            if looks:
                before = weights.detach().clone()
                with weights_in_use(optimizer):
                    seen.append((before, weights.detach().clone(), optimizer.state[weights]["z"].clone()))
                assert torch.equal(weights, before)
        return weights, seen

    weights, seen = train(looks=True)
    assert torch.equal(weights, train(looks=False)[0])
    beta = 0.9
    for trained, used, z in seen:  # y = beta x + (1 - beta) z
        torch.testing.assert_close(beta * used + (1 - beta) * z, trained)
    assert not torch.equal(seen[-1][0], seen[-1][1])


@pytest.mark.parametrize("name", ["AdamW", "Prodigy"])
def test_the_others_have_one_point(name):
    optimizer = create_optimizer(name, one_group(), learning_rate=0.5, optimizer_args={})
    step(optimizer)
    weights = optimizer.param_groups[0]["params"][0]
    before = weights.detach().clone()
    with weights_in_use(optimizer):
        assert torch.equal(weights, before)


def test_weights_are_restored_after_an_exception():
    weights = torch.nn.Parameter(torch.rand(5))
    before = weights.detach().clone()
    with pytest.raises(ValueError), restored([weights]):
        weights.data.mul_(3)
        raise ValueError
    assert torch.equal(weights, before)
