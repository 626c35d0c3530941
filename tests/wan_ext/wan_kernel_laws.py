"""Laws of the block's kernels; `test_kernels_wan.py` runs this file in a process of its own, where Triton interprets.

By hand: `TRITON_INTERPRET=1 pytest tests/wan_ext/wan_kernel_laws.py`; on a GPU without the variable.
The interpreter cuts bfloat16 off where a GPU rounds it: hence a whole step of tolerance there.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wan_ext import fused_forward, fused_ops, kernels
from wan_ext.configs import DiTConfig
from wan_ext.dit import WanBlock, add_gated, storage_dtype
from wan_ext.fused_block import FusedBlockMaths
from wan_ext.fused_schedule import BlockSchedule
from wan_ext.norms import LayerNorm, ModulatedNorm, RMSNorm
from wan_ext.rope import rope_table, rotate

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 1, 2
TOKENS = FRAMES * HEIGHT * WIDTH
HEADS, HEAD = 3, 10
DIM = HEADS * HEAD  # 30: no power of two, like 5,120


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def rope() -> Tensor:
    return rope_table(FRAMES, HEIGHT, WIDTH, head_dim=HEAD, device=torch.device(DEVICE))


def assert_alike(actual: Tensor, expected: Tensor) -> None:
    """Equal up to summation order in float32, a step of the narrower dtypes."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    relative = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=relative, atol=5e-6)


def assert_all_alike(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_alike(one, other)


def modulation(kind: str) -> tuple[Tensor, Tensor]:
    """Two of the six vectors of a modulation, as the block unbinds them: rows lie apart."""
    shape = {"one": (1, 1), "clip": (BATCH, 1), "frame": (BATCH, FRAMES), "shared frame": (1, FRAMES)}[kind]
    first, second = normal(*shape, 2, DIM).unbind(2)
    return first, second


KINDS_AND_DTYPES = [(kind, torch.float32) for kind in ("one", "clip", "frame", "shared frame")]
KINDS_AND_DTYPES += [("frame", dtype) for dtype in (torch.bfloat16, torch.float16)]


def parameters(function: Callable) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_kernels_have_the_names_and_parameters_of_the_reference() -> None:
    for name, function in inspect.getmembers(fused_ops, inspect.isfunction):
        if name.startswith("_") or name == "ops_for" or function.__module__ != fused_ops.__name__:
            continue
        assert parameters(getattr(kernels, name)) == parameters(function), name


# ---- against the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_norm_and_modulation(kind: str, dtype: torch.dtype) -> None:
    x, (gain, shift) = normal(BATCH, TOKENS, DIM) * 3 + 1, modulation(kind)
    out, mean, rstd = kernels.norm_modulate_forward(x, gain, shift, EPS, dtype)
    assert_all_alike((out, mean, rstd), fused_ops.norm_modulate_forward(x, gain, shift, EPS, dtype))
    grad = normal(BATCH, TOKENS, DIM, dtype=dtype)
    expected = fused_ops.norm_modulate_backward(grad, x, mean, rstd, gain)
    assert_alike(kernels.norm_modulate_backward(grad, x, mean, rstd, gain), expected)
    residual = normal(BATCH, TOKENS, DIM)
    total = residual + expected
    assert kernels.norm_modulate_backward(grad, x, mean, rstd, gain, into=residual) is residual
    assert_alike(residual, total)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("turned", [True, False])
def test_rms_norm_and_rotation(turned: bool, dtype: torch.dtype) -> None:
    x, weight, table = normal(BATCH, TOKENS, DIM, dtype=dtype), normal(DIM), rope() if turned else None
    out, rrms = kernels.rms_rope_forward(x, weight, table, HEADS, EPS)
    assert_all_alike((out, rrms), fused_ops.rms_rope_forward(x, weight, table, HEADS, EPS))
    grad = normal(BATCH, TOKENS, HEADS, HEAD, dtype=dtype)
    expected = fused_ops.rms_rope_backward(grad, x, rrms, weight, table)
    assert_alike(kernels.rms_rope_backward(grad, x, rrms, weight, table), expected)


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_gated_sum(kind: str, dtype: torch.dtype) -> None:
    x, branch, (gate, _) = normal(BATCH, TOKENS, DIM), normal(BATCH, TOKENS, DIM, dtype=dtype), modulation(kind)
    expected = fused_ops.gate_residual_forward(x, branch, gate)
    assert_alike(kernels.gate_residual_forward(x, branch, gate), expected)
    grad = normal(BATCH, TOKENS, DIM)
    backward = fused_ops.gate_residual_backward(grad, gate, dtype)
    assert_alike(kernels.gate_residual_backward(grad, gate, dtype), backward)
    assert kernels.gate_residual_forward(x, branch, gate, out=x) is x
    assert_alike(x, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7, 13), (2, 3, 5), (2, 3, 2, 5)])
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    h, grad = normal(*shape, dtype=dtype) * 3, normal(*shape, dtype=dtype)
    assert_alike(kernels.gelu_forward(h), fused_ops.gelu_forward(h))
    expected = fused_ops.gelu_backward(grad, h)
    assert_alike(kernels.gelu_backward(grad, h), expected)
    assert kernels.gelu_backward(grad, h, out=grad) is grad
    assert_alike(grad, expected)


