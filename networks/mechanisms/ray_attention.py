"""Mechanism `ray_attention`: a narrow attention beside self-attention, whose positions are the tokens' rays.

Every token has four ray frames, one for each video frame of its latent frame: the origin is the camera's centre, z runs
along the ray through the token's middle, x lies as near to the camera's right axis as it can. With E_i from world to
ray frame i, a half of each head's channels, four by four as homogeneous vectors, goes through

    q_i' = E_i^T q_i     k_j' = E_j^-1 k_j     v_j' = E_j^-1 v_j     out_i = E_i out_i'

so that a logit is q_i^T (E_i E_j^-1) k_j, and what is read from token j arrives in the coordinates of ray i: only the
transform from one ray to another counts. Moving or turning the world changes nothing, whether the camera stands still
in a moving world or moves in a still one. The other half of the channels of q and k turns by rotary positions, so that
the attention knows which frame, row and column it looks at. Heads stand for the four video frames in turn.

    x -> q, k, v of R channels -> attention -> linear, zero at start -> added to the output of self-attention

Scale: translations enter as they are, so they should be of order 1 in the path's unit (see the scale rules).

Absolute term. Relative transforms cannot tell where in a known place a camera stands. In pose frame "scene" this is
what is asked for, so there the tokens also get the term of `plucker_light` (camera_absolute=yes); in pose frame "first"
the first frame says where it is, and the term is left out. Either can be chosen.

Source: UCPE (arXiv 2512.07237) for rays as positions in a narrow parallel attention; GTA (Miyato et al. 2024,
arXiv 2310.10375) for the transforms on q, k, v and out; PRoPE (arXiv 2507.10496) for cameras as relative positions.
Shapes: B clips, T video frames, F latent frames, h w token rows and columns, L tokens, N heads, R channels, g groups of
four of a head.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from camera.rays import pixel_directions, scale_intrinsics
from core.errors import InputError
from networks.mechanisms.features import CameraEncoder, linear_as, live_linear, zero_linear
from networks.mechanisms.settings import CameraSettings
from networks.mechanisms.tokens import LightPluckerEncoder
from wan_ext.attention import attention
from wan_ext.condition import TEMPORAL_STRIDE, CameraBranch, CameraCondition
from wan_ext.configs import WanVariant
from wan_ext.norms import RMSNorm
from wan_ext.rope import rope_table, rotate

HEAD_STEP = 8
"""Channels of a head come in eights: half of them in fours for the transforms."""


class RayFramesEncoder(CameraEncoder):
    """The ray frames of every token, and perhaps the term in world coordinates. Ray frames have nothing to learn."""

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__(variant)
        check_width(settings)
        self.absolute = LightPluckerEncoder(variant, settings, generator) if settings.absolute else None

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        rows, columns = (
            size // (stride * patch)
            for size, stride, patch in zip((height, width), self.stride[1:], self.patch_size[1:], strict=True)
        )
        token_K = scale_intrinsics(K, from_size=(height, width), to_size=(rows, columns))
        # Seen from the first camera: it cancels in every product of two, and keeps numbers small far from the origin.
        seen = inverse_rigid(c2w[:, :1]) @ c2w  # [B, T, 4, 4]
        to_world = ray_frames(seen, token_K, rows, columns)  # [B, T, h, w, 4, 4]
        both = torch.stack((inverse_rigid(to_world), to_world.mT), -3)  # [B, T, h, w, 2, 4, 4], for row vectors
        both = torch.cat((both[:, :1].expand(-1, TEMPORAL_STRIDE - 1, *both.shape[2:]), both), 1)  # frame 0 four times
        features = rearrange(both, "b (f n) h w s i j -> b f h w s n i j", n=TEMPORAL_STRIDE).float().contiguous()
        absolute = None if self.absolute is None else self.absolute.encode(c2w, K, height, width).tokens
        return CameraCondition(tokens=absolute, features=features)


class RayAttentionBranch(CameraBranch):
    """The narrow attention of one block."""

    def __init__(self, variant: WanVariant, settings: CameraSettings, generator: torch.Generator | None) -> None:
        super().__init__()
        check_width(settings)
        assert isinstance(settings.rank, int)
        dim, width = variant.dit.dim, settings.rank
        self.qkv = live_linear(dim, 3 * width, generator, bias=False)
        self.norm_q = RMSNorm(width, variant.dit.eps)
        self.norm_k = RMSNorm(width, variant.dit.eps)
        self.o = zero_linear(width, dim)

    def after(self, out: Tensor, x: Tensor, q: Tensor, features: Tensor) -> Tensor:
        grid = features.shape[1:4]
        to_ray, to_world = features.flatten(1, 3).unbind(2)  # E and E^-1 transposed, [B, L, N, 4, 4]
        q, k, v = linear_as(x, self.qkv).chunk(3, -1)  # [B, L, R]
        q, k, v = (self.heads(part).float() for part in (self.norm_q(q), self.norm_k(k), v))  # [B, L, N, d]
        half = q.shape[-1] // 2
        rope = rope_table(*grid, head_dim=half, device=x.device)
        kv = transform(torch.cat((k[..., :half], v[..., :half]), -1), to_world)
        q = torch.cat((transform(q[..., :half], to_ray), rotate(q[..., half:], rope)), -1)
        k = torch.cat((kv[..., :half], rotate(k[..., half:], rope)), -1)
        v = torch.cat((kv[..., half:], v[..., half:]), -1)
        read = attention(q.to(x.dtype), k.to(x.dtype), v.to(x.dtype))  # [B, L, N, d]
        read = torch.cat((transform(read[..., :half].float(), to_ray.mT).to(x.dtype), read[..., half:]), -1)
        return linear_as(read.flatten(2), self.o)[:, None]  # [B, 1, L, D]

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, R] -> [B, L, N, d]"""
        return x.unflatten(-1, (TEMPORAL_STRIDE, -1))


