"""The planner as a user meets it: figures of the survey as laws, sizes in words, and what bad input gets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InputError
from memory.machine import host_bytes, parse_bytes
from memory.plan import MemoryPlan, next_smaller
from memory.rates import CATALOGUE
from memory.simulate_plan import simulate_plan
from tools.plan_memory import Options, plan_for, read_size
from wan_ext.configs import get_variant
from wan_ext.planning import plan_generation, plan_training

GB = 10**9
ROOT = Path(__file__).parents[2]
A14B = get_variant("t2v-A14B")


def planned(
    vram: float, ram: float = 128, *, frames: int = 81, size=(480, 832), card: str = "4090", **more
) -> MemoryPlan:
    settings = {"rank": 16, "experts": ("high", "low"), "recipe": "fp8", **more}
    return plan_training(
        A14B,
        frames=frames,
        height=size[0],
        width=size[1],
        vram_bytes=int(vram * GB),
        ram_bytes=int(ram * GB),
        rates=CATALOGUE[card],
        **settings,
    )


def test_81_frames_of_480p_train_in_8_gb_with_one_expert() -> None:
    found = planned(8, experts=("low",))
    assert len(found.streamed) >= 38
    assert found.schedule.head_groups >= 2 and not found.eight_bit_store


def test_720p_trains_in_12_gb_of_tensors_with_one_expert() -> None:
    found = planned(13.5, experts=("low",), size=(720, 1280))
    assert found.tensor_bytes <= 12.5 * GB


def test_24_gb_keep_as_many_blocks_of_both_experts_as_there_is_room_for() -> None:
    found = planned(24, rank=32)
    resident = 40 - len(found.streamed)
    assert 5 <= resident < 40  # both experts together have 29 GB in 8 bits
    assert 24 * GB - found.vram_bytes < 2 * found.costs.block_bytes
    assert found.schedule.keep_attention and found.schedule.head_groups == 1
    assert found.stall_seconds == 0


def test_keeping_attention_saves_what_the_survey_says() -> None:
    """14 % of the operations at 81 frames of 480 x 832."""
    kept, recomputed = planned(24, 128), planned(24, 64)
    assert kept.schedule.keep_attention
    blocks = {block.schedule: block for block in recomputed.costs.blocks}
    with_it, without = (
        blocks[replace(kept.schedule, keep_attention=keep)].backward.seconds(CATALOGUE["4090"], "bf16")
        for keep in (True, False)
    )
    step = recomputed.compute_seconds
    assert 40 * (without - with_it) / step == pytest.approx(0.14, abs=0.03)


def test_weights_stream_for_nothing_above_the_survey_s_tokens() -> None:
    """A 4090 hides 8-bit blocks from 1,880 tokens on; one frame of 480 x 832 has 1,560, 17 frames have 7,800."""
    everything = {"experts": ("low",), "blocks_to_swap": 40}
    assert planned(20, frames=17, **everything).stall_seconds == 0
    assert planned(20, frames=1, size=(480, 480), **everything).stall_seconds > 0


@pytest.mark.parametrize(("vram", "frames", "card"), [(8.5, 81, "4090"), (16, 17, "3090"), (7, 1, "4090-x8")])
def test_the_simulated_engine_agrees(vram: float, frames: int, card: str) -> None:
    found = planned(vram, frames=frames, card=card, experts=("low",))
    report = simulate_plan(found)
    assert report.step_seconds == pytest.approx(found.step_seconds, rel=0.05)
    assert report.h2d_bytes <= found.h2d_bytes
    assert report.d2h_bytes == pytest.approx(found.d2h_bytes, rel=1e-4)


def test_the_estimate_is_that_of_the_survey() -> None:
    """Design E of the survey's model on a 4090: 39.7 s at 32,760 tokens, 5.3 s at 7,800; in int8 31.4 s and 3.3 s."""
    for frames, exact, int8 in ((81, 39.7, 31.4), (17, 5.3, 3.3)):
        assert planned(24, frames=frames).step_seconds == pytest.approx(exact, rel=0.15)
        assert planned(24, frames=frames, recipe="int8_w8a8").step_seconds == pytest.approx(int8, rel=0.15)


