"""A run that ends before its end leaves the state of its last whole step: Ctrl-C, SIGTERM, a card that is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from core.errors import InputError
from networks.checkpoint import save_state
from networks.last_step import LastStep, is_lost


class Terminated(BaseException):
    """SIGTERM, as a scheduler sends it before it takes the machine away."""


@contextmanager
def ending_early(last: LastStep, folder: Path, *, config: Mapping[str, object], saves: bool) -> Iterator[None]:
    """Save the last whole step when something ends the block.

    SIGTERM then leaves the block without an error, so that the command ends with code 0; Ctrl-C goes on as the
    interruption that it is.

    Args:
        last: what is saved.
        folder: of the state.
        config: of the run, written into the state.
        saves: whether this process does it; the others only end.

    Raises:
        InputError: a device was lost, or its memory ran out where no step can be repeated (in the optimizer, in a
            validation); the message names the state to go on with.
    """

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, Terminated) as end:
        step = _save(last, folder, config) if saves else 0
        tqdm.write(f"ended after step {step}; go on with --resume {folder}")
        if isinstance(end, KeyboardInterrupt):
            raise
    except Exception as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if not (out_of_memory or is_lost(error)):
            raise
        step = _save(last, folder, config) if saves else 0
        what = "device memory ran out" if out_of_memory else "the device was lost"
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{what} after step {step} ({reason}); the state of that step is saved: go on with --resume {folder}"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _save(last: LastStep, folder: Path, config: Mapping[str, object]) -> int:
    parts, step = last.parts()
    save_state(folder, parts, step=step, config=config)
    return step
