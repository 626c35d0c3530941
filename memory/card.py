"""The card to plan for: how much memory it has, and how fast it is.

What: `find_card` takes what a person says (`--vram`, `--gpu`) or, where nothing is said, what is here.

Exact: memory that is measured is what is free now. Rates are those of the catalogue (`memory/rates.py`); seconds of a
card that is not in it are those of a 4090, and a note says so. Memory does not depend on the rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InputError
from memory.machine import device_bytes, parse_bytes
from memory.plan import DRIVER_BYTES, GB
from memory.rates import RateProfile, find_rates

USUAL = "4090"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a plan needs to know of a card."""

    rates: RateProfile
    vram_bytes: int
    note: str | None = None
    """What had to be assumed."""


def find_card(*, vram: str | None, gpu: str | None) -> Card:
    """The card to plan for.

    Args:
        vram: size of its memory, such as "24GB"; None: all that --gpu has, or what is free here.
        gpu: name of a card in the catalogue; None: the one here.

    Raises:
        InputError: no size, no name, more memory than the card has, or nothing said and no card here.
    """
    given = None if vram is None else parse_bytes(vram, "--vram")
    if gpu is not None:
        rates = find_rates(gpu)
        if given is not None and given > rates.vram_bytes:
            raise InputError(f"--vram {vram}: expected at most the {rates.vram_bytes / GB:.1f} GB of a {rates.name}")
        return Card(rates=rates, vram_bytes=given or rates.vram_bytes)
    here = device_bytes(DRIVER_BYTES)
    if here is None:
        if given is None:
            raise InputError(
                "--vram: expected a size such as --vram 24GB or a card such as --gpu 4090, because this machine has no "
                "CUDA device to measure"
            )
        note = f"seconds are those of a {USUAL}; --gpu names another card"
        return Card(rates=find_rates(USUAL), vram_bytes=given, note=note)
    name, total, free = here
    if given is not None and given > total:
        raise InputError(f"--vram {vram}: expected at most the {total / GB:.1f} GB of this {name}")
    try:
        return Card(rates=find_rates(name), vram_bytes=given or free)
    except InputError:
        note = f"seconds are those of a {USUAL}: nothing is known of a {name}; --gpu names a card"
        return Card(rates=find_rates(USUAL), vram_bytes=given or free, note=note)
