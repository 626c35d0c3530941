"""The largest sum of activations inside a block of Wan, in closed form: the plain block, and the scheduled one.

What: for each moment that can be the worst one, the tensors that live at it; the peak is the largest sum. The moments
follow the code of `wan_ext/dit.py` (run again in backward by autograd) and of `wan_ext/fused_block.py`.

Exact: within 5 % of what the tracer (`memory/trace.py`) counts in that code, which tests hold both to; what is left
out is small: intermediates of element-wise operations, adapters in the dtype of the activations. A camera mechanism's
branches inside the blocks are not counted.

Shapes: B clips, L tokens of a clip, D width, F width of the feed-forward, N heads, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory.costs import Schedule
from wan_ext.fused_schedule import FFN_TOKENS, head_slices
from wan_ext.workload import FLOAT32, Workload, context_tokens, lora_parameters

INTERMEDIATES = 3 * FLOAT32 * 2**21
"""What an element-wise operation of plain PyTorch needs for itself; a Triton kernel needs nothing."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """The sizes that activations come in, in bytes, of the whole batch."""

    row: int
    """T: a row of the model's width for each token, in the blocks' precision."""
    wide: int
    """The same in float32: the residual stream and its gradient."""
    hidden: int
    """H: a row of the feed-forward's width for each token."""
    context: int
    """A row of the model's width for each text and image token."""
    per_token: int
    """One float32 number a token: a norm's statistics."""
    log_sum: int
    """One float32 number a token and head: what an attention keeps of its softmax."""
    weight: int
    """The largest weight of a block in the precision of the activations, made for a product and given back."""
    square: int
    """The same of a linear that keeps the model's width."""


def units(work: Workload, *, rows: int | None = None) -> Units:
    """The sizes for all tokens, or for a chunk of them."""
    config, d = work.config, work.config.dim
    rows = work.rows if rows is None else rows
    made = work.recipe is not None and work.recipe.compute == "dequant"
    return Units(
        row=work.element * rows * d,
        wide=FLOAT32 * rows * d,
        hidden=work.element * rows * config.ffn_dim,
        context=work.element * work.batch * context_tokens(config) * d,
        per_token=FLOAT32 * rows,
        log_sum=FLOAT32 * rows * config.num_heads,
        weight=work.element * d * config.ffn_dim if made else 0,
        square=work.element * d * d if made else 0,
    )


def plain_forward_bytes(work: Workload) -> int:
    """Worst moment of the plain block without gradients: the feed-forward, or where rotated keys are put together."""
    u = units(work)
    held = u.wide + 2 * u.row  # the stream, what self-attention returned, the feed-forward's input
    return max(
        held + 2 * u.hidden,
        held + u.hidden + u.row + u.weight,
        3 * u.row + 3 * u.wide,  # input, values, queries; the keys' norm, both halves, both together
    )


def plain_backward_bytes(work: Workload) -> int:
    """Worst moment of the plain block in backward, where autograd has run it again and has all that it keeps."""
    u, trains, image = units(work), work.rank > 0, work.config.image_dim is not None
    # Norms' rows (3), products before a norm (3), q k v and out of self-attention, q and out of cross-attention.
    kept = (13 if image else 12) * u.row + 3 * u.context + (3 if image else 2) * u.log_sum + 6 * u.per_token
    if trains:  # the inputs of linears too, and what is between the two matrices of each adapter
        kept += (4 if image else 3) * u.row + 8 * work.element * work.rows * work.rank
    hidden = (2 if trains else 1) * u.hidden
    end_of_forward = kept + hidden + 2 * u.row + 4 * u.wide  # gradient, three versions of the stream, two branches
    last_product = kept + 2 * u.hidden + 2 * u.row + 2 * u.wide + u.weight
    feed_forward = kept + hidden + 2 * u.hidden + 2 * u.wide
    first_product = kept + hidden + u.hidden + u.row + 2 * u.wide + u.weight
    norm = kept + 6 * u.wide + u.row
    return max(end_of_forward, last_product, feed_forward, first_product, norm)


def span_rows(work: Workload, limit: int | None) -> int:
    """Tokens that are computed together where at most `limit` of them are: those of all clips, or some of one."""
    return work.rows if limit is None or work.rows <= limit else min(work.tokens, limit)


