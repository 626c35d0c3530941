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


@needs_triton
@pytest.mark.slow  # half a minute of compiling for each
@pytest.mark.parametrize("capability", ["80", "89", "90"])
def test_kernels_compile_for_cards_that_are_not_here(capability: str, tmp_path: Path) -> None:
    """Ampere, Ada, Hopper; a program's shared memory is what one of them has (227 KB, and 99 KB but for products)."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "tests/wan_ext/build_kernels.py", capability]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-8000:]
    built = [line.split() for line in done.stdout.splitlines()]
    sources = [*ROOT.glob("memory/kernels/*.py"), *ROOT.glob("wan_ext/kernels/*.py")]
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sources if "@triton.jit" in file.read_text()
    }
    assert {name.rsplit(".", 1)[0] for name, _, _ in built} == modules
    for name, _, shared in built:
        assert int(shared) <= (227 if "int8" in name else 99) * 1024
