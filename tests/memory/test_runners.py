"""Laws of the plain runners: checkpointing changes what is kept, and nothing else."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from memory.runners import BlockRunner, run_checkpointed, run_plain
from tests.memory.tiny_blocks import inputs, make_blocks, trainable


def run(runner: BlockRunner, dropout: float) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], int]:
    """Output, all gradients, and how many tensors were kept for backward."""
    blocks = make_blocks(dropout=dropout)
    x, shift = (tensor.requires_grad_() for tensor in inputs())
    kept: list[torch.Tensor] = []
    torch.manual_seed(0)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = runner(blocks, x, shift, None)
    return y, torch.autograd.grad(y.square().sum(), [x, shift, *trainable(blocks)]), len(kept)


def test_checkpointed_equals_plain_bit_for_bit_and_keeps_less() -> None:
    for dropout in (0.0, 0.5):
        plain, plain_grads, plain_kept = run(run_plain, dropout)
        checkpointed, checkpointed_grads, checkpointed_kept = run(run_checkpointed, dropout)
        assert torch.equal(plain, checkpointed)
        assert all(torch.equal(a, b) for a, b in zip(plain_grads, checkpointed_grads, strict=True))
        assert checkpointed_kept < plain_kept


def test_both_call_the_blocks_in_order() -> None:
    x, shift = inputs()
    expected = x
    for block in make_blocks():
        expected = block(expected, shift)
    for runner in (run_plain, run_checkpointed):
        assert torch.equal(runner(make_blocks(), x, shift), expected)
        with torch.no_grad():
            assert torch.equal(runner(make_blocks(), x, shift), expected)
