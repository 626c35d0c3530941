"""The DiT computes what the official model and diffusers' model compute, forward and backward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.wan_ext.models import (
    CONFIGS,
    diffusers_names,
    golden_dit,
    lively_dit,
    random_inputs,
    run_diffusers,
    stored_in,
    to_diffusers,
)
from wan_ext.dit import sinusoid

CASES = [
    ("t2v", {}),
    ("t2v", {"batch": 1, "size": (1, 6, 4)}),
    ("i2v-A14B", {}),
    ("ti2v-5B", {}),
    ("ti2v-5B", {"per_frame": True}),
    ("i2v-14B with CLIP", {}),
    ("flf2v-14B with CLIP", {}),
]


def share_of_largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ["t2v", "i2v", "ti2v"])
def test_official_vectors(name):
    dit, golden = golden_dit(name)
    timestep = golden["timestep"]
    if timestep.ndim == 2:  # recorded per token; every token of a latent frame has the same
        timestep = timestep.unflatten(1, (golden["x"].shape[1], -1))[:, :, 0]
    condition = golden["y"][None] if "y" in golden else None
    out = dit(golden["x"][None], timestep=timestep, context=golden["context"][None], condition=condition)
    assert (out[0] - golden["out"]).abs().max() <= 5e-6


@pytest.mark.parametrize(("variant", "shape"), CASES)
def test_output_and_input_gradients_equal_diffusers(variant, shape):
    ours = lively_dit(CONFIGS[variant])
    theirs = to_diffusers(ours)
    inputs = random_inputs(CONFIGS[variant], **shape)
    differentiable = [inputs.noised, inputs.context, inputs.condition, inputs.image_context]
    differentiable = [tensor.requires_grad_() for tensor in differentiable if tensor is not None]

    found = ours(inputs.noised, **inputs.keywords())
    expected = run_diffusers(theirs, inputs)
    assert share_of_largest(found, expected) <= 1e-5

    with sdpa_kernel(SDPBackend.MATH):  # see below
        found = ours(inputs.noised, **inputs.keywords())
        expected = run_diffusers(theirs, inputs)
        found_grads = torch.autograd.grad((found * inputs.weights).sum(), differentiable)
        expected_grads = torch.autograd.grad((expected * inputs.weights).sum(), differentiable)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert share_of_largest(found_grad, expected_grad) <= 1e-5


@pytest.mark.parametrize(("variant", "shape"), CASES)
def test_parameter_gradients_equal_diffusers(variant, shape):
    ours = lively_dit(CONFIGS[variant])
    theirs = to_diffusers(ours)
    # The official sinusoid is float64; diffusers' float32 one is off by 3e-5 at timestep 800, and so is its gradient.
    theirs.condition_embedder.timesteps_proj.forward = lambda timestep: sinusoid(timestep, ours.config.freq_dim)
    # Few padding tokens, which are all alike, and the plain attention kernel: gradients of cross-attention are small
    # differences of large sums, and torch's fused CPU kernel alone moves them by 5e-5 between two memory layouts.
    inputs = random_inputs(CONFIGS[variant], text_tokens=500, **shape)
    with sdpa_kernel(SDPBackend.MATH):
        (ours(inputs.noised, **inputs.keywords()) * inputs.weights).sum().backward()
        (run_diffusers(theirs, inputs) * inputs.weights).sum().backward()

    found = diffusers_names({name: parameter.grad for name, parameter in ours.named_parameters()})
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name in expected:
        # A key's bias moves all logits of a query alike and nearly cancels: it is measured with its layer's weight.
        scale = max(
            expected[name].abs().max(), expected.get(name.replace("bias", "weight"), expected[name]).abs().max()
        )
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * scale, name


def test_sinusoid_is_the_official_formula():
    timestep = torch.tensor([0.0, 37.5, 999.0], dtype=torch.float64)
    frequency = torch.tensor([10000.0 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    angle = torch.outer(timestep, frequency)
    assert torch.equal(sinusoid(timestep, 8), torch.cat((angle.cos(), angle.sin()), dim=1).float())


@pytest.mark.parametrize("variant", ["t2v", "ti2v-5B", "i2v-14B with CLIP"])
def test_bf16_error_is_below_that_of_diffusers(variant):
    truth = lively_dit(CONFIGS[variant])
    inputs = random_inputs(CONFIGS[variant], per_frame=variant == "ti2v-5B")
    noised = inputs.noised.requires_grad_()

    def result_and_gradient(out):
        return out.detach().float(), torch.autograd.grad((out.float() * inputs.weights).sum(), noised)[0]

    def error(found, expected):
        return ((found - expected).norm() / expected.norm()).item()

    expected = result_and_gradient(truth(noised, **inputs.keywords()))
    ours = result_and_gradient(stored_in(truth, torch.bfloat16)(noised, **inputs.keywords()))
    theirs = result_and_gradient(run_diffusers(to_diffusers(truth, torch.bfloat16), inputs, torch.bfloat16))
    assert error(ours[0], expected[0]) < error(theirs[0], expected[0])
    assert error(ours[1], expected[1]) < error(theirs[1], expected[1])
