"""The 8-bit kernels: where they are offered, what their references say, and their laws in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from memory.kernels import available
from memory.kernels.reference import dequantize_runs_reference, int8_matmul_reference, quantize_rows_reference

ROOT = Path(__file__).parents[2]
LAWS = "tests/memory/memory_kernel_laws.py"

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


def test_kernels_are_for_cuda_alone() -> None:
    assert not available(torch.device("cpu")) and not available(torch.device("meta"))


def test_asking_for_kernels_imports_no_triton() -> None:
    ask = "import sys, torch, memory.kernels.reference, memory.kernels as k; k.available(torch.device('cpu'))"
    check = f"{ask}; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=120).returncode == 0


def test_references_multiply_what_they_quantised() -> None:
    """Forward and input gradient of a linear by the references alone, against float32."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(30, 512), torch.randn(48, 512), torch.randn(30, 48)
    values, scale = quantize_rows_reference(weight, 256)
    rows, row_scale = quantize_rows_reference(x, 256)
    out = int8_matmul_reference(rows, values, row_scale, scale, dtype=torch.float32)
    exact = x @ weight.T
    assert (out - exact).norm() < 0.02 * exact.norm()
    flat, grad_scale = quantize_rows_reference(grad, columns=scale)
    grad_rotated = int8_matmul_reference(flat, values, grad_scale, None, layout="nn", dtype=torch.float32)
    dequantised = dequantize_runs_reference(values, scale[:, None], torch.float32)
    assert (grad_rotated - grad @ dequantised).norm() < 0.02 * grad_rotated.norm()
