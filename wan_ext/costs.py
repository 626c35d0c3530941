"""What a training step or a forward pass of Wan costs: the numbers by which `memory.plan` chooses.

What: `training_costs` and `generation_costs` put together the bytes of `wan_ext.workload` and `wan_ext.activations`,
the operations of each pass, and an estimate of the traffic of everything that is no matrix product.

How: traffic is counted in passes over a row of the model's width for each token. The fused block reads or writes 30
such rows of 2 bytes in forward and 66 in recomputation and backward, the plain one three to five times as many, as
eager PyTorch does. Weights that are made from 8 bits for a product cost 5 bytes each for every chunk of tokens.

Cost: microseconds. Exact: bytes as those two modules are; seconds made of these are estimates.
"""

from __future__ import annotations

from core.errors import InputError, nearest
from memory.costs import BlockCosts, ModelCosts, Products, Schedule, Work
from memory.plan import ACTIVATIONS, CHECKPOINTS, MASTERS, RESIDENT, TRAINED
from wan_ext.activations import (
    fused_backward_bytes,
    fused_forward_bytes,
    plain_backward_bytes,
    plain_forward_bytes,
    units,
)
from wan_ext.configs import WanVariant
from wan_ext.dit import HEAD_TOKENS
from wan_ext.workload import (
    FLOAT32,
    Workload,
    attention_flop,
    block_bytes,
    block_linears,
    embedding_bytes,
    linear_flop,
    lora_flop,
    lora_parameters,
    outside_bytes,
)


def fused_costs(work: Workload, schedule: Schedule, *, trains: bool) -> BlockCosts:
    """The scheduled block of `wan_ext/fused_block.py`."""
    u = units(work)
    recomputed = linear_flop(work) - 2.0 * work.rows * work.config.dim * work.config.ffn_dim  # all but the last linear
    keeps = trains and schedule.keep_attention
    return BlockCosts(
        schedule=schedule,
        forward_bytes=fused_forward_bytes(work, schedule),
        backward_bytes=fused_backward_bytes(work, schedule) if trains else 0,
        kept_bytes=u.row + u.log_sum if keeps else 0,
        kept_eight_bit_bytes=_rounded_bytes(work, work.config.head_dim) + u.log_sum if keeps else 0,
        forward=_forward_work(work, 15 * u.wide + 2 * u.hidden, schedule),
        backward=_backward_work(work, 33 * u.wide + 7 * u.hidden, schedule, recomputed) if trains else Work(),
    )


def plain_costs(work: Workload, *, trains: bool) -> BlockCosts:
    """The plain block of `wan_ext/dit.py`, run again by autograd in backward."""
    u, schedule = units(work), Schedule()
    return BlockCosts(
        schedule=schedule,
        forward_bytes=plain_forward_bytes(work),
        backward_bytes=plain_backward_bytes(work) if trains else 0,
        forward=_forward_work(work, 48 * u.wide + 2 * u.hidden, schedule),
        backward=_backward_work(work, 150 * u.wide + 8 * u.hidden, schedule, linear_flop(work)) if trains else Work(),
    )


def _rounded_bytes(work: Workload, width: int) -> int:
    """A row of the model's width for each token in 8 bits, with a float32 scale for every `width` numbers."""
    return work.rows * work.config.dim * (width + FLOAT32) // width


