"""Training as laws: resumed equals uninterrupted, swapped equals resident, both experts learn, files say it."""

import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from core.errors import InputError
from core.files import read_safetensors
from training.ending import Terminated
from wan_ext.dit import WanDiT

ROOT = Path(__file__).parents[2]

HIGH, LOW = "net_high_noise.safetensors", "net_low_noise.safetensors"


def weights_of(folder, suffix=""):
    files = [f"net{suffix}_{expert}_noise{part}.safetensors" for expert in ("high", "low") for part in ("", "_camera")]
    return {f"{file}/{name}": t for file in files for name, t in read_safetensors(folder / file)[0].items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different[:5]


def test_both_experts_learn(trained_once):
    for file in (HIGH, LOW):
        tensors, metadata = read_safetensors(trained_once / file)
        assert all(t.abs().sum() > 0 for name, t in tensors.items() if name.endswith("lora_B.weight"))
        assert metadata["task"] == "tiny"
        assert metadata["expert"] == file.split("_")[1]
        assert metadata["pose_frame"] == "scene"
        assert metadata["prompt"] == "a room with red walls and a blue ball"
        assert (metadata["height"], metadata["width"], metadata["num_frames"]) == ("32", "48", "5")
        assert json.loads(metadata["ss_training_options"])["network_dim"] == 4
        camera, _ = read_safetensors(trained_once / metadata["camera_file"])
        assert all(t.abs().sum() > 0 for t in camera.values())


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "AdamWScheduleFree"])
def test_resumed_equals_uninterrupted(world, optimizer):
    options = {
        "optimizer_type": optimizer,
        "gradient_accumulation_steps": 2,
        "network_dropout": 0.2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "max_train_steps": 6,
    }
    whole = world.train("whole", **options, save_every_n_steps=3, save_state=True)
    resumed = world.train("resumed", **options, resume=whole / "net-step00000003-state")
    assert_same(weights_of(whole), weights_of(resumed))
    other_seed = world.train("other", **(options | {"seed": 4}))
    assert not torch.equal(weights_of(whole)[key := first_up(whole)], weights_of(other_seed)[key])


def test_a_resumed_average_equals_an_uninterrupted_one(world):
    options = {"ema_decay": 0.5, "weighting_scheme": "cosmap", "lr_scheduler": "rex"}
    whole = world.train("whole", **options, save_every_n_steps=2, save_state=True)
    resumed = world.train("resumed", **options, resume=whole / "net-step00000002-state")
    assert_same(weights_of(whole), weights_of(resumed))
    assert_same(weights_of(whole, "-ema"), weights_of(resumed, "-ema"))
    plain = world.train("plain", **(options | {"ema_decay": None}))
    assert_same(weights_of(whole), weights_of(plain))
    key = first_up(whole)
    averaged = weights_of(whole, "-ema")[key.replace("net_", "net-ema_")]
    assert 0 < averaged.norm() < weights_of(whole)[key].norm()
    with pytest.raises(InputError, match="found a moving average; resume with the same --ema_decay"):
        world.train("resumed", **(options | {"ema_decay": None}), resume=whole / "net-state")


def no_number_at(monkeypatch, calls_from: int, calls_to: int) -> None:
    """Let some passes of the transformer give no number, as an overflow would."""
    calls = []

    def forward(*given, **names):
        calls.append(1)
        velocity = plain(*given, **names)
        return velocity * float("nan") if calls_from <= len(calls) <= calls_to else velocity

    plain = WanDiT.forward
    monkeypatch.setattr(WanDiT, "forward", forward)


def test_a_step_without_a_number_is_skipped_and_named(world, monkeypatch, capsys):
    no_number_at(monkeypatch, 2, 3)
    folder = world.train("skipped", optimizer_type="AdamW8bit", ema_decay=0.9)
    assert all(tensor.isfinite().all() for suffix in ("", "-ema") for tensor in weights_of(folder, suffix).values())
    said = "".join(capsys.readouterr())
    assert "step 1: skipped" in said and "step 2: skipped" in said and "2 in a row, 2 in all" in said
    assert "step 3: skipped" not in said


def test_ten_steps_without_a_number_end_the_run_with_its_state(world, monkeypatch):
    before = world.train("before", max_train_steps=1)
    no_number_at(monkeypatch, 2, 99)
    with pytest.raises(InputError, match="steps 1 to 10: expected finite gradients.*clips: .*0000"):
        world.train("stopped", max_train_steps=20)
    assert_same(
        weights_of(before), {k.replace("-bad", ""): v for k, v in weights_of(world.folder / "stopped", "-bad").items()}
    )
    assert json.loads((world.folder / "stopped" / "net-bad-state" / "state.json").read_text())["step"] == 11


def first_up(folder):
    return next(name for name in weights_of(folder) if name.endswith("lora_B.weight"))


def test_swapped_equals_resident(world):
    resident = world.train("resident", gradient_checkpointing=True)
    swapped = world.train("swapped", gradient_checkpointing=True, blocks_to_swap=6)
    assert_same(weights_of(resident), weights_of(swapped))


