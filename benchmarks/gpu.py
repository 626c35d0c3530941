"""What the memory engine does on this GPU: kernels checked, streaming checked, training and generation measured.

    python benchmarks/gpu.py --out DIR [--quick]

One command that downloads nothing: weights are random and made on the device. It needs torch, triton, numpy,
safetensors and einops alone, so its options are read by argparse and not by the project's own module.

    checks      every kernel, every way to multiply in 8 bits, every attention and the whole block, against references
    streaming   optimizer steps of both experts: streamed is resident, bit for bit
    training    the real t2v-A14B shape, both experts, on cards of 24, 16, 12 and 8 GB (caps of the allocator), as the
                planner says: memory planned and measured, seconds, waiting
    eager       the same step in the style of today's trainers
    generation  seconds of a denoising pass, and of a change of expert

It ends within nine minutes (three with --quick): what has no time left is skipped, and said. --only gives all of that
time to one of three parts: checks (with streaming), exact (weights in fp8) and int8. Each part is a process of its own,
so that a crash in one leaves the others; rows are on the disk as soon as they are measured. DIR/gpu.json has every
figure and the bars, DIR/gpu.md the same as tables. Exit code 1: a check failed, or a part did not come to its end;
2: there is no GPU.

--dry_run runs all of it with a toy on the CPU, to see that it runs; it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.errors import InputError
from core.files import atomic_path

SECONDS, QUICK_SECONDS = 525.0, 172.0
ENDS = {"checks": 0.24, "exact": 0.65, "int8": 1.0}
"""When each part has to be over, as a share of all."""
GRACE = 5.0
"""Seconds after its end in which a part may write; then it is stopped."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--quick", action="store_true", help="three minutes: fewer rows")
    parser.add_argument("--dry_run", action="store_true", help="a toy on the CPU; measures nothing")
    parser.add_argument("--only", choices=tuple(ENDS), help="one of the three parts, with all the time")
    parser.add_argument("--part", choices=tuple(ENDS), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--without_cudnn", action="store_true", help="attention by FlashAttention 2 instead of cuDNN's")
    return parser.parse_args()


def main(out: Path, *, quick: bool, dry_run: bool, without_cudnn: bool, only: str | None) -> int:
    """Run all parts, or one of them, and write the report after each; the exit code.

    Where a check finds cuDNN's attention wrong, what follows is measured without it, and the report says so.
    """
    from benchmarks.gpu_kit import report as reports

    started = time.time()
    machine = _machine(dry_run)
    limit = QUICK_SECONDS if quick else SECONDS
    ended: dict[str, str] = {}
    found: dict[str, Any] = {}
    for part, share in (ENDS if only is None else {only: 1.0}).items():
        until = started + share * limit
        ended[part] = _run_part(part, out, quick=quick, dry_run=dry_run, without_cudnn=without_cudnn, until=until)
        sections = reports.merge(
            json.loads(path.read_text()) for path in (_part_file(out, name) for name in ended) if path.exists()
        )
        found = {
            "dry_run": dry_run,
            "quick": quick,
            "machine": machine,
            "cudnn_attention": not without_cudnn,
            "seconds": time.time() - started,
            "parts": ended,
            "sections": sections,
        }
        found["bars"] = reports.bars(found)
        without_cudnn = without_cudnn or reports.attention_failed(found)
        for name, write in reports.WRITERS.items():
            with atomic_path(out / name) as temporary:
                temporary.write_text(write(found), encoding="utf-8")
    for part in ended:
        _part_file(out, part).unlink(missing_ok=True)
    print(reports.tables(found))
    failed = reports.failures(found)
    print("\n".join(f"failed: {what}" for what in failed) or "every check passed")
    return 1 if failed else 0


def _run_part(part: str, out: Path, *, quick: bool, dry_run: bool, without_cudnn: bool, until: float) -> str:
    """Run a part in a process of its own; "done", or how it ended."""
    command = [sys.executable, __file__, "--out", str(out), "--part", part, "--until", repr(until)]
    command += ["--quick"] * quick + ["--dry_run"] * dry_run + ["--without_cudnn"] * without_cudnn
    # Sums of cuBLAS in one order: the comparison of streamed and resident asks for it.
    environment = os.environ | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if part == "checks" else {})
    with subprocess.Popen(command, env=environment) as process:
        try:
            code = process.wait(max(1.0, until + GRACE - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "stopped by the clock"
        except BaseException:
            process.kill()
            raise
    return "done" if code == 0 else f"ended with exit code {code}"


def _part_file(out: Path, part: str) -> Path:
    return out / f"part_{part}.json"


def _machine(dry_run: bool) -> dict[str, Any]:
    """What this runs on. Raises InputError where there is no GPU."""
    import torch

    from memory.machine import host_bytes

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "host_bytes": host_bytes(),
        "cores": os.cpu_count(),
    }
    if dry_run:
        return {"device": "CPU", "device_bytes": None, **found}
    if not torch.cuda.is_available():
        raise InputError(
            "benchmarks/gpu.py: expected a CUDA device, found none; --dry_run tries the program on the CPU"
        )
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "device_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(0)),
        "cudnn": torch.backends.cudnn.version(),
        **found,
    }


def part_main(part: str, out: Path, *, quick: bool, dry_run: bool, without_cudnn: bool, until: float) -> None:
    """What the process of a part does."""
    import torch

    from benchmarks.gpu_kit.parts import run_part
    from benchmarks.gpu_kit.records import Clock, Records
    from benchmarks.gpu_kit.settings import REAL, TOY

    if without_cudnn:
        torch.backends.cuda.enable_cudnn_sdp(False)
    records = Records(_part_file(out, part), Clock(until))
    run_part(part, TOY if dry_run else REAL, records, quick=quick)


if __name__ == "__main__":
    given = options()
    try:
        if given.part:
            part_main(
                given.part,
                given.out,
                quick=given.quick,
                dry_run=given.dry_run,
                without_cudnn=given.without_cudnn,
                until=given.until,
            )
        else:
            sys.exit(
                main(
                    given.out,
                    quick=given.quick,
                    dry_run=given.dry_run,
                    without_cudnn=given.without_cudnn,
                    only=given.only,
                )
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
