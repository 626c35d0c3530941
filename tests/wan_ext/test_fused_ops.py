"""Laws of the block's element-wise operations: equal to the plain modules, gradients that gradcheck agrees with."""

import pytest
import torch

from wan_ext import fused_ops as ops
from wan_ext.dit import add_gated
from wan_ext.norms import layer_norm, rms_norm
from wan_ext.rope import rope_table, rotate

B, GRID, HEADS, WIDTH = 2, (3, 2, 2), 3, 8  # clips; latent frames, rows, columns; heads of 8 channels
FRAMES, TOKENS, DIM = GRID[0], 12, HEADS * WIDTH
EPS = 1e-6


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=["all rows at once", "three rows at a time"])
def few_rows(request, monkeypatch):
    """The operations must not depend on how many rows they take at a time."""
    if request.param == "three rows at a time":
        monkeypatch.setattr(ops, "_some_rows", lambda x, axis: (slice(a, a + 3) for a in range(0, x.shape[axis], 3)))


@pytest.fixture(params=[None, GRID], ids=["no positions", "positions"])
def rope(request):
    return None if request.param is None else rope_table(*GRID, head_dim=WIDTH, device=torch.device("cpu"))


@pytest.mark.parametrize("frames", [1, FRAMES])
@pytest.mark.parametrize("clips", [1, B])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_layer_norm_of_the_plain_block(few_rows, frames, clips, dtype):
    x, gain, shift = draw(B, TOKENS, DIM), draw(clips, frames, DIM, seed=1), draw(clips, frames, DIM, seed=2)
    y, mean, rstd = ops.norm_modulate_forward(x, gain, shift, EPS, dtype)
    assert torch.equal(y, layer_norm(x, gain, shift, eps=EPS, dtype=dtype))
    torch.testing.assert_close(mean, x.mean(-1, keepdim=True))
    torch.testing.assert_close(rstd, (x.var(-1, keepdim=True, correction=0) + EPS).rsqrt())


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_norm_gradients_are_those_of_autograd(few_rows, frames):
    x, gain, shift = (
        draw(*shape, dtype=torch.float64, seed=seed).requires_grad_()
        for seed, shape in enumerate([(B, TOKENS, DIM), (B, frames, DIM), (B, frames, DIM)])
    )
    grad = draw(B, TOKENS, DIM, dtype=torch.float64, seed=3)
    rows = x.unflatten(1, (frames, -1))
    unit = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    expected = torch.autograd.grad((unit * gain[:, :, None] + shift[:, :, None]).flatten(1, 2), (x, gain, shift), grad)
    with torch.no_grad():
        _, mean, rstd = ops.norm_modulate_forward(x, gain, shift, EPS, torch.float64)
        torch.testing.assert_close(ops.norm_modulate_backward(grad, x, mean, rstd, gain), expected[0])
        stream = draw(B, TOKENS, DIM, dtype=torch.float64, seed=4)
        before = stream.clone()
        ops.norm_modulate_backward(grad, x, mean, rstd, gain, into=stream)
        torch.testing.assert_close(stream - before, expected[0])
        sums = ops.norm_modulate_sums(grad, x, mean, rstd, frames)
    torch.testing.assert_close(sums, expected[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_and_rotation_are_those_of_the_plain_block(few_rows, rope, dtype):
    x, weight = draw(B, TOKENS, DIM, dtype=dtype), draw(DIM, seed=1)
    expected = rms_norm(x, weight, EPS).unflatten(-1, (HEADS, -1))
    expected = expected if rope is None else rotate(expected, rope)
    y, rrms = ops.rms_rope_forward(x, weight, rope, HEADS, EPS)
    torch.testing.assert_close(y, expected.to(dtype))
    some = slice(WIDTH, 3 * WIDTH)
    part, same = ops.rms_rope_forward(x[..., some], weight[some], rope, 2, EPS, rrms=rrms)
    assert torch.equal(part, y[:, :, 1:])
    assert same is rrms


def test_rms_and_rotation_gradients_are_those_of_autograd(few_rows, rope):
    x, weight = (draw(*shape, dtype=torch.float64).requires_grad_() for shape in [(B, TOKENS, DIM), (DIM,)])
    grad = draw(B, TOKENS, HEADS, WIDTH, dtype=torch.float64, seed=3)
    y = (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight).unflatten(-1, (HEADS, -1))
    expected = torch.autograd.grad(y if rope is None else rotate(y, rope), (x, weight), grad)
    with torch.no_grad():
        _, rrms = ops.rms_rope_forward(x, weight, rope, HEADS, EPS)
        kept = grad.clone()
        torch.testing.assert_close(ops.rms_rope_backward(grad, x, rrms, weight, rope), expected[0])
        torch.testing.assert_close(ops.rms_rope_sum(grad, x, rrms, rope), expected[1])
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("frames", [1, FRAMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_is_that_of_the_plain_block(frames, dtype):
    x, branch, gate = draw(B, TOKENS, DIM), draw(B, TOKENS, DIM, dtype=dtype), draw(B, frames, DIM, seed=2)
    expected = add_gated(x, branch, gate)
    torch.testing.assert_close(ops.gate_residual_forward(x, branch, gate), expected)
    y, branch = x.clone(), branch.requires_grad_()
    assert ops.gate_residual_forward(x, branch.detach(), gate, out=y) is y
    torch.testing.assert_close(y, expected)
    grad, gate = draw(B, TOKENS, DIM, seed=3), gate.requires_grad_()
    of_branch, of_gate = torch.autograd.grad(add_gated(x, branch, gate), (branch, gate), grad)
    with torch.no_grad():
        assert torch.equal(ops.gate_residual_backward(grad, gate, dtype), of_branch)
        torch.testing.assert_close(ops.gate_residual_sum(grad, branch, frames), of_gate)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gelu_may_write_over_its_gradient(dtype):
    h, grad = draw(5, 7, dtype=dtype).requires_grad_(), draw(5, 7, dtype=dtype, seed=1)
    activation = torch.nn.GELU(approximate="tanh")(h)
    expected = torch.autograd.grad(activation, h, grad)[0]
    with torch.no_grad():
        assert torch.equal(ops.gelu_forward(h), activation)
        assert torch.equal(ops.gelu_backward(grad, h), expected)
        assert ops.gelu_backward(grad, h, out=grad) is grad
    assert torch.equal(grad, expected)


def test_the_cpu_and_meta_tensors_get_these_operations():
    assert ops.ops_for(torch.device("cpu")) is ops
    assert ops.ops_for(torch.device("meta")) is ops
