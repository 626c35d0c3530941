"""Flow matching on Wan latents, and the laws by which training draws noise levels.

    noised   = (1 - sigma) * latents + sigma * noise
    velocity = d noised / d sigma = noise - latents          (what the DiT predicts)

sigma is in [0, 1]: 0 is the clean video, 1 is pure noise. The DiT embeds timestep = 1000 * sigma.

Every law is the image of a uniform u under an increasing function, so a law restricted to an expert's interval
[low, high) is that function on the interval of u which maps there: no draw is rejected, none is moved.

Shapes: B batch, C latent channels, F latent frames, H and W latent height and width.
Sources: Lipman et al. 2023, arXiv:2210.02747; `shift_sigma` and the logit-normal law: Esser et al. 2024,
arXiv:2403.03206. The laws carry musubi-tuner's names and meanings.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from core.errors import InputError, nearest

SigmaLaw = Literal["uniform", "sigmoid", "shift", "logit_normal", "sigma"]
Density = Literal["uniform", "logit_normal", "mode"]
"""Of the number under the law "sigma"."""
NUM_TRAIN_TIMESTEPS = 1000
"""Length of the discrete table of the law "sigma", and the timestep of pure noise."""
MAX_MODE_SCALE = 2 / (math.pi - 2)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Latents at noise level sigma: (1 - sigma) * latents + sigma * noise.

    Args:
        latents, noise: [B, C, F, H, W]
        sigma: one per clip, or one per clip and latent frame. [B] or [B, F]

    Returns:
        [B, C, F, H, W]
    """
    sigma = sigma.to(latents)
    sigma = sigma.view(-1, 1, 1, 1, 1) if sigma.ndim == 1 else sigma[:, None, :, None, None]
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the DiT learns to predict: noise - latents. [B, C, F, H, W]"""
    return noise - latents


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move sigma towards noise (shift > 1); 0 and 1 stay. Any shape in, the same shape out."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigma(
    batch_size: int,
    *,
    law: SigmaLaw,
    low: float = 0.0,
    high: float = 1.0,
    shift: float = 1.0,
    sigmoid_scale: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    density: Density = "uniform",
    mode_scale: float = 0.0,
    generator: torch.Generator,
) -> Tensor:
    """Draw one noise level per clip from a law restricted to [low, high).

    Args:
        batch_size: how many.
        law: with u uniform on [0, 1) and n standard normal,
            uniform: u; sigmoid: sigmoid(sigmoid_scale n); shift: the same, then `shift_sigma`;
            logit_normal: sigmoid(logit_mean + logit_std n); sigma: one of the 1000 levels shift_sigma(i / 1000), i > 0.
        low, high: the noise interval of the expert in training, e.g. (0.875, 1.0) for the high-noise one.
            The upper end 1 belongs to the interval (it is a level of the discrete law).
        shift, sigmoid_scale, logit_mean, logit_std: parameters of the laws that name them.
        density: of the number from which the law sigma makes its level i: uniform, sigmoid(logit_mean + logit_std n),
            or mode: u + mode_scale (u - sin^2(pi u / 2)).
        mode_scale: in [-1, 2 / (pi - 2)], where that rises with u; above 0 the middle is drawn more often.
        generator: source of the randomness, on the CPU.

    Returns:
        float32. [B]

    Raises:
        InputError: the law is unknown, a scale is not positive, or the law never falls into the interval.
    """
    quantile = _Law(
        law,
        shift=shift,
        sigmoid_scale=sigmoid_scale,
        logit_mean=logit_mean,
        logit_std=logit_std,
        density=density,
        mode_scale=mode_scale,
    )
    low_u, high_u = quantile.interval(low, high)
    u = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    sigma = quantile(low_u + u * (high_u - low_u)).float()
    # A rounding error may carry a draw over an end of the interval, and the experts' intervals must not overlap.
    below_high = 1.0 if high >= 1 else torch.nextafter(torch.tensor(high), torch.tensor(0.0)).item()
    return sigma.clamp(low, below_high)


def interval_probability(
    law: SigmaLaw,
    *,
    low: float,
    high: float,
    shift: float = 1.0,
    sigmoid_scale: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    density: Density = "uniform",
    mode_scale: float = 0.0,
) -> float:
    """How much of a law's mass lies in [low, high): with what probability training picks the expert of that interval.

    The arguments are those of `sample_sigma`.
    """
    quantile = _Law(
        law,
        shift=shift,
        sigmoid_scale=sigmoid_scale,
        logit_mean=logit_mean,
        logit_std=logit_std,
        density=density,
        mode_scale=mode_scale,
    )
    low_u, high_u = quantile.interval(low, high, allow_empty=True)
    return high_u - low_u


class _Law:
    """One law as the quantile function that makes it from a uniform u, and that function's inverse."""

    def __init__(
        self,
        law: SigmaLaw,
        *,
        shift: float,
        sigmoid_scale: float,
        logit_mean: float,
        logit_std: float,
        density: Density,
        mode_scale: float,
    ):
        if law not in get_args(SigmaLaw):
            known = get_args(SigmaLaw)
            raise InputError(
                f"timestep_sampling: expected one of {', '.join(known)}, found {law!r}{nearest(law, known)}"
            )
        for name, scale in (("shift", shift), ("sigmoid_scale", sigmoid_scale), ("logit_std", logit_std)):
            if not scale > 0:
                raise InputError(f"timestep_sampling: {name} must be above 0, found {scale}")
        self.law = law
        self.shift = shift if law in ("shift", "sigma") else 1.0
        takes_logit = "logit_normal" in (law, density)
        self.mean, self.std = (logit_mean, logit_std) if takes_logit else (0.0, sigmoid_scale)
        if density != "uniform" and law != "sigma":
            raise InputError(
                f"timestep_sampling: the law {law!r} has a density of its own, found {density!r} beside it"
            )
        if not -1 <= mode_scale <= MAX_MODE_SCALE:
            raise InputError(f"mode_scale: expected a number in [-1, {MAX_MODE_SCALE:.3f}], found {mode_scale:g}")
        self.density, self.mode_scale = density, mode_scale
        self.is_normal = law in ("sigmoid", "shift", "logit_normal")

    def __call__(self, u: Tensor) -> Tensor:
        """Quantile function: u in [0, 1], float64 -> sigma."""
        if self.is_normal:
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        elif self.law == "sigma":
            level = (self._spread(u) * NUM_TRAIN_TIMESTEPS).floor() + 1
            u = level.clamp(max=NUM_TRAIN_TIMESTEPS) / NUM_TRAIN_TIMESTEPS
        return shift_sigma(u, self.shift)

    def _spread(self, u: Tensor) -> Tensor:
        """Quantile function of the density: float64 in [0, 1] -> the same."""
        if self.density == "logit_normal":
            return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return u + self.mode_scale * (u - torch.sin(math.pi / 2 * u) ** 2) if self.density == "mode" else u

    def _gather(self, value: float) -> float:
        """The inverse of `_spread`: how much of the density lies below a number."""
        if self.density == "logit_normal":
            logit = torch.logit(torch.tensor(value, dtype=torch.float64))
            return torch.special.ndtr((logit - self.mean) / self.std).item()
        if self.density == "uniform":
            return value
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            below = self._spread(torch.tensor(middle, dtype=torch.float64)).item() < value
            low, high = (middle, high) if below else (low, middle)
        return high if value > 0 else 0.0

    def interval(self, low: float, high: float, *, allow_empty: bool = False) -> tuple[float, float]:
        """The ends of the interval of u whose quantiles are the sigma in [low, high), or in [low, 1]."""
        if not 0 <= low < high <= 1:
            raise InputError(f"timestep_sampling: expected an interval 0 <= low < high <= 1, found [{low}, {high})")
        if self.law == "sigma":
            table = (torch.arange(NUM_TRAIN_TIMESTEPS, dtype=torch.float64) + 1) / NUM_TRAIN_TIMESTEPS
            levels = shift_sigma(table, self.shift)
            low_u = self._gather((levels < low).sum().item() / NUM_TRAIN_TIMESTEPS)
            high_u = 1.0 if high == 1 else self._gather((levels < high).sum().item() / NUM_TRAIN_TIMESTEPS)
        else:
            low_u, high_u = self._cdf(low), self._cdf(high)
        if not low_u < high_u and not allow_empty:
            raise InputError(
                f"timestep_sampling: the law {self.law!r} with these parameters never draws a sigma in [{low}, {high})"
            )
        return low_u, high_u

    def _cdf(self, sigma: float) -> float:
        """How much of a continuous law lies below sigma."""
        # Undoing the shift of 1 may round to above 1, of which there is no logit.
        unshifted = shift_sigma(torch.tensor(sigma, dtype=torch.float64), 1 / self.shift).clamp(0, 1)
        if self.is_normal:
            return torch.special.ndtr((torch.logit(unshifted) - self.mean) / self.std).item()
        return unshifted.item()
