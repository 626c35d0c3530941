"""A resumed run equals an uninterrupted one to the bit, a state is whole or absent, and another run's is refused."""

import json
import os
from pathlib import Path

import pytest
import torch

from core.errors import InputError
from networks.checkpoint import STATE_FILE, latest_state, load_state, read_state, save_state, state_part
from networks.last_step import LastStep, is_lost
from networks.network import Network
from networks.optimization import OPTIMIZERS, create_optimizer
from tests.networks.cases import VARIANTS, Clip, make_clip, make_dit, make_network, run
from wan_ext.dit import WanDiT

T2V = VARIANTS["T2V"]
STEPS = 4


class Run:
    """Both experts with their networks and optimizers; step n trains expert n % 2 on noise that depends on n alone."""

    def __init__(
        self, optimizer: str = "AdamW", kind: str = "bias", experts: tuple[str, ...] = ("high", "low"), **changes
    ):
        self.dits: dict[str, WanDiT] = {}
        self.networks: dict[str, Network] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for seed, expert in enumerate(experts):
            self.dits[expert] = make_dit(T2V, seed=seed)
            self.networks[expert] = make_network(
                self.dits[expert], T2V, kind, seed=seed, **({"expert": expert, "dropout": 0.2} | changes)
            )
            groups = self.networks[expert].parameter_groups(1e-3)
            self.optimizers[expert] = create_optimizer(optimizer, groups, learning_rate=1e-3, optimizer_args={})
        self.clip: Clip = make_clip(T2V)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            expert = list(self.networks)[step % len(self.networks)]
            torch.manual_seed(step)  # of dropout
            target = torch.randn(self.clip.inputs.weights.shape, generator=torch.Generator().manual_seed(step))
            loss = (run(self.dits[expert], self.networks[expert], self.clip) - target).square().mean()
            loss.backward()
            self.optimizers[expert].step()
            self.optimizers[expert].zero_grad()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, step: int = 2) -> None:
        config = {"seed": 1, "output_dir": folder}
        parts = {expert: state_part(network, self.optimizers[expert]) for expert, network in self.networks.items()}
        save_state(folder, parts, step=step, config=config)

    def load(self, folder: Path) -> int:
        return load_state(folder, networks=self.networks, optimizers=self.optimizers)

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            f"{expert} {name}": tensor.clone()
            for expert, network in self.networks.items()
            for name, tensor in (network.lora_state() | network.camera_state()).items()
        }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_resumed_equals_uninterrupted(optimizer: str, tmp_path: Path) -> None:
    whole = Run(optimizer)
    losses = whole.train(0, STEPS)
    begun = Run(optimizer)
    begun.train(0, 2)
    begun.save(tmp_path / "state")
    resumed = Run(optimizer, dropout=0.2)
    resumed.train(0, 1)  # whatever it held before is replaced
    assert resumed.load(tmp_path / "state") == 2
    assert equal(resumed.weights(), begun.weights())
    assert resumed.train(2, STEPS) == losses[2:]
    assert equal(resumed.weights(), whole.weights())


def test_the_8_bit_states_are_in_8_bits() -> None:
    """Otherwise the test above would say nothing of them: bitsandbytes keeps small parameters in 32 bits."""
    begun = Run("AdamW8bit")
    begun.train(0, 1)
    states = begun.optimizers["high"].state_dict()["state"].values()
    dtypes = {state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in states}
    assert dtypes == {torch.uint8, torch.float32}


def test_a_state_holds_its_configuration(tmp_path: Path) -> None:
    Run().save(tmp_path / "state", step=7)
    state = read_state(tmp_path / "state")
    assert state["step"] == 7 and state["config"] == {"seed": 1, "output_dir": str(tmp_path / "state")}
    assert state["networks"]["high"]["expert"] == "high"


def test_other_optimizer_args_are_refused_and_another_learning_rate_is_not(tmp_path: Path) -> None:
    begun, other = Run(), Run()
    begun.train(0, 2)
    begun.save(tmp_path / "state")
    for expert, args in (("high", {"weight_decay": "0.5"}), ("low", {})):
        groups = other.networks[expert].parameter_groups(2e-3)
        other.optimizers[expert] = create_optimizer("AdamW", groups, learning_rate=2e-3, optimizer_args=args)
    with pytest.raises(InputError, match="this run has option weight_decay 0.5, the state has 0.01"):
        other.load(tmp_path / "state")
    groups = other.networks["high"].parameter_groups(2e-3)
    other.optimizers["high"] = create_optimizer("AdamW", groups, learning_rate=2e-3, optimizer_args={})
    assert other.load(tmp_path / "state") == 2


