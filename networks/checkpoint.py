"""The state of a training run on disk: what a resumed run needs to go on as if it had never stopped.

    FOLDER/state.json                       step, settings of each network, echo of the configuration; names the other
    files FOLDER/{high|low}.safetensors           adapters and camera encoder of an expert, float32
    FOLDER/{high|low}_optimizer.pt          state of its optimizer
    FOLDER/{high|low}_average.safetensors   moving average of its weights, where the run keeps one

A state is written into a temporary folder that takes its name when it is whole, so a run that is killed at any moment
leaves the old state or the new one. Random numbers need no state here: they are a function of (seed, step, rank,
purpose).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from core.errors import InputError
from core.files import atomic_folder, fingerprint, read_safetensors, save_safetensors
from networks.network import Network

VERSION = 1
STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True)
class StatePart:
    """What a state holds of one expert."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    network_settings: Mapping[str, str]
    optimizer_settings: Mapping[str, str]
    average: Mapping[str, Tensor] | None = None


def state_part(
    network: Network, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None = None
) -> StatePart:
    """What there is to save of an expert now; the tensors are the live ones, not copies."""
    return StatePart(
        weights=network.lora_state() | network.camera_state(),
        optimizer=optimizer.state_dict(),
        network_settings=network.metadata(),
        optimizer_settings=_describe(network, optimizer),
        average=average,
    )


def save_state(
    folder: Path, parts: Mapping[str, StatePart], *, step: int, config: Mapping[str, object] | None = None
) -> None:
    """Write the state of a run, atomically; a state that is already there is replaced when the new one is whole.

    Args:
        folder: of the state, by convention one per step, beside the weights.
        parts: by expert.
        step: optimizer steps done, of all experts together.
        config: what the run was started with, for people and for comparison; must go into JSON.
    """
    folder = Path(folder)
    _clear_leftovers(folder)
    with atomic_folder(folder) as temporary:
        for expert, part in parts.items():
            save_safetensors(part.weights, temporary / f"{expert}.safetensors", part.network_settings)
            torch.save(dict(part.optimizer), temporary / f"{expert}_optimizer.pt")
            if part.average is not None:
                save_safetensors(part.average, temporary / f"{expert}_average.safetensors", {})
        state = {
            "version": VERSION,
            "step": step,
            "networks": {expert: part.network_settings for expert, part in parts.items()},
            "optimizers": {expert: part.optimizer_settings for expert, part in parts.items()},
            "files": {file.name: fingerprint(file) for file in sorted(temporary.iterdir())},
            "config": dict(config or {}),
        }
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1, default=str), encoding="utf-8")
        for file in temporary.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())


