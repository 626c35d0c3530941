"""Laws of working ahead: every result once, a bounded number of them waiting, errors where they belong."""

import threading

import pytest

from dataset.prefetch import run_ahead


def numbers(first: int, count: int):
    def task():
        yield from range(first, first + count)

    return task


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("counts", [[], [0], [3], [3, 0, 1, 20, 2]])
def test_every_result_comes_once_and_those_of_a_task_in_order(threads, counts):
    tasks = [numbers(100 * place, count) for place, count in enumerate(counts)]
    found = list(run_ahead(tasks, threads=threads, depth=2))
    assert sorted(found) == [100 * place + k for place, count in enumerate(counts) for k in range(count)]
    for place in range(len(counts)):
        own = [value for value in found if value // 100 == place]
        assert own == sorted(own)


def test_no_more_is_made_than_may_wait():
    """Without anyone taking results, each thread makes one more than fits the queue, and stops."""
    made: list[int] = []
    full = threading.Event()

    def task():
        for number in range(100):
            made.append(number)
            if len(made) == 2 + 1 + 1:
                full.set()
            yield number

    results = run_ahead([task], threads=1, depth=2)
    assert next(results) == 0
    assert full.wait(10)
    assert len(made) == 4  # one taken, two in the queue, one in the thread's hand
    results.close()
    assert len(made) == 4


def test_an_error_is_raised_and_everything_ends():
    def bad():
        yield 1
        raise OSError("broken")

    before = threading.active_count()
    with pytest.raises(OSError, match="broken"):
        list(run_ahead([bad, numbers(0, 3)], threads=2, depth=1))
    assert threading.active_count() == before
