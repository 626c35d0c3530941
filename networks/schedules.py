"""Learning rates over a run: what they are multiplied with, as a pure function of the step.

What: the schedules of transformers by their names, and REX. Flags carry musubi-tuner's names.

How: `make_schedule` checks the flags against the schedule that is chosen; one that would do nothing is refused.
`Schedule.factor(step)` is the rest. Nothing is remembered from step to step, so a resumed run needs no state.

A step is one optimizer step of the run, whichever expert takes it. With two experts both follow the one curve, each at
its own steps: warm-up and decay end at the same step for both, and an expert that is drawn in a third of the steps
takes a third of the warm-up's. As in transformers a warm-up begins at exactly 0: step 0 changes no weight.

Exact: equal to transformers' functions step by step, but for polynomial, which here ends at 0 unless
--lr_scheduler_min_lr_ratio says otherwise (there at 1e-7, not scaled with the learning rate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.errors import InputError, nearest

WARMUP, DECAY, CYCLES = "--lr_warmup_steps", "--lr_decay_steps", "--lr_scheduler_num_cycles"
POWER, MIN_RATIO, TIMESCALE = "--lr_scheduler_power", "--lr_scheduler_min_lr_ratio", "--lr_scheduler_timescale"

SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (WARMUP,),
    "linear": (WARMUP,),
    "cosine": (WARMUP,),
    "cosine_with_restarts": (WARMUP, CYCLES),
    "polynomial": (WARMUP, POWER, MIN_RATIO),
    "inverse_sqrt": (WARMUP, TIMESCALE),
    "cosine_with_min_lr": (WARMUP, CYCLES, MIN_RATIO),
    "cosine_warmup_with_min_lr": (WARMUP, CYCLES, MIN_RATIO),
    "warmup_stable_decay": (WARMUP, DECAY, CYCLES, MIN_RATIO),
    "rex": (WARMUP, MIN_RATIO),
}
"""The flags that act, by schedule."""
LOOK_AT_THE_LOSS = ("reduce_lr_on_plateau", "greedy")
"""Of transformers too, but no function of the step."""
REX_ALPHA, REX_BETA = 0.1, 0.9
"""REX is z / (alpha + beta z) of the share z of steps that remain. The paper has 1/2 and 1/2; these are the constants
of the trainers whose flags we share: closer to constant, then a steeper fall."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One schedule with its numbers; made by `make_schedule`, which checks them."""

    name: str
    max_steps: int  # of the whole run
    warmup_steps: int = 0
    decay_steps: int = 0  # at the end, of warmup_stable_decay
    num_cycles: int = 1
    power: float = 1.0
    min_lr_ratio: float = 0.0  # where a fall ends
    timescale: int = 10_000  # of inverse_sqrt: the rate is halved at four times it

    def factor(self, step: int) -> float:
        """What learning rates are multiplied with.

        Args:
            step: optimizer steps of the run done before this one, of all experts together.

        Returns:
            In [0, 1].
        """
        warmup, low = self.warmup_steps, self.min_lr_ratio
        if step < warmup:
            if self.name == "cosine_warmup_with_min_lr":  # the one that begins above 0
                return (step + 1) / warmup
            rise = step / warmup
            return low + (1 - low) * rise if self.name == "warmup_stable_decay" else rise
        done = (step - warmup) / max(1, self.max_steps - warmup)  # of what is after the warm-up, in [0, 1)
        if self.name in ("constant", "constant_with_warmup"):
            return 1.0
        if self.name == "linear":
            return max(0.0, 1 - done)
        if self.name == "cosine":
            return _wave(done)
        if self.name == "cosine_with_restarts":
            return _wave(self.num_cycles * done % 1) if done < 1 else 0.0
        if self.name == "polynomial":
            return low + (1 - low) * max(0.0, 1 - done) ** self.power
        if self.name == "inverse_sqrt":
            return 1 / math.sqrt((step - warmup) / self.timescale + 1)
        if self.name == "cosine_with_min_lr":
            return low + (1 - low) * _wave(self.num_cycles * done)
        if self.name == "cosine_warmup_with_min_lr":
            done = (step - warmup + 1) / max(1, self.max_steps - warmup)
            return low + (1 - low) * _wave(self.num_cycles * done)
        if self.name == "warmup_stable_decay":
            falling = step - (self.max_steps - self.decay_steps)
            if falling < 0:
                return 1.0
            return low + (1 - low) * _wave(self.num_cycles * falling / self.decay_steps)
        z = max(0.0, 1 - done)
        return low + (1 - low) * z / (REX_ALPHA + REX_BETA * z)


