"""The block's kernels: their laws hold in Triton's interpreter, and nothing imports Triton before it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAWS = "tests/wan_ext/wan_kernel_laws.py"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")


def run_laws(*, interpreted: bool) -> None:
    """In a process of its own: Triton decides once, when it is first imported, whether it interprets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--color=no", LAWS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@needs_triton
def test_laws_hold_in_the_interpreter() -> None:
    run_laws(interpreted=True)


@needs_triton
@pytest.mark.gpu
def test_laws_hold_on_the_gpu() -> None:
    run_laws(interpreted=False)


def test_the_block_on_a_cpu_imports_no_triton() -> None:
    check = (
        "import sys, torch, wan_ext.dit, wan_ext.fused_ops as ops; ops.ops_for(torch.device('cpu')); "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=120).returncode == 0
