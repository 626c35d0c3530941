"""The backward of a block by hand: recomputation and gradients, step by step.

The order and the bytes are told in `wan_ext/fused_block.py`.

Shapes: B clips, F latent frames, L tokens, S keys, D model width, N heads, d channels of a head; b and l: the clips and
tokens of a span.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError
from wan_ext.attention import attention_backward, check_backend_has_backward
from wan_ext.condition import CameraBranch
from wan_ext.fused_forward import Crossing, Forward
from wan_ext.fused_ops import gate_residual_sum, norm_modulate_sums, rms_rope_sum
from wan_ext.fused_schedule import BlockSchedule
from wan_ext.norms import LayerNorm, RMSNorm
from wan_ext.token_spans import Span

SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_FFN, SCALE_FFN, GATE_FFN = range(6)


class Backward(Forward):
    """One backward of a block.

    Args:
        block: a `WanBlock`.
        inputs: as its `forward` takes them.
        schedule: which parts exist at the same time.
        needed: for each of the inputs, whether its gradient is wanted.

    Raises:
        InputError: a gradient is wanted that does not exist, or the attention has no backward.
    """

    def __init__(self, block: Any, inputs: tuple[Any, ...], schedule: BlockSchedule, needed: tuple[bool, ...]) -> None:
        super().__init__(block, inputs, schedule)
        check_backend_has_backward(self.backend)
        self.parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        wants = (*needed, *(False,) * (7 - len(needed)))
        self.num_inputs = len(needed)
        self.wants_x, wants_mods, wants_context, wants_rope, wants_image, wants_features, wants_keep = wants
        if wants_rope or wants_keep:
            name = "the rotary positions" if wants_rope else "which clips hear their camera"
            raise InputError(f"fused block: has no gradient for {name}; detach them, or use another maths")
        self.grad_mods = None
        if wants_mods or block.modulation.requires_grad:
            shape = (*self.gate_attn.shape[:2], 6, self.gate_attn.shape[2])
            self.grad_mods = self.x.new_zeros(shape)  # [B, 1|F, 6, D]
        self.wants_mods = wants_mods
        wants_contexts = {"": wants_context, "_img": wants_image}
        self.grad_contexts: dict[str, Tensor | None] = {name: None for name, wanted in wants_contexts.items() if wanted}
        self.grad_features = torch.zeros_like(self.features) if wants_features else None
        self.grad_y: Tensor | None = None  # what cameras after self-attention add to the gradients of its input
        self.grad_q: Tensor | None = None  # and of its queries

    def run(self, kept: tuple[Tensor, ...], grad: Tensor):  # type: ignore[override]
        """Gradients of the inputs and of the trainable parameters; `grad` is written into. [B, L, D]"""
        self.grad = grad.to(self.x.dtype).contiguous()
        # o is ours to write over unless it is kept elsewhere, or one group needs it whole
        self.replaces_o = not kept and len(self.groups) > 1
        if not kept or self.self_camera is not None:
            self.project()
        if kept:
            self.o, self.lse = kept
        else:
            self.attend()
        self.contexts = self.make_contexts()
        self.grad_kv = [
            (torch.zeros_like(keys.k, dtype=self.wide), torch.zeros_like(keys.v, dtype=self.wide))
            for keys in self.contexts
        ]
        self.grad_o: Tensor | None = self.o if self.replaces_o else None
        self.ratio: Tensor | None = None
        for span in self.spans():
            self.tokens_back(span)
        self.contexts_back()
        if kept and self.self_camera is None:
            self.project()
        self.attention_back()
        for span in self.spans():
            self.input_back(span)
        return self.results()

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def results(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """What a `BlockMaths` returns."""
        if self.grad_mods is not None and self.block.modulation.requires_grad:
            self.gradients.add(self.block.modulation, self.grad_mods.sum((0, 1))[None])
        of_inputs = (
            self.grad if self.wants_x else None,
            self.grad_mods if self.wants_mods else None,
            self.grad_contexts.get(""),
            None,
            self.grad_contexts.get("_img"),
            self.grad_features,
            None,
        )
        return of_inputs[: self.num_inputs], self.gradients.take(self.parameters)

    # ---- step 2: feed-forward, cross-attention, the product after self-attention ----

    def tokens_back(self, span: Span) -> None:
        """From the gradient of the block's output to that of the residual stream after norm1's branch, and to dO."""
        grad = span.of(self.grad)
        stream = torch.empty_like(span.of(self.x), memory_format=torch.contiguous_format)
        crossing = self.cross(span, stream)
        self.feed_forward_back(span, stream, grad)
        del stream
        self.cross_back(span, crossing, grad)
        gate = span.of_frames(self.gate_attn)
        if self.grad_mods is not None:
            self.add_mods(GATE_ATTN, span, gate_residual_sum(grad, crossing.attended, gate.shape[1]))
        branch = self.ops.gate_residual_backward(grad, gate, self.dtype)
        del crossing
        if self.self_camera is not None:
            y, q = self.camera_sees(span)
            branch, of_y, of_q = self.camera_back(self.self_camera, span, self.attention_output(span), y, q, branch)
            self.grad_y = self.grad_y if of_y is None else span.put(self.grad_y, of_y, self.x)
            self.grad_q = self.grad_q if of_q is None else span.put(self.grad_q, of_q, self.x)
            del y, q
        o = span.of(self.o)
        grad_o = self.linears["self_attn.o"].backward(o, branch, span.first_row)
        assert grad_o is not None
        if self.replaces_o:
            self.ratio = span.put(self.ratio, stand_in_ratio(self.by_head(grad_o), self.by_head(o)), self.x)
            o.copy_(grad_o)
        else:
            self.grad_o = span.put(self.grad_o, grad_o, self.x)

    def feed_forward_back(self, span: Span, stream: Tensor, grad: Tensor) -> None:
        """Add the feed-forward's gradient to that of its output. All [b, l, D]"""
        first, second = self.linears["ffn.0"], self.linears["ffn.2"]
        for inner in self.feed_forward_spans(span, stream):
            row, part = span.first_row + inner.first_row, inner.of(grad)
            gain, gate = (inner.of_frames(span.of_frames(mod)) for mod in (self.gain_ffn, self.gate_ffn))
            y, mean, rstd = self.feed_forward_input(span, inner, stream)
            h = first.forward(y, row)
            a = self.ops.gelu_forward(h)
            if self.grad_mods is not None:
                of_gate = gate_residual_sum(part, second.forward(a, row), gate.shape[1])
                self.add_mods(GATE_FFN, span, of_gate, inner)
            grad_h = second.backward(a, self.ops.gate_residual_backward(part, gate, self.dtype), row)
            assert grad_h is not None
            del a
            self.ops.gelu_backward(grad_h, h, out=grad_h)
            del h
            grad_y = first.backward(y, grad_h, row)
            assert grad_y is not None
            del y, grad_h
            rows = inner.of(stream)
            self.add_norm_mods(SCALE_FFN, SHIFT_FFN, span, (grad_y, rows, mean, rstd, gain.shape[1]), inner)
            self.ops.norm_modulate_backward(grad_y, rows, mean, rstd, gain, into=part)

    def cross_back(self, span: Span, crossing: Crossing, grad: Tensor) -> None:
        """Add cross-attention's gradient to that of its output. [b, l, D]"""
        branch, row, attn = grad.to(self.dtype), span.first_row, self.cross_attn
        of_y = of_q = None
        if self.cross_camera is not None:
            y = self.cross_input(self.before_cross(span, crossing))[0]
            q = self.cross_queries(crossing.before)[0]
            out = self.linears["cross_attn.o"].forward(crossing.out, row)
            branch, of_y, of_q = self.camera_back(self.cross_camera, span, out, y, q, branch)
            del y, q, out
        grad_out = self.linears["cross_attn.o"].backward(crossing.out, branch, row)
        assert grad_out is not None
        del branch
        crossing.out = grad_out  # no longer needed, and as large
        grad_out = self.by_head(grad_out)
        q = self.cross_queries(crossing.before)[0]
        for keys, out, lse, sums in zip(self.contexts, crossing.outs, crossing.lses, self.grad_kv, strict=True):
            assert lse is not None
            k, v = keys.k[span.clips], keys.v[span.clips]
            grad_q, *of_kv = attention_backward(grad_out, q, k, v, out, lse, backend=self.backend)
            of_q = grad_q if of_q is None else of_q + grad_q
            for total, part in zip(sums, of_kv, strict=True):
                total[span.clips] += part
        del q, grad_out, grad_q, out
        crossing.outs.clear()
        assert of_q is not None
        self.add_rms_weight(attn.norm_q, (of_q, crossing.before, crossing.rrms, None))
        grad_before = self.ops.rms_rope_backward(of_q, crossing.before, crossing.rrms, attn.norm_q.weight, None)
        del of_q
        stream = self.before_cross(span, crossing)
        y, mean, rstd = self.cross_input(stream)
        grad_y = self.linears["cross_attn.q"].backward(y, grad_before, row)
        assert grad_y is not None
        if of_y is not None:
            grad_y.add_(of_y)
        self.add_affine(self.block.norm3, (grad_y, stream, mean, rstd, 1))
        self.ops.norm_modulate_backward(grad_y, stream, mean, rstd, self.gain_cross, into=grad)

    def before_cross(self, span: Span, crossing: Crossing) -> Tensor:
        """The residual stream before cross-attention, again. -> [b, l, D]"""
        gate = span.of_frames(self.gate_attn)
        return self.ops.gate_residual_forward(span.of(self.x), crossing.attended, gate)

    def contexts_back(self) -> None:
        """Gradients of cross-attention's keys and values, of all tokens together."""
        for keys, (of_k, of_v) in zip(self.contexts, self.grad_kv, strict=True):
            wanted, norm = keys.name in self.grad_contexts, getattr(self.cross_attn, f"norm_k{keys.name}")
            of_k = of_k.to(self.dtype)
            self.add_rms_weight(norm, (of_k, keys.before, keys.rrms, None))
            of_before = self.ops.rms_rope_backward(of_k, keys.before, keys.rrms, norm.weight, None)
            pairs = (("k", of_before), ("v", of_v.to(self.dtype).flatten(2)))
            found = [
                self.linears[f"cross_attn.{name}{keys.name}"].backward(keys.context, gradient, 0, needs_x=wanted)
                for name, gradient in pairs
            ]
            if found[0] is not None and found[1] is not None:
                self.grad_contexts[keys.name] = found[0] + found[1]
        self.contexts, self.grad_kv = [], []

    # ---- step 3: self-attention ----

    def attention_back(self) -> None:
        """Gradients of q (by groups of heads), k and v, which take the places of dO and v."""
        attn, v, grad_o, self.grad_o = self.self_attn, self.by_head(self.v), self.grad_o, None
        assert grad_o is not None and self.lse is not None
        grad_o = self.by_head(grad_o)
        whole = None if self.replaces_o else self.by_head(self.o)
        del self.o
        self.grad_queries: list[Tensor] = []
        for heads in self.groups:
            q = self.turned(self.q, self.rrms_q, attn.norm_q, heads)
            k = self.turned(self.k, self.rrms_k, attn.norm_k, heads)
            grad, lse = grad_o[:, :, heads], self.lse[:, heads]
            out = stand_in(grad, self.ratio[:, :, heads]) if whole is None else whole[:, :, heads]  # type: ignore[index]
            lse = lse if len(self.groups) == 1 else lse.contiguous()
            of_q, of_k, of_v = attention_backward(grad, q, k, v[:, :, heads], out, lse, backend=self.backend)
            del q, k, out, grad
            self.grad_queries.append(of_q)
            if len(self.groups) == 1:
                grad_o, v = of_k, of_v
            else:
                grad_o[:, :, heads] = of_k
                v[:, :, heads] = of_v
            del of_q, of_k, of_v
        self.grad_keys, self.v, self.lse, self.ratio = grad_o, v.flatten(2), None, None

    # ---- step 4: q, k, v and norm1 ----

    def input_back(self, span: Span) -> None:
        """Add the gradient that goes through q, k and v to that of the block's input."""
        attn, row, rope = self.self_attn, span.first_row, self.rope[:, span.tokens]
        gain = span.of_frames(self.gain_attn)
        plain, mean, rstd = self.attention_input(span)
        y = self.with_before(span, plain)
        parts = [span.of(part) for part in self.grad_queries]
        of_q, of_k = parts[0] if len(parts) == 1 else torch.cat(parts, 2), span.of(self.grad_keys)
        if self.grad_q is not None:
            of_q = of_q + span.of(self.grad_q)
        wanted = self.wants_x or self.grad_mods is not None or self.self_camera is not None
        grad_y = None if self.grad_y is None else span.of(self.grad_y)
        for name, gradient, before, rrms in (
            ("q", of_q, self.q, self.rrms_q), ("k", of_k, self.k, self.rrms_k), ("v", span.of(self.v), None, None)
        ):  # fmt: skip
            if before is not None and rrms is not None:
                norm, rows = getattr(attn, f"norm_{name}"), (span.of(before), span.of(rrms))
                self.add_rms_weight(norm, (gradient, *rows, rope))
                gradient = self.ops.rms_rope_backward(gradient, *rows, norm.weight, rope)
            found = self.linears[f"self_attn.{name}"].backward(y, gradient, row, needs_x=wanted)
            if found is not None:
                grad_y = found if grad_y is None else found.add_(grad_y)
        if grad_y is None:
            return
        if self.self_camera is not None:
            grad_y = self.before_back(self.self_camera, span, plain, grad_y)
        x = span.of(self.x)
        self.add_norm_mods(SCALE_ATTN, SHIFT_ATTN, span, (grad_y, x, mean, rstd, gain.shape[1]))
        if self.wants_x:
            self.ops.norm_modulate_backward(grad_y, x, mean, rstd, gain, into=span.of(self.grad))

    # ---- cameras: small, so autograd does them ----

    def camera_back(
        self, camera: CameraBranch, span: Span, out: Tensor, y: Tensor, q: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of an attention's output, input and queries through its camera. Shapes as `CameraBranch.after`."""

        def after(out: Tensor, y: Tensor, q: Tensor, features: Tensor) -> Tensor:
            return self.with_after(camera, span, out, y, q, features)

        of_out, of_y, of_q = self.pull(after, (out, y, q), camera, span, grad)
        assert of_out is not None
        return of_out, of_y, of_q

    def before_back(self, camera: CameraBranch, span: Span, y: Tensor, grad: Tensor) -> Tensor:
        """The gradient of self-attention's input without its camera's share. [b, l, D]"""

        def before(y: Tensor, features: Tensor) -> Tensor:
            return self.with_before(span, y, features)

        of_y = self.pull(before, (y,), camera, span, grad)[0]
        assert of_y is not None
        return of_y

    def pull(
        self,
        function: Callable[..., Tensor],
        tensors: tuple[Tensor, ...],
        camera: CameraBranch,
        span: Span,
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of some tensors; those of the camera's parameters and features are added to their sums."""
        fresh = [tensor.detach().requires_grad_() for tensor in tensors]
        features = span.of_frames(self.features).detach().requires_grad_(self.grad_features is not None)
        parameters = [parameter for parameter in camera.parameters() if parameter.requires_grad]
        wanted = [*fresh, *parameters, *([features] if features.requires_grad else [])]
        with torch.enable_grad():
            result = function(*fresh, features)
        found = torch.autograd.grad(result, wanted, grad, allow_unused=True)
        for parameter, gradient in zip(parameters, found[len(fresh) :], strict=False):
            if gradient is not None:
                self.gradients.add(parameter, gradient.clone())  # autograd may give one tensor out twice
        if self.grad_features is not None and found[-1] is not None:
            span.of_frames(self.grad_features).add_(found[-1])
        return found[: len(fresh)]

    # ---- what is seldom trained: modulation, norms ----

    def add_mods(self, which: int, span: Span, value: Tensor, inner: Span | None = None) -> None:
        """Add to the gradient of one of the six modulations. value [b, 1|f, D]"""
        assert self.grad_mods is not None
        target = span.of_frames(self.grad_mods)
        (target if inner is None else inner.of_frames(target))[:, :, which] += value

    def add_norm_mods(
        self, scale: int, shift: int, span: Span, rows: tuple[Any, ...], inner: Span | None = None
    ) -> None:
        """The same for scale and shift of a modulated norm, where wanted; `rows` as `norm_modulate_sums` takes them."""
        if self.grad_mods is not None:
            of_scale, of_shift = norm_modulate_sums(*rows)
            self.add_mods(scale, span, of_scale, inner)
            self.add_mods(shift, span, of_shift, inner)

    def add_affine(self, norm: LayerNorm, rows: tuple[Any, ...]) -> None:
        """The gradients of a layer norm's weight and bias, where they are trained."""
        if norm.weight.requires_grad or norm.bias.requires_grad:
            for parameter, total in zip((norm.weight, norm.bias), norm_modulate_sums(*rows), strict=True):
                if parameter.requires_grad:
                    self.gradients.add(parameter, total.sum((0, 1)))

    def add_rms_weight(self, norm: RMSNorm, rows: tuple[Any, ...]) -> None:
        """The gradient of an RMS norm's weight, where it is trained."""
        if norm.weight.requires_grad:
            self.gradients.add(norm.weight, rms_rope_sum(*rows))


def stand_in_ratio(grad: Tensor, out: Tensor) -> Tensor:
    """sum(grad * out) / sum(grad^2) of each row of a head, 0 where the gradient is 0.

    Args:
        grad: of an attention's output. [b, l, N, d]
        out: the output. [b, l, N, d]

    Returns:
        float32. [b, l, N, 1]
    """
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    largest = wide.abs().amax(-1, keepdim=True)
    unit = wide / largest  # squares of small gradients would vanish
    ratio = (unit * out).sum(-1, keepdim=True) / (unit.square_().sum(-1, keepdim=True).mul_(largest))
    return ratio.nan_to_num_(0.0)


def stand_in(grad: Tensor, ratio: Tensor) -> Tensor:
    """What has the same product with the gradient as the output had: grad * ratio. -> [b, l, n, d]"""
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return torch.mul(grad, ratio, out=out)
