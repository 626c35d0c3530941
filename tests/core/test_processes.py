"""Laws of division: every item has one owner, whoever asks, and no process has much more than another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InputError
from core.processes import Process, share_of, this_process


@given(st.lists(st.floats(0.1, 100), max_size=40), st.integers(1, 7))
def test_the_shares_are_a_partition(sizes, count):
    items = list(range(len(sizes)))
    shares = [share_of(items, sizes, Process(rank=rank, count=count)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0) + 1e-9


def test_one_process_has_everything():
    assert share_of("abc", [1, 1, 1], Process()) == ["a", "b", "c"]


def test_the_environment_says_which_process_this_is(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert this_process() == Process(rank=0, local_rank=0, count=1) and this_process().is_main
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert this_process() == Process(rank=5, local_rank=1, count=8) and not this_process().is_main
    for name, value in (("RANK", "8"), ("RANK", "-1"), ("WORLD_SIZE", "many")):
        with monkeypatch.context() as other:
            other.setenv(name, value)
            with pytest.raises(InputError, match=f"{name}={value}"):
                this_process()
