"""Mechanisms in use: dropped is absent, every block runner and both modes agree, the LoRA stays pure."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.errors import InputError
from core.randomness import generator_for
from memory.runners import BlockRunner, run_checkpointed, run_plain
from memory.stream import StreamedBlocks, spread
from networks.lora_linear import block_linears
from networks.mechanisms.registry import INJECTIONS
from tests.networks.cases import (
    NETWORKS,
    VARIANTS,
    Clip,
    camera_of,
    disturb,
    make_clip,
    make_dit,
    make_network,
    run,
)
from wan_ext.dit import WanDiT, storage_dtype

KINDS = [kind for kind in NETWORKS if kind != "lora"]
T2V = VARIANTS["T2V"]
every_kind = pytest.mark.parametrize("kind", KINDS)
everywhere = pytest.mark.parametrize(
    ("task", "expert"), [("T2V", "high"), ("T2V", "low"), ("I2V", "high"), ("TI2V", "low")]
)


@everywhere
@every_kind
def test_a_dropped_camera_is_no_camera(kind: str, task: str, expert: str) -> None:
    dit, clip = make_dit(VARIANTS[task]), make_clip(VARIANTS[task])
    network = make_network(dit, VARIANTS[task], kind, expert=expert)
    disturb(network)

    def with_keep(*keep: float) -> Tensor:
        camera = network.encode_camera(clip.c2w, clip.K, clip.height, clip.width, keep=torch.tensor(keep))
        return dit(clip.inputs.noised, camera=camera, **clip.inputs.keywords())

    with torch.no_grad():
        heard, absent = run(dit, network, clip), dit(clip.inputs.noised, **clip.inputs.keywords())
        assert not torch.isclose(heard, absent, rtol=0, atol=1e-3).flatten(1).all(1).any()  # each clip's is heard
        assert torch.equal(with_keep(0, 0), absent) and torch.equal(with_keep(1, 1), heard)
        assert torch.equal(with_keep(0, 1), torch.stack((absent[0], heard[1])))


def gradients(dit: WanDiT, network, clip: Clip, run_blocks: BlockRunner) -> list[Tensor]:
    out = dit(clip.inputs.noised, camera=camera_of(network, clip), **clip.inputs.keywords(), run_blocks=run_blocks)
    return [out, *torch.autograd.grad((out * clip.inputs.weights).sum(), list(network.parameters()))]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_to_run_the_blocks_gives_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    dit, clip = make_dit(T2V), make_clip(T2V)
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, dtype))
    network = make_network(dit, T2V, kind)
    disturb(network)
    plain = gradients(dit, network, clip, run_plain)
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in plain)
    assert all(map(torch.equal, plain, gradients(dit, network, clip, run_checkpointed)))
    for num_streamed in (1, 2):
        streamed = StreamedBlocks(dit.blocks, streamed=spread(len(dit.blocks), num_streamed), device="cpu")
        assert all(map(torch.equal, plain, gradients(dit, network, clip, streamed)))


@every_kind
def test_training_and_evaluation_mode_hear_the_same(kind: str) -> None:
    dit, clip = make_dit(T2V), make_clip(T2V)
    network = make_network(dit, T2V, kind)
    disturb(network)
    training = run(dit.train(), network.train(), clip)
    with torch.no_grad():
        assert torch.equal(run(dit.eval(), network.eval(), clip), training)
    assert network.training is False and not any(branch.training for branch in network.camera_branches.modules())


@every_kind
def test_the_lora_goes_on_the_model_and_not_on_the_branches(kind: str) -> None:
    dit = make_dit(T2V)
    linears = list(block_linears(dit))
    network = make_network(dit, T2V, kind)
    assert list(block_linears(dit)) == linears == list(network.named_adapters)
    assert all(".camera." not in name for name in network.lora_state())
    owned = {id(parameter) for parameter in network.parameters()}
    assert owned == {id(parameter) for parameter in dit.parameters() if parameter.requires_grad} | {
        id(parameter) for parameter in network.camera_encoder.parameters()
    }
    network.remove(dit)
    assert dit.state_dict().keys() == make_dit(T2V).state_dict().keys()


@every_kind
def test_merging_the_lora_leaves_the_camera(kind: str) -> None:
    dit, clip = make_dit(T2V), make_clip(T2V)
    network = make_network(dit, T2V, kind)
    disturb(network)
    with torch.no_grad():
        before = run(dit, network, clip)
        network.merge(dit)
        torch.testing.assert_close(run(dit, network, clip), before, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if INJECTIONS[NETWORKS[kind][1]["injection"]].branch])
def test_branches_stand_visibly_in_the_chosen_blocks_alone(kind: str) -> None:
    module, args = NETWORKS[kind]
    mechanism = INJECTIONS[args["injection"]]
    variant = replace(T2V, dit=replace(T2V.dit, num_layers=4))
    dit = make_dit(variant)
    network = make_network(dit, variant, kind, network_args=args | {"camera_blocks": "1-2"})
    assert list(network.camera_branches) == ["1", "2"]
    standing = [getattr(block, mechanism.seam).camera for block in dit.blocks]
    assert standing[0] is None and standing[3] is None
    assert standing[1:3] == list(network.camera_branches.values())
    assert f"(camera): {type(standing[1]).__name__}" in str(dit)
    keys = {name.split(".")[1] for name in network.camera_state() if name.startswith("camera_branches.")}
    assert keys == {"1", "2"}
    with pytest.raises(InputError, match="at most one network that hears the camera inside the blocks, found two"):
        make_network(dit, variant, kind)


@pytest.mark.parametrize("kind", ["bias", "film"])
def test_an_expert_that_is_not_to_hear_the_camera_has_none(kind: str) -> None:
    module, args = NETWORKS[kind]
    for expert, hears in (("high", True), ("low", False)):
        dit, clip = make_dit(T2V), make_clip(T2V)
        network = make_network(dit, T2V, kind, expert=expert, network_args=args | {"camera_experts": "high"})
        assert (camera_of(network, clip) is not None) == hears == bool(network.camera_state())
        assert network.settings.camera.heard_by(expert) == hears


def test_camera_dropout_is_a_function_of_its_generator_and_has_its_share() -> None:
    dit = make_dit(T2V)
    network = make_network(dit, T2V, "bias", network_args={"injection": "bias", "camera_dropout": "0.25"})
    draws = [network.draw_keep(1000, generator_for(7, "camera_dropout", step, 0, 0)) for step in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert set(draws[0].tolist()) == {0.0, 1.0} and abs(draws[0].mean() - 0.75) < 0.05
    assert make_network(make_dit(T2V), T2V, "bias").draw_keep(3, torch.Generator()) is None