def load_state(
    folder: Path,
    *,
    networks: Mapping[str, Network],
    optimizers: Mapping[str, torch.optim.Optimizer],
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> int:
    """Read a state into networks and optimizers that were made with the same settings.

    Args:
        folder: a state, or a folder of states of which the latest is taken.
        networks: by expert; their weights are replaced.
        optimizers: by expert; likewise.
        averages: by expert, for a run that keeps moving averages; written into.

    Returns:
        The number of steps done.

    Raises:
        InputError: no state, a broken one, or one of another task, expert, rank, injection, pose frame, ...: the
        message
            names what differs. Nothing is changed then.
    """
    folder = latest_state(folder)
    state = read_state(folder)
    if state["networks"].keys() != networks.keys():
        found = " and ".join(state["networks"])
        raise InputError(
            f"{folder}: expected the state of the experts {' and '.join(networks)}, found that of {found}; resume with "
            f"the same --experts"
        )
    for expert, network in networks.items():
        _check_equal(folder, f"{expert}-noise network", found=state["networks"][expert], expected=network.metadata())
        _check_equal(
            folder,
            f"{expert}-noise optimizer",
            found=state["optimizers"][expert],
            expected=_describe(network, optimizers[expert]),
        )
    weights = {expert: read_safetensors(folder / f"{expert}.safetensors")[0] for expert in networks}
    saved_averages = _read_averages(folder, state, averages or {})
    optimizer_states = {expert: _read_optimizer(folder / f"{expert}_optimizer.pt") for expert in networks}
    for expert, network in networks.items():
        try:
            network.load_weights(weights[expert])
        except InputError as error:
            raise InputError(f"{folder / expert}.safetensors: {error}") from None
        optimizers[expert].load_state_dict(optimizer_states[expert])
    for expert, average in (averages or {}).items():
        for name, tensor in average.items():
            tensor.copy_(saved_averages[expert][name])
    return int(state["step"])


def read_state(folder: Path) -> dict:
    """What `state.json` of a state says, after a check that the other files are those that were saved with it.

    Raises:
        InputError: it cannot be read, or a file is missing, cut or changed.
    """
    state = _read_json(Path(folder))
    for name, expected in state["files"].items():
        file = Path(folder) / name
        found = fingerprint(file) if file.is_file() else "nothing"
        if found != expected:
            raise InputError(
                f"{file}: expected the file that was saved with this state ({expected}), found {found}; the state is "
                f"broken, resume another one"
            )
    return state


def _read_json(folder: Path) -> dict:
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version = state["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a training state, cannot read it ({error}); resume another one") from None
    if version != VERSION:
        raise InputError(f"{path}: expected a training state of version {VERSION}, found version {version}")
    return state


def latest_state(folder: Path) -> Path:
    """The state that `--resume FOLDER` means: the folder itself, or the one of the highest step inside it.

    Raises:
        InputError: there is none.
    """
    folder = Path(folder)
    if (folder / STATE_FILE).is_file():
        return folder
    states = list(_states_in(folder)) if folder.is_dir() else []
    if not states:
        # The moment between two renames, in which atomic_folder has put the old state aside.
        states = list(_states_in(folder.parent, aside=folder.name)) if folder.parent.is_dir() else []
    if not states:
        raise InputError(
            f"--resume {folder}: expected a training state ({STATE_FILE}) there or in a folder inside it, found none; "
            f"states are written by --save_state"
        )
    return max(states, key=lambda state: (_read_json(state)["step"], state.name))


def _states_in(folder: Path, aside: str | None = None) -> Iterator[Path]:
    """States in a folder, and those that a killed run left put aside there (only those of one name, if given)."""
    for path in folder.iterdir():
        put_aside = re.fullmatch(r"\.(.+)\.[^.]+\.old", path.name)
        if put_aside and aside in (None, put_aside[1]):
            path = path / put_aside[1]
        elif aside is not None or path.name.startswith("."):
            continue
        if (path / STATE_FILE).is_file():
            yield path


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed saves of this state left, but not the only whole state of its name."""
    if not folder.parent.is_dir():
        return
    for path in folder.parent.iterdir():
        leftover = re.fullmatch(rf"\.{re.escape(folder.name)}\.[^.]+\.(tmp|old)", path.name)
        if leftover and (leftover[1] == "tmp" or folder.exists()):
            shutil.rmtree(path, ignore_errors=True)


def _describe(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What two optimizers must share for one to go on from the other's state."""
    shapes = {id(parameter): f"{name} {[*parameter.shape]}" for name, parameter in network.named_parameters()}
    groups = [[shapes.get(id(parameter), "?") for parameter in group["params"]] for group in optimizer.param_groups]
    return {
        "class": f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}",
        "parameters": json.dumps(groups),
        **{f"option {key}": str(value) for key, value in optimizer.defaults.items() if key != "lr"},
    }


def _check_equal(folder: Path, what: str, *, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise InputError(
                f"{folder}: {what}: this run has {key} {_short(expected.get(key))}, the state has "
                f"{_short(found.get(key))}; resume with the settings that it was saved with"
            )


def _short(value: str | None) -> str:
    text = "none" if value is None else value
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_averages(
    folder: Path, state: Mapping[str, Any], averages: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Mapping[str, Tensor]]:
    """The moving averages of a state, which has them if and only if the run that goes on has."""
    has = any(name.endswith("_average.safetensors") for name in state["files"])
    if has != bool(averages):
        found = "a moving average" if has else "no moving average"
        raise InputError(f"{folder}: found {found}; resume with the same --ema_decay that it was saved with")
    return {expert: read_safetensors(folder / f"{expert}_average.safetensors")[0] for expert in averages}


def _read_optimizer(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: expected the state of an optimizer, cannot read it ({reason})") from None