def test_more_memory_is_never_slower_and_smaller_plans_end() -> None:
    seconds = [planned(vram).step_seconds for vram in (10, 12, 16, 24, 48)]
    assert seconds == sorted(seconds, reverse=True)
    found, sizes = planned(24), []
    for _ in range(100):
        sizes.append(found.vram_bytes)
        try:
            found = next_smaller(found)
        except InputError:
            break
    assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] < 10 * GB


def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(InputError) as error:
        planned(7, rank=32)
    text = str(error.value)
    assert "\n" not in text and "--frames" in text and "--rank" not in text.split("What would fit")[0]
    least = float(re.findall(r"at least ([\d.]+) GB of device memory", text)[0])
    assert planned(least, rank=32).vram_bytes <= least * GB
    frames = int(re.findall(r"--frames (\d+)", text)[0])
    assert planned(7, rank=32, frames=frames).vram_bytes <= 7 * GB
    with pytest.raises(InputError, match="host memory"):
        planned(12, 20)
    assert planned(12, 20, from_file=True, experts=("low",)).masters == "mapped"


def test_generation_needs_no_backward() -> None:
    settings = {"frames": 81, "height": 480, "width": 832, "recipe": "fp8", "rates": CATALOGUE["4090"]}
    found = plan_generation(A14B, vram_bytes=8 * GB, ram_bytes=64 * GB, **settings)
    assert found.d2h_bytes == 0 and found.step_seconds < planned(24).step_seconds / 3
    with pytest.raises(InputError, match="device memory"):
        plan_generation(A14B, vram_bytes=3 * GB, ram_bytes=64 * GB, **settings)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * GB), ("23.5GiB", int(23.5 * 2**30)), ("512 mb", 512 * 10**6), ("1TiB", 2**40)]
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert parse_bytes(text, "--vram") == size


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "0GB", "24 bananas", "", "1e3GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--vram: expected a size such as 24GB"):
        parse_bytes(text, "--vram")


def test_height_stands_before_width() -> None:
    assert read_size("480x832") == read_size("480*832") == (480, 832)
    with pytest.raises(InputError, match="height x width"):
        read_size("480")


def test_this_machine_has_memory() -> None:
    assert host_bytes() > 10**8


def options(**changes) -> Options:
    return replace(Options(task="t2v-A14B", vram="24GB", ram="64GB", gpu="4090"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vram": "48GB"}, "--vram 48GB: expected at most"),
        ({"task": "t2v-14"}, "t2v-14B"),
        ({"recipe": "int9"}, "int8"),
        ({"frames": 80}, "4 n \\+ 1"),
        ({"size": "481x832"}, "multiples of 16"),
        ({"rank": 0}, "--rank"),
        ({"optimizer_type": "AdamW9"}, "AdamW8bit"),
        ({"blocks_to_swap": 41}, "0 to 40"),
        ({"task": "t2v-14B", "experts": "high"}, "one expert"),
        ({"gpu": "banana"}, "graphics card"),
        ({"recipe": "fp8_w8a8", "gpu": "3090"}, "3090"),
    ],
)
def test_bad_input_gets_one_line(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        plan_for(options(**changes))
    assert "\n" not in str(error.value) and "What would fit" not in str(error.value)


def test_without_a_card_the_size_has_to_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory.card.device_bytes", lambda own: None)
    with pytest.raises(InputError, match="--vram"):
        plan_for(options(vram=None, gpu=None))
    plan, note = plan_for(options(gpu=None))
    assert plan.rates.name == "4090" and note and "--gpu" in note


def test_a_card_in_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ("NVIDIA GeForce RTX 3090", 24 * GB, 20 * GB)
    monkeypatch.setattr("memory.card.device_bytes", lambda own: here)
    plan, note = plan_for(options(vram=None, gpu=None))
    assert plan.limits.vram_bytes == 20 * GB and plan.rates.name == "3090" and note is None
    with pytest.raises(InputError, match="at most the 24.0 GB"):
        plan_for(options(vram="25GB", gpu=None))


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "tools/plan_memory.py", "--task", "t2v-A14B", "--frames", "81", "--size", "480x832"]
    command += ["--rank", "32", "--vram", "24GB", "--ram", "64GB", "--gpu", "4090"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "plan.json")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "plan.json").read_text())
    assert f"{record['vram_bytes'] / GB:.2f} of 24.0" in done.stdout
    for words in ("resident blocks", "ring of streamed blocks", "activations", "workspace", "share for fragmentation"):
        assert words in done.stdout
