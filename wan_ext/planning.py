"""From what a user says to a memory plan: for training, and for generating.

What: `plan_training` and `plan_generation` take plain numbers, which every command has, and return a `MemoryPlan`.
When nothing fits, the error names the smallest sizes that would do, and which of the user's settings, changed alone,
would fit into what there is.

Cost: tens of milliseconds; seconds where nothing fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from core.errors import InputError
from memory.plan import Limits, MemoryPlan, NothingFits, make_plan
from memory.quant.recipes import parse_recipe
from memory.rates import RateProfile
from wan_ext.configs import Expert, WanVariant
from wan_ext.costs import generation_costs, training_costs
from wan_ext.workload import Workload, tokens_of


def plan_training(
    variant: WanVariant,
    *,
    frames: int,
    height: int,
    width: int,
    batch_size: int = 1,
    rank: int,
    experts: Sequence[Expert],
    recipe: str | None,
    vram_bytes: int,
    ram_bytes: int,
    rates: RateProfile,
    bf16: bool = True,
    optimizer: str = "AdamW8bit",
    trained_parameters: int | None = None,
    camera_bytes: int = 0,
    from_file: bool = False,
    blocks_to_swap: int | None = None,
    fused: bool = True,
) -> MemoryPlan:
    """The plan of a training step.

    Args:
        variant: the task.
        frames: of the longest clip, 4 n + 1.
        height: of the largest clip, pixels.
        width: of the largest clip, pixels.
        batch_size: clips of a batch.
        rank: of the LoRA on every linear of the blocks.
        experts: that are trained in this run.
        recipe: how the blocks' linears are kept in 8 bits, a name of `memory.quant.RECIPES`; None: in the precision of
            the activations.
        vram_bytes: device memory to plan for.
        ram_bytes: host memory to plan for.
        rates: of the card.
        bf16: whether linears and activations are bfloat16, else float32.
        optimizer: as `training_costs` takes it.
        trained_parameters: of one expert's network, camera included; None: those of the LoRA.
        camera_bytes: what a camera mechanism keeps outside the blocks for a step.
        from_file: whether the weights come from an 8-bit file, out of which blocks can be streamed as they lie.
        blocks_to_swap: the user's number of streamed blocks; None: the planner's choice.
        fused: whether blocks compute by their schedule; else as the plain block, run again in backward.

    Returns:
        The fastest plan that fits.

    Raises:
        InputError: a size that no clip has, an unknown name; NothingFits where that is all.
    """

    def plan(frames: int, height: int, width: int, batch: int, rank: int, models: int) -> MemoryPlan:
        work = Workload(
            config=variant.dit,
            tokens=_tokens(variant, frames, height, width),
            batch=batch,
            rank=rank,
            recipe=None if recipe is None else parse_recipe(recipe),
            element=2 if bf16 else 4,
        )
        costs = training_costs(
            variant,
            work,
            num_models=models,
            trained_parameters=trained_parameters,
            optimizer=optimizer,
            more_bytes=camera_bytes,
            fused=fused,
        )
        limits = Limits(vram_bytes=vram_bytes, ram_bytes=ram_bytes, may_map=from_file, streamed=blocks_to_swap)
        return make_plan(costs, limits=limits, rates=rates)

    _require_blocks(blocks_to_swap, variant)
    given = (frames, height, width, batch_size, rank, len(experts))
    return _with_advice(plan, given, _changes(*given), recipe)


def plan_generation(
    variant: WanVariant,
    *,
    frames: int,
    height: int,
    width: int,
    recipe: str | None,
    vram_bytes: int,
    ram_bytes: int,
    rates: RateProfile,
    rank: int = 0,
    bf16: bool = True,
    camera_bytes: int = 0,
    from_file: bool = False,
    blocks_to_swap: int | None = None,
    fused: bool = True,
    experts_at_once: int | None = None,
) -> MemoryPlan:
    """The plan of one forward pass while a video is sampled, with all experts of the task at hand.

    The arguments are those of `plan_training`; rank is that of a LoRA that is not merged, `experts_at_once` how many
    experts are in memory together (None: all of the task).

    Raises:
        InputError: a size that no clip has, an unknown name; NothingFits where that is all.
    """

    def plan(frames: int, height: int, width: int, batch: int, rank: int, models: int) -> MemoryPlan:
        work = Workload(
            config=variant.dit,
            tokens=_tokens(variant, frames, height, width),
            batch=batch,
            rank=rank,
            recipe=None if recipe is None else parse_recipe(recipe),
            element=2 if bf16 else 4,
        )
        costs = generation_costs(variant, work, num_models=models, more_bytes=camera_bytes, fused=fused)
        limits = Limits(vram_bytes=vram_bytes, ram_bytes=ram_bytes, may_map=from_file, streamed=blocks_to_swap)
        return make_plan(costs, limits=limits, rates=rates)

    _require_blocks(blocks_to_swap, variant)
    given = (frames, height, width, 1, rank, experts_at_once or len(variant.experts))
    changes = (change for change in _changes(*given) if change[0].startswith("--frames"))
    return _with_advice(plan, given, changes, recipe)


Setting = tuple[int, int, int, int, int, int]


def _with_advice(
    plan: Callable[..., MemoryPlan], given: Setting, changes: Iterator[tuple[str, Setting]], recipe: str | None
) -> MemoryPlan:
    """The plan; or why there is none, and which single change would help."""
    try:
        return plan(*given)
    except NothingFits as error:
        reason = str(error)
    fitting = []
    for words, setting in changes:
        try:
            plan(*setting)
        except NothingFits:
            continue
        fitting.append(words)
    if recipe is None:
        fitting.append("8-bit weights (--fp8_scaled) need half")
    if not fitting:
        raise NothingFits(reason)
    raise NothingFits(f"{reason}. What would fit: {', or '.join(fitting)}")


def _changes(frames: int, height: int, width: int, batch: int, rank: int, models: int) -> Iterator[tuple[str, Setting]]:
    """Every setting made smaller alone, the mildest of its kind that might do first."""
    for fewer in (frames - 1) * 3 // 4, (frames - 1) // 2, (frames - 1) // 4, 0:
        if fewer // 4 * 4 + 1 < frames:
            yield f"--frames {fewer // 4 * 4 + 1}", (fewer // 4 * 4 + 1, height, width, batch, rank, models)
    for share in (0.75, 0.5):
        h, w = (max(32, int(side * share) // 32 * 32) for side in (height, width))
        if h * w < height * width:
            yield f"--size {h}x{w}", (frames, h, w, batch, rank, models)
    if batch > 1:
        yield "--batch_size 1", (frames, height, width, 1, rank, models)
    if rank > 8:
        yield f"--rank {rank // 2}", (frames, height, width, batch, rank // 2, models)
    if models > 1:
        yield "one expert at a time (--experts low, then high)", (frames, height, width, batch, rank, 1)


def _tokens(variant: WanVariant, frames: int, height: int, width: int) -> int:
    """Tokens of a clip.

    Raises:
        InputError: a size that no clip has.
    """
    stride_t, side = variant.vae.stride[0], variant.spatial_stride
    if frames < 1 or (frames - 1) % stride_t:
        raise InputError(f"frames: expected {stride_t} n + 1, found {frames}")
    if min(height, width) < side or height % side or width % side:
        raise InputError(
            f"size: expected multiples of {side} from {side} up for {variant.name}, found {height}x{width}"
        )
    return tokens_of(variant, frames=frames, height=height, width=width)


def _require_blocks(blocks_to_swap: int | None, variant: WanVariant) -> None:
    total = variant.dit.num_layers
    if blocks_to_swap is not None and not 0 <= blocks_to_swap <= total:
        raise InputError(f"blocks to swap: expected 0 to {total}, as many as the model has, found {blocks_to_swap}")
