"""From noise to latents: the official noise schedules, three solvers, classifier-free guidance.

    unipc   UniPC, order 2; starts at sigma 0.999           } diffusers' solvers, given the official sigmas: the ones
    dpm++   DPM-Solver++ 2M; starts at sigma 1              } that diffusers makes itself differ from Wan's
    euler   Euler; starts at sigma 1

The velocity is a callable of latents and timestep, so that whoever samples a mixture of experts chooses the expert
inside it by `wan_ext.experts.expert_at`. Latents stay float32 from the noise to the end.

Sources: Wan-Video/Wan2.2 `wan/utils/fm_solvers.py`, `fm_solvers_unipc.py`; Zhao et al. 2023, arXiv:2302.04867 (UniPC);
Lu et al. 2022, arXiv:2211.01095 (DPM-Solver++); Ho and Salimans 2022, arXiv:2207.12598 (guidance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from core.errors import InputError, nearest
from wan_ext.flow import NUM_TRAIN_TIMESTEPS, shift_sigma

Solver = Literal["unipc", "dpm++", "euler"]
Velocity = Callable[[Tensor, float], Tensor]


def sigmas(solver: Solver, steps: int, shift: float) -> Tensor:
    """The noise levels between which a solver steps, from noise to 0.

    Args:
        solver: unipc starts below pure noise, the others at it.
        steps: how many.
        shift: moves the levels towards noise.

    Returns:
        float64, decreasing, the last is 0. [steps + 1]

    Raises:
        InputError: no solver of that name, or a number that makes no schedule.
    """
    if solver not in get_args(Solver):
        known = get_args(Solver)
        raise InputError(f"sample_solver: expected one of {', '.join(known)}, found {solver!r}{nearest(solver, known)}")
    if steps < 1 or not shift > 0:
        raise InputError(f"sampling: expected at least 1 step and a shift above 0, found {steps} steps, shift {shift}")
    # To the last bit as officially (numpy's linspace; 0.999 in float32): timesteps are these numbers cut to integers.
    first = float(np.float32(0.999)) if solver == "unipc" else 1.0
    return shift_sigma(torch.from_numpy(np.linspace(first, 0, steps + 1)), shift)


def timesteps(solver: Solver, steps: int, shift: float) -> Tensor:
    """The timestep that the DiT is told at each step: 1000 * sigma. [steps]

    The official solvers cut it to an integer; Euler is ours and tells the true value.
    """
    exact = sigmas(solver, steps, shift)[:-1] * NUM_TRAIN_TIMESTEPS
    return exact if solver == "euler" else exact.long()


def sample(
    velocity: Velocity,
    latents: Tensor,
    *,
    solver: Solver,
    steps: int,
    shift: float,
    constrain: Callable[[Tensor], Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate the velocity from noise to clean latents.

    Args:
        velocity: latents [B, C, F, H, W] and timestep (1000 * sigma) -> velocity of the same shape.
        latents: pure noise. [B, C, F, H, W]
        solver, steps, shift: see `sigmas`.
        constrain: what must hold of the latents, re-imposed at the start and after every step
            (TI2V: `condition.with_first_frame`).
        on_step: told the number of steps done and the latents, after each of them.

    Returns:
        float32. [B, C, F, H, W]
    """
    step = _euler_step(steps, shift) if solver == "euler" else _multistep(solver, steps, shift)
    constrain = constrain or (lambda x: x)
    latents = constrain(latents.float())
    for index, timestep in enumerate(timesteps(solver, steps, shift).tolist()):
        latents = constrain(step(index, velocity(latents, timestep).float(), latents))
        if on_step is not None:
            on_step(index + 1, latents)
    return latents


def guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Away from the prediction without the prompt, by `scale` times the difference; 1 is the plain prediction."""
    return uncond + scale * (cond - uncond)


def _euler_step(steps: int, shift: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    levels = sigmas("euler", steps, shift).tolist()
    return lambda index, velocity, latents: latents + (levels[index + 1] - levels[index]) * velocity


def _multistep(solver: Solver, steps: int, shift: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    """One step of diffusers' solver on our sigmas. It remembers past velocities, so it serves one trajectory."""
    # Imported here: diffusers takes seconds to load, and training needs none of it.
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind: Any = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    scheduler = kind(solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas(solver, steps, shift).float()
    scheduler.timesteps = timesteps(solver, steps, shift)
    scheduler.set_begin_index(0)  # by index: two steps near sigma 1 may share an integer timestep
    return lambda index, velocity, latents: scheduler.step(
        velocity, scheduler.timesteps[index], latents, return_dict=False
    )[0]
