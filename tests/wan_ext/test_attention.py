"""Laws of attention: the formula, its layout, and refusals that name the way out."""

import sys
from types import SimpleNamespace

import pytest
import torch

from core.errors import InputError
from tests.wan_ext.models import SMALL
from wan_ext import attention as attention_module
from wan_ext.attention import attention
from wan_ext.dit import WanDiT


def queries_keys_values(requires_grad=False):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 8, generator=g).requires_grad_(requires_grad) for n in (5, 7, 7))


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins for the optional packages, as this machine may have none of them."""

    def refuse(*args, **keywords):
        raise AssertionError("a kernel was called")

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=refuse))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=refuse))
    attention_module._kernel.cache_clear()
    yield
    attention_module._kernel.cache_clear()


def test_is_the_formula():
    q, k, v = queries_keys_values()
    weights = torch.einsum("blnd,bsnd->bnls", q, k).div(8**0.5).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bnls,bsnd->blnd", weights, v))


def test_an_unknown_backend_is_named_with_the_nearest():
    with pytest.raises(InputError, match="sdpa, flash, sage.*did you mean 'flash'"):
        attention(*queries_keys_values(), backend="flsh")


@pytest.mark.parametrize(("backend", "package"), [("flash", "flash_attn"), ("sage", "sageattention")])
def test_a_package_that_does_not_load_is_named(monkeypatch, backend, package):
    monkeypatch.setitem(sys.modules, package, None)
    attention_module._kernel.cache_clear()
    with pytest.raises(InputError, match=package):
        attention(*queries_keys_values(), backend=backend)
    with pytest.raises(InputError, match=package):
        WanDiT(SMALL, attention_backend=backend)


def test_sage_refuses_gradients(installed):
    with pytest.raises(InputError, match="sample but not train"):
        attention(*queries_keys_values(requires_grad=True), backend="sage")


@pytest.mark.parametrize("backend", ["flash", "sage"])
def test_kernels_for_cuda_refuse_what_they_cannot_take(installed, backend):
    with pytest.raises(InputError, match="float32 on cpu"):
        attention(*queries_keys_values(), backend=backend)


def test_the_backend_of_a_model_is_that_of_all_its_attentions(installed):
    dit = WanDiT(SMALL)
    dit.attention_backend = "sage"
    layers = [layer for block in dit.blocks for layer in (block.self_attn, block.cross_attn)]
    assert {layer.backend for layer in layers} == {dit.attention_backend} == {"sage"}
    with pytest.raises(InputError, match="sample but not train"):
        dit(torch.zeros(1, 16, 1, 2, 2), timestep=torch.zeros(1), context=torch.zeros(1, 1, SMALL.text_dim))
