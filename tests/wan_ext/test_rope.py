"""Laws of rotary positions: rotations, relative in each axis, as in diffusers."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from wan_ext.rope import pairs_per_axis, rope_table, rotate

CPU = torch.device("cpu")


def table(frames, height, width, head_dim=32):
    return rope_table(frames, height, width, head_dim=head_dim, device=CPU)


def test_pairs_of_the_official_head():
    assert pairs_per_axis(128) == (22, 21, 21)


@pytest.mark.parametrize("head_dim", [16, 24, 32, 128])
def test_table_equals_diffusers(head_dim):
    theirs = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.zeros(1, 1, 5, 8, 6))
    for ours, cos_or_sin in zip(table(5, 4, 3, head_dim), theirs, strict=True):
        assert torch.equal(ours[:, 0], cos_or_sin[0, :, 0, ::2])


def test_rotation_keeps_lengths_and_the_first_token():
    x = torch.randn(2, 24, 3, 32, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, table(2, 3, 4))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1:], x[:, 1:])


def test_products_depend_on_distance_alone():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(32, generator=g), torch.randn(32, generator=g)
    everywhere = torch.ones(1, 4 * 4 * 4, 1, 1)
    turned_q, turned_k = (rotate(everywhere * x, table(4, 4, 4)).view(4, 4, 4, 32) for x in (q, k))
    for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 1)):
        f, h, w = step
        near = turned_q[0, 0, 0] @ turned_k[f, h, w]
        far = turned_q[1, 1, 1] @ turned_k[1 + f, 1 + h, 1 + w]
        torch.testing.assert_close(near, far, rtol=0, atol=1e-5)
        assert (near - q @ k).abs() > 1e-2


def test_rotation_is_float32_whatever_it_rotates():
    assert rotate(torch.ones(1, 1, 1, 8, dtype=torch.bfloat16), table(1, 1, 1, 8)).dtype == torch.float32


def test_a_table_made_in_inference_mode_serves_training():
    rope_table.cache_clear()
    with torch.inference_mode():
        table(1, 2, 5)
    x = torch.randn(1, 10, 1, 32, requires_grad=True)
    rotate(x, table(1, 2, 5)).sum().backward()
    assert x.grad is not None


def test_tables_are_made_once():
    assert table(2, 2, 2) is table(2, 2, 2)


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="even"):
        table(1, 1, 1, 9)