def make_schedule(
    name: str,
    *,
    max_steps: int,
    warmup_steps: float = 0,
    decay_steps: float | None = None,
    num_cycles: int | None = None,
    power: float | None = None,
    min_lr_ratio: float | None = None,
    timescale: int | None = None,
) -> Schedule:
    """The schedule that the flags describe.

    Args:
        name: --lr_scheduler.
        max_steps: of the whole run.
        warmup_steps: a whole number, or a share of max_steps below 1.
        decay_steps: likewise; of warmup_stable_decay, which needs it.
        num_cycles: waves; at least 1.
        power: of polynomial; above 0.
        min_lr_ratio: share of the learning rate that is left at the end, in [0, 1).
        timescale: of inverse_sqrt; None: the warm-up, or 10000 without one.

    Raises:
        InputError: no such schedule, a flag that does nothing for it, one that it needs, or a number out of range.

    Source: the formulas of transformers' optimization.py; REX: Chen et al. 2021, arXiv:2107.04197; warmup_stable_decay:
    Hu et al. 2024, arXiv:2404.06395.
    """
    if name in LOOK_AT_THE_LOSS:
        raise InputError(
            f"--lr_scheduler: {name} follows the loss, found no function of the step in it; a resumed run would not "
            f"equal an uninterrupted one: take one of {', '.join(SCHEDULES)}"
        )
    if name not in SCHEDULES:
        raise InputError(
            f"--lr_scheduler: expected one of {', '.join(SCHEDULES)}, found {name!r}{nearest(name, SCHEDULES)}"
        )
    given = {
        WARMUP: warmup_steps or None,
        DECAY: decay_steps,
        CYCLES: num_cycles,
        POWER: power,
        MIN_RATIO: min_lr_ratio,
        TIMESCALE: timescale,
    }
    for flag, value in given.items():
        if value is not None and flag not in SCHEDULES[name]:
            fitting = [other for other, flags in SCHEDULES.items() if flag in flags]
            raise InputError(
                f"{flag} {value:g}: does nothing with --lr_scheduler {name}; leave it out, or take "
                f"{' or '.join(fitting)}"
            )
    needed = DECAY if name == "warmup_stable_decay" else MIN_RATIO if name.endswith("min_lr") else None
    if needed is not None and given[needed] is None:
        raise InputError(f"--lr_scheduler {name}: expected {needed}, found none")
    warmup = _steps(WARMUP, warmup_steps, max_steps)
    decay = 0 if decay_steps is None else _steps(DECAY, decay_steps, max_steps)
    if warmup + decay > max_steps or (decay_steps is not None and decay == 0):
        raise InputError(
            f"{WARMUP} {DECAY}: expected a decay of at least 1 step and both within the {max_steps} steps of the run, "
            f"found {warmup} and {decay}"
        )
    for flag, number, fits, expected in (
        (CYCLES, num_cycles, num_cycles is None or num_cycles >= 1, "at least 1"),
        (POWER, power, power is None or 0 < power < math.inf, "a number above 0"),
        (MIN_RATIO, min_lr_ratio, min_lr_ratio is None or 0 <= min_lr_ratio < 1, "a share from 0 to below 1"),
        (TIMESCALE, timescale, timescale is None or timescale >= 1, "at least 1"),
    ):
        if not fits:
            raise InputError(f"{flag}: expected {expected}, found {number}")
    return Schedule(
        name=name,
        max_steps=max_steps,
        warmup_steps=warmup,
        decay_steps=decay,
        num_cycles=1 if num_cycles is None else num_cycles,
        power=1.0 if power is None else power,
        min_lr_ratio=0.0 if min_lr_ratio is None else min_lr_ratio,
        timescale=timescale or warmup or 10_000,
    )


def _steps(flag: str, value: float, max_steps: int) -> int:
    """A number of steps from a number or a share of all."""
    if not 0 <= value < math.inf or (value > 1 and value != int(value)):
        raise InputError(f"{flag}: expected a whole number of steps, or a share of the run below 1, found {value:g}")
    return int(value * max_steps) if value < 1 else int(value)


def _wave(turns: float) -> float:
    """A fall from 1 to 0 along half a cosine wave, and back again if it goes on."""
    return 0.5 * (1 + math.cos(math.pi * turns))
