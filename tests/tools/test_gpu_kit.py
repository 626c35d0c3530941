"""The GPU kit on a machine without a GPU: it runs through, needs nothing it may not need, and makes nothing up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_kit import report as reports
from benchmarks.gpu_kit.bench import Bench
from benchmarks.gpu_kit.host_pool import HostPool, Lease
from benchmarks.gpu_kit.model import loss_of, make_batch
from benchmarks.gpu_kit.optimizer import AdamW8
from benchmarks.gpu_kit.records import Clock, Records
from benchmarks.gpu_kit.settings import TOY
from memory.device import CpuDevice

ROOT = Path(__file__).parents[2]
ABSENT = (
    "tyro", "av", "diffusers", "bitsandbytes", "transformers", "accelerate", "scipy", "PIL", "matplotlib", "toml",
    "tqdm",
)  # fmt: skip
"""What the machine with the GPU does not have."""
SECTIONS = {
    "streaming", "checks", "machine", "build", "training", "agreement", "eager", "resident", "generation",
}  # fmt: skip
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Rest:
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT!r} else PathFinder.find_spec(name, path, target)

sys.meta_path = [Rest() if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a dry run, in processes that lack the modules; half a minute of one core."""
    folder = tmp_path_factory.mktemp("gpu_kit")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    absent = subprocess.run([sys.executable, "-c", "import scipy"], env=environment, capture_output=True, text=True)
    assert "No module named 'scipy'" in absent.stderr
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--out", folder / "out", "--dry_run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert {path.name for path in (folder / "out").iterdir()} == {"gpu.json", "gpu.md"}
    assert "Nothing here is a figure" in (folder / "out" / "gpu.md").read_text()
    return json.loads((folder / "out" / "gpu.json").read_text())


def test_every_section_runs_through(report: dict) -> None:
    assert report["sections"].keys() == SECTIONS
    for name, section in report["sections"].items():
        assert section["status"] == "done" and section["rows"] and not section["skipped"], name
    assert set(report["parts"].values()) == {"done"} and reports.failures(report) == []
    checks = report["sections"]["checks"]["rows"]
    assert len(checks) > 50 and all(row["passed"] for row in checks)


def test_what_a_plan_says_is_what_travels(report: dict) -> None:
    rows = report["sections"]["training"]["rows"]
    assert {row["recipe"] for row in rows} == {"fp8", "int8_w8a8"}
    assert any(row["store"].startswith("host") and row["d2h_bytes"] for row in rows)
    for row in rows:
        assert (row["h2d_bytes"] > 0) == (row["streamed"] > 0) and row["out_of_memory_before"] == 0
        assert row["measured_bytes"] is None and row["stall_seconds"] is None


def test_without_a_gpu_no_bar_is_judged(report: dict) -> None:
    assert len(report["bars"]) == 8
    assert all(bar["met"] is None and bar["found"] is None for bar in report["bars"])


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "expected a CUDA device" in done.stderr and not (tmp_path / "out").exists()


def test_the_readme_is_what_the_results_say() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = reports.readme_section((ROOT / "benchmarks" / "results").glob("gpu_*.json"))
    assert reports.with_section(readme, section) == readme


def measured(**changes: object) -> dict:
    """A report with one row of training that meets its bars."""
    row = {
        "recipe": "fp8", "clip": "81x480x832", "tokens": reports.LONG, "card": "24 GB", "experts": 2, "streamed": 25,
        "seconds": 6.0, "stall_seconds": 0.06, "transfer_seconds": 1.0, "planned_bytes": 22e9, "measured_bytes": 21.5e9,
        "reserved_bytes": 23e9,
    } | changes  # fmt: skip
    eager = {"tokens": reports.LONG, "attention": "default", "recipe": "fp8", "seconds": 12.0, "measured_bytes": 60e9}
    same = {"check": "c", "required": True, "passed": True}
    sections = {"training": [row], "eager": [eager], "streaming": [same]}
    empty = {"status": "done", "seconds": 1.0, "skipped": [], "errors": []}
    return {
        "dry_run": False, "quick": False, "seconds": 1.0, "parts": {"checks": "done"}, "cudnn_attention": True,
        "machine": {"device": "A card", "torch": "2", "triton": "3", "python": "3.12"},
        "sections": {name: {**empty, "rows": rows} for name, rows in sections.items()},
    }  # fmt: skip


def judged(report: dict) -> list[bool | None]:
    return [bar["met"] for bar in reports.bars(report)]


