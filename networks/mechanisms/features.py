"""From poses and intrinsics to what a small network can read: numbers per frame or per token, octaves, and an MLP.

    frame numbers   position, right and down axis, angle of view, of a latent frame's four video frames   40 a frame
    ray numbers     rays of the four frames through a 2 x 2 grid in each token, and their origins          108 a token

Every number x enters as x, sin(2^k x) and cos(2^k x), k = -2 .. 3. Scene coordinates have no fixed unit (metres, or
whatever a reconstruction chose), and an MLP on raw numbers is slow to learn what changes within a fraction of one; with
octaves some frequency fits any scale from a tenth to ten times the room. Rays enter as Plücker moment and direction,
which name a line however its points are chosen, plus the camera's origin, which tells apart the points on that line:
what stands between two of them hides what lies behind.

    features -> linear -> SiLU -> (+ linear, SiLU, linear) -> linear without bias

The last linear starts at zero where its output is added to the video, so that the camera changes exactly nothing at
step 0, the last linear has a gradient at once and everything before it from the second step on. Where a linear that
starts at zero follows in the blocks, it starts alive: two zero factors in a row would have zero gradients for ever.

Shapes: B clips, T video frames, F latent frames, h w token rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camera.rays import fold_frames, plucker_rays, scale_intrinsics
from camera.ten_numbers import ten_numbers
from core.errors import InputError
from wan_ext.condition import TEMPORAL_STRIDE, CameraCondition
from wan_ext.configs import WanVariant

OCTAVES = (-2, -1, 0, 1, 2, 3)
FEATURES = 1 + 2 * len(OCTAVES)
"""Numbers that a number becomes: itself, and a sine and a cosine of each octave."""
FRAME_NUMBERS = 10 * TEMPORAL_STRIDE


class CameraEncoder(nn.Module):
    """Base of the encoders: checks the clip and keeps the geometry in full precision."""

    prefix = "camera_encoder."
    """What the names of its weights begin with in a file."""

    def __init__(self, variant: WanVariant) -> None:
        super().__init__()
        self.patch_size = variant.dit.patch_size
        self.stride = variant.vae.stride

    def encode(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        """What the DiT is told; the arguments are those of `forward`, checked and on the encoder's device."""
        raise NotImplementedError

    def forward(self, c2w: Tensor, K: Tensor, height: int, width: int) -> CameraCondition:
        """What the DiT is told of the camera.

        Args:
            c2w: camera-to-world poses of every video frame, [B, T, 4, 4], T = 4 (F - 1) + 1.
            K: intrinsics in pixels of the frame, [B, T, 3, 3].
            height: of the frame, pixels.
            width: of the frame, pixels.

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
        device = next((parameter.device for parameter in self.parameters()), c2w.device)
        with torch.autocast(device.type, enabled=False):
            return self.encode(c2w.to(device), K.to(device), height, width)


class FeatureMLP(nn.Module):
    """Octaves, one residual hidden layer, and a last linear.

    In training it is recomputed in backward: at 81 frames of 480 x 832 its activations per token would take 0.6 GB
    while the blocks run, and its forward is a ten-thousandth of theirs.

    Args:
        num_numbers: what it reads.
        hidden: width.
        out_features: width of the output.
        zero_start: whether the last linear starts at zero.
        generator: CPU generator that draws the weights; None: the global one.
    """

    def __init__(
        self,
        num_numbers: int,
        hidden: int,
        out_features: int,
        *,
        zero_start: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.first = live_linear(num_numbers * FEATURES, hidden, generator)
        self.second = live_linear(hidden, hidden, generator)
        self.third = live_linear(hidden, hidden, generator)
        if zero_start:
            self.last = zero_linear(hidden, out_features)
        else:
            self.last = live_linear(hidden, out_features, generator, bias=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """[..., num_numbers] of any precision -> float32 [..., out_features]"""
        numbers = numbers.float().contiguous()
        if torch.is_grad_enabled() and self.first.weight.requires_grad:
            return checkpoint(self.compute, numbers, use_reentrant=False)
        return self.compute(numbers)

    def compute(self, numbers: Tensor) -> Tensor:
        """The same, with everything that backward needs kept."""
        x = F.silu(self.first(octaves(numbers)))
        x = x + self.third(F.silu(self.second(x)))
        return self.last(x)


def frame_numbers(c2w: Tensor, K: Tensor, width: int) -> Tensor:
    """The ten numbers of each of a latent frame's four video frames, the angle of view in radians: [B, F, 1, 1, 40]."""
    ten = ten_numbers(c2w, K, width)  # [B, T, 10]
    ten = torch.cat([ten[..., :9], torch.deg2rad(ten[..., 9:])], -1)
    return rearrange(fold_frames(rearrange(ten, "b t c -> b c t 1 1")), "b c f 1 1 -> b f 1 1 c")


def num_ray_numbers(patch_size: tuple[int, int, int]) -> int:
    """How many `ray_numbers` a token has: moments and directions of its rays, and the origin that they share."""
    return TEMPORAL_STRIDE * (6 * patch_size[1] * patch_size[2] + 3)


def ray_numbers(
    c2w: Tensor, K: Tensor, height: int, width: int, *, stride: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> Tensor:
    """The rays through each token in each of the latent frame's four video frames, and their origins.

    There is one ray per latent pixel, folded into tokens as the DiT folds its latents: four points of a token tell
    where it looks and how wide it is, which is all that a smooth field of rays holds.

    Returns:
        [B, F, h, w, 96 + 12] for patches of 2 x 2
    """
    rows, columns = height // stride[1], width // stride[2]
    K = scale_intrinsics(K, from_size=(height, width), to_size=(rows, columns))
    rays = rearrange(plucker_rays(c2w, K, rows, columns), "b t c h w -> b c t h w")  # [B, 6, T, 2 h, 2 w]
    lines = rearrange(fold_frames(rays), "b c f (h p) (w q) -> b f h w (c p q)", p=patch_size[1], q=patch_size[2])
    origins = fold_frames(rearrange(c2w[..., :3, 3], "b t c -> b c t 1 1"))  # [B, 12, F, 1, 1]
    origins = repeat(origins, "b c f 1 1 -> b f h w c", h=lines.shape[2], w=lines.shape[3])
    return torch.cat([lines, origins], -1)


def octaves(numbers: Tensor) -> Tensor:
    """Each number with its sines and cosines at doubling frequencies, [..., C] -> [..., C * FEATURES]."""
    waves = [wave(numbers * 2.0**k) for k in OCTAVES for wave in (torch.sin, torch.cos)]
    return torch.cat([numbers, *waves], -1)


def live_linear(
    in_features: int, out_features: int, generator: torch.Generator | None, *, bias: bool = True
) -> nn.Linear:
    """A linear that keeps the variance of its input, drawn from one generator; the global one is not touched."""
    linear = nn.Linear(in_features, out_features, bias=bias, device="meta").to_empty(device=torch.get_default_device())
    nn.init.kaiming_normal_(linear.weight, nonlinearity="linear", generator=generator)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear without bias that starts at zero."""
    linear = nn.Linear(in_features, out_features, bias=False, device="meta").to_empty(device=torch.get_default_device())
    nn.init.zeros_(linear.weight)
    return linear


def linear_as(x: Tensor, linear: nn.Linear) -> Tensor:
    """A linear without bias in the dtype of its input, whatever its own is. [..., in] -> [..., out]"""
    return F.linear(x, linear.weight.to(x.dtype))
