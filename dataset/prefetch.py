"""Work that is done ahead of the one who needs it: threads that decode while a device encodes.

Results wait in a queue of bounded length, so memory holds `depth` of them and one for each thread. Decoding and
resizing release the interpreter's lock, so threads run side by side.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Result = TypeVar("Result")
POLL_SECONDS = 0.1  # how often a thread whose queue is full looks whether anyone still wants its results


def run_ahead(tasks: Sequence[Callable[[], Iterator[Result]]], *, threads: int, depth: int) -> Iterator[Result]:
    """The results of several tasks, as they come.

    Args:
        tasks: each is called in a thread and gives its results one by one; they are begun in this order.
        threads: that work on them; results of different tasks may overtake each other, those of one task never.
        depth: results that may wait.

    Yields:
        Every result once. An exception of a task is raised here, after the results that were ready before it; when the
        caller stops listening, the threads end.
    """
    waiting: queue.Queue[tuple[bool, object]] = queue.Queue(depth)
    given_up = threading.Event()
    unclaimed = iter(tasks)
    claim = threading.Lock()

    def put(ends: bool, value: object) -> bool:
        while not given_up.is_set():
            try:
                waiting.put((ends, value), timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            while True:
                with claim:
                    task = next(unclaimed, None)
                if task is None:
                    break
                for result in task():
                    if not put(False, result):
                        return
            put(True, None)
        except BaseException as error:
            put(True, error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(tasks)))]
    for worker in workers:
        worker.start()
    running = len(workers)
    try:
        while running:
            ends, value = waiting.get()
            if not ends:
                yield value  # type: ignore[misc]  # a result
                continue
            running -= 1
            if value is not None:
                assert isinstance(value, BaseException)
                raise value
    finally:
        given_up.set()
        for worker in workers:
            worker.join()
