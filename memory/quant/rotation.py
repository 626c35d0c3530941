"""A rotation that spreads outliers over a block of inputs, so that one step of int8 fits them all.

What: `rotate` multiplies every block of `rotation_block(width)` neighbouring numbers of a row by a Hadamard matrix over
its root: orthogonal, symmetric, hence its own inverse. A linear layer y = W x is y = (W R)(R x): the weight is rotated
once, when it is quantised, and every activation at run time.

How: the matrix is a Kronecker power of the regular Hadamard matrix of order 4 (every row sums to the same number), with
one factor of order 2 where the order is no power of 4. Regular, because the common matrix of Sylvester has a row of
ones: what all channels share would gather in one number and be an outlier again. One large number in a block of 256
becomes 256 numbers of a sixteenth of its size; Gaussian numbers stay Gaussian.

Cost: one product of [.., block] with [block, block]: 2 * block operations a number, 256 / out_features of the linear's
own (5 % at 5,120). The matrix holds 256 KiB in float32.

Exact: the entries are +-2^-k (times the root of a half with the factor 2): for orders 4, 16, 64 and 256 every product
is exact and the sum alone rounds.

Source: regular Hadamard rotations for int8 weights and activations, ConvRot (arXiv 2512.03673).
"""

from functools import cache

import torch
from torch import Tensor

LARGEST_BLOCK = 256


def rotation_block(width: int) -> int:
    """Order of the rotation of a row of `width` numbers: its largest divisor that is a power of two, at most 256."""
    return min(width & -width, LARGEST_BLOCK)


@cache
def hadamard(order: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The orthogonal, symmetric Hadamard matrix [order, order]; regular (equal row sums) where order is a power of 4.

    Args:
        order: a power of two.
        dtype: of the result; rounded once, from float64.
        device: of the result.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"expected a power of two, found {order}")
    with torch.inference_mode(False), torch.no_grad():
        # Half of a matrix of ones less the exchange of first and last: three times 1/2 and once -1/2 in every row.
        four = torch.full((4, 4), 0.5, dtype=torch.float64) - torch.eye(4, dtype=torch.float64).flip(0)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) * 0.5**0.5
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < order:
            matrix = torch.kron(matrix, four if matrix.shape[0] * 4 <= order else two)
        return matrix.to(dtype).to(device)


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotate every `block` neighbouring numbers of the last dimension; rotating again gives `x` back.

    Args:
        x: [..., width], any float dtype; `block` divides the width.
        block: order of the rotation, as from `rotation_block`; 1 returns `x` itself.

    Returns:
        [..., width], computed in the dtype of `x`.
    """
    if block == 1:
        return x
    matrix = hadamard(block, x.dtype, x.device)
    return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2)
