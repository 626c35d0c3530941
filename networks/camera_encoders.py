"""Camera encoders: from poses and intrinsics to a term for the DiT's tokens.

    bias      position, right and down axis, field of view of a latent frame's four video frames -> one vector a frame
    plucker   rays of the four frames through a 2 x 2 grid in each token, and their origins       -> one vector a token

Both are an MLP between fixed features and one linear that starts at zero:

    features -> linear -> SiLU -> (+ linear, SiLU, linear) -> linear without bias, zero

so that at step 0 the term is exactly zero, the last linear has a gradient at once and everything before it from the
second step on. There is one zero factor on the way, never two: two in a row would have zero gradients for ever.

Features. Every number x enters as x, sin(2^k x) and cos(2^k x), k = -2 .. 3. Scene coordinates have no fixed unit
(metres, or whatever a reconstruction chose), and an MLP on raw numbers is slow to learn what changes within a
fraction of one; with octaves some frequency fits any scale from a tenth to ten times the room. Rays enter as Plücker
moment and direction, which name a line however its points are chosen, plus the camera's origin, which tells apart the
points on that line: what stands between two of them hides what lies behind.

Parameters at width 512: 3.9 million (plucker) and 3.4 million (bias) for D = 5120; 1.3 and 0.9 million for D = 192.

Shapes: B clips, T video frames, F latent frames, h w token rows and columns, D model width.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camera.rays import fold_frames, plucker_rays, scale_intrinsics
from camera.ten_numbers import ten_numbers
from core.errors import InputError
from wan_ext.condition import TEMPORAL_STRIDE
from wan_ext.configs import WanVariant

OCTAVES = (-2, -1, 0, 1, 2, 3)
FEATURES = 1 + 2 * len(OCTAVES)
"""Numbers that a number becomes: itself, and a sine and a cosine of each octave."""


class CameraEncoder(nn.Module):
    """Base of the encoders: checks the clip, keeps the geometry in full precision, and keeps memory small.

    In training the encoder is recomputed in backward: at 81 frames of 480 x 832 its activations would take 0.6 GB while
    the blocks run, and its forward is a ten-thousandth of theirs.

    Args:
        variant: the model: its width, and how many pixels a token covers.
        hidden: width of the hidden layers.
        num_numbers: what `numbers` gives per token, before the octaves.
        generator: CPU generator that draws the weights; None: the global one.
        device: where the weights live.
    """

    def __init__(
        self,
        variant: WanVariant,
        *,
        hidden: int,
        num_numbers: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.patch_size = variant.dit.patch_size
        self.stride = variant.vae.stride
        self.mlp = ZeroStartMLP(num_numbers * FEATURES, hidden, variant.dit.dim, generator=generator).to(device)

    def numbers(self, c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
        """What is known of the camera, per token: [B, F, h | 1, w | 1, num_numbers]."""
        raise NotImplementedError

    def forward(self, c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
        """The term for the tokens.

        Args:
            c2w: camera-to-world poses of every video frame, [B, T, 4, 4], T = 4 (F - 1) + 1.
            K: intrinsics in pixels of the frame, [B, T, 3, 3].
            height: of the frame, pixels.
            width: of the frame, pixels.

        Returns:
            float32 [B, F, h, w, D] or [B, F, 1, 1, D].

        Raises:
            InputError: a number of frames or a frame size that does not fit the model.
        """
        if c2w.shape[1] % TEMPORAL_STRIDE != 1:
            raise InputError(f"camera path: expected 4n + 1 frames (1, 5, 9, ...), found {c2w.shape[1]}")
        for name, pixels, stride, patch in (
            ("height", height, self.stride[1], self.patch_size[1]),
            ("width", width, self.stride[2], self.patch_size[2]),
        ):
            if pixels % (stride * patch):
                raise InputError(f"{name}: expected a multiple of {stride * patch} pixels, found {pixels}")
        device = self.mlp.first.weight.device
        with torch.autocast(device.type, enabled=False):
            numbers = self.numbers(c2w.to(device), K.to(device), height, width).float().contiguous()
            if torch.is_grad_enabled():
                return checkpoint(self.mlp, numbers, use_reentrant=False)
            return self.mlp(numbers)


class BiasEncoder(CameraEncoder):
    """One vector per latent frame, from the ten numbers of its four video frames, the angle of view in radians."""

    def __init__(
        self,
        variant: WanVariant,
        *,
        hidden: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(variant, hidden=hidden, num_numbers=10 * TEMPORAL_STRIDE, generator=generator, device=device)

    def numbers(self, c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
        ten = ten_numbers(c2w, K, width)  # [B, T, 10]
        ten = torch.cat([ten[..., :9], torch.deg2rad(ten[..., 9:])], -1)
        return rearrange(fold_frames(rearrange(ten, "b t c -> b c t 1 1")), "b c f 1 1 -> b f 1 1 c")


class PluckerEncoder(CameraEncoder):
    """One vector per token, from the rays through it in each of the latent frame's four video frames.

    There is one ray per latent pixel, folded into tokens as the DiT folds its latents: four points of a token tell
    where it looks and how wide it is, which is all that a smooth field of rays holds.
    """

    def __init__(
        self,
        variant: WanVariant,
        *,
        hidden: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        rays = variant.dit.patch_size[1] * variant.dit.patch_size[2]
        super().__init__(
            variant, hidden=hidden, num_numbers=(6 * rays + 3) * TEMPORAL_STRIDE, generator=generator, device=device
        )

    def numbers(self, c2w: Tensor, K: Tensor, height: int, width: int) -> Tensor:
        rows, columns = height // self.stride[1], width // self.stride[2]
        K = scale_intrinsics(K, from_size=(height, width), to_size=(rows, columns))
        rays = rearrange(plucker_rays(c2w, K, rows, columns), "b t c h w -> b c t h w")  # [B, 6, T, 2 h, 2 w]
        _, patch_h, patch_w = self.patch_size
        lines = rearrange(fold_frames(rays), "b c f (h p) (w q) -> b f h w (c p q)", p=patch_h, q=patch_w)
        origins = fold_frames(rearrange(c2w[..., :3, 3], "b t c -> b c t 1 1"))  # [B, 12, F, 1, 1]
        origins = repeat(origins, "b c f 1 1 -> b f h w c", h=lines.shape[2], w=lines.shape[3])
        return torch.cat([lines, origins], -1)  # [B, F, h, w, 96 + 12]


class ZeroStartMLP(nn.Module):
    """Octaves, one residual hidden layer, and a last linear that starts at zero.

    Args:
        in_features: numbers times FEATURES.
        hidden: width.
        out_features: D.
        generator: CPU generator that draws all but the last linear; None: the global one.
    """

    def __init__(
        self, in_features: int, hidden: int, out_features: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.first = _linear(in_features, hidden, generator)
        self.second = _linear(hidden, hidden, generator)
        self.third = _linear(hidden, hidden, generator)
        self.last = nn.Linear(hidden, out_features, bias=False, device="meta").to_empty(device="cpu")
        nn.init.zeros_(self.last.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        x = F.silu(self.first(octaves(numbers)))
        x = x + self.third(F.silu(self.second(x)))
        return self.last(x)


class EncoderClass(Protocol):
    """What makes an encoder."""

    def __call__(
        self, variant: WanVariant, *, hidden: int, generator: torch.Generator | None, device: torch.device | str
    ) -> CameraEncoder: ...


INJECTIONS: dict[str, EncoderClass] = {"plucker": PluckerEncoder, "bias": BiasEncoder}
"""Mechanisms by the name that `--network_args injection=` gives them."""


def octaves(numbers: Tensor) -> Tensor:
    """Each number with its sines and cosines at doubling frequencies, [..., C] -> [..., C * FEATURES]."""
    waves = [wave(numbers * 2.0**k) for k in OCTAVES for wave in (torch.sin, torch.cos)]
    return torch.cat([numbers, *waves], -1)


def _linear(in_features: int, out_features: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear that keeps the variance of its input, drawn from one generator; the global one is not touched."""
    linear = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    nn.init.kaiming_normal_(linear.weight, nonlinearity="linear", generator=generator)
    nn.init.zeros_(linear.bias)
    return linear
