"""The forward of a block by hand: steps that the forward pass and the recomputation before backward share.

The order and the bytes are told in `wan_ext/fused_block.py`; what is computed, in `wan_ext/dit.py`.

Shapes: B clips, F latent frames, L tokens, S keys, D model width, N heads, d channels of a head; b and l: the clips and
tokens of a span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError
from wan_ext.attention import attention, attention_forward, check_backend_has_backward
from wan_ext.condition import CameraBranch, add_branch
from wan_ext.fused_linear import FusedLinear, Gradients
from wan_ext.fused_ops import ops_for, row_rrms
from wan_ext.fused_schedule import FFN_TOKENS, BlockSchedule, head_slices
from wan_ext.norms import RMSNorm
from wan_ext.token_spans import Span, token_spans

KEY_STEP = 0x2545F4914F6CDD1D
"""Between the keys of two linears' dropout masks."""


@dataclass(kw_only=True)
class Keys:
    """Keys and values of one context of cross-attention."""

    name: str  # "" for the text, "_img" for the image
    context: Tensor  # [B, S, D]
    before: Tensor  # keys before their norm. [B, S, D]
    rrms: Tensor  # [B, S, 1]
    k: Tensor  # [B, S, N, d]
    v: Tensor  # [B, S, N, d]


@dataclass(kw_only=True)
class Crossing:
    """What some tokens leave behind on their way to the feed-forward, in the dtype of the linears."""

    attended: Tensor  # what self-attention adds before its gate. [b, l, D]
    before: Tensor  # queries of cross-attention before their norm. [b, l, D]
    rrms: Tensor  # [b, l, 1]
    outs: list[Tensor]  # of the attention to each context. [b, l, N, d]
    lses: list[Tensor | None]
    out: Tensor  # their sum. [b, l, D]


