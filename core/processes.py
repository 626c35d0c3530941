"""Which of several processes this is, as `accelerate launch` and torchrun say it in the environment.

Caching needs no more than that: processes that divide work beforehand never wait for each other, so one that dies
leaves the others' work as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from core.errors import InputError

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Process:
    """One of `count` processes; rank counts them all, local_rank those of this machine."""

    rank: int = 0
    local_rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def this_process() -> Process:
    """What RANK, LOCAL_RANK and WORLD_SIZE say; a single process where they are not set.

    Raises:
        InputError: they hold no such numbers.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    found = [os.environ.get(name, default) for name, default in zip(names, ("0", "0", "1"), strict=True)]
    if not all(value.isdigit() for value in found) or int(found[0]) >= int(found[2]):
        given = ", ".join(f"{name}={value}" for name, value in zip(names, found, strict=True))
        raise InputError(f"environment: expected the rank of a process below the number of processes, found {given}")
    rank, local_rank, count = map(int, found)
    return Process(rank=rank, local_rank=local_rank, count=count)


def share_of(items: Sequence[Item], sizes: Sequence[float], process: Process) -> list[Item]:
    """The items of one process: each goes, largest first, to the process that has least so far.

    No process has more than 4/3 of what the best division would give the busiest one (Graham 1969).

    Args:
        items: to divide; every process gives the same ones in the same order.
        sizes: what each costs, in any unit.
        process: whose share it is.

    Returns:
        A part of `items`, in their order.
    """
    loads = [0.0] * process.count
    owners = [0] * len(items)
    for index in sorted(range(len(items)), key=lambda index: -sizes[index]):  # stable: equal ones in their order
        owners[index] = min(range(process.count), key=loads.__getitem__)
        loads[owners[index]] += sizes[index]
    return [item for item, owner in zip(items, owners, strict=True) if owner == process.rank]
