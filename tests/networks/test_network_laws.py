"""The laws of every network module, on every kind of model: zero at start, alive, moved by the camera, base frozen."""

import pytest
import torch

from core.errors import InputError
from memory.runners import run_checkpointed
from networks import lora, lora_camera
from networks.mechanisms.registry import INJECTIONS
from tests.networks.cases import (
    NETWORKS,
    VARIANTS,
    camera_of,
    disturb,
    make_clip,
    make_dit,
    make_network,
    run,
    train,
)

CASES = [
    *((kind, task, False) for kind in NETWORKS for task in VARIANTS),
    *((kind, task, True) for kind in NETWORKS for task in ("T2V", "I2V")),
]
everywhere = pytest.mark.parametrize(("kind", "task", "quantised"), CASES)
with_camera = pytest.mark.parametrize(("kind", "task", "quantised"), [case for case in CASES if case[0] != "lora"])


def test_every_injection_is_held_to_the_laws() -> None:
    assert INJECTIONS.keys() == {args["injection"] for _, args in NETWORKS.values() if args}


@everywhere
def test_zero_at_start(kind: str, task: str, quantised: bool) -> None:
    dit, clip = make_dit(VARIANTS[task], quantised=quantised), make_clip(VARIANTS[task])
    with torch.no_grad():
        before = run(dit, None, clip)
        network = make_network(dit, VARIANTS[task], kind)
        assert torch.equal(run(dit, network, clip), before)  # to the bit
        camera = camera_of(network, clip)
    assert (camera is None) == (kind == "lora")


@everywhere
def test_alive_by_the_second_step(kind: str, task: str, quantised: bool) -> None:
    dit, clip = make_dit(VARIANTS[task], quantised=quantised), make_clip(VARIANTS[task])
    network = make_network(dit, VARIANTS[task], kind)
    train(dit, network, clip, steps=2)
    dead = [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    assert not dead


@with_camera
def test_another_camera_gives_another_output_in_eval_mode(kind: str, task: str, quantised: bool) -> None:
    dit, clip = make_dit(VARIANTS[task], quantised=quantised), make_clip(VARIANTS[task])
    network = make_network(dit, VARIANTS[task], kind)
    train(dit, network, clip, steps=3)
    dit.eval()
    network.eval()
    with torch.no_grad():
        one, other = run(dit, network, clip), run(dit, network, clip, clip.other_c2w)
        clip.K[..., :2, :2] *= 1.3  # zoomed in
        zoomed = run(dit, network, clip)
    scale = one.abs().max()
    assert (one - other).abs().max() > 1e-3 * scale
    assert (one - zoomed).abs().max() > 1e-4 * scale


@everywhere
def test_the_base_is_frozen(kind: str, task: str, quantised: bool) -> None:
    dit, clip = make_dit(VARIANTS[task], quantised=quantised), make_clip(VARIANTS[task])
    before = {name: parameter.detach().clone() for name, parameter in dit.named_parameters()}
    network = make_network(dit, VARIANTS[task], kind)
    train(dit, network, clip, steps=1)
    network.remove(dit)
    for name, parameter in dit.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter.float(), before[name].float())


@pytest.mark.parametrize("kind", NETWORKS)
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    variant = VARIANTS["T2V"]
    dit, clip = make_dit(variant), make_clip(variant)
    network = make_network(dit, variant, kind)
    disturb(network)

    def gradients(**how: object) -> list[torch.Tensor]:
        camera = camera_of(network, clip)
        out = dit(clip.inputs.noised, camera=camera, **clip.inputs.keywords(), **how)
        return torch.autograd.grad((out * clip.inputs.weights).sum(), list(network.parameters()))

    assert all(map(torch.equal, gradients(), gradients(run_blocks=run_checkpointed)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_seed_decides_the_start_alone(kind: str) -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        network = make_network(dits.pop(), VARIANTS["T2V"], kind, seed=seed)
        return network.lora_state() | network.camera_state()

    dits = [make_dit(VARIANTS["T2V"]) for _ in range(3)]
    state = torch.get_rng_state()
    once, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(state, torch.get_rng_state())
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
    down = "diffusion_model.blocks.0.ffn.0.lora_A.weight"
    assert not torch.equal(once[down], other[down])


def test_parameter_groups_cover_every_parameter_once_with_its_learning_rate() -> None:
    variant = VARIANTS["T2V"]
    args = {"injection": "bias", "camera_lr": "2e-3"}
    for kind, changes, learning_rates in (
        ("plucker", {"network_args": args}, {"low_lora": 1e-4, "low_camera": 2e-3}),
        ("bias", {}, {"low_lora": 1e-4, "low_camera": 1e-4}),
        ("lora", {"expert": "high"}, {"high_lora": 1e-4}),
        ("lora", {"network_args": {"loraplus_lr_ratio": "16"}}, {"low_lora": 1e-4, "low_lora_up": 1.6e-3}),
        (
            "bias",
            {"network_args": {"injection": "bias", "loraplus_lr_ratio": "4"}},
            {"low_lora": 1e-4, "low_lora_up": 4e-4, "low_camera": 1e-4},
        ),
    ):
        network = make_network(make_dit(variant), variant, kind, **changes)
        groups = network.parameter_groups(1e-4)
        assert {group["name"]: group["lr"] for group in groups} == pytest.approx(learning_rates)
        ups = [p for group in groups if group["name"].endswith("_lora_up") for p in group["params"]]
        assert not ups or [id(p) for p in ups] == [id(lora.up) for lora in network.named_adapters.values()]
        grouped = [parameter for group in groups for parameter in group["params"]]
        assert {id(p) for p in grouped} == {id(p) for p in network.parameters()}
        assert len(grouped) == len({id(p) for p in grouped})


# ---- what bad input gets ------------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ("plucker", {"injecton": "bias"}, "network argument injecton: .*did you mean 'injection'"),
    ("plucker", {"injection": "pluker"}, "injection: expected one of plucker, .*found 'pluker' .*mean 'plucker'"),
    ("plucker", {"camera_lr": "fast"}, "camera_lr: expected a number above 0, found 'fast'"),
    ("plucker", {"camera_lr": "nan"}, "camera_lr: expected a number above 0"),
    ("plucker", {"camera_hidden": "0"}, "camera_hidden: expected a whole number of at least 1"),
    (
        "lora",
        {"injection": "bias"},
        "networks.lora has include_patterns, exclude_patterns, loraplus_lr_ratio, found 'injection'",
    ),
    ("lora", {"include_patterns": "['a', 3]"}, "include_patterns: expected a pattern or a list"),
    ("lora", {"include_patterns": "['a'"}, "include_patterns: expected a pattern or a list"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        *((kind, {"network_args": args}, message) for kind, args, message in BAD_ARGUMENTS),
        ("plucker", {"pose_frame": None}, "expected a data set with cameras, found none"),
        ("lora", {"rank": 0}, "--network_dim: expected a rank of at least 1, found 0"),
        ("lora", {"alpha": 0.0}, "--network_alpha: expected a number above 0"),
        ("lora", {"dropout": 1.0}, "--network_dropout"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_touched(kind: str, changes: dict, message: str) -> None:
    dit = make_dit(VARIANTS["T2V"])
    names = list(dit.state_dict())
    with pytest.raises(InputError, match=message):
        make_network(dit, VARIANTS["T2V"], kind, **changes)
    assert list(dit.state_dict()) == names


def test_the_modules_say_whether_they_need_cameras() -> None:
    assert lora_camera.NEEDS_CAMERA and not lora.NEEDS_CAMERA
