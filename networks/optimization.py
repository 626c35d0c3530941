"""The optimizer of one expert's network, and how its learning rates change over a run."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from core.errors import InputError, nearest

OPTIMIZERS = ("AdamW8bit", "AdamW")


def create_optimizer(
    kind: str, groups: list[dict[str, Any]], *, learning_rate: float, optimizer_args: Mapping[str, str]
) -> torch.optim.Optimizer:
    """The optimizer that --optimizer_type names.

    Args:
        kind: AdamW8bit (bitsandbytes, states in 8 bits) or AdamW (torch), in any case.
        groups: parameter groups, each with its own "lr".
        learning_rate: of groups without one.
        optimizer_args: weight_decay, betas, eps, ... as text: "0.01", "0.9,0.999".

    Raises:
        InputError: no such optimizer, or it does not take these arguments.
    """
    values = {}
    for key, text in optimizer_args.items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise InputError(f"--optimizer_args: expected {key}=NUMBER, found {key}={text}") from None
    optimizer_class: Any
    if kind.lower() == "adamw":
        optimizer_class = torch.optim.AdamW
    elif kind.lower() == "adamw8bit":
        import bitsandbytes  # only here: some machines with a GPU lack it

        optimizer_class = bitsandbytes.optim.AdamW8bit
    else:
        hint = nearest(kind, OPTIMIZERS)
        raise InputError(f"--optimizer_type: expected {' or '.join(OPTIMIZERS)}, found {kind!r}{hint}")
    try:
        return optimizer_class(groups, lr=learning_rate, **values)
    except (TypeError, ValueError) as error:
        raise InputError(f"--optimizer_args: {kind} refuses them: {error}") from None


def learning_rate_factor(
    step: int, *, schedule: Literal["constant", "linear", "cosine"], warmup_steps: int, max_steps: int
) -> float:
    """What learning rates are multiplied with at a step: a rise over the warm-up, then the schedule.

    Args:
        step: from 0.
        schedule: constant stays at 1; linear and cosine fall to 0 at max_steps.
        warmup_steps: steps of the rise from near 0.
        max_steps: of the whole run.

    Returns:
        In [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