def test_gelu_far_out_is_the_identity_or_zero() -> None:
    h = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=DEVICE)
    assert torch.equal(kernels.gelu_forward(h), h.clamp(min=0))
    assert torch.equal(kernels.gelu_backward(torch.ones_like(h), h), (h > 0) + (h == 0) * 0.5)


@pytest.mark.parametrize(("width", "heads"), [(1, None), (2, 1), (260, 2), (2100, 3)])
def test_rows_of_other_widths(width: int, heads: int | None) -> None:
    """More than one program for a row in the gated sum and in the GELU; blocks that the row fills or does not."""
    x, branch, gain = normal(1, 2, width), normal(1, 2, width), normal(1, 1, width)
    assert_alike(kernels.gate_residual_forward(x, branch, gain), fused_ops.gate_residual_forward(x, branch, gain))
    backward = kernels.gate_residual_backward(branch, gain, torch.float32)
    assert_alike(backward, fused_ops.gate_residual_backward(branch, gain, torch.float32))
    assert_alike(kernels.gelu_forward(x), fused_ops.gelu_forward(x))
    assert_alike(kernels.gelu_backward(branch, x), fused_ops.gelu_backward(branch, x))
    if heads is not None:
        forward = kernels.norm_modulate_forward(x, gain, gain, EPS, torch.float32)
        assert_all_alike(forward, fused_ops.norm_modulate_forward(x, gain, gain, EPS, torch.float32))
        table = rope_table(1, 1, 2, head_dim=width // heads, device=x.device)
        turned = kernels.rms_rope_forward(x, gain[0, 0], table, heads, EPS)
        assert_all_alike(turned, fused_ops.rms_rope_forward(x, gain[0, 0], table, heads, EPS))


# ---- against autograd of the plain modules ---------------------------------------------------------------------------


def gradients(result: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result, inputs, grad)


@pytest.mark.parametrize("kind", ["clip", "frame"])
def test_gradient_of_the_modulated_norm_is_autograds(kind: str) -> None:
    x, (shift, scale) = normal(BATCH, TOKENS, DIM).requires_grad_(), modulation(kind)
    plain = ModulatedNorm(EPS)(x, shift, scale, torch.float32)
    grad = normal(*plain.shape)
    out, mean, rstd = kernels.norm_modulate_forward(x.detach(), 1 + scale, shift, EPS, torch.float32)
    assert_alike(out, plain.detach())
    expected = gradients(plain, grad, x)[0]
    assert_alike(kernels.norm_modulate_backward(grad, x.detach(), mean, rstd, 1 + scale), expected)


def test_gradient_of_the_affine_norm_is_autograds() -> None:
    x, norm = normal(BATCH, TOKENS, DIM).requires_grad_(), LayerNorm(DIM, EPS).to(DEVICE)
    gain, shift = norm.weight.data.normal_()[None, None], norm.bias.data.normal_()[None, None]
    plain = norm(x, torch.float32)
    grad = normal(*plain.shape)
    out, mean, rstd = kernels.norm_modulate_forward(x.detach(), gain, shift, EPS, torch.float32)
    assert_alike(out, plain.detach())
    expected = gradients(plain, grad, x)[0]
    assert_alike(kernels.norm_modulate_backward(grad, x.detach(), mean, rstd, gain), expected)


def test_gradient_of_norm_and_rotation_is_autograds() -> None:
    x, norm, table = normal(BATCH, TOKENS, DIM).requires_grad_(), RMSNorm(DIM, EPS).to(DEVICE), rope()
    weight = norm.weight.data.normal_()
    plain = rotate(norm(x).unflatten(-1, (HEADS, -1)), table)
    grad = normal(*plain.shape)
    out, rrms = kernels.rms_rope_forward(x.detach(), weight, table, HEADS, EPS)
    assert_alike(out, plain.detach())
    assert_alike(kernels.rms_rope_backward(grad, x.detach(), rrms, weight, table), gradients(plain, grad, x)[0])


@pytest.mark.parametrize("kind", ["clip", "frame"])
def test_gradient_of_the_gated_sum_is_autograds(kind: str) -> None:
    x, branch, (gate, _) = normal(BATCH, TOKENS, DIM), normal(BATCH, TOKENS, DIM).requires_grad_(), modulation(kind)
    plain = add_gated(x, branch, gate)
    grad = normal(*plain.shape)
    assert_alike(kernels.gate_residual_forward(x, branch.detach(), gate), plain.detach())
    assert_alike(kernels.gate_residual_backward(grad, gate, torch.float32), gradients(plain, grad, branch)[0])


def test_gradient_of_gelu_is_autograds() -> None:
    h = (normal(5, 40) * 3).requires_grad_()
    plain = F.gelu(h, approximate="tanh")
    grad = normal(5, 40)
    assert_alike(kernels.gelu_backward(grad, h.detach()), gradients(plain, grad, h)[0])


# ---- memory that does not lie together -------------------------------------------------------------------------------


def apart(x: Tensor) -> Tensor:
    """The same numbers with other tokens before and behind them, and other channels behind."""
    wide = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:-1], x.shape[-1] + 5), float("nan"), device=x.device)
    place = wide.to(x.dtype)[:, 2 : 2 + x.shape[1], ..., : x.shape[-1]]
    return place.copy_(x)


