"""--weighting_scheme: which noise levels count how much.

Two kinds of scheme, under the names of SD3's training:

    none           every draw counts alike
    cosmap         the loss is weighted: 2 / (pi (1 - 2 sigma + 2 sigma^2)), 0.64 at both ends, 1.27 in the middle
    sigma_sqrt     the loss is weighted: sigma^-2, the levels next to the clean video above all; never above 10^6, the
                   weight of sigma = 1/1000, under which a table of 1000 levels has none
    logit_normal   the draws are weighted: the uniform number under the law `sigma` becomes logit-normal
    mode           the draws are weighted: it becomes u + s (u - sin^2(pi u / 2)), s = --mode_scale

What a law that has a density p(sigma) already makes of it: a weighted loss counts a level p(sigma) w(sigma) times, so
`--timestep_sampling shift --weighting_scheme cosmap` is both together. Weighted draws replace the density of the law,
which only `sigma` leaves open (its draws are uniform before the shift); with any other law they are refused.

Both experts' losses get the same function of sigma. A weighted loss also scales gradients, which AdamW takes out again
within an expert, up to --max_grad_norm.

Exact: the loss weights are those of diffusers' compute_loss_weighting_for_sd3. Its draws are ours too, but the training
scripts that use them read their table of levels from noise to clean: there a positive --logit_mean means less noise,
here, as in the paper, more.

Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch import Tensor

from core.errors import InputError, nearest
from wan_ext.flow import NUM_TRAIN_TIMESTEPS

WeightingScheme = Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"]
OF_DRAWS = ("logit_normal", "mode")
MODE_SCALE = 1.29


def density_of(scheme: str, *, timestep_sampling: str, mode_scale: float | None) -> dict[str, Any]:
    """What a scheme adds to the law of sigma, as `flow.sample_sigma` takes it.

    Args:
        scheme: --weighting_scheme.
        timestep_sampling: the law that it meets.
        mode_scale: --mode_scale, of `mode` alone, in [-1, 2 / (pi - 2)]; None: 1.29.

    Raises:
        InputError: no such scheme, weighted draws with a law that has a density of its own, or a scale that nothing
            uses.
    """
    schemes = get_args(WeightingScheme)
    if scheme not in schemes:
        raise InputError(
            f"--weighting_scheme: expected one of {', '.join(schemes)}, found {scheme!r}{nearest(scheme, schemes)}"
        )
    if scheme in OF_DRAWS and timestep_sampling != "sigma":
        raise InputError(
            f"--weighting_scheme {scheme}: weights the draws of --timestep_sampling sigma, found "
            f"{timestep_sampling!r}, which has a density of its own; take one of the two"
        )
    if mode_scale is not None and scheme != "mode":
        raise InputError(f"--mode_scale {mode_scale:g}: does nothing with --weighting_scheme {scheme}; leave it out")
    if scheme not in OF_DRAWS:
        return {}
    return {"density": scheme, "mode_scale": MODE_SCALE if mode_scale is None else mode_scale}


def loss_weights(scheme: str, sigma: Tensor) -> Tensor | None:
    """What each clip's loss is multiplied with.

    Args:
        scheme: a `WeightingScheme`.
        sigma: [B]

    Returns:
        [B], above 0; None: the scheme weights no loss.
    """
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=1 / NUM_TRAIN_TIMESTEPS) ** -2
    return None
