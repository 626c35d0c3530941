"""How the kernels find their rows: strides of tokens and of modulation, checked before anything is launched.

What: `token_strides` for tensors [B, L, ...], `frame_strides` for gains, shifts and gates [1|B, 1|F, D], `row_numbers`
for means and the like [B, L, 1].

How: a kernel gets a row's number and these strides; a size of 1 that is broadcast has stride 0. Operands with gaps
between the numbers of a row are copied first (`readable`; gradients that autograd expanded have them); a result has to
have none. What a kernel cannot read right (float64, sizes that do not fit) is a ValueError here, because a kernel would
read something else without a word.

Cost: microseconds on the host, and the copy where one is made.

Exact: nothing is computed here.
"""

from torch import Tensor, bfloat16, float16, float32

DTYPES = (float32, bfloat16, float16)
LONGEST_ROW = 2**14
"""Numbers of a row that one program holds, 32 a thread at 16 warps; Wan's width is 5,120."""


def token_strides(name: str, x: Tensor, shape: tuple[int, ...]) -> tuple[int, int]:
    """Numbers from clip to clip and from token to token.

    Args:
        name: of the operand, for an error.
        x: [B, L, D]
        shape: what its shape has to be.

    Raises:
        ValueError: another shape, another dtype than a kernel reads, or gaps within a row.
    """
    if x.shape != shape or x.dtype not in DTYPES or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise ValueError(
            f"{name}: expected {list(shape)} in float32, bfloat16 or float16 with rows of neighbouring numbers, "
            f"found {x.dtype} {list(x.shape)} of strides {list(x.stride())}"
        )
    return x.stride(0), x.stride(1)


def readable(x: Tensor) -> Tensor:
    """The tensor, or a copy where the neighbouring numbers of its rows lie apart."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def frame_strides(name: str, gain: Tensor, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Numbers from clip to clip and from frame to frame of a modulation, and tokens of a frame.

    Args:
        name: of the operand, for an error.
        gain: [1|B, 1|F, D]
        shape: of the rows that it modulates. [B, L, D]

    Raises:
        ValueError: it does not fit these rows, or has gaps within a row.
    """
    batch, tokens, width = shape
    clips, frames = gain.shape[:2]
    fits = gain.ndim == 3 and clips in (1, batch) and frames > 0 and tokens % frames == 0 and gain.shape[2] == width
    if not fits or gain.dtype not in DTYPES or (gain.stride(2) != 1 and width > 1):
        raise ValueError(
            f"{name}: expected [1 or {batch}, a divisor of {tokens}, {width}] in float32, bfloat16 or float16 with "
            f"rows of neighbouring numbers, found {gain.dtype} {list(gain.shape)} of strides {list(gain.stride())}"
        )
    return gain.stride(0) if clips > 1 else 0, gain.stride(1), tokens // frames


def row_numbers(name: str, numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One number a token, lying together: a copy where they do not.

    Args:
        name: of the operand, for an error.
        numbers: float32. [B, L, 1]
        shape: of the rows they belong to. [B, L, D]

    Raises:
        ValueError: another shape or dtype.
    """
    if numbers.shape != (*shape[:2], 1) or numbers.dtype != float32:
        raise ValueError(f"{name}: expected float32 {[*shape[:2], 1]}, found {numbers.dtype} {list(numbers.shape)}")
    return numbers.contiguous()


def check_width(width: int) -> None:
    """Refuse rows that one program cannot hold.

    Raises:
        ValueError: no numbers, or more than `LONGEST_ROW`.
    """
    if not 1 <= width <= LONGEST_ROW:
        raise ValueError(f"expected rows of 1 to {LONGEST_ROW} numbers, found {width}")


def warps(block: int) -> int:
    """Warps of a program that holds `block` numbers of a few tensors: 16 numbers a thread."""
    return min(16, max(1, block // 512))