def fused_forward_bytes(work: Workload, schedule: Schedule) -> int:
    """Worst moment of the scheduled block's forward, its output included."""
    u = units(work)
    c = units(work, rows=span_rows(work, schedule.token_chunk))
    f = units(work, rows=span_rows(work, min(schedule.token_chunk or FFN_TOKENS, FFN_TOKENS)))
    first = 1 / schedule.head_groups if schedule.head_groups == 1 else _head_shares(work, schedule)[0]
    in_groups = u.row + 4 * first * u.row  # the output of all heads; of some: queries, keys, a norm's rows, the output
    attention = 3 * u.row + (3 * u.row if schedule.head_groups == 1 else in_groups)
    held = u.wide + u.row + 3 * u.context  # the result, attention's output, keys and values of the text
    image = 0 if work.config.image_dim is None else 2 * c.row + c.log_sum  # attention to it, the sum of both
    crossing = held + 5 * c.row + image + c.log_sum + u.square  # branches, queries before and after their norm, out
    rotated = f.hidden if work.recipe is not None and work.recipe.rotate and u.weight else 0
    feed_forward = held + max(2 * f.hidden, f.hidden + rotated + f.row + u.weight)
    return int(u.log_sum + 2 * u.per_token + max(attention, crossing, feed_forward))


def fused_backward_bytes(work: Workload, schedule: Schedule) -> int:
    """Worst moment of the scheduled block's backward: steps 2, 3 and 4 of `wan_ext/fused_block.py`.

    What was kept of attention is not counted: it is the store's.
    """
    u, keeps = units(work), schedule.keep_attention
    c = units(work, rows=span_rows(work, schedule.token_chunk))
    f = units(work, rows=span_rows(work, min(schedule.token_chunk or FFN_TOKENS, FFN_TOKENS)))
    in_groups = schedule.head_groups > 1
    of_adapters = FLOAT32 * lora_parameters(work) // work.config.num_layers

    # Step 2: q, k, v, o unless o is kept; from the second chunk on dO, where it does not take the place of o.
    whole = 0 if keeps else 4 * u.row + u.log_sum + 2 * u.per_token
    whole += 7 * u.context  # keys and values of the text, before and after their norm; their gradients in float32
    step2 = whole + _step2_bytes(work, c, f)
    if c.row < u.row and (keeps or not in_groups):
        chunk = span_rows(work, schedule.token_chunk)
        rest = c if work.batch > 1 else units(work, rows=min(chunk, work.rows - chunk))
        step2 = whole + max(_step2_bytes(work, c, f), u.row + _step2_bytes(work, rest, f if f.row < rest.row else rest))

    # Step 3: q, k, v, dO; the gradients of the queries that are done; of the heads at work: q, k, o, dq, dk, dv and the
    # kernel's sum in float32.
    held = 4 * u.row + 2 * u.per_token + (0 if keeps else u.log_sum)
    done = step3 = 0.0
    for share in _head_shares(work, schedule):
        step3 = max(step3, held + (done + (7 if keeps else 8) * share) * u.row + 2 * share * u.log_sum)
        done += share

    # Step 4: q and k before their norms, gradients of q, k, v; norm1's rows, gradients on their way through.
    step4 = (
        5 * u.row + 2 * u.per_token + (5 if in_groups else 4) * c.row + max(u.square, min(3 * c.wide, INTERMEDIATES))
    )
    return int(u.wide + max(step2, of_adapters + step3, of_adapters + step4))


def _step2_bytes(work: Workload, c: Units, f: Units) -> int:
    """Of a chunk c of the tokens, whose feed-forward takes f at a time: there, or in cross-attention's backward."""
    image = 0 if work.config.image_dim is None else 2 * c.row + c.log_sum
    crossed = c.wide + 3 * c.row + image + c.log_sum  # the stream, self-attention's branch, queries, the output
    product = 3 * f.hidden + c.weight  # before GELU, after, the gradient
    if work.recipe is not None and work.recipe.rotate:  # the gradient a second time, rotated back
        product = max(product, 4 * f.hidden + (f.row // work.element if work.recipe.compute == "w8a8" else 0))
    feed_forward = crossed + (3 if f.row < c.row else 2) * f.row + product
    return max(feed_forward, 8 * c.row + image + 2 * c.log_sum + c.square)


def _head_shares(work: Workload, schedule: Schedule) -> list[float]:
    """Share of the heads in each group."""
    heads = work.config.num_heads
    return [(group.stop - group.start) / heads for group in head_slices(heads, schedule.head_groups)]