def test_tokens_and_channels_may_be_slices() -> None:
    x, grad, weight, table = normal(BATCH, TOKENS, DIM), normal(BATCH, TOKENS, DIM), normal(DIM), apart(rope())
    gain, shift = modulation("frame")
    forward = kernels.norm_modulate_forward(x, gain, shift, EPS, torch.float32)
    assert_all_alike(kernels.norm_modulate_forward(apart(x), apart(gain), apart(shift), EPS, torch.float32), forward)
    _, mean, rstd = forward
    expected = kernels.norm_modulate_backward(grad, x, mean, rstd, gain)
    into = apart(torch.zeros_like(x))
    kernels.norm_modulate_backward(apart(grad), apart(x), apart(mean), apart(rstd), apart(gain), into=into)
    assert_alike(into, expected)

    forward = kernels.rms_rope_forward(x, weight, table, HEADS, EPS)
    assert_all_alike(kernels.rms_rope_forward(apart(x), weight, table, HEADS, EPS), forward)
    heads_first = grad.unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous().transpose(1, 2)
    backward = kernels.rms_rope_backward(grad.unflatten(-1, (HEADS, -1)), x, forward[1], weight, table)
    assert_alike(kernels.rms_rope_backward(heads_first, apart(x), apart(forward[1]), weight, table), backward)

    summed = kernels.gate_residual_forward(x, grad, gain)
    out = apart(x)
    kernels.gate_residual_forward(out, apart(grad), apart(gain), out=out)
    assert_alike(out, summed)
    assert_alike(
        kernels.gate_residual_backward(apart(grad), gain, torch.bfloat16),
        kernels.gate_residual_backward(grad, gain, torch.bfloat16),
    )
    assert_alike(kernels.gelu_forward(apart(x)), kernels.gelu_forward(x))
    in_place = apart(grad)
    kernels.gelu_backward(in_place, apart(x), out=in_place)
    assert_alike(in_place, kernels.gelu_backward(grad, x))


