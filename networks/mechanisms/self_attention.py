"""Mechanism `self_attention`: each block is told the pose before its self-attention, and may rework what comes out.

    frame numbers -> MLP -> R features of a latent frame            once, shared by the blocks
    before:  x = x + linear(features), zero at start                x the modulated input
    after:   out = out + up(down(out)), up zero at start            camera_rank=R
             out = out + W out, W zero at start                     camera_rank=full

The sums after it are an identity at the start, stored as their distance from the identity, so that weight decay pulls
towards the model as it was. A full matrix costs 26 million parameters per block of a 14B model; the product of two,
0.7 million at rank 64.

Source: ReCamMaster (arXiv 2503.11647), which adds a linear of the twelve numbers of the pose and has a full projector.
Shapes: B clips, F latent frames, L tokens, D model width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from networks.mechanisms.features import linear_as, live_linear, zero_linear
from networks.mechanisms.film import feature_width
from networks.mechanisms.settings import CameraSettings
from wan_ext.condition import CameraBranch
from wan_ext.configs import WanVariant


class SelfAttentionBranch(CameraBranch):
    """Pose before, projector after the self-attention of one block."""

    tokenwise = True

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__()
        dim = variant.dit.dim
        self.pose = zero_linear(feature_width(settings), dim)
        if settings.rank == "full":
            self.projector = nn.ModuleList([zero_linear(dim, dim)])
        else:
            assert settings.rank is not None
            down = live_linear(dim, settings.rank, generator, bias=False)
            self.projector = nn.ModuleList([down, zero_linear(settings.rank, dim)])

    def before(self, x: Tensor, features: Tensor) -> Tensor:
        frame = rearrange(features, "b f 1 1 r -> b f 1 r")
        return self.pose(frame).to(x.dtype)  # [B, F, 1, D]

    def after(self, out: Tensor, x: Tensor, q: Tensor, features: Tensor) -> Tensor:
        for linear in self.projector:
            out = linear_as(out, linear)  # type: ignore[arg-type]
        return out[:, None]  # [B, 1, L, D]
