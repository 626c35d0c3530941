"""Every kernel and every way to multiply against a wider reference, at the widths of the 14B model.

What: each check is a row with its error, its tolerance and `passed`. Operations are those that the block itself uses
on the device (`wan_ext.fused_ops.ops_for`, `memory.quant`, `wan_ext.attention`): on CUDA the Triton kernels and the
fused attentions. The references are the plain PyTorch operations in float64, products and attentions in float32 or
wider, and the plain block with autograd in float32.

How: "largest" is the largest difference over the largest magnitude, "norm" the norm of the difference over the norm.
Tolerances are those of one rounding to the result's dtype, and of the rounding to 8 bits where that is what is checked.
A check that raises has failed; the others go on.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_kit.model import DTYPE, make_expert
from benchmarks.gpu_kit.records import Records, tidy
from benchmarks.gpu_kit.settings import Setting
from core.errors import InputError
from memory import kernels
from memory.kernels.reference import (
    dequantize_runs_reference,
    int8_matmul_reference,
    quantize_rows_reference,
)
from memory.quant import RECIPES, QuantLinear, linear_backward, linear_forward, parse_recipe
from networks.lora import LoRALinear
from networks.lora_linear import LoRAAdapter
from wan_ext import fused_ops
from wan_ext.attention import attention_backward, attention_forward
from wan_ext.dit import WanBlock
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths
from wan_ext.fused_ops import ops_for
from wan_ext.rope import rope_table

EPS = 1e-6
NARROW = {torch.bfloat16: 2.0**-8, torch.float32: 2e-5}
"""Largest error over the largest number, for results of a dtype."""
LINEAR = {"dequant": 0.01, "int8": 0.03, "e4m3": 0.06}
"""Norm of the error of a linear against its own weight in float32: a bf16 rounding, and what 8-bit activations cost."""
ATTENTION = 0.02
BLOCK = {"fp8": 0.03, "int8_w8a8": 0.08}

Check = tuple[str, Callable[[], float], float]
"""Its name, what gives its error, its tolerance."""


def run_checks(setting: Setting, records: Records, *, quick: bool) -> None:
    """All checks; a row each.

    Args:
        setting: widths and device.
        records: where rows go.
        quick: leave out what is slow and large.
    """
    families = [
        element_wise(setting),
        eight_bit_kernels(setting),
        attentions(setting),
        blocks(setting, quick=quick),
        *(() if quick else (beyond_two_to_the_31(setting),)),
        linears(setting, quick=quick),
    ]
    for family in families:
        for name, error_of, tolerance in family:
            if records.clock.left < 5:
                records.skip("checks", name, 5)
                continue
            torch.manual_seed(0)
            row: dict[str, Any] = {"check": name, "error": None, "tolerance": tolerance, "passed": False}
            try:
                error = error_of()
                row |= {"error": error, "passed": bool(error <= tolerance)}
            except InputError as refusal:  # a card without these numbers: said, and no failure
                row |= {"refused": str(refusal), "passed": None}
            except Exception as failure:
                row["raised"] = "".join(traceback.format_exception(failure))[-2000:]
                traceback.clear_frames(failure.__traceback__)
            records.add("checks", row)
        tidy()


# ---- how far off ----------------------------------------------------------------------------------------------------


def largest(found: Tensor, expected: Tensor) -> float:
    off = (found.double() - expected.double()).abs().max()
    return float(off / expected.double().abs().max().clamp(min=1e-30))


def norm(found: Tensor, expected: Tensor) -> float:
    found, wide = found.detach(), expected.detach().double()
    return float((found.double() - wide).norm() / wide.norm().clamp(min=1e-30))


# ---- the operations between products --------------------------------------------------------------------------------


def element_wise(setting: Setting) -> Iterator[Check]:
    device, rows, width, heads = setting.device, setting.rows, setting.width, setting.heads
    ops = ops_for(device)
    table = rope_table(1, 1, rows, head_dim=width // heads, device=device)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.")

        def modulate(dtype: torch.dtype = dtype) -> float:
            x, gain, shift = normal(1, rows, width) * 3 + 1, normal(1, 1, width), normal(1, 1, width)
            found = ops.norm_modulate_forward(x, gain, shift, EPS, dtype)
            wide = fused_ops.norm_modulate_forward(x.double(), gain.double(), shift.double(), EPS, torch.float64)
            return max(largest(a, b) for a, b in zip(found, wide, strict=True))

        def modulate_back(dtype: torch.dtype = dtype) -> float:
            x, gain, grad = normal(1, rows, width) * 3 + 1, normal(1, 1, width), normal(1, rows, width, dtype=dtype)
            _, mean, rstd = fused_ops.norm_modulate_forward(x, gain, gain, EPS, torch.float32)
            into = normal(1, rows, width)
            wide = (t.double() for t in (grad, x, mean, rstd, gain))
            expected = fused_ops.norm_modulate_backward(*wide) + into.double()
            return largest(ops.norm_modulate_backward(grad, x, mean, rstd, gain, into=into), expected)

        def turn(dtype: torch.dtype = dtype) -> float:
            x, weight = normal(1, rows, width, dtype=dtype), normal(width)
            found = ops.rms_rope_forward(x, weight, table, heads, EPS)
            wide = fused_ops.rms_rope_forward(x.double(), weight.double(), table.double(), heads, EPS)
            return max(largest(a, b) for a, b in zip(found, wide, strict=True))

        def turn_back(dtype: torch.dtype = dtype) -> float:
            x, weight, grad = normal(1, rows, width, dtype=dtype), normal(width), normal(1, rows, width, dtype=dtype)
            grad, rrms = grad.unflatten(-1, (heads, -1)), fused_ops.row_rrms(x, EPS)
            wide = (t.double() for t in (grad, x, rrms, weight, table))
            return largest(ops.rms_rope_backward(grad, x, rrms, weight, table), fused_ops.rms_rope_backward(*wide))

        def gate(dtype: torch.dtype = dtype) -> float:
            x, branch, factor = normal(1, rows, width), normal(1, rows, width, dtype=dtype), normal(1, 1, width)
            expected = fused_ops.gate_residual_forward(x.double(), branch.double(), factor.double())
            return largest(ops.gate_residual_forward(x, branch, factor), expected)

        def gate_back(dtype: torch.dtype = dtype) -> float:
            grad, factor = normal(1, rows, width), normal(1, 1, width)
            expected = fused_ops.gate_residual_backward(grad.double(), factor.double(), torch.float64)
            return largest(ops.gate_residual_backward(grad, factor, dtype), expected)

        def gelu(dtype: torch.dtype = dtype) -> float:
            h = normal(rows, setting.hidden, dtype=dtype) * 3
            return largest(ops.gelu_forward(h), fused_ops.gelu_forward(h.double()))

        def gelu_back(dtype: torch.dtype = dtype) -> float:
            h, grad = normal(rows, setting.hidden, dtype=dtype) * 3, normal(rows, setting.hidden, dtype=dtype)
            expected = fused_ops.gelu_backward(grad.double(), h.double())
            return largest(ops.gelu_backward(grad, h, out=grad), expected)

        named = (
            ("norm and modulation", modulate, NARROW[dtype]),
            ("norm and modulation, backward", modulate_back, NARROW[torch.float32]),
            ("norm and rotation", turn, NARROW[dtype]),
            ("norm and rotation, backward", turn_back, NARROW[dtype]),
            ("gated sum", gate, NARROW[torch.float32]),
            ("gated sum, backward", gate_back, NARROW[dtype]),
            ("GELU", gelu, NARROW[dtype]),
            ("GELU, backward", gelu_back, NARROW[dtype]),
        )
        for name, error_of, tolerance in named:
            yield f"{name}, {short}", error_of, tolerance


# ---- kernels of 8 bits ----------------------------------------------------------------------------------------------


def eight_bit_kernels(setting: Setting) -> Iterator[Check]:
    device, rows = setting.device, setting.rows
    if kernels.available(device):
        from memory.kernels.dequantize import dequantize_runs
        from memory.kernels.int8 import int8_matmul
        from memory.kernels.rows import quantize_rows
    else:
        dequantize_runs, int8_matmul = dequantize_runs_reference, int8_matmul_reference
        quantize_rows = quantize_rows_reference

    def int8(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)

    for k, n in ((setting.width, setting.hidden), (setting.hidden, setting.width)):
        for layout in ("tn", "nn"):

            def product(k: int = k, n: int = n, layout: str = layout) -> float:
                """As the layer calls it: scales and bias forwards, neither in the gradient of the input."""
                forwards = layout == "tn"
                a, b = int8(rows, k), int8(*((n, k) if forwards else (k, n)))
                scale_a = torch.rand(rows, device=device)
                scale_b = torch.rand(n, device=device) if forwards else None
                bias = torch.randn(n, device=device).to(DTYPE) if forwards else None
                found = int8_matmul(a, b, scale_a, scale_b, layout=layout, bias=bias, dtype=DTYPE)
                return largest(
                    found,
                    int8_matmul_reference(a, b, scale_a, scale_b, layout=layout, bias=bias, dtype=torch.float32),
                )

            yield f"int8 product {rows} x {k} x {n}, {layout}", product, NARROW[DTYPE]

        for dtype in (torch.int8, torch.float8_e4m3fn):
            for rotate in (None, 256 if k % 256 == 0 else 64) if dtype == torch.int8 else (None,):

                def rounded(k: int = k, dtype: torch.dtype = dtype, rotate: int | None = rotate) -> float:
                    x = torch.randn(rows, k, device=device).to(DTYPE)
                    values, scale = quantize_rows(x, rotate, dtype=dtype)
                    expected, expected_scale = quantize_rows_reference(x, rotate, dtype=dtype)
                    found = values.float() * scale[:, None]
                    return norm(found, expected.float() * expected_scale[:, None])

                name = str(dtype).removeprefix("torch.")
                yield f"rows to {name}, width {k}, {'rotated' if rotate else 'as they are'}", rounded, 2e-3

            def back(k: int = k, dtype: torch.dtype = dtype) -> float:
                values = (torch.randn(rows, k, device=device) * 40).to(dtype)
                scale = torch.rand(rows, k // 64, device=device).to(torch.bfloat16)
                expected = dequantize_runs_reference(values, scale, torch.float32)
                return largest(dequantize_runs(values, scale, DTYPE), expected)

            yield f"weights from {str(dtype).removeprefix('torch.')}, width {k}", back, NARROW[DTYPE]


def linears(setting: Setting, *, quick: bool) -> Iterator[Check]:
    device, rows = setting.device, setting.rows
    shapes = [(setting.width, setting.hidden), (setting.hidden, setting.width)]
    for name, recipe in sorted(RECIPES.items(), key=lambda item: item[1].transposed):  # more kernels to compile: last
        for inputs, outputs in shapes[:1] if quick else shapes:

            def error(inputs: int = inputs, outputs: int = outputs, name: str = name, back: bool = False) -> float:
                linear = nn.Linear(inputs, outputs, device=device, dtype=DTYPE)
                layer = QuantLinear.from_linear(linear, recipe=parse_recipe(name))
                weight = layer.dequantized(torch.float32)
                x = torch.randn(rows, outputs if back else inputs, device=device).to(DTYPE)
                if back:
                    return norm(linear_backward(layer, x), x.float() @ weight)
                return norm(linear_forward(layer, x), F.linear(x.float(), weight, linear.bias.float()))

            tolerance = LINEAR["dequant" if recipe.compute == "dequant" else recipe.values]
            yield f"linear {inputs} -> {outputs}, {name}", error, tolerance
            yield f"linear {inputs} -> {outputs}, {name}, backward", lambda error=error: error(back=True), tolerance


# ---- attention ------------------------------------------------------------------------------------------------------


def attentions(setting: Setting) -> Iterator[Check]:
    device, heads, width = setting.device, setting.heads, setting.width // setting.heads
    on_cuda = device.type == "cuda"
    kinds = [("sdpa", True), ("sdpa, cuDNN off", False)] if on_cuda else [("sdpa", True)]
    for kind, with_cudnn in kinds:
        for tokens, keys in ((setting.rows, setting.rows), (setting.rows, 512 if setting.real else 8)):
            for share in (heads, max(1, heads // 3)):
                for part in ("output", "log-sum-exp", "gradients"):

                    def error(
                        with_cudnn: bool = with_cudnn,
                        tokens: int = tokens,
                        keys: int = keys,
                        share: int = share,
                        part: str = part,
                    ) -> float:
                        before = torch.backends.cuda.cudnn_sdp_enabled()
                        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
                        try:
                            return _attention_error(with_cudnn, device, tokens, keys, heads, share, width)[part]
                        finally:
                            torch.backends.cuda.enable_cudnn_sdp(before)

                    used = "all heads" if share == heads else f"{share} of {heads} heads"
                    yield f"attention {kind}, {tokens} x {keys}, {used}, {part}", error, ATTENTION


@cache
def _attention_error(
    with_cudnn: bool, device: torch.device, tokens: int, keys: int, heads: int, share: int, width: int
) -> dict[str, float]:
    """As the block calls it: some heads of rows that hold all of them. cuDNN is on or off already."""
    torch.manual_seed(1)

    def rows(length: int) -> Tensor:
        return torch.randn(1, length, heads, width, device=device).to(DTYPE)[:, :, :share]

    q, k, v, grad = rows(tokens), rows(keys), rows(keys), rows(tokens)
    out, lse = attention_forward(q, k, v)
    of_inputs = attention_backward(grad, q, k, v, out, lse)
    wide = [t.double().transpose(1, 2).requires_grad_() for t in (q, k, v)]  # [1, n, l, d]
    scores = wide[0] @ wide[1].transpose(-1, -2) / math.sqrt(width)
    expected = scores.softmax(-1) @ wide[2]
    gradients = torch.autograd.grad(expected, wide, grad.double().transpose(1, 2))
    return {
        "output": norm(out.transpose(1, 2), expected.detach()),
        "log-sum-exp": largest(lse.flatten(2).view(1, share, tokens), scores.detach().logsumexp(-1)),
        "gradients": max(norm(a.transpose(1, 2), b) for a, b in zip(of_inputs, gradients, strict=True)),
    }


# ---- the whole block ------------------------------------------------------------------------------------------------


def blocks(setting: Setting, *, quick: bool) -> Iterator[Check]:
    chunk = setting.rows // 3
    schedules = [
        BlockSchedule(),
        BlockSchedule(head_groups=2, token_chunk=chunk),
        BlockSchedule(keep_attention=True),
    ]
    for recipe, tolerance in BLOCK.items():
        for schedule in schedules[1:2] if quick else schedules:
            for part in ("output", "gradient of the input", "gradients of the LoRA"):

                def error(recipe: str = recipe, schedule: BlockSchedule = schedule, part: str = part) -> float:
                    return _block_error(setting, recipe, schedule)[part]

                groups = f"{schedule.head_groups} groups, chunks of {schedule.token_chunk}"
                kept = ", attention kept" if schedule.keep_attention else ""
                yield f"block by hand, {recipe}, {groups}{kept}, {part}", error, tolerance


@cache
def _block_error(setting: Setting, recipe: str, schedule: BlockSchedule) -> dict[str, float]:
    """The fused block in bf16 and 8 bits against the plain one with autograd in float32, on the same weights."""
    device, rows = setting.device, setting.rows
    variant = replace(setting.variant, dit=replace(setting.variant.dit, num_layers=1))
    expert = make_expert(
        variant, "high", recipe=parse_recipe(recipe), rank=setting.rank, device=device, host=None, seed=0
    )
    block, config = expert.dit.blocks[0], variant.dit
    plain = _plain_copy(block, variant.dit, device)
    torch.manual_seed(2)
    x = torch.randn(1, rows, config.dim, device=device)
    modulation = torch.randn(1, 1, 6, config.dim, device=device) * 0.3
    context = torch.randn(1, config.text_len, config.dim, device=device).to(DTYPE)
    rope = rope_table(1, 1, rows, head_dim=config.head_dim, device=device)
    grad = torch.randn_like(x)
    inputs = (x, modulation, context, rope)
    maths = FusedBlockMaths(schedule)
    out, kept = maths.forward(block, inputs, keep=True)
    of_inputs, of_parameters = maths.backward(block, inputs, kept, grad.clone(), needed=(True, False, False, False))
    wide = x.clone().requires_grad_()
    parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    expected = plain(wide, modulation, context.float(), rope)
    of_wide, *of_plain = torch.autograd.grad(expected, (wide, *parameters), grad)
    assert of_inputs[0] is not None
    together = torch.cat([g.flatten() for g in of_parameters if g is not None])
    return {
        "output": norm(out, expected.detach()),
        "gradient of the input": norm(of_inputs[0], of_wide),
        "gradients of the LoRA": norm(together, torch.cat([g.flatten() for g in of_plain])),
    }


def _plain_copy(block: nn.Module, config: Any, device: torch.device) -> nn.Module:
    """A block in float32 with the weights that the 8-bit one stands for, and its LoRA."""
    with torch.device(device):
        plain = WanBlock(config).float()
    for name, module in block.named_modules():
        if isinstance(module, LoRALinear):
            base: Any = module.base
            linear = nn.Linear(base.in_features, base.out_features, device=device)
            linear.weight.data, linear.bias.data = base.dequantized(torch.float32), base.bias.detach().float()
            lora = module.lora
            adapter = LoRAAdapter(lora.down.detach().clone(), lora.up.detach().clone(), alpha=lora.alpha)
            plain.set_submodule(name, LoRALinear(linear.requires_grad_(False), adapter))
    own = dict(block.named_parameters())
    for name, parameter in plain.named_parameters():
        if "lora" not in name and ".base." not in name:
            parameter.data = own[name].detach().float().clone()
            parameter.requires_grad_(False)
    return plain


# ---- large --------------------------------------------------------------------------------------------------------


def beyond_two_to_the_31(setting: Setting) -> Iterator[Check]:
    device, hidden, width = setting.device, setting.hidden, setting.width
    numbers = 2**31 if setting.real else 2**12
    last = 64
    ops = ops_for(device)

    def gelu() -> float:
        rows = numbers // hidden + last
        h = torch.empty(rows, hidden, dtype=DTYPE, device=device).normal_()
        expected = fused_ops.gelu_forward(h[-last:].double())
        return largest(ops.gelu_forward(h)[-last:], expected)

    def modulate() -> float:
        rows = numbers // width + last
        x = torch.empty(1, rows, width, device=device).normal_()
        gain, shift = torch.randn(2, 1, 1, width, device=device)
        expected = fused_ops.norm_modulate_forward(
            x[:, -last:].double(), gain.double(), shift.double(), EPS, torch.float64
        )[0]
        return largest(ops.norm_modulate_forward(x, gain, shift, EPS, DTYPE)[0][:, -last:], expected)

    def gate() -> float:
        rows = numbers // width + last
        x, factor = torch.empty(1, rows, width, device=device).normal_(), torch.randn(1, 1, width, device=device)
        branch = torch.empty(1, rows, width, dtype=DTYPE, device=device).normal_()
        expected = fused_ops.gate_residual_forward(x[:, -last:], branch[:, -last:], factor)
        return largest(ops.gate_residual_forward(x, branch, factor, out=x)[:, -last:], expected)

    for name, error_of, tolerance in (
        ("GELU", gelu, NARROW[DTYPE]),
        ("norm and modulation", modulate, NARROW[DTYPE]),
        ("gated sum", gate, NARROW[torch.float32]),
    ):
        yield f"{name} of more than {numbers:,} numbers, their last rows", error_of, tolerance
