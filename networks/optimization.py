"""The optimizer of one expert's network.

What: AdamW of torch; AdamW8bit, PagedAdamW8bit and Lion8bit of bitsandbytes; Adafactor of transformers; Prodigy of
prodigyopt; the schedule-free ones of schedulefree; any other class as "module.Class". A library is imported when its
optimizer is asked for.

Learning rates are set before every step from --learning_rate and the schedule (`networks/schedules.py`), so an
optimizer that would set its own is told not to: Adafactor begins with relative_step=False, scale_parameter=False.

Schedule-free optimizers train at one point and are used at another, the average of where they were. `weights_in_use`
goes there for a while, and comes back to the bit: what is saved or filmed on the way changes no later step.

Source: Prodigy: arXiv:2306.06101; schedule-free: arXiv:2405.15682; Adafactor: arXiv:1804.04235; 8-bit states:
arXiv:2110.02861.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError, nearest

OPTIMIZERS = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "Adafactor": "transformers.optimization.Adafactor",
    "Prodigy": "prodigyopt.Prodigy",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
}
"""Names of --optimizer_type, in any case, and what they stand for."""
DEFAULTS: dict[str, dict[str, Any]] = {"Adafactor": {"relative_step": False, "scale_parameter": False}}
"""Where ours differ from the library's."""


def optimizer_name(kind: str) -> str:
    """--optimizer_type as `OPTIMIZERS` spells it, or the "module.Class" that it is.

    Raises:
        InputError: neither.
    """
    spelt = {name.lower(): name for name in OPTIMIZERS} | {path.lower(): name for name, path in OPTIMIZERS.items()}
    if kind.lower() in spelt:
        return spelt[kind.lower()]
    if "." not in kind:
        hint = nearest(kind, tuple(OPTIMIZERS))
        raise InputError(f"--optimizer_type: expected {', '.join(OPTIMIZERS)} or module.Class, found {kind!r}{hint}")
    return kind


def create_optimizer(
    kind: str, groups: list[dict[str, Any]], *, learning_rate: float, optimizer_args: Mapping[str, str]
) -> torch.optim.Optimizer:
    """The optimizer that --optimizer_type names.

    Args:
        kind: a name of `OPTIMIZERS` in any case, or "module.Class".
        groups: parameter groups, each with its own "lr".
        learning_rate: of groups without one.
        optimizer_args: weight_decay, betas, eps, ... as text: "0.01", "0.9,0.999", "True", "None".

    Returns:
        Ready to step; a schedule-free one in its training mode.

    Raises:
        InputError: no such optimizer, its library is not installed, it does not take these arguments, or it takes one
            learning rate and the groups have several.
    """
    name = optimizer_name(kind)
    optimizer_class = _import_class(name)
    parameters = inspect.signature(optimizer_class).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.name not in ("params", "lr")]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    values = dict(DEFAULTS.get(name, {}))
    for key, text in optimizer_args.items():
        if key not in known and (key == "lr" or not takes_any):
            raise InputError(
                f"--optimizer_args: {name} takes {', '.join(known)}, found {key!r}{nearest(key, known)}"
                + ("; that is --learning_rate" if key == "lr" else "")
            )
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise InputError(f"--optimizer_args: expected {key}=NUMBER, found {key}={text}") from None
    rates = sorted({group.get("lr", learning_rate) for group in groups})
    if name == "Prodigy" and len(rates) > 1:
        raise InputError(
            f"--optimizer_type Prodigy: expected one learning rate, which it scales by itself, found "
            f"{' and '.join(f'{rate:g}' for rate in rates)}; leave out camera_lr and loraplus_lr_ratio"
        )
    try:
        optimizer = optimizer_class(groups, lr=learning_rate, **values)
    except (TypeError, ValueError) as error:
        raise InputError(f"--optimizer_args: {name} refuses them: {error}") from None
    if _is_schedule_free(optimizer):
        optimizer.train()
    return optimizer


@contextmanager
def weights_in_use(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the weights to where they are used, for saving, sampling and validation; afterwards back to the bit.

    Only schedule-free optimizers make a difference between the two. Cost: a copy of what is trained, for the while.
    """
    if not _is_schedule_free(optimizer):
        yield
        return
    with restored(parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            optimizer.train()  # type: ignore[attr-defined]  # its mode; the weights that it leaves are rounded


@contextmanager
def restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters be changed for a while; afterwards they are what they were, to the bit."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def _import_class(name: str) -> Any:
    module, _, cls = OPTIMIZERS.get(name, name).rpartition(".")
    try:
        found = getattr(import_module(module), cls)
    except ImportError as error:
        library = module.split(".")[0]
        advice = f"; pip install {library}" if name in OPTIMIZERS else ""
        raise InputError(f"--optimizer_type {name}: expected the library {library}, found: {error}{advice}") from None
    except AttributeError:
        raise InputError(f"--optimizer_type {name}: expected a class {cls} in {module}, found none") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise InputError(f"--optimizer_type {name}: expected a torch.optim.Optimizer, found {found!r}")
    return found


def _is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has modes, as the protocol of schedulefree goes."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
