"""How much memory there is: as a person writes it, and as this machine says.

What: `parse_bytes` reads sizes such as 24GB and 23.5GiB; `host_bytes` and `device_bytes` measure.

Exact: the host's memory is the smaller of the machine's and of what a container is granted. The device's is what is
free now, with the share that our own context takes, which a plan counts itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from core.errors import InputError

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def parse_bytes(text: str, flag: str) -> int:
    """A size in bytes.

    Args:
        text: a number and a unit: "24GB" (10^9), "23.5GiB" (2^30), "512 MB".
        flag: how an error calls it.

    Raises:
        InputError: something else, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].lower() not in UNITS or float(found[1]) <= 0:
        raise InputError(f"{flag}: expected a size such as 24GB or 23.5GiB, found {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])


def host_bytes() -> int:
    """Host memory that processes here can have."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for limit in CONTAINER_LIMITS:
        try:
            sizes.append(int(limit.read_text()))
        except (OSError, ValueError):  # no container, or "max"
            continue
    if not sizes:
        raise InputError("--ram: this system does not say how much memory it has; give it, such as --ram 64GB")
    return min(sizes)


def device_bytes(own: int) -> tuple[str, int, int] | None:
    """The first CUDA device: its name, its memory, and how much of it is free; None where there is none.

    Args:
        own: what our context takes, which counts as free.
    """
    import torch  # takes seconds, and whoever says --vram and --gpu does without

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return torch.cuda.get_device_name(0), total, min(total, free + own)