def test_numbers_of_a_row_may_lie_apart_too() -> None:
    """As in a gradient that autograd expanded, or a transposed one."""
    turned, ones, gain = (
        normal(BATCH, DIM, TOKENS).mT,
        normal(1, 1, 1).expand(BATCH, TOKENS, DIM),
        modulation("clip")[0],
    )
    weight, table = normal(DIM), rope()
    _, mean, rstd = kernels.norm_modulate_forward(turned, gain, gain, EPS, torch.float32)
    for x, grad in ((turned, ones), (ones, turned)):
        together, dense = x.contiguous(), grad.contiguous()
        assert_all_alike(
            kernels.norm_modulate_forward(x, gain, gain, EPS, torch.float32),
            kernels.norm_modulate_forward(together, gain, gain, EPS, torch.float32),
        )
        assert_alike(
            kernels.norm_modulate_backward(grad, x, mean, rstd, gain),
            kernels.norm_modulate_backward(dense, together, mean, rstd, gain),
        )
        assert_all_alike(
            kernels.rms_rope_forward(x, weight, table, HEADS, EPS),
            kernels.rms_rope_forward(together, weight, table, HEADS, EPS),
        )
        assert_alike(
            kernels.rms_rope_backward(grad.unflatten(-1, (HEADS, -1)), x, rstd, weight, table),
            kernels.rms_rope_backward(dense.unflatten(-1, (HEADS, -1)), together, rstd, weight, table),
        )
        forward = kernels.gate_residual_forward(together, dense, gain)
        assert_alike(kernels.gate_residual_forward(x, grad, gain), forward)
        backward = kernels.gate_residual_backward(dense, gain, torch.float32)
        assert_alike(kernels.gate_residual_backward(grad, gain, torch.float32), backward)
        assert_alike(kernels.gelu_forward(x), kernels.gelu_forward(together))
        assert_alike(kernels.gelu_backward(grad, x), kernels.gelu_backward(dense, together))


# ---- the block by hand, on these kernels -----------------------------------------------------------------------------


def test_the_block_by_hand_is_the_same_on_kernels_and_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients of its inputs, with groups of heads and chunks of tokens: operands as a block has them."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # fused attention on CUDA takes no float32
    config = DiTConfig(dim=48, ffn_dim=80, num_heads=3, num_layers=1, in_dim=16, out_dim=16, text_dim=48)
    block = WanBlock(config).to(DEVICE).requires_grad_(False)
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.data = parameter.data.to(storage_dtype(name, dtype))
    table = rope_table(FRAMES, HEIGHT, WIDTH, head_dim=16, device=torch.device(DEVICE))
    x, modulation, context = normal(BATCH, TOKENS, 48), normal(BATCH, FRAMES, 6, 48), normal(BATCH, 7, 48, dtype=dtype)
    inputs, grad = (x, modulation, context, table), normal(BATCH, TOKENS, 48)
    maths = FusedBlockMaths(BlockSchedule(head_groups=2, token_chunk=2))

    def results(ops: object) -> list[Tensor]:
        monkeypatch.setattr(fused_forward, "ops_for", lambda device: ops)
        out, kept = maths.forward(block, inputs, keep=True)
        of_inputs, _ = maths.backward(block, inputs, kept, grad.clone(), needed=(True, True, True, False))
        return [out, *(one for one in of_inputs if one is not None)]

    found, expected = results(kernels), results(fused_ops)
    assert len(found) == 4
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).norm() < tolerance * other.float().norm()


def test_some_heads_alone_are_those_of_the_whole() -> None:
    x, weight, table = normal(BATCH, TOKENS, DIM, dtype=torch.bfloat16), normal(DIM), rope()
    whole, rrms = kernels.rms_rope_forward(x, weight, table, HEADS, EPS)
    channels = slice(HEAD, 3 * HEAD)
    some, same = kernels.rms_rope_forward(x[..., channels], weight[channels], table, 2, EPS, rrms=rrms)
    assert torch.equal(some, whole[:, :, 1:]) and torch.equal(same, rrms)


