"""Mechanism `cross_attention`: the camera as extra keys and values, beside those of the text.

    frame numbers -> MLP -> M tokens of R channels for each latent frame         once, shared by the blocks
    k, v = linear(tokens);  out = out + up(down(attention(q, norm(k), v)))       per block, up zero at start

The queries are those that the block asks of the text. A video token attends to the camera tokens of its own latent
frame: among those of all frames it could not find its own, for queries of cross-attention carry no position. The
softmax is the camera's own, so the text's is not touched. `camera_rank` is R, also the width between down and up.

Source: decoupled cross-attention, IP-Adapter (Ye et al. 2023, arXiv 2308.06721).
Shapes: B clips, F latent frames, L tokens, M camera tokens of a frame, N heads, d channels of a head, D model width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from networks.mechanisms.features import (
    FRAME_NUMBERS,
    CameraEncoder,
    FeatureMLP,
    frame_numbers,
    linear_as,
    live_linear,
    zero_linear,
)
from networks.mechanisms.settings import CameraSettings
from wan_ext.attention import attention
from wan_ext.condition import CameraBranch, CameraCondition
from wan_ext.configs import WanVariant
from wan_ext.norms import RMSNorm

TOKENS = 8
"""Camera tokens of a latent frame."""


class CameraTokensEncoder(CameraEncoder):
    """M tokens of R channels for each latent frame."""

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__(variant)
        assert settings.hidden is not None and isinstance(settings.rank, int)
        width = TOKENS * settings.rank
        self.mlp = FeatureMLP(FRAME_NUMBERS, settings.hidden, width, zero_start=False, generator=generator)

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        features = self.mlp(frame_numbers(c2w, K, width))  # [B, F, 1, 1, M R]
        return CameraCondition(features=features.unflatten(-1, (TOKENS, -1)))  # [B, F, 1, 1, M, R]


class CrossAttentionBranch(CameraBranch):
    """Keys, values and output of one block."""

    tokenwise = True

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__()
        assert isinstance(settings.rank, int)
        dim = variant.dit.dim
        self.kv = live_linear(settings.rank, 2 * dim, generator, bias=False)
        self.norm_k = RMSNorm(dim, variant.dit.eps)
        self.down = live_linear(dim, settings.rank, generator, bias=False)
        self.up = zero_linear(settings.rank, dim)

    def after(self, out: Tensor, x: Tensor, q: Tensor, features: Tensor) -> Tensor:
        frames, heads = features.shape[1], q.shape[2]
        k, v = self.kv(rearrange(features, "b f 1 1 m r -> (b f) m r")).chunk(2, -1)  # [B F, M, D]
        k, v = (part.to(q.dtype).unflatten(-1, (heads, -1)) for part in (self.norm_k(k), v))
        attended = attention(rearrange(q, "b (f l) n d -> (b f) l n d", f=frames), k, v)
        hidden = linear_as(attended.flatten(2), self.down)  # [B F, h w, R]
        return rearrange(linear_as(hidden, self.up), "(b f) l d -> b f l d", f=frames)