def _pieces(work: Workload, schedule: Schedule) -> int:
    """Chunks of tokens."""
    return 1 if schedule.token_chunk is None else work.batch * -(-work.tokens // schedule.token_chunk)


def _made_bytes(work: Workload, pieces: int) -> float:
    """Traffic of making the linears' weights from 8 bits: read 1, write 2, read 2 of each, for each chunk of tokens."""
    if work.recipe is None or work.recipe.compute != "dequant":
        return 0.0
    return 5.0 * pieces * sum(i * o for i, o in block_linears(work.config))


def _forward_work(work: Workload, traffic: float, schedule: Schedule) -> Work:
    pieces = _pieces(work, schedule)
    return Work(
        linear=linear_flop(work),
        small=lora_flop(work),
        attention=attention_flop(work),
        traffic=traffic + _made_bytes(work, pieces),
        launches=60 + 30 * pieces,
    )


def _backward_work(work: Workload, traffic: float, schedule: Schedule, recomputed: float) -> Work:
    config, pieces = work.config, _pieces(work, schedule)
    back = 2.0 * work.rows * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)  # none for text and image
    return Work(
        linear=recomputed + back,
        small=3 * lora_flop(work),
        attention=0.0 if schedule.keep_attention else attention_flop(work),
        attention_backward=2.5 * attention_flop(work),
        traffic=traffic + 2 * _made_bytes(work, pieces),
        launches=150 + 80 * pieces + 25 * schedule.head_groups,
    )


def schedules(work: Workload, *, trains: bool) -> list[Schedule]:
    """Those worth choosing from: groups that divide the heads, chunks that divide the work into several."""
    groups = [count for count in (1, 2, 4, 8) if work.config.num_heads % count == 0] if trains else [1]
    chunks = [None, *(chunk for chunk in (8192, 4096, 2048, 1024) if chunk < work.tokens)]
    return [
        Schedule(head_groups=count, token_chunk=chunk, keep_attention=keep)
        for keep in ((False, True) if trains else (False,))
        for count in groups
        for chunk in chunks
    ]


# ---- a whole step ----

OPTIMIZER_BYTES = {
    "AdamW": 8.0,
    "AdamW8bit": 2.0 + 8 / 256,
    "PagedAdamW8bit": 2.0 + 8 / 256,
    "Lion8bit": 1.0 + 4 / 256,
    "Adafactor": 1.0,
    "Prodigy": 16.0,
    "AdamWScheduleFree": 8.0,
    "RAdamScheduleFree": 8.0,
    "SGDScheduleFree": 4.0,
}
"""Of a trained number: moments in float32, or in 8 bits with a float32 scale for 256 of them. Paged states count as if
they lay on the device, where they are during the step. Adafactor keeps a row and a column of each matrix, at rank 4 a
quarter of it. Prodigy keeps the start and a numerator too."""
OPTIMIZER_TRANSIENT_BYTES = dict.fromkeys(OPTIMIZER_BYTES, 4.0) | dict.fromkeys(
    ("AdamW8bit", "PagedAdamW8bit", "Lion8bit"), 0.0
)
"""Of a trained number of one expert, during the step: the root of the second moment."""
ADVICE = {
    ACTIVATIONS: "fewer frames, a smaller size or a smaller batch make it smaller",
    f"{TRAINED}: weights": "a smaller rank makes it smaller, and one expert at a time halves it",
    f"{TRAINED}: optimizer": "AdamW8bit, a smaller rank or one expert at a time make it smaller",
    CHECKPOINTS: "fewer frames, a smaller size or a smaller batch make it smaller",
    RESIDENT: "more streamed blocks make it smaller",
    MASTERS: "an 8-bit file (tools/quantize.py) can be read from disk instead, and one expert at a time halves it",
}
"""What a user can change, by part of the memory."""