def ray_frames(c2w: Tensor, K: Tensor, rows: int, columns: int) -> Tensor:
    """From each ray's own coordinates to the world: z along the ray, x next to the camera's right axis.

    Args:
        c2w: [..., 4, 4]
        K: in pixels of a frame of rows x columns. [..., 3, 3]
        rows, columns: h and w.

    Returns:
        rigid transforms, [..., h, w, 4, 4]
    """
    z = rearrange(pixel_directions(c2w, K, rows, columns), "... c h w -> ... h w c")
    right = c2w[..., None, None, :3, 0]
    x = right - (right * z).sum(-1, keepdim=True) * z
    x = x / x.norm(dim=-1, keepdim=True)  # a ray that a pinhole sees is never along its right axis
    y = torch.linalg.cross(z, x)
    origin = c2w[..., None, None, :3, 3].expand_as(z)
    top = torch.stack((x, y, z, origin), -1)  # [..., h, w, 3, 4]
    last = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat((top, last), -2)


def inverse_rigid(transform: Tensor) -> Tensor:
    """The inverse of rotations with translations, [..., 4, 4]."""
    rotation = transform[..., :3, :3].mT
    top = torch.cat((rotation, -rotation @ transform[..., :3, 3:]), -1)
    return torch.cat((top, transform[..., 3:, :]), -2)


def transform(x: Tensor, matrices: Tensor) -> Tensor:
    """Groups of four channels, as row vectors, times the matrix of their token and head.

    Args:
        x: [B, L, N, 4 g]
        matrices: [B, L, N, 4, 4]

    Returns:
        [B, L, N, 4 g]
    """
    return (x.unflatten(-1, (-1, 4)) @ matrices).flatten(-2)


def check_width(settings: CameraSettings) -> None:
    """Refuse a width that does not divide into heads. Raises InputError."""
    assert isinstance(settings.rank, int)
    step = TEMPORAL_STRIDE * HEAD_STEP
    if settings.rank % step:
        raise InputError(
            f"network argument camera_rank: expected a multiple of {step} for injection {settings.injection}, found "
            f"{settings.rank}"
        )
