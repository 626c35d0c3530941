"""Laws of the norms: torch's values and gradients, in float32, with only the input and one number a token kept."""

import torch
import torch.nn.functional as F

from wan_ext.norms import layer_norm, rms_norm


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


def test_layer_norm_computes_in_float32():
    x, weight, bias = (random(4, 64, dtype=torch.bfloat16), *random(2, 64, dtype=torch.bfloat16, seed=1))
    expected = F.layer_norm(x.double(), (64,), weight.double(), bias.double(), 1e-6)
    found = layer_norm(x, 1e-6, weight, bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
