"""How a list of blocks is run: plain, or with one checkpoint per block.

What: a model whose body is a list of blocks takes a `BlockRunner` as an argument and calls it once. The runner decides
what stays in memory between forward and backward; the model knows nothing about it. `memory.swap.SwappedBlocks` is a
third runner of the same shape, which keeps frozen weights in host memory.

How: every block is called as `block(x, *inputs)` and returns the next `x`. `run_checkpointed` keeps only the inputs of
each block and recomputes the block in backward (PyTorch's non-reentrant checkpoint: random numbers and autocast are
restored for the recomputation).

Cost: plain keeps everything that each block saves for backward. Checkpointed keeps one `x` per block, plus all of one
block's activations while that block is in backward, and runs every block's forward twice.

Exact: both give the same output and the same gradients, bit for bit, where the block itself is deterministic.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class BlockRunner(Protocol):
    """Anything that takes `x` through a list of blocks."""

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
        """Return `x` after all blocks.

        Args:
            blocks: called in order as `block(x, *inputs)`.
            x: what one block hands to the next, any shape.
            inputs: what every block receives unchanged (tensors, None, or plain containers of them).
        """
        ...


def run_plain(blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
    """Run the blocks one after the other.

    Args:
        blocks: called in order as `block(x, *inputs)`.
        x: what one block hands to the next, any shape.
        inputs: what every block receives unchanged.

    Returns:
        `x` after the last block.
    """
    for block in blocks:
        x = block(x, *inputs)
    return x


def run_checkpointed(blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
    """Run the blocks one after the other, and each a second time in backward instead of keeping its activations.

    Args:
        blocks: called in order as `block(x, *inputs)`; a block must not change its inputs in place.
        x: what one block hands to the next, any shape.
        inputs: what every block receives unchanged.

    Returns:
        `x` after the last block.
    """
    for block in blocks:
        x = checkpoint(block, x, *inputs, use_reentrant=False)
    return x
