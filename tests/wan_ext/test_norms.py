"""Laws of the norms: torch's values and gradients, in float32, with only the input and one number a token kept."""

import pytest
import torch
import torch.nn.functional as F

from wan_ext.norms import LayerNorm, layer_norm, rms_norm


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_rms_norm_equals_torch_forward_and_backward():
    x, weight, weights = (random(2, 5, 24), random(24, seed=1), random(2, 5, 24, seed=2))
    results = []
    for norm in (lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, (24,), w, 1e-6)):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = norm(*inputs)
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_gradients_of_rms_norm_are_derivatives():
    x, weight = random(3, 8, dtype=torch.float64), random(8, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x.requires_grad_(), weight.requires_grad_()))


def test_rms_norm_of_bf16_keeps_its_input_and_one_number_a_token():
    x, weight = random(1, 64, 256, dtype=torch.bfloat16).requires_grad_(), random(256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.float32
    assert sum(t.nbytes for t in saved) == x.nbytes + weight.nbytes + 64 * 4
    (out * 2).sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_layer_norm_equals_torch_forward_and_backward_for_each_frame():
    x, gain, shift = random(2, 6, 24), random(2, 3, 24, seed=1), random(2, 3, 24, seed=2)
    weights = random(2, 6, 24, seed=3)

    def by_torch(x, gain, shift):
        return F.layer_norm(x, (24,), eps=1e-6) * gain.repeat_interleave(2, dim=1) + shift.repeat_interleave(2, dim=1)

    results = []
    for norm in (lambda *inputs: layer_norm(*inputs, eps=1e-6), by_torch):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, gain, shift)]
        out = norm(*inputs)
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 1, 8), (2, 3, 8), (1, 3, 8)])
def test_gradients_of_layer_norm_are_derivatives_for_every_sharing_of_gain_and_shift(shape):
    inputs = [random(2, 6, 8, dtype=torch.float64)] + [random(*shape, dtype=torch.float64, seed=i) for i in (1, 2)]

    def norm(x, gain, shift):
        return layer_norm(x, gain, shift, eps=1e-6, dtype=torch.float64)

    assert torch.autograd.gradcheck(norm, [tensor.requires_grad_() for tensor in inputs])


def test_layer_norm_to_bf16_keeps_half_of_its_input_and_gives_a_float32_gradient():
    x, gain, shift = random(1, 64, 256).requires_grad_(), random(1, 1, 256), random(1, 1, 256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer_norm(x, gain, shift, eps=1e-6, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert sum(t.nbytes for t in saved) == x.nbytes // 2 + gain.nbytes + 64 * 4
    weights = random(1, 64, 256, seed=4)
    grad = torch.autograd.grad((out * weights).sum(), x)[0]
    exact = torch.autograd.grad((layer_norm(x, gain, shift, eps=1e-6) * weights).sum(), x)[0]
    assert grad.dtype == torch.float32
    assert (grad - exact).norm() < 4e-3 * exact.norm()


def test_weights_of_any_dtype_are_applied_in_float32():
    norm = LayerNorm(64, 1e-6)
    x = random(2, 4, 64)
    with torch.no_grad():
        norm.weight.copy_(random(64, seed=1).bfloat16())
        norm.bias.copy_(random(64, seed=2).bfloat16())
    assert torch.equal(norm(x, torch.float32), norm.bfloat16()(x, torch.float32))