def test_swapped_equals_resident_in_8_bits_and_bf16(world):
    options = {"fp8_scaled": True, "mixed_precision": "bf16", "max_train_steps": 3, "gradient_checkpointing": True}
    resident = world.train("resident", **options)
    swapped = world.train("swapped", **options, blocks_to_swap=4)
    assert_same(weights_of(resident), weights_of(swapped))
    full = world.train("full", max_train_steps=3)
    name = first_up(full)
    assert (
        torch.nn.functional.cosine_similarity(
            weights_of(full)[name].flatten(), weights_of(resident)[name].flatten(), dim=0
        )
        > 0.8
    )


PLANNED = {"vram": "4GB", "ram": "16GB", "gpu": "4090"}


def test_a_plan_is_printed_and_changes_no_result(world, capsys):
    by_hand = world.train("by_hand", gradient_checkpointing=True)
    planned = world.train("planned", **PLANNED)
    assert "device memory at the worst moment" in capsys.readouterr().out
    for name, weight in weights_of(by_hand).items():
        torch.testing.assert_close(weights_of(planned)[name], weight, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("flags", [{"ram": "16GB"}, {"gpu": "4090"}, {"on_oom": "replan"}])
def test_what_only_a_plan_reads_is_refused_without_one(world, flags):
    with pytest.raises(InputError, match=f"--{next(iter(flags))} .* without a plan"):
        world.train("unplanned", **flags)


def test_a_state_of_the_last_step_still_gives_weights(world):
    """A run that was ended while it saved: nothing is left to train, and the weights are."""
    whole = world.train("whole", save_state=True)
    again = world.train("again", resume=whole / "net-state")
    assert_same(weights_of(whole), weights_of(again))


def test_memory_that_runs_out_under_the_smallest_plan_still_leaves_the_state(world, monkeypatch):
    def none(plan):
        raise InputError("this is the smallest")

    monkeypatch.setattr("train_network.next_smaller", none)
    out_of_memory_once(monkeypatch, at_call=3)
    with pytest.raises(InputError, match=r"step 2: .* go on with --resume .*net-oom-state; this is the smallest"):
        world.train("stopped", **PLANNED, on_oom="replan")
    assert (world.folder / "stopped" / "net-oom-state" / "state.json").exists()


def test_a_plan_that_cannot_be_says_what_would_do(world):
    with pytest.raises(InputError, match=r"expected at least \d.* of device memory"):
        world.train("planned", **PLANNED | {"vram": "0.5GB"})
    with pytest.raises(InputError, match="--vram: expected a size such as 24GB"):
        world.train("planned", **PLANNED | {"vram": "24"})
    with pytest.raises(InputError, match="at most the .* of a 4090"):
        world.train("planned", **PLANNED | {"vram": "30GB"})


def out_of_memory_once(monkeypatch, at_call: int) -> None:
    """Let one pass of the transformer find no memory, as a device would say it."""
    calls = []

    def forward(*given, **names):
        calls.append(1)
        if len(calls) == at_call:
            raise torch.OutOfMemoryError("no memory left")
        return plain(*given, **names)

    plain = WanDiT.forward
    monkeypatch.setattr(WanDiT, "forward", forward)


def test_running_out_of_memory_replans_and_repeats_the_step(world, monkeypatch, capsys):
    whole = world.train("whole", **PLANNED)
    out_of_memory_once(monkeypatch, at_call=3)
    replanned = world.train("replanned", **PLANNED, on_oom="replan")
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(replanned)[name], weight, atol=1e-4, rtol=1e-2)
    assert "step 2: device memory ran out; the step is done again" in "".join(capsys.readouterr())


def test_running_out_of_memory_saves_what_a_resumed_run_needs(world, monkeypatch):
    whole = world.train("whole", **PLANNED)
    with monkeypatch.context() as once:
        out_of_memory_once(once, at_call=3)
        with pytest.raises(
            InputError, match=r"step 2: device memory ran out; go on with --resume .*; --vram .*GB"
        ) as stop:
            world.train("stopped", **PLANNED)
    state = Path(str(stop.value).split("--resume ")[1].split(";")[0])
    resumed = world.train("stopped", **PLANNED, resume=state)
    assert_same(weights_of(whole), weights_of(resumed))


@pytest.mark.parametrize(
    ("end", "raises"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (Terminated(), None),
        (RuntimeError("CUDA error: unspecified launch failure\nmore"), InputError),
    ],
    ids=["ctrl_c", "sigterm", "lost_device"],
)
def test_a_run_that_is_ended_leaves_the_state_of_its_last_step(world, monkeypatch, end, raises):
    whole = world.train("whole")
    calls = []

    def forward(*given, **names):
        calls.append(1)
        if len(calls) == 3:
            raise end
        return plain(*given, **names)

    plain = WanDiT.forward
    with monkeypatch.context() as once:
        once.setattr(WanDiT, "forward", forward)
        with pytest.raises(raises, match="resume" if raises is InputError else None) if raises else nullcontext():
            world.train("ended")
    resumed = world.train("ended", resume=world.folder / "ended" / "net-interrupted-state")
    assert_same(weights_of(whole), weights_of(resumed))


