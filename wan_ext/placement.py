"""Where the transformers of a run live and how their blocks run: as a memory plan says, or as flags do.

What: a `Placement` is made once for a run and places each expert's transformer (`place`). All share one ring of device
buffers and one store of what waits for backward, because only one of them computes at a time: to change experts moves
no weights. Where the plan says so, the weights of the text and time embeddings, 0.83 GB of a 14B expert, stay in pinned
host memory and are copied to the device for each forward, 0.02 to 0.04 s. When memory runs out all the same, `shrink`
places everything anew by the planner's next smaller plan.

How: with a plan, blocks compute by their own schedule (`wan_ext/fused_block.py`). Without one, blocks run plainly; with
`checkpoint` or streamed blocks they compute by that schedule too, which keeps their inputs alone.

Exact: schedules differ in summation order, streaming in nothing (memory/stream.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.errors import InputError
from memory.device import Device, device_for
from memory.masters import HostBlock
from memory.plan import MemoryPlan, next_smaller
from memory.quant import QuantRecipe
from memory.quant.products import require_device
from memory.runners import BlockRunner, run_plain, run_with
from memory.store import HostStore
from memory.stream import Ring, StreamedBlocks, move_all_but, ring_bytes, spread
from wan_ext.checkpoint_files import open_checkpoint
from wan_ext.dit import WanDiT
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths
from wan_ext.quantized_files import quantized_file


class PlacedBlocks:
    """The runner of one transformer's blocks; what is behind it changes when a smaller plan is taken."""

    def __init__(self, dit: WanDiT) -> None:
        self.dit = dit
        self.runner: BlockRunner = run_plain

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
        return self.runner(blocks, x, *inputs)


class Placement:
    """Places transformers on a device.

    Args:
        device: where they compute.
        plan: of all of them together; None: `blocks_to_swap` and `checkpoint` say how.
        blocks_to_swap: evenly spaced blocks of each that live in host memory.
        checkpoint: whether blocks keep their inputs alone and compute the rest again in backward.

    Attributes:
        plan: the one in force.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        plan: MemoryPlan | None = None,
        blocks_to_swap: int = 0,
        checkpoint: bool = False,
    ) -> None:
        self.device, self.plan = device, plan
        self._blocks_to_swap, self._checkpoint = blocks_to_swap, checkpoint
        self._operations = device_for(device)  # one for all: what ring and store copy is ordered against each other
        self._placed: list[PlacedBlocks] = []
        self._ring: Ring | None = None
        self._store: HostStore | None = None

    @property
    def load_device(self) -> torch.device:
        """Where to load a transformer that is going to be placed: in host memory if some of its blocks stay there."""
        streams = bool(self.plan.streamed) if self.plan is not None else self._blocks_to_swap > 0
        return torch.device("cpu") if streams else self.device

    def place(self, dit: WanDiT) -> PlacedBlocks:
        """Put a transformer where it runs.

        Args:
            dit: with its adapters; what is frozen now is what is streamed.

        Returns:
            What its `forward` takes as `run_blocks`.
        """
        placed = PlacedBlocks(dit)
        placed.runner = self._runner(dit)
        self._placed.append(placed)
        return placed

    def forget(self) -> None:
        """Let go of what was placed: nothing here keeps its memory from being freed."""
        self._placed.clear()

    def shrink(self) -> MemoryPlan:
        """Place everything by the next smaller plan.

        Returns:
            The plan that is in force from now on.

        Raises:
            InputError: there is none.
        """
        assert self.plan is not None
        self.plan = next_smaller(self.plan)
        self._ring = self._store = None
        for placed in self._placed:
            placed.runner = run_plain  # lets go of the old ring before a new one is made
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # once, between steps: what the old plan left lies in pieces
        for placed in self._placed:
            placed.runner = self._runner(placed.dit)
        return self.plan

    def _runner(self, dit: WanDiT) -> BlockRunner:
        blocks = list(dit.blocks)
        plan = self.plan
        if plan is None:
            streamed, masters = spread(len(blocks), self._blocks_to_swap), "pinned"
            maths = FusedBlockMaths()
            if not streamed:
                dit.to(self.device)
                return run_with(maths) if self._checkpoint else run_plain
        else:
            streamed, masters = plan.streamed, plan.masters
            schedule = plan.schedule
            maths = FusedBlockMaths(
                BlockSchedule(
                    head_groups=schedule.head_groups,
                    token_chunk=schedule.token_chunk,
                    keep_attention=schedule.keep_attention,
                )
            )
            if plan.store == "host" and self._store is None:
                self._store = HostStore(self._operations, eight_bits=plan.eight_bit_store)
        if streamed and self._ring is None:
            self._ring = Ring(self._operations, ring_bytes(blocks, slots=1), min(2, len(streamed)))
        runner = StreamedBlocks(
            blocks,
            streamed=streamed,
            device=self.device,
            ring=self._ring,
            maths=maths,
            store=self._store,
            masters=masters,  # type: ignore[arg-type]  # one of two words
        )
        where = "device" if plan is None else plan.outside
        place_outside(dit, self.device, embeddings=where, operations=self._operations)
        return runner


def place_outside(
    dit: WanDiT, device: torch.device, *, embeddings: Literal["device", "host"], operations: Device
) -> None:
    """Put what is outside the blocks of a transformer where a plan wants it.

    Args:
        dit: the transformer.
        device: where it computes, and where everything goes but the embeddings' weights.
        embeddings: where `dit.embeddings` go; on the host into one piece of pinned memory, except what trains.
        operations: of the device; the pinned memory is theirs.
    """
    if embeddings == "device":
        move_all_but(dit, dit.blocks, device)
        return
    move_all_but(dit, [*dit.blocks, *dit.embeddings], device)
    HostBlock(nn.ModuleList(dit.embeddings), operations, place=device, kind="pinned")


def stored_recipe(
    checkpoints: Sequence[Path], recipe: QuantRecipe | None, *, device: torch.device
) -> tuple[QuantRecipe | None, bool]:
    """How the blocks' linears of a run are kept, and whether they can be streamed from their files.

    Args:
        checkpoints: of the experts; a file of 8-bit weights brings its recipe.
        recipe: of other checkpoints; None: not quantised.
        device: that multiplies with them.

    Raises:
        InputError: some of the experts are in 8-bit files and others are not; a damaged file; the device cannot
            multiply as the recipe asks.
    """
    files = [quantized_file(open_checkpoint(path), model="dit") for path in checkpoints]
    if any(files) and not all(files):
        raise InputError("--dit --dit_high_noise: expected both experts in 8-bit files or none, found one of each kind")
    if files[0]:
        recipe = files[0].recipe_for(recipe)
    if recipe is not None:
        require_device(recipe, device)
    return recipe, bool(files[0])


def require_plan(*, ram: str | None = None, gpu: str | None = None, on_oom: str | None = None) -> None:
    """Refuse, where no plan is made, the flags that only a plan reads.

    Raises:
        InputError: one of them is given.
    """
    for flag, value in (("--ram", ram), ("--gpu", gpu), ("--on_oom", on_oom)):
        if value is not None:
            raise InputError(
                f"{flag} {value}: does nothing without a plan, which a CPU has only with --vram; give both"
            )
