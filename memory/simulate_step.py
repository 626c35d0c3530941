"""How long a training step or a pass takes on a card: the real engine, run on the simulator.

What: `simulate_step` takes what each block weighs and for how long it computes (`BlockTimes`), which blocks are
streamed, whether their inputs wait in host memory, and a card's rates; it returns how long a step takes once the first
is over, and how much of that the computation waits for the bus.

How: `StreamedBlocks`, `Ring` and `HostStore` themselves run on a `SimulatedDevice`, with blocks of nothing but a flat
weight on meta and a maths that issues computations of the given duration. So what is reported includes every detail of
the engine's order: what stays in the ring and in the store's buffers at the turn, what queues behind what on the bus.

Cost: about 0.1 s for 40 blocks. No memory.

Exact: as `memory.simulate`; laws are checked on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import InputError
from memory.rates import RateProfile
from memory.simulate import META, SimulatedDevice
from memory.store import HostStore
from memory.stream import Ring, StreamedBlocks


@dataclass(frozen=True, kw_only=True)
class BlockTimes:
    """What one block weighs and for how long it computes.

    Attributes:
        weight_bytes: of its frozen tensors, as they travel. >= 1
        stored_bytes: what waits for backward in host memory, `memory.store.stored_bytes`; 0 where nothing does.
        forward_seconds: of its forward alone.
        backward_seconds: of its recomputation and gradients.
    """

    weight_bytes: int
    stored_bytes: int
    forward_seconds: float
    backward_seconds: float

    def __post_init__(self) -> None:
        if self.weight_bytes < 1 or self.stored_bytes < 0:
            raise InputError(
                f"block: expected at least 1 byte of weights and no less than 0 stored, found {self.weight_bytes} and "
                f"{self.stored_bytes}"
            )
        if not (self.forward_seconds >= 0 and self.backward_seconds >= 0):
            raise InputError(
                f"block: expected times of at least 0 s, found {self.forward_seconds} and {self.backward_seconds}"
            )


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A step, or a pass without gradients, after others like it.

    Attributes:
        step_seconds: from one to the next.
        compute_seconds: how much of that the device computes.
        stall_seconds: how much of it the computation waits.
        h2d_seconds: for how long the bus is busy towards the device.
        d2h_seconds: for how long it is busy the other way.
        h2d_bytes: copied towards the device.
        d2h_bytes: copied the other way.
        lead_seconds: what the very first step waits for its first block.
    """

    step_seconds: float
    compute_seconds: float
    stall_seconds: float
    h2d_seconds: float
    d2h_seconds: float
    h2d_bytes: int
    d2h_bytes: int
    lead_seconds: float


def simulate_step(
    blocks: Sequence[BlockTimes],
    *,
    streamed: Sequence[int],
    rates: RateProfile,
    trains: bool = True,
    outside_seconds: float = 0.0,
) -> StepReport:
    """Return how long a step takes.

    Args:
        blocks: in order.
        streamed: numbers of those whose weights live in host memory.
        rates: of the card.
        trains: whether backward follows forward; otherwise a pass of generation, in which nothing is stored.
        outside_seconds: what is computed between the blocks of one step and of the next (optimizer, embeddings, head).

    Returns:
        The second of two steps.

    Raises:
        InputError: there are no blocks; a number that they do not have.
    """
    if not blocks:
        raise InputError("simulation of a step: expected at least one block, found none")
    device = SimulatedDevice(rates)
    modules = [_Block(number, times) for number, times in enumerate(blocks)]
    stores = trains and any(times.stored_bytes for times in blocks)
    slot_bytes = max((blocks[number].weight_bytes for number in streamed if 0 <= number < len(blocks)), default=0)
    runner = StreamedBlocks(
        modules,
        streamed=streamed,
        device=META,
        ring=Ring(device, slot_bytes, min(2, len(streamed))) if slot_bytes else None,
        maths=_TimedMaths(device),
        store=HostStore(device) if stores else None,
    )
    x = torch.empty(1, device=META).requires_grad_(trains)
    lead = 0.0
    with device.watched():
        for step in range(2):
            if trains:
                runner(modules, x).backward()
                x.grad = None
            else:
                with torch.no_grad():
                    runner(modules, x)
            device.compute("outside the blocks", outside_seconds)
            if step == 0:
                lead = device.report().lead_seconds
                device.restart()
    report = device.report()
    return StepReport(
        step_seconds=report.seconds,
        compute_seconds=report.compute_seconds,
        stall_seconds=report.stall_seconds,
        h2d_seconds=report.h2d_seconds,
        d2h_seconds=report.d2h_seconds,
        h2d_bytes=report.h2d_bytes,
        d2h_bytes=report.d2h_bytes,
        lead_seconds=lead,
    )


class _Block(nn.Module):
    """A flat weight with a duration."""

    def __init__(self, number: int, times: BlockTimes) -> None:
        super().__init__()
        self.number, self.times = number, times
        self.weight = nn.Parameter(torch.empty(times.weight_bytes, dtype=torch.uint8, device=META), requires_grad=False)


class _TimedMaths:
    """Computes nothing, for as long as a block says."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def forward(self, block: nn.Module, inputs: tuple[Any, ...], *, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert isinstance(block, _Block)
        x = inputs[0]
        output = torch.empty(1, device=META)
        kept = torch.empty(block.times.stored_bytes if keep else 0, dtype=torch.uint8, device=META)
        name, seconds = f"forward of block {block.number}", block.times.forward_seconds
        self._device.compute(name, seconds, reads=[x, block.weight], writes=[output, kept])
        return output, (kept,)

    def backward(
        self,
        block: nn.Module,
        inputs: tuple[Any, ...],
        kept: tuple[Tensor, ...],
        grad: Tensor,
        *,
        needed: tuple[bool, ...],
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        assert isinstance(block, _Block)
        of_input = torch.empty(1, device=META)
        name, seconds = f"backward of block {block.number}", block.times.backward_seconds
        self._device.compute(name, seconds, reads=[*inputs, *kept, grad, block.weight], writes=[of_input])
        return (of_input,), ()
