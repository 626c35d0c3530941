"""Laws of the parts of the block by hand: attention's forward and backward, dropout masks, sums, spans of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.errors import InputError
from wan_ext.attention import attention, attention_backward, attention_forward, fused_kernel
from wan_ext.fused_backward import stand_in, stand_in_ratio
from wan_ext.fused_linear import Gradients, keep_mask
from wan_ext.token_spans import Span, token_spans


def heads(*tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 3, 8, generator=g, dtype=torch.float64).to(dtype) for n in tokens]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("keys", [11, 4])
def test_attention_apart_is_attention(dtype, near, keys):
    q, k, v, grad = heads(11, keys, keys, 11, dtype=dtype)
    expected = [x.requires_grad_() for x in (q, k, v)]
    whole = attention(q, k, v)
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = attention_forward(q, k, v)
    torch.testing.assert_close(out, whole.detach(), rtol=near, atol=near)
    scores = torch.einsum("blnd,bsnd->bnls", q.double(), k.double()) / 8**0.5
    torch.testing.assert_close(lse.double().reshape(2, 3, 11), scores.logsumexp(-1), rtol=near, atol=near)
    for some in (slice(0, 3), slice(1, 3)):  # heads alone, and what came back from elsewhere with other strides
        parts = [x[:, :, some] for x in (grad, q, k, v, out)]
        found = attention_backward(*parts, lse[:, some].contiguous())
        for part, other in zip(found, expected, strict=True):
            torch.testing.assert_close(part, other[:, :, some], rtol=near, atol=near)


def test_attention_backward_asks_of_the_output_only_its_product_with_the_gradient():
    q, k, v, grad = heads(9, 9, 9, 9)
    grad[0, 0] = 0
    grad[1] *= 1e-200  # whose square is 0
    out, lse = attention_forward(q, k, v)
    other = stand_in(grad, stand_in_ratio(grad, out))
    assert other.isfinite().all()
    torch.testing.assert_close((other * grad).sum(-1), (out * grad).sum(-1), rtol=1e-10, atol=0)
    found, expected = (attention_backward(grad, q, k, v, o, lse) for o in (other, out))
    for part, same in zip(found, expected, strict=True):
        for clip in (0, 1):
            torch.testing.assert_close(part[clip], same[clip], rtol=1e-8, atol=1e-12 * same[clip].abs().max().item())


def test_attention_on_meta_tensors_has_the_shapes_of_attention():
    q, k, v, grad = (x.to("meta") for x in heads(9, 4, 4, 9, dtype=torch.bfloat16))
    out, lse = attention_forward(q, k, v)
    assert out.shape == q.shape and lse.shape == (2, 3, 9)
    assert [x.shape for x in attention_backward(grad, q, k, v, out, lse)] == [q.shape, k.shape, v.shape]


def test_sage_is_refused_before_anything_is_computed():
    with pytest.raises(InputError, match="sample but not train"):
        fused_kernel(heads(2)[0], "sage")


def test_a_dropout_mask_does_not_depend_on_what_is_computed_together():
    whole = keep_mask(17, 0, 40, 6, 0.3, torch.device("cpu"))
    assert torch.equal(keep_mask(17, 13, 9, 6, 0.3, torch.device("cpu")), whole[13:22])


def test_a_dropout_mask_keeps_its_share_and_knows_neither_its_neighbours_nor_other_keys():
    masks = [keep_mask(key, 0, 2000, 32, 0.3, torch.device("cpu")).double() for key in (1, 2, 2**63 + 1, -5)]
    for mask in masks:
        assert abs(mask.mean() - 0.7) < 0.01
        centred = mask - mask.mean()
        for one, other in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
            assert abs((one * other).mean()) < 0.01
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(((one - 0.7) * (other - 0.7)).mean()) < 0.01


def test_gradients_are_summed_wide_and_handed_out_once():
    weight, other = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(3))
    gradients = Gradients()
    for _ in range(257):  # in bf16 the sum would stay at 256
        gradients.add(weight, torch.ones(3, dtype=torch.bfloat16))
    found, nothing = gradients.take((weight, other))
    assert found.dtype == torch.bfloat16 and found.tolist() == [256.0] * 3 and nothing is None
    gradients.add(weight, torch.ones(3, dtype=torch.bfloat16))
    assert gradients.take((weight,))[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("limit", [None, 1, 3, 4, 5, 8, 9, 12, 100])
@pytest.mark.parametrize("frames", [1, 3])
def test_spans_cover_every_token_once_in_whole_frames_or_parts_of_one(limit, frames):
    batch, tokens = 2, 12
    places = torch.arange(batch * tokens).view(batch, tokens)
    frame = (torch.arange(tokens) // (tokens // frames)).expand(batch, -1)
    spans = token_spans(batch, tokens, frames=frames, limit=limit)
    assert torch.cat([span.of(places).flatten() for span in spans]).tolist() == places.flatten().tolist()
    for span in spans:
        found = span.of(places)
        assert found.is_contiguous() and found.flatten()[0] == span.first_row
        assert limit is None or found.numel() <= limit
        seen = span.of(frame).unique().tolist()
        assert span.of_frames(torch.arange(frames).expand(batch, -1))[0].tolist() == seen
        assert len(seen) == 1 or found.shape[1] == len(seen) * (tokens // frames)
        assert span.of_frames(torch.zeros(1, 1)).shape == (1, 1)


def test_parts_are_put_together_in_the_order_of_their_tokens():
    source, target = torch.randn(2, 12, 5), None
    for span in token_spans(2, 12, limit=5):
        target = span.put(target, span.of(source), source)
    assert torch.equal(target, source)
    assert Span().put(None, source, source) is source
