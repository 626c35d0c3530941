"""Which files, which task and which experts a run trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from core.errors import InputError
from core.model_files import ModelFiles, resolve_model
from wan_ext.configs import Expert, WanVariant, get_variant

ChosenExperts = Literal["both", "high", "low"]


def settle_model(
    flags: Mapping[str, str | Path | None],
    *,
    table: Mapping[str, str],
    table_source: Path,
    experts: ChosenExperts,
    timestep_boundary: float | None,
    filming: bool,
) -> tuple[ModelFiles, WanVariant]:
    """The files of a run, and its task.

    Args:
        flags: task, ckpt_dir, dit, dit_high_noise, vae and t5 as given on the command line; None: not given.
        table: the [model] table of the data set, for what the flags leave out.
        table_source: the file that the table is from, for messages.
        experts: those that are trained.
        timestep_boundary: where the experts meet, in [0, 1] or [0, 1000]; None: where the task says.
        filming: whether every expert and the VAE are needed, to make videos.

    Raises:
        InputError: a file is missing, the task is unknown or has no such expert, the boundary makes no sense.
    """
    task = resolve_model(flags, table=table, table_source=table_source, needs=()).task
    variant = get_variant(task)
    if timestep_boundary is not None:
        boundary = timestep_boundary / (1000 if timestep_boundary > 1 else 1)
        if variant.boundary is None or not 0 < boundary < 1:
            raise InputError(
                f"--timestep_boundary: expected a number between 0 and 1 (or 1000) for a task of two experts, found "
                f"{timestep_boundary} for {variant.name}"
            )
        variant = replace(variant, boundary=boundary)
    names = variant.experts if filming else trained_experts(variant, experts)
    needs = ["dit" if name == "low" else "dit_high_noise" for name in names]
    needs += ["vae"] if filming else []
    return resolve_model(flags, table=table, table_source=table_source, needs=needs), variant


def trained_experts(variant: WanVariant, experts: ChosenExperts) -> tuple[Expert, ...]:
    """The experts that are trained. Raises InputError: the task has no such expert."""
    if experts == "both":
        return variant.experts
    if experts not in variant.experts:
        raise InputError(f"--experts {experts}: {variant.name} has one expert, called low")
    return (experts,)
