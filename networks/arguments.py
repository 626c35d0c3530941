"""`--network_args key=value ...`: reading them into values, with an error that names the argument."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence

from core.errors import InputError, nearest


def check_names(network_args: Mapping[str, str], known: Sequence[str], *, module: str) -> None:
    """Refuse arguments that the network does not have.

    Raises:
        InputError: an unknown name; the message holds the nearest known one.
    """
    for name in network_args:
        if name not in known:
            raise InputError(
                f"network argument {name}: {module} has {', '.join(known)}, found {name!r}{nearest(name, known)}"
            )


def read_choice(network_args: Mapping[str, str], name: str, choices: Sequence[str], default: str) -> str:
    """One of a few words."""
    value = network_args.get(name, default)
    if value not in choices:
        raise InputError(
            f"network argument {name}: expected one of {', '.join(choices)}, found {value!r}{nearest(value, choices)}"
        )
    return value


def read_int(network_args: Mapping[str, str], name: str, default: int) -> int:
    """A whole number of at least 1."""
    value = network_args.get(name, str(default))
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"network argument {name}: expected a whole number of at least 1, found {value!r}")
    return number


def read_positive(network_args: Mapping[str, str], name: str) -> float | None:
    """A number above 0; None where the argument is not given."""
    if name not in network_args:
        return None
    try:
        number = float(network_args[name])
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"network argument {name}: expected a number above 0, found {network_args[name]!r}")
    return number


def read_patterns(network_args: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Regular expressions: one as it is, or several as a Python list, "[r'self_attn', r'ffn\\.0']"."""
    value = network_args.get(name, "").strip()
    if not value:
        return ()
    if not value.startswith("["):
        return (value,)
    try:
        patterns = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        patterns = None
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(
            f"network argument {name}: expected a pattern or a list such as ['self_attn'], found {value!r}"
        )
    return tuple(patterns)


def read_share(network_args: Mapping[str, str], name: str) -> float:
    """A share from 0 to below 1; 0 where the argument is not given."""
    try:
        share = float(network_args.get(name, "0"))
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise InputError(f"network argument {name}: expected a share from 0 to below 1, found {network_args[name]!r}")
    return share


def read_range(network_args: Mapping[str, str], name: str, *, last: int) -> tuple[int, int]:
    """First and last number of a range such as "0-19", or of one number; all up to `last` where it is not given."""
    value = network_args.get(name, f"0-{last}")
    ends = value.split("-")
    if len(ends) > 2 or not all(end.isdecimal() for end in ends) or not int(ends[0]) <= int(ends[-1]) <= last:
        raise InputError(
            f"network argument {name}: expected a range between 0 and {last} such as 0-{last // 2}, found {value!r}"
        )
    return int(ends[0]), int(ends[-1])
