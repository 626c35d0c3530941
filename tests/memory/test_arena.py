"""Laws of the arena: exactly as large as it must be, aligned, no byte handed out twice."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory.arena import ALIGNMENT_BYTES, Arena, arena_bytes
from memory.device import CpuDevice

shapes = st.lists(
    st.tuples(
        st.lists(st.integers(0, 7), max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float64]),
    ),
    max_size=6,
)


@given(shapes)
def test_tensors_fill_an_arena_of_their_size_without_sharing_a_byte(wanted: list) -> None:
    arena = Arena(CpuDevice(), arena_bytes(wanted))
    taken = [arena.take(shape, dtype) for shape, dtype in wanted]
    for number, (tensor, (shape, dtype)) in enumerate(zip(taken, wanted, strict=True)):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert not tensor.numel() or (tensor.data_ptr() - arena.memory.data_ptr()) % ALIGNMENT_BYTES == 0
        tensor.view(-1).view(torch.uint8).fill_(number)
    for number, tensor in enumerate(taken):
        assert (tensor.view(-1).view(torch.uint8) == number).all()
    content = sum(tensor.numel() * tensor.element_size() for tensor in taken)
    assert arena.used == arena.memory.numel() <= content + ALIGNMENT_BYTES * len(taken)
    with pytest.raises(ValueError, match="expected room"):
        arena.take((ALIGNMENT_BYTES,), torch.uint8)


def test_memory_outlives_the_arena() -> None:
    tensor = Arena(CpuDevice(), 16).take((4,), torch.float32).fill_(3)
    assert tensor.sum() == 12