def test_rows_beyond_two_to_the_31_numbers_are_found() -> None:
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # 4 GiB of addresses, of which 3 pages are used
    x = far.as_strided((1, 3, 20), (2**31, 2**30, 1))
    gain = normal(1, 1, 20)

    def results(x: Tensor) -> list[Tensor]:
        ones = torch.ones(1, 3, 1, device=DEVICE)
        near = normal(1, 3, 20, dtype=torch.float16) * 0 + 1
        return [
            *kernels.norm_modulate_forward(x, gain, gain, EPS, torch.float32),
            kernels.norm_modulate_backward(x, x, ones, ones, gain),
            *kernels.rms_rope_forward(x, gain[0, 0], None, 2, EPS),
            kernels.rms_rope_backward(x.unflatten(-1, (2, -1)), x, ones, gain[0, 0], None),
            kernels.gate_residual_forward(x, near, gain),
            kernels.gate_residual_forward(near, near, gain, out=x.clone(memory_format=torch.preserve_format)),
            kernels.gate_residual_backward(x, gain, torch.float32),
            kernels.gelu_forward(x),
            kernels.gelu_backward(near, x),
        ]

    numbers = normal(1, 3, 20, dtype=torch.float16)
    x.copy_(numbers)
    for one, other in zip(results(x), results(numbers), strict=True):
        assert torch.equal(one, other)


def test_operands_that_a_kernel_would_misread_are_refused() -> None:
    x, gain, weight, table = normal(BATCH, TOKENS, DIM), normal(BATCH, 1, DIM), normal(DIM), rope()
    mean = rstd = normal(BATCH, TOKENS, 1)
    gappy = normal(BATCH, TOKENS, 2 * DIM)[..., ::2]
    heads = x.unflatten(-1, (HEADS, -1))
    for wrong in (
        lambda: kernels.norm_modulate_forward(x.double(), gain, gain, EPS, torch.float32),
        lambda: kernels.gate_residual_forward(x, x, normal(BATCH, 4, DIM)),
        lambda: kernels.norm_modulate_forward(x, normal(BATCH, 3, DIM), gain, EPS, torch.float32),
        lambda: kernels.norm_modulate_forward(x, gain[..., :-1], gain, EPS, torch.float32),
        lambda: kernels.norm_modulate_forward(x, gain, normal(3, 1, DIM), EPS, torch.float32),
        lambda: kernels.norm_modulate_backward(x[:, 1:], x, mean, rstd, gain),
        lambda: kernels.norm_modulate_backward(x, x, mean[:, 1:], rstd, gain),
        lambda: kernels.norm_modulate_backward(x, x, mean, rstd, gain, into=x[..., 1:]),
        lambda: kernels.rms_rope_forward(x, weight[1:], table, HEADS, EPS),
        lambda: kernels.rms_rope_forward(x, weight, table[:, 1:], HEADS, EPS),
        lambda: kernels.rms_rope_forward(x, weight, table.half(), HEADS, EPS),
        lambda: kernels.rms_rope_forward(x, weight, table, 2, EPS),
        lambda: kernels.rms_rope_forward(x, weight, None, 4, EPS),
        lambda: kernels.rms_rope_backward(heads[:, 1:], x, rstd, weight, table),
        lambda: kernels.rms_rope_backward(heads, x, rstd.double(), weight, table),
        lambda: kernels.gate_residual_forward(x, x[:, 1:], gain),
        lambda: kernels.gate_residual_forward(x, x, gain, out=x[:1]),
        lambda: kernels.gate_residual_backward(x, gain.double(), torch.float32),
        lambda: kernels.gate_residual_forward(x, x, gain, out=gappy),
        lambda: kernels.gelu_backward(x, x, out=gappy),
        lambda: kernels.norm_modulate_backward(x, x, mean, rstd, gain, into=gappy),
        lambda: kernels.gelu_forward(x.double()),
        lambda: kernels.gelu_backward(x, x[1:]),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_no_tokens_are_no_work() -> None:
    none = normal(BATCH, 0, DIM)
    gain = normal(BATCH, 1, DIM)
    assert kernels.norm_modulate_forward(none, gain, gain, EPS, torch.bfloat16)[0].shape == none.shape
    assert kernels.gate_residual_forward(none, none, gain).shape == none.shape
    assert kernels.gelu_forward(none).shape == none.shape
