"""The product of two int8 matrices with a scale for each row and each column, on the GPU's 8-bit tensor cores.

What: `int8_matmul` multiplies int8 activations [M, K] with an int8 weight, sums in int32 and writes
sum * scale_a[row] * scale_b[column] + bias in bfloat16, float16 or float32.

How: one program a tile of the result; tiles that share columns of the weight run together, so that it is read from the
cache. The weight lies as [N, K] ("tn": the layout of a linear's forward, K neighbouring for both factors, which 8-bit
tensor cores read directly) or as [K, N] ("nn": the same weight in the input gradient dY @ W, whose tiles are turned on
the way). Which tile is fastest is measured, once for a shape: every candidate that fits the card's shared memory runs
three times on the real operands.

Cost: reads M K + N K bytes at least, writes M N numbers; no temporary. 2 M N K operations at up to twice the rate of
bfloat16 on Ampere, Ada and Hopper (four times on GeForce cards, whose bfloat16 sums in float32 at half rate). Choosing
a tile waits for the stream and compiles the candidates, one to three seconds each, on the first call of a shape.

Exact: the sum is, for K up to 133,000, so the tile that was chosen leaves no trace; then two products and one sum in
float32, and one rounding.

Shapes: M rows (tokens), K inputs, N outputs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from memory.kernels import launching_on

LAYOUTS = ("tn", "nn")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST_INPUT = 2**31 // 127**2
GROUP_ROWS = 8
"""Rows of tiles that run together: 8 x 128 rows of activations stay in the cache while columns of the weight pass."""


class Tile(NamedTuple):
    """One way to cut the product up."""

    rows: int
    columns: int
    inputs: int
    """Summed at a time."""
    warps: int
    stages: int
    """Tiles of the factors on their way at a time."""

    @property
    def shared_bytes(self) -> int:
        return (self.rows + self.columns) * self.inputs * self.stages


TILES = (
    Tile(128, 256, 128, warps=8, stages=3),  # 147 KB: A100, Hopper
    Tile(256, 128, 128, warps=8, stages=3),
    Tile(128, 128, 128, warps=8, stages=3),  # 98 KB: all
    Tile(128, 256, 64, warps=8, stages=3),
    Tile(256, 128, 64, warps=8, stages=3),
    Tile(128, 128, 64, warps=4, stages=4),
    Tile(64, 128, 128, warps=4, stages=3),
)
SHORT_TILES = (Tile(32, 128, 128, warps=4, stages=4), Tile(64, 64, 128, warps=4, stages=4))
"""For at most `SHORT` rows."""
SHORT = 64
INTERPRETED_TILE = Tile(16, 32, 32, warps=1, stages=1)

_chosen: dict[tuple[int | None, str, int, int, int], Tile] = {}


@triton.jit(do_not_specialize=["m"])
def _int8_matmul(
    a,
    b,
    scale_a,
    scale_b,
    bias,
    out,
    m,
    n,
    k,
    stride_bn,
    stride_bk,
    EVEN_K: tl.constexpr,
    HAS_SCALE_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    group = program // (GROUP * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = program % (GROUP * tiles_n)
    tile_m = group * GROUP + inside % rows_in_group
    tile_n = inside // rows_in_group

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    row_is = rows < m
    column_is = columns < n
    a_at = a + rows.to(tl.int64)[:, None] * k + inputs[None, :]
    b_at = b + columns.to(tl.int64)[None, :] * stride_bn + inputs.to(tl.int64)[:, None] * stride_bk
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a_at, mask=row_is[:, None], other=0)
            b_tile = tl.load(b_at, mask=column_is[None, :], other=0)
        else:
            input_is = inputs < k - start
            a_tile = tl.load(a_at, mask=row_is[:, None] & input_is[None, :], other=0)
            b_tile = tl.load(b_at, mask=column_is[None, :] & input_is[:, None], other=0)
        total = tl.dot(a_tile, b_tile, acc=total, out_dtype=tl.int32)
        a_at += BLOCK_K
        b_at += BLOCK_K * stride_bk

    result = total.to(tl.float32) * tl.load(scale_a + rows, mask=row_is, other=0.0)[:, None]
    if HAS_SCALE_B:
        result = result * tl.load(scale_b + columns, mask=column_is, other=0.0)[None, :]
    if HAS_BIAS:
        result = result + tl.load(bias + columns, mask=column_is, other=0.0).to(tl.float32)[None, :]
    out_at = out + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=row_is[:, None] & column_is[None, :])


def int8_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor | None,
    *,
    layout: str = "tn",
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply int8 rows with an int8 weight: (a @ b.T or a @ b) * scale_a[:, None] * scale_b + bias.

    Args:
        a: int8, contiguous. [M, K]
        b: int8, contiguous. [N, K] for layout "tn", [K, N] for "nn"
        scale_a: float32. [M]
        scale_b: float32; None: the columns have no scale of their own. [N]
        layout: how `b` lies.
        bias: any float dtype. [N]
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        [M, N]

    Raises:
        ValueError: dtypes, shapes or strides other than these.
    """
    m, n, k = _check(a, b, scale_a, scale_b, layout, bias, dtype)
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    if m == 0 or n == 0:
        return out

    stride_bn, stride_bk = (k, 1) if layout == "tn" else (1, n)

    def launch(tile: Tile) -> None:
        _int8_matmul[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
            a,
            b,
            scale_a,
            scale_b,
            bias,
            out,
            m,
            n,
            k,
            stride_bn,
            stride_bk,
            EVEN_K=k % tile.inputs == 0,
            HAS_SCALE_B=scale_b is not None,
            HAS_BIAS=bias is not None,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.inputs,
            GROUP=GROUP_ROWS,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    with launching_on(a):
        if not a.is_cuda:
            launch(INTERPRETED_TILE)
            return out
        key = (a.device.index, layout, n, k, min(triton.next_power_of_2(m), 8192))
        if key not in _chosen:
            _chosen[key] = _fastest(launch, _candidates(m, a.device))
        launch(_chosen[key])
    return out


def _candidates(m: int, device: torch.device | str) -> list[Tile]:
    """The tiles whose factors fit the shared memory that a program may have on this card."""
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks the field
    most = properties.shared_memory_per_block_optin
    return [tile for tile in (SHORT_TILES if m <= SHORT else TILES) if tile.shared_bytes <= most]


def _fastest(launch, tiles: list[Tile]) -> Tile:
    """Run every tile, the first time to compile, and return the one of the shortest run.

    What a tile needs beside its factors (to turn them) is only known once it is compiled: one that then proves too
    large for the card is out of the race.
    """
    best: tuple[float, Tile] | None = None
    for tile in tiles:
        try:
            launch(tile)
        except OutOfResources:
            continue
        milliseconds = min(_milliseconds(launch, tile) for _ in range(2))
        if best is None or milliseconds < best[0]:
            best = (milliseconds, tile)
    if best is None:
        raise RuntimeError(f"int8_matmul: no tile of {tiles} fits the shared memory of this card")
    return best[1]


def _milliseconds(launch, tile: Tile) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    launch(tile)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _check(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor | None,
    layout: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[int, int, int]:
    """M, N, K of operands that fit each other; a kernel that read past them would not say so."""
    if layout not in LAYOUTS:
        raise ValueError(f"int8_matmul: expected layout tn or nn, found {layout!r}")
    if dtype not in DTYPES:
        raise ValueError(f"int8_matmul: expected a result of bfloat16, float16 or float32, found {dtype}")
    for name, matrix in (("a", a), ("b", b)):
        if matrix.dtype != torch.int8 or matrix.ndim != 2 or not matrix.is_contiguous():
            raise ValueError(f"int8_matmul: expected {name} int8, a contiguous matrix, found {_describe(matrix)}")
    (m, k), (n, inputs) = a.shape, b.shape if layout == "tn" else reversed(b.shape)
    if inputs != k or k > WIDEST_INPUT:
        raise ValueError(
            f"int8_matmul ({layout}): expected factors of one K of at most {WIDEST_INPUT}, "
            f"found {list(a.shape)} and {list(b.shape)}"
        )
    for name, scale, length in (("scale_a", scale_a, m), ("scale_b", scale_b, n)):
        if scale is not None and (
            scale.dtype != torch.float32 or scale.shape != (length,) or not scale.is_contiguous()
        ):
            raise ValueError(f"int8_matmul: expected {name} float32 [{length}], contiguous, found {_describe(scale)}")
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"int8_matmul: expected bias [{n}], contiguous, found {_describe(bias)}")
    return m, n, k


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} of strides {list(tensor.stride())}"