def test_a_bar_is_met_missed_or_not_measured() -> None:
    assert judged(measured()) == [True, True, None, None, True, None, True, True]
    assert judged(measured(reserved_bytes=23.5e9))[1] is False  # the driver's share comes on top
    assert judged(measured(experts=1))[1] is None
    assert judged(measured(seconds=7.3))[4] is False
    assert judged(measured(stall_seconds=0.2))[6] is False
    assert judged(measured(measured_bytes=23.5e9))[7] is False
    assert judged(measured(recipe="int8_w8a8"))[4:6] == [None, True]
    assert judged(measured(card="8 GB", reserved_bytes=7e9))[1:3] == [None, True]


def test_figures_come_into_the_readme(tmp_path: Path) -> None:
    (tmp_path / "gpu_card.json").write_text(json.dumps(measured()))
    (tmp_path / "gpu_toy.json").write_text(json.dumps(measured() | {"dry_run": True}))
    section = reports.readme_section(tmp_path.glob("gpu_*.json"))
    assert section.count("A card") == 1 and "| 21.50 |" in section and "| not measured |" in section
    readme = f"a\n{reports.START}\nold\n{reports.END}\nb\n"
    assert reports.with_section(readme, section) == f"a\n{reports.START}\n{section}\n{reports.END}\nb\n"
    with pytest.raises(ValueError, match="README"):
        reports.with_section("nothing", section)


def test_a_failure_is_noted_and_the_next_row_runs(tmp_path: Path) -> None:
    records = Records(tmp_path / "part.json", Clock(time.time() + 60))
    with records.section("training"):
        raise RuntimeError("the first row")
    with records.section("training"):
        records.add("training", {"seconds": 1.0})
    found = json.loads((tmp_path / "part.json").read_text())["training"]
    assert found["status"] == "failed" and "the first row" in found["errors"][0] and found["rows"] == [{"seconds": 1.0}]
    report = measured() | {
        "sections": reports.merge([{"training": found}]),
        "parts": {"checks": "done", "int8": "gone"},
    }
    assert reports.failures(report) == ["part int8: gone", "training: RuntimeError: the first row"]
    assert not Clock(time.time() + 4).fits(2) and Clock(time.time() + 60).fits(2)


def test_host_memory_is_lent_and_comes_back() -> None:
    pool = HostPool(CpuDevice())
    pool.reserve(2, 64)
    one = Lease(pool)
    pieces = [one.host(64), one.host(32), one.host(128)]
    assert [piece.numel() for piece in pieces] == [64, 32, 128] and not pool.free
    target, source = one.buffer(64), one.host(64).fill_(3)
    one.wait(one.copy(target, source, after=one.record()))
    assert torch.equal(target, source) and (one.h2d_bytes, one.d2h_bytes) == (64, 0)
    one.wait(one.copy(pieces[0], target, after=None))
    assert torch.equal(pieces[0], source) and (one.h2d_bytes, one.d2h_bytes) == (64, 64)
    one.end()
    assert sorted(piece.numel() for piece in pool.free) == [64, 64, 64, 128]
    assert pool.missing_bytes(2, 128) == 128
    pool.reserve(2, 128)
    assert [piece.numel() for piece in pool.free] == [128, 128]


def test_wherever_a_plan_puts_the_experts_they_compute_the_same() -> None:
    bench = Bench(TOY, "fp8")
    bench.build()
    plan = replace(bench.training_plan(TOY.long, 10**12), store="device", outside="device", stored_bytes=0)
    batch = make_batch(TOY.variant, TOY.long, device=torch.device("cpu"), seed=0)
    found = []
    for streamed, place in (((), "device"), (range(6), "host"), ((0, 3, 4), "host"), ((), "device")):
        with bench.placed(replace(plan, streamed=tuple(streamed), store=place, outside=place)) as placed:
            placed.lease.reset()  # resident blocks have travelled
            for expert in placed.experts:
                loss_of(expert.dit, batch, placed.runners[expert.name]).backward()
                found.append([parameter.grad for parameter in expert.network.parameters()])
                expert.network.zero_grad(set_to_none=True)
            assert (placed.lease.h2d_bytes > 0) == (place == "host")
    for number in range(2, len(found)):
        assert all(torch.equal(a, b) for a, b in zip(found[number % 2], found[number], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))


def test_the_optimizer_does_what_adamw_does() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(7, 50)), torch.nn.Parameter(torch.randn(300))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    start = torch.cat([parameter.detach().flatten() for parameter in ours])
    one, other = AdamW8(ours, learning_rate=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for _ in range(5):
        for mine, yours in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) + 1
            yours.grad = mine.grad.clone()
        one.step()
        other.step()
    assert all(parameter.grad is None for parameter in ours)
    moved, expected = (torch.cat([p.detach().flatten() for p in group]) - start for group in (ours, theirs))
    assert (moved - expected).norm() < 0.05 * expected.norm()
    one.to(torch.device("cpu"))
    assert ours[0].data_ptr() == one.groups[0].flat.data_ptr()
