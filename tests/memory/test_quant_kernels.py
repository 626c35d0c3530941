"""The 8-bit layer reaches the Triton kernels, and they change nothing: in Triton's interpreter, in its own process."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_laws(interpreted: dict[str, str]) -> None:
    """In a process of its own: Triton decides once, when it is first imported, whether it interprets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INT"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--color=no"]
    command.append("tests/memory/quant_kernel_laws.py")
    done = subprocess.run(command, cwd=ROOT, env=environment | interpreted, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
def test_the_layer_through_the_kernels_in_the_interpreter() -> None:
    run_laws({"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
def test_the_layer_through_the_kernels_on_the_gpu() -> None:
    run_laws({})