class Forward:
    """One call of a block: its parts and inputs under short names, and the steps of its forward.

    Args:
        block: a `WanBlock`.
        inputs: as its `forward` takes them.
        schedule: which parts exist at the same time.
    """

    def __init__(self, block: Any, inputs: tuple[Any, ...], schedule: BlockSchedule) -> None:
        all_inputs = (*inputs, *(None,) * (7 - len(inputs)))
        self.x, modulation, self.context, self.rope, self.image_context, self.features, self.keep = all_inputs
        device = self.x.device
        if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
            raise InputError(
                "fused block: expected no autocast, for it computes in the dtype of the weights, found one"
            )
        self.block, self.schedule, self.ops = block, schedule, ops_for(device)
        self.dtype: torch.dtype = self.context.dtype
        self.self_attn, self.cross_attn = block.self_attn, block.cross_attn
        self.num_heads: int = self.self_attn.num_heads
        self.groups = head_slices(self.num_heads, schedule.head_groups)
        self.backend: str = self.self_attn.backend
        hears = self.features is not None
        self.self_camera: CameraBranch | None = self.self_attn.camera if hears else None
        self.cross_camera: CameraBranch | None = self.cross_attn.camera if hears else None

        mods = (block.modulation.float()[:, None] + modulation).movedim(2, 0).contiguous()  # [6, B, 1|F, D]
        self.shift_attn, scale_attn, self.gate_attn, self.shift_ffn, scale_ffn, self.gate_ffn = mods
        self.gain_attn, self.gain_ffn = 1 + scale_attn, 1 + scale_ffn
        affine = (block.norm3.weight, block.norm3.bias)
        self.gain_cross, self.shift_cross = (parameter.float()[None, None] for parameter in affine)  # [1, 1, D]

        self.gradients = Gradients()
        names = [f"{attn}.{name}" for attn in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
        names += [] if self.image_context is None else ["cross_attn.k_img", "cross_attn.v_img"]
        self.linears = {name: FusedLinear(block.get_submodule(name), name, self.gradients) for name in names}
        if any(linear.draws for linear in self.linears.values()):
            seed = int(torch.randint(2**62, (), device="cpu"))  # the same again in backward: a runner sees to that
            for number, linear in enumerate(self.linears.values()):
                linear.key = seed + number * KEY_STEP

    def run(self, *, keep_attention: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The block's output; attention's output and log-sum-exp where they are kept."""
        if keep_attention:
            check_backend_has_backward(self.backend)
        self.project()
        self.attend()
        if self.self_camera is None:
            del self.q, self.k, self.v
        self.contexts = self.make_contexts()
        result = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        for span in self.spans():
            stream = span.of(result)
            self.cross(span, stream)
            self.feed_forward(span, stream)
        if keep_attention:
            assert self.lse is not None
            return result, (self.o, self.lse)
        return result, ()

    def spans(self) -> list[Span]:
        """The tokens that are taken at a time outside attention: all, where a camera's branch wants to see all."""
        batch, tokens = self.x.shape[:2]
        frames, limit = self.gate_attn.shape[1], self.schedule.token_chunk
        for camera in (self.self_camera, self.cross_camera):
            if camera is not None:
                frames = max(frames, self.features.shape[1])
                limit = limit if camera.tokenwise and self.features.shape[2:4] == (1, 1) else None
        return token_spans(batch, tokens, frames=frames, limit=limit)

    def feed_forward_spans(self, span: Span, stream: Tensor) -> list[Span]:
        """The tokens inside a span that the feed-forward takes at a time."""
        limit = min(self.schedule.token_chunk or FFN_TOKENS, FFN_TOKENS)
        return token_spans(*stream.shape[:2], frames=span.of_frames(self.gate_ffn).shape[1], limit=limit)

    # ---- self-attention ----

    def attention_input(self, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """norm1 without the camera's share, mean and 1 / deviation of the rows. -> [b, l, D], [b, l, 1], [b, l, 1]"""
        gain, shift = span.of_frames(self.gain_attn), span.of_frames(self.shift_attn)
        return self.ops.norm_modulate_forward(span.of(self.x), gain, shift, self.block.norm1.eps, self.dtype)

    def with_before(self, span: Span, y: Tensor, features: Tensor | None = None) -> Tensor:
        """The input of self-attention with what its camera adds to it."""
        if self.self_camera is None:
            return y
        features = span.of_frames(self.features) if features is None else features
        return add_branch(y, self.self_camera.before(y, features), self.kept_clips(span))

    def with_after(
        self, camera: CameraBranch, span: Span, out: Tensor, y: Tensor, q: Tensor, features: Tensor | None = None
    ) -> Tensor:
        """The output of an attention with what its camera adds to it."""
        features = span.of_frames(self.features) if features is None else features
        return add_branch(out, camera.after(out, y, q, features), self.kept_clips(span))

    def kept_clips(self, span: Span) -> Tensor | None:
        return None if self.keep is None else self.keep[span.clips]

    def project(self) -> None:
        """q, k, v before their norms. [B, L, D]"""
        y = self.with_before(Span(), self.attention_input(Span())[0])
        q, k, v = (self.linears[f"self_attn.{name}"] for name in "qkv")
        shared = q.prepare(y)
        self.q, self.k, self.v = (
            linear.forward(y, 0, prepared=shared if linear.shares_inputs_with(q) else None) for linear in (q, k, v)
        )
        self.rrms_q, self.rrms_k = (
            row_rrms(rows, norm.eps)
            for rows, norm in ((self.q, self.self_attn.norm_q), (self.k, self.self_attn.norm_k))
        )

    def turned(self, rows: Tensor, rrms: Tensor, norm: RMSNorm, heads: slice, span: Span | None = None) -> Tensor:
        """Queries or keys of some heads and tokens, normed and turned. -> [b, l, n, d]"""
        span = Span() if span is None else span
        width = rows.shape[-1] // self.num_heads
        channels = slice(heads.start * width, heads.stop * width)
        rows, weight, rope = span.of(rows)[..., channels], norm.weight[channels], self.rope[:, span.tokens]
        count = heads.stop - heads.start
        return self.ops.rms_rope_forward(rows, weight, rope, count, norm.eps, rrms=span.of(rrms))[0]

    def by_head(self, rows: Tensor) -> Tensor:
        """[..., D] -> a view [..., N, d]"""
        return rows.unflatten(-1, (self.num_heads, -1))

    def attend(self) -> None:
        """The output of self-attention [B, L, D] and its log-sum-exp [B, N, L], by groups of heads."""
        attn, v = self.self_attn, self.by_head(self.v)
        o = torch.empty_like(v) if len(self.groups) > 1 else None
        lses = []
        for heads in self.groups:
            q = self.turned(self.q, self.rrms_q, attn.norm_q, heads)
            k = self.turned(self.k, self.rrms_k, attn.norm_k, heads)
            out, lse = self.attention(q, k, v[:, :, heads])
            lses.append(lse)
            if o is None:
                o = out
            else:
                o[:, :, heads] = out
        assert o is not None
        self.o = o.flatten(2)
        known = [lse for lse in lses if lse is not None]
        self.lse = None if not known else known[0] if len(known) == 1 else torch.cat(known, 1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output and log-sum-exp; SageAttention, which can only sample, gives none."""
        if self.backend == "sage":
            return attention(q, k, v, backend=self.backend), None
        return attention_forward(q, k, v, backend=self.backend)

    def attention_output(self, span: Span) -> Tensor:
        """The product of o, without the camera's share. -> [b, l, D]"""
        return self.linears["self_attn.o"].forward(span.of(self.o), span.first_row)

    def camera_sees(self, span: Span) -> tuple[Tensor, Tensor]:
        """The input and the queries that self-attention's camera is shown. -> [b, l, D], [b, l, N, d]"""
        y = self.with_before(span, self.attention_input(span)[0])
        heads = slice(0, self.num_heads)
        return y, self.turned(self.q, self.rrms_q, self.self_attn.norm_q, heads, span)

    # ---- cross-attention ----

    def make_contexts(self) -> list[Keys]:
        """Keys and values of the text and, where there is one, of the image."""
        attn, found = self.cross_attn, []
        for name, context in (("", self.context), ("_img", self.image_context)):
            if context is None:
                continue
            norm = getattr(attn, f"norm_k{name}")
            before = self.linears[f"cross_attn.k{name}"].forward(context, 0)
            k, rrms = self.ops.rms_rope_forward(before, norm.weight, None, self.num_heads, norm.eps)
            v = self.by_head(self.linears[f"cross_attn.v{name}"].forward(context, 0))
            found.append(Keys(name=name, context=context, before=before, rrms=rrms, k=k, v=v))
        return found

    def cross_input(self, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """norm3, and mean and 1 / deviation of the rows. [b, l, D] -> [b, l, D], [b, l, 1], [b, l, 1]"""
        eps = self.block.norm3.eps
        return self.ops.norm_modulate_forward(stream, self.gain_cross, self.shift_cross, eps, self.dtype)

    def cross_queries(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of cross-attention, normed, and 1 / rms of each row. [b, l, D] -> [b, l, N, d], [b, l, 1]"""
        norm = self.cross_attn.norm_q
        return self.ops.rms_rope_forward(before, norm.weight, None, self.num_heads, norm.eps)

    def cross(self, span: Span, stream: Tensor) -> Crossing:
        """From the output of self-attention to the input of norm2, which is written into `stream`. [b, l, D]"""
        attended = self.attention_output(span)
        if self.self_camera is not None:
            attended = self.with_after(self.self_camera, span, attended, *self.camera_sees(span))
        gate = span.of_frames(self.gate_attn)
        self.ops.gate_residual_forward(span.of(self.x), attended, gate, out=stream)
        y = self.cross_input(stream)[0]
        before = self.linears["cross_attn.q"].forward(y, span.first_row)
        if self.cross_camera is None:
            del y
        q, rrms = self.cross_queries(before)
        found = [self.attention(q, keys.k[span.clips], keys.v[span.clips]) for keys in self.contexts]
        outs, lses = [out for out, _ in found], [lse for _, lse in found]
        out = (outs[0] if len(outs) == 1 else outs[0] + outs[1]).flatten(2)
        crossed = self.linears["cross_attn.o"].forward(out, span.first_row)
        if self.cross_camera is not None:
            crossed = self.with_after(self.cross_camera, span, crossed, y, q)
        stream.add_(crossed)
        return Crossing(attended=attended, before=before, rrms=rrms, outs=outs, lses=lses, out=out)

    # ---- feed-forward ----

    def feed_forward_input(self, span: Span, inner: Span, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """norm2 of some tokens of a span, and mean and 1 / deviation of the rows."""
        gain, shift = (inner.of_frames(span.of_frames(mod)) for mod in (self.gain_ffn, self.shift_ffn))
        return self.ops.norm_modulate_forward(inner.of(stream), gain, shift, self.block.norm2.eps, self.dtype)

    def feed_forward(self, span: Span, stream: Tensor) -> None:
        """Add the feed-forward to the stream. [b, l, D]"""
        for inner in self.feed_forward_spans(span, stream):
            part, row = inner.of(stream), span.first_row + inner.first_row
            h = self.linears["ffn.0"].forward(self.feed_forward_input(span, inner, stream)[0], row)
            h = self.ops.gelu_forward(h)
            gate = inner.of_frames(span.of_frames(self.gate_ffn))
            self.ops.gate_residual_forward(part, self.linears["ffn.2"].forward(h, row), gate, out=part)