def training_costs(
    variant: WanVariant,
    work: Workload,
    *,
    num_models: int,
    trained_parameters: int | None = None,
    optimizer: str = "AdamW8bit",
    more_bytes: int = 0,
    fused: bool = True,
) -> ModelCosts:
    """A training step of LoRA on one or both experts.

    Args:
        variant: the task.
        work: of a batch.
        num_models: experts that are trained in the run; all their weights are kept somewhere.
        trained_parameters: of one expert; None: those of the LoRA.
        optimizer: a name of `OPTIMIZER_BYTES`; a "module.Class" is reckoned as the largest of them.
        more_bytes: activations of a camera mechanism outside the blocks, for a whole step.
        fused: the scheduled block; else the plain one.
    """
    if optimizer not in OPTIMIZER_BYTES and "." not in optimizer:
        raise InputError(
            f"plan: expected one of the optimizers {', '.join(OPTIMIZER_BYTES)}, found {optimizer!r}"
            f"{nearest(optimizer, OPTIMIZER_BYTES)}"
        )
    count = lora_parameters(work) if trained_parameters is None else trained_parameters
    u = units(work)
    choice = [fused_costs(work, s, trains=True) for s in schedules(work, trains=True)]
    return ModelCosts(
        name=_name(variant, work, num_models),
        num_blocks=work.config.num_layers,
        num_models=num_models,
        trains=True,
        products=products_of(work),
        block_bytes=block_bytes(work),
        outside_bytes=num_models * outside_bytes(work),
        visiting_bytes=num_models * embedding_bytes(work),
        visitor_bytes=FLOAT32 * 6 * work.config.dim**2,  # the time projection
        trained_bytes={
            "weights": FLOAT32 * num_models * count,
            "gradients": FLOAT32 * count,
            "optimizer": int(OPTIMIZER_BYTES.get(optimizer, max(OPTIMIZER_BYTES.values())) * num_models * count),
        },
        optimizer_bytes=int(OPTIMIZER_TRANSIENT_BYTES.get(optimizer, 4.0) * count),
        input_bytes=input_bytes(work) + more_bytes,
        checkpoint_bytes=u.wide,
        checkpoint_eight_bit_bytes=_rounded_bytes(work, work.config.dim),
        outside_activation_bytes=2 * u.wide + 2 * _head_bytes(work),  # the head's input; everything has a gradient
        outside=Work(traffic=40 * u.wide + 24.0 * count),
        blocks=tuple(choice) if fused else (plain_costs(work, trains=True),),
        advice=ADVICE,
    )


def generation_costs(
    variant: WanVariant, work: Workload, *, num_models: int, more_bytes: int = 0, fused: bool = True
) -> ModelCosts:
    """One forward pass. Guidance runs several of them, one after the other."""
    u = units(work)
    choice = [fused_costs(work, s, trains=False) for s in schedules(work, trains=False)]
    return ModelCosts(
        name=_name(variant, work, num_models),
        num_blocks=work.config.num_layers,
        num_models=num_models,
        trains=False,
        products=products_of(work),
        block_bytes=block_bytes(work),
        outside_bytes=num_models * outside_bytes(work),
        visiting_bytes=num_models * embedding_bytes(work),
        visitor_bytes=FLOAT32 * 6 * work.config.dim**2,  # the time projection
        trained_bytes={"weights": FLOAT32 * num_models * lora_parameters(work)} if work.rank else {},
        input_bytes=input_bytes(work) + more_bytes,
        checkpoint_bytes=u.wide,
        outside_activation_bytes=u.wide + _head_bytes(work),  # the head's input
        outside=Work(traffic=20 * u.wide),
        blocks=tuple(choice) if fused else (plain_costs(work, trains=False),),
        advice=ADVICE,
    )


def _head_bytes(work: Workload) -> int:
    """What the head makes: of the rows that it computes together their norm in two steps, of all of them its result."""
    config = work.config
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    together = min(work.rows, HEAD_TOKENS)
    return FLOAT32 * (2 * together * config.dim + work.rows * patch * config.out_dim)


def input_bytes(work: Workload) -> int:
    """What lives through a whole step: latents, noise and target, the modulation, the text, the rotary table."""
    config = work.config
    latents = FLOAT32 * work.rows * 4 * (4 * config.out_dim + config.in_dim)
    modulation = FLOAT32 * work.batch * work.timesteps * 7 * config.dim
    return latents + modulation + units(work).context + FLOAT32 * work.tokens * config.head_dim


def products_of(work: Workload) -> Products:
    """What the frozen linears multiply in."""
    if work.recipe is None or work.recipe.compute == "dequant":
        return "bf16"
    return "int8" if work.recipe.values == "int8" else "fp8"


def _name(variant: WanVariant, work: Workload, num_models: int) -> str:
    experts = "" if len(variant.experts) == 1 else (", both experts" if num_models == 2 else ", one expert")
    return f"{variant.name}{experts}, {work.batch} x {work.tokens:,} tokens"