def test_memory_that_runs_out_in_the_optimizer_leaves_the_last_whole_step(world, monkeypatch):
    whole = world.train("whole")
    calls = []

    def step(*given, **names):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory left")
        return plain(*given, **names)

    plain = torch.optim.AdamW.step
    with monkeypatch.context() as once:
        once.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(InputError, match="device memory ran out after step 2 .*--resume"):
            world.train("ended")
    resumed = world.train("ended", resume=world.folder / "ended" / "net-interrupted-state")
    assert_same(weights_of(whole), weights_of(resumed))


def test_sigterm_ends_a_run_with_code_0(world):
    """As a scheduler does it: the command, in a process of its own."""
    words = [sys.executable, str(ROOT / "train_network.py"), "--dataset_config", str(world.toml), "--device", "cpu"]
    words += ["--mixed_precision", "no", "--optimizer_type", "AdamW", "--max_train_steps", "100000"]
    words += ["--output_dir", str(world.folder / "term"), "--output_name", "net", "--network_dim", "4"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in iter(process.stderr.readline, ""):
        if "step/s" in line:
            break
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "go on with --resume" in said
    assert json.loads((world.folder / "term" / "net-interrupted-state" / "state.json").read_text())["step"] >= 0


def test_one_expert_alone_trains_only_that_one(world):
    folder = world.train("low", experts="low")
    assert (folder / LOW).exists()
    assert not (folder / HIGH).exists()


def test_lora_without_camera_needs_no_camera_cache(world):
    for file in world.cache_files:
        if "camera" in file.name:
            file.unlink()
    folder = world.train("plain", network_module="networks.lora", network_args=())
    assert (folder / LOW).exists()
    assert not list(folder.glob("*camera*"))
    with pytest.raises(InputError, match="cache_camera.py"):
        world.train("camera")


def test_epochs_count_the_data_set(world, capsys):
    folder = world.train("epochs", max_train_epochs=2, save_every_n_epochs=1)
    assert (folder / "net-000001_low_noise.safetensors").exists()  # 3 clips in batches of 2: 2 steps
    assert read_safetensors(folder / LOW)[1]["ss_steps"] == "4"


def test_tensorboard_gets_the_curves(world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    world.train("logged", log_with="tensorboard", logging_dir=world.folder / "logs", max_train_steps=6)
    (folder,) = [f.parent for f in (world.folder / "logs").rglob("events*")][:1]
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/low", "grad_norm/low", "seconds_per_step"} <= tags
    assert len(events.Scalars("seconds_per_step")) == 6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sage_attn": True}, "sage_attn"),
        ({"network_args": ("injektion=bias",)}, "injection"),
        ({"network_args": ("injection=biass",)}, "bias"),
        ({"network_args": ("injection",)}, "key=value"),
        ({"network_module": "networks.lora_cam"}, "networks.lora_camera"),
        ({"optimizer_type": "Adam9"}, "AdamW"),
        ({"optimizer_type": "Prodigy", "network_args": ("loraplus_lr_ratio=4",)}, "loraplus_lr_ratio"),
        ({"lr_scheduler": "cosin"}, "cosine"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"weighting_scheme": "mode"}, "weighting_scheme mode"),
        ({"lr_warmup_steps": 2}, "lr_warmup_steps 2: does nothing"),
        ({"blocks_to_swap": 7}, "6"),
        ({"timestep_boundary": 2000.0}, "timestep_boundary"),
        ({"task": "t2v-A15B"}, "t2v-A14B"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"save_every_n_epochs": 0}, "save_every_n_epochs"),
        ({"discrete_flow_shift": 0.0}, "shift"),
        ({"resume": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_train_is_named(world, options, named):
    options = {key: Path(value) if key == "resume" else value for key, value in options.items()}
    with pytest.raises(InputError, match=named):
        world.train("bad", **options)
    assert not list((world.folder / "bad").glob("*.safetensors"))


def test_a_state_of_another_network_is_refused(world):
    folder = world.train("whole", save_state=True)
    with pytest.raises(InputError, match="rank|network_dim"):
        world.train("other", network_dim=8, resume=folder / "net-state")


@pytest.mark.parametrize("kind", ["latents", "text", "camera"])
def test_a_truncated_cache_is_named_with_the_command_that_mends_it(world, kind):
    file = next(f for f in world.cache_files if f.name.endswith(f"{kind}.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"{file.name}.*cache_{kind}.py"):
        world.train("bad")


def test_caches_of_another_size_are_named(world):
    world.toml.write_text(world.toml.read_text().replace("[48, 32]", "[64, 32]"))
    with pytest.raises(InputError, match="cache_latents.py"):
        world.train("bad")
