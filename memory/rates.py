"""How fast graphics cards compute and copy: what a plan and a simulation reckon with when nothing has been measured.

What: a `RateProfile` holds the sustained rates of one card in one slot, `CATALOGUE` those of common cards, `find_rates`
looks one up by the name that a person or the driver uses. A measured profile is an ordinary `RateProfile` with other
numbers.

How: sustained means what a kernel reaches over a whole training step, not what the data sheet promises. Where somebody
has published a measurement, it is taken; otherwise a stated fraction of the data sheet's dense peak:

    matrix products   bfloat16 0.88 of the dense peak (4090: 165e12, 3090: 71e12, 5090: 209e12, 4060 Ti: 44e12; H100 and
                      H200: 700e12 of a measured best of 790e12); int8 0.5 of the dense peak (660, 284, 838, 176e12;
                      Hopper 1979e12), as int8 training kernels measured on the 5090 (361 to 479e12) and 4070 Ti reach;
                      fp8 with float32 sums 0.75 of 330e12 on the 4090 (assumed) and 88e12 on the 4060 Ti, measured
                      200e12 on the 5090, 0.6 of 1979e12 on Hopper (assumed); cards before Ada have no fp8
    attention         FlashAttention 2 at head width 128 and 32k tokens as SageAttention's authors plot it: forward
                      164e12 on the 4090, 68e12 on the 3090, 339e12 on the H100; elsewhere 0.99 of the bfloat16 peak.
                      Backward 0.75 of the bfloat16 peak on consumer cards, 290e12 on Hopper
    device memory     0.9 of the data sheet (1008, 936, 1792, 288, 3350, 4800 GB/s)
    copies            0.8 of the slot: 25 GB/s for 16 lanes of generation 4, 12.5 GB/s for 8 of them (or for generation
                      3), 50 GB/s for generation 5; the same in both directions, from pinned memory
    disk              7 GB/s, a good NVMe drive of generation 4 (only read where weights stay in a file)

Cost: none. Exact: no; a plan made with these numbers is an estimate of time. Memory does not depend on them.
"""

import math
import re
from dataclasses import dataclass, fields, replace

from core.errors import InputError, nearest

GIB = 2**30
GEN4_X16, GEN4_X8, GEN5_X16 = 25e9, 12.5e9, 50e9  # sustained copies through a slot, bytes per second


@dataclass(frozen=True, kw_only=True)
class RateProfile:
    """Sustained rates of one card in one slot.

    Attributes:
        name: how tables call it.
        vram_bytes: its memory, before driver and display take theirs.
        h2d: bytes per second from pinned host memory to the device.
        d2h: bytes per second the other way; both directions at once keep their rates.
        device_memory: bytes per second that elementwise kernels read and write.
        bf16: FLOP/s of matrix products in bfloat16.
        int8: operations per second of int8 matrix products.
        fp8: FLOP/s of e4m3 matrix products with float32 sums; None where the card has none.
        attention_forward: FLOP/s of exact attention in bfloat16.
        attention_backward: the same for its backward (five matrix products).
        disk: bytes per second from the file that holds the weights.
    """

    name: str
    vram_bytes: int
    h2d: float
    d2h: float
    device_memory: float
    bf16: float
    int8: float
    fp8: float | None
    attention_forward: float
    attention_backward: float
    disk: float = 7e9

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise InputError(f"rates of {self.name}: expected a positive {field.name}, found {value}")


def _consumer(
    name: str,
    *,
    vram_gib: int,
    slot: float,
    memory: float,
    bf16: float,
    int8: float,
    fp8: float | None,
    attention: float | None = None,
) -> RateProfile:
    """A card for the desk from its data sheet: `memory` in B/s, `bf16` and `int8` dense peaks, `slot` sustained."""
    return RateProfile(
        name=name,
        vram_bytes=vram_gib * GIB,
        h2d=slot,
        d2h=slot,
        device_memory=0.9 * memory,
        bf16=0.88 * bf16,
        int8=0.5 * int8,
        fp8=fp8,
        attention_forward=0.99 * bf16 if attention is None else attention,
        attention_backward=0.75 * bf16,
    )


def _hopper(name: str, *, vram_gib: int, memory: float) -> RateProfile:
    """A data centre card of generation 9: the same processor with different memory."""
    return RateProfile(
        name=name,
        vram_bytes=vram_gib * GIB,
        h2d=GEN5_X16,
        d2h=GEN5_X16,
        device_memory=0.9 * memory,
        bf16=700e12,
        int8=0.5 * 1979e12,
        fp8=0.6 * 1979e12,
        attention_forward=339e12,
        attention_backward=290e12,
    )


_4090 = _consumer(
    "4090", vram_gib=24, slot=GEN4_X16, memory=1008e9, bf16=165e12, int8=660e12, fp8=0.75 * 330e12, attention=164e12
)
_PROFILES = (
    _consumer("3090", vram_gib=24, slot=GEN4_X16, memory=936e9, bf16=71e12, int8=284e12, fp8=None, attention=68e12),
    _consumer("4060ti", vram_gib=16, slot=GEN4_X8, memory=288e9, bf16=44e12, int8=176e12, fp8=0.75 * 88e12),
    _4090,
    replace(_4090, name="4090-x8", h2d=GEN4_X8, d2h=GEN4_X8),
    _consumer("5090", vram_gib=32, slot=GEN5_X16, memory=1792e9, bf16=209e12, int8=838e12, fp8=200e12),
    _hopper("h100", vram_gib=80, memory=3350e9),
    _hopper("h200", vram_gib=139, memory=4800e9),
)
CATALOGUE = {profile.name: profile for profile in _PROFILES}
"""Profiles by name."""


def find_rates(name: str) -> RateProfile:
    """Return the catalogue's profile of a card.

    Args:
        name: a name of the catalogue, or the driver's: "4090-x8", "RTX 4060 Ti", "NVIDIA GeForce RTX 4090".

    Returns:
        Its profile; of several names that fit, the longest.

    Raises:
        InputError: no name of the catalogue is part of it.
    """
    plain = _plain(name)
    fitting = [known for known in CATALOGUE if _plain(known) in plain]
    if not fitting:
        raise InputError(
            f"graphics card: expected one of {', '.join(CATALOGUE)}, found {name!r}{nearest(plain, CATALOGUE)}; "
            "rates of another card can be measured where it is"
        )
    return CATALOGUE[max(fitting, key=len)]


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