# ---- whole or absent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (torch, "save", 1),
        (torch, "save", 2),
        (json, "dumps", 1),
        (Path, "write_text", 1),
        (os, "fsync", 3),  # the first two are those of the weights
        (Path, "replace", 1),
        (Path, "replace", 3),  # the old state is put aside
        (Path, "replace", 4),  # the new one takes its name
    ],
)
def test_a_save_that_fails_at_any_moment_leaves_a_whole_state(
    target: object, name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing and renaming are interrupted in turn, as by a full disk or Ctrl-C."""
    folder, begun = tmp_path / "state", Run(kind="lora")
    begun.save(folder, step=1)
    old = begun.weights()
    begun.train(0, 2)
    original, calls = getattr(target, name), 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, name, interrupted)
        begun.save(folder, step=2)
    resumed = Run(kind="lora")
    assert resumed.load(folder) == 1 and equal(resumed.weights(), old)
    begun.save(folder, step=3)  # the next save goes through
    begun.save(folder, step=4)  # and clears what was left
    assert resumed.load(folder) == 4 and [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_that_a_killed_save_put_aside_is_found_and_later_cleared(tmp_path: Path) -> None:
    folder, begun = tmp_path / "state", Run(kind="lora")
    begun.save(folder, step=1)
    aside = tmp_path / ".state.abc123.old"
    aside.mkdir()
    folder.rename(aside / "state")  # killed between the two renames of a replacement
    (tmp_path / ".state.def456.tmp").mkdir()
    assert Run(kind="lora").load(folder) == 1 and Run(kind="lora").load(tmp_path) == 1
    begun.save(folder, step=2)
    begun.save(folder, step=3)
    assert Run(kind="lora").load(folder) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_resuming_a_folder_takes_its_latest_state(tmp_path: Path) -> None:
    begun = Run(kind="lora")
    for step in (5, 40, 9):
        begun.save(tmp_path / f"mine-step{step}-state", step=step)
    (tmp_path / "empty").mkdir()
    assert latest_state(tmp_path).name == "mine-step40-state"
    assert latest_state(tmp_path / "mine-step9-state").name == "mine-step9-state"
    assert Run(kind="lora").load(tmp_path) == 40


# ---- what bad input gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, "high-noise network: this run has ss_network_dim 8, the state has 4"),
        ({"alpha": 1.0}, "this run has ss_network_alpha 1.0, the state has 2.0"),
        ({"pose_frame": "first"}, "this run has pose_frame first, the state has scene"),
        ({"kind": "plucker_light"}, "this run has injection plucker_light, the state has bias"),
        ({"kind": "lora"}, "this run has camera_hidden none, the state has 64"),
        ({"optimizer": "AdamW8bit"}, "optimizer: this run has class bitsandbytes.AdamW8bit, the state has torch.AdamW"),
        ({"experts": ("low",)}, "expected the state of the experts low, found that of high and low"),
    ],
)
def test_the_state_of_another_run_is_refused_and_changes_nothing(changes: dict, message: str, tmp_path: Path) -> None:
    Run().save(tmp_path / "state")
    other = Run(**changes)
    before = other.weights()
    with pytest.raises(InputError, match=message):
        other.load(tmp_path / "state")
    assert equal(other.weights(), before)


@pytest.mark.parametrize("name", ["high.safetensors", "low_optimizer.pt", STATE_FILE])
@pytest.mark.parametrize("how", ["missing", "cut", "half zeros"])
def test_a_broken_state_is_refused(name: str, how: str, tmp_path: Path) -> None:
    folder, begun = tmp_path / "state", Run(kind="lora")
    begun.train(0, 2)
    begun.save(folder)
    file = folder / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(
            content[: len(content) // 2] + bytes(len(content) - len(content) // 2 if how == "half zeros" else 0)
        )
    before = begun.weights()
    with pytest.raises(InputError) as caught:
        begun.load(folder)
    assert "state" in str(caught.value) and "\n" not in str(caught.value)
    assert equal(begun.weights(), before)


def test_no_state_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="expected a training state .* found none"):
            Run(kind="lora").load(folder)


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_the_last_step_is_what_a_state_saved_then_holds(optimizer: str, tmp_path: Path) -> None:
    """Copies are of one moment: what trains on afterwards changes none of them."""
    ours = Run(optimizer)
    last = LastStep(ours.networks, ours.optimizers, step=0)
    for step in range(3):
        ours.train(step, step + 1)
        last.settle()
        last.keep(list(ours.networks)[step % 2], step=step + 1)
    parts, step = last.parts()
    ours.save(tmp_path / "live", step=3)
    ours.train(3, 5)
    save_state(tmp_path / "copied", parts, step=step)
    live, copied = Run(optimizer), Run(optimizer)
    assert live.load(tmp_path / "live") == copied.load(tmp_path / "copied") == 3
    assert equal(live.weights(), copied.weights()) and not equal(live.weights(), ours.weights())
    assert live.train(3, STEPS) == copied.train(3, STEPS) and equal(live.weights(), copied.weights())


def test_a_copy_that_never_arrived_gives_way_to_the_one_before(tmp_path: Path) -> None:
    class Lost:
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure")

    ours = Run()
    last = LastStep(ours.networks, ours.optimizers, step=0)
    ours.train(0, 2)
    last.keep("high", step=1)
    last.keep("low", step=2)
    before = last.parts()[0]["high"].weights
    expected = {name: tensor.clone() for name, tensor in before.items()}
    ours.train(2, 3)
    last.keep("high", step=3)
    last._copies["high"][-1].arrived = Lost()  # type: ignore[assignment]
    parts, step = last.parts()
    assert step == 2 and equal(dict(parts["high"].weights), expected)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_what_a_lost_device_says(error: Exception, lost: bool) -> None:
    assert is_lost(error) == lost
