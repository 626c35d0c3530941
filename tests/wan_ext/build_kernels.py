"""Compile every kernel to machine code for a card that need not be here: `python build_kernels.py 90` for Hopper.

Triton asks its driver what to compile for; a stand-in answers. Launches then compile and stop there. Operands have the
shapes of Wan 14B at 81 x 480 x 832; they are never written, so they take addresses and no memory.
Prints one line a kernel: its name, warps, and bytes of shared memory.
"""

from __future__ import annotations

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOKENS, WIDTH, HIDDEN, HEADS = 32760, 5120, 13824, 40


class StandIn:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(kernel: JITFunction, grid: object):
    """What `kernel[grid]` becomes."""

    def launch(*operands, **options) -> None:
        built = kernel.run(*operands, grid=grid, warmup=True, **options)
        assert built.asm["cubin"]
        print(f"{kernel.__module__}.{kernel.__name__}", built.metadata.num_warps, built.metadata.shared)

    return launch


def build_wan() -> None:
    from wan_ext import kernels

    x, y = torch.empty(1, TOKENS, WIDTH), torch.empty(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    row, weight, rope = torch.empty(1, TOKENS, 1), torch.empty(WIDTH), torch.empty(2, TOKENS, 1, WIDTH // HEADS // 2)
    by_head, hidden = y.unflatten(-1, (HEADS, -1)), torch.empty(1, 4096, HIDDEN, dtype=torch.bfloat16)
    for frames in (1, 21):
        gain = torch.empty(1, frames, 6, WIDTH)[:, :, 0]
        kernels.norm_modulate_forward(x, gain, gain, 1e-6, torch.bfloat16)
        kernels.norm_modulate_backward(y, x, row, row, gain, into=x)
        kernels.gate_residual_forward(x, y, gain, out=x)
        kernels.gate_residual_backward(x, gain, torch.bfloat16)
    for table in (rope, None):
        kernels.rms_rope_forward(y, weight, table, HEADS, 1e-6)
        kernels.rms_rope_backward(by_head, y, row, weight, table)
    kernels.rms_rope_forward(y[..., :1280], weight[:1280], rope, 10, 1e-6, rrms=row)
    kernels.gelu_forward(hidden)
    kernels.gelu_backward(hidden, hidden, out=hidden)


def build_memory() -> None:
    from memory.kernels import int8
    from memory.kernels.dequantize import dequantize_runs
    from memory.kernels.rows import quantize_rows

    for eight in (torch.int8, torch.float8_e4m3fn):
        quantize_rows(torch.empty(4096, HIDDEN, dtype=torch.bfloat16), 256, dtype=eight)
        weight = torch.empty(WIDTH, HIDDEN, dtype=eight)
        dequantize_runs(weight, torch.empty(WIDTH, HIDDEN // 64, dtype=torch.bfloat16), torch.bfloat16)
    quantize_rows(torch.empty(4096, WIDTH, dtype=torch.bfloat16), columns=torch.empty(WIDTH))
    a, scale, columns = torch.empty(TOKENS, WIDTH, dtype=torch.int8), torch.empty(TOKENS), torch.empty(HIDDEN)
    for tile in (*int8.TILES, *int8.SHORT_TILES):
        int8.INTERPRETED_TILE = tile  # the one that operands outside a card run with
        int8.int8_matmul(a, torch.empty(HIDDEN, WIDTH, dtype=torch.int8), scale, columns, bias=columns)
        int8.int8_matmul(a, torch.empty(WIDTH, HIDDEN, dtype=torch.int8), scale, None, layout="nn")


if __name__ == "__main__":
    driver.set_active(StandIn(int(sys.argv[1])))
    JITFunction.__getitem__ = compile_only
    build_wan()
    build_memory()
