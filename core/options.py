"""From a frozen dataclass to a command line, and from an exception to what a person reads.

Only the five commands, the tools and the benchmarks import this module. A command declares its options as a dataclass
whose field docstrings are the help texts, parses them before it imports torch, and ends in `run`.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from core.errors import InputError

Options = TypeVar("Options")

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def parse_options(options_type: type[Options], description: str | None) -> Options:
    """Read the command line into `options_type`; prints help or the misspelt flag and exits when asked to.

    Flags are spelt with underscores, as users of this field know them (`--network_dim`); booleans are bare flags.
    """
    signal.signal(signal.SIGINT, _interrupted)  # Ctrl-C during the imports that follow: one line, no traceback
    # bitsandbytes reports at import that it lacks a 4-bit kernel, which nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return tyro.cli(
        options_type,
        description=description,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def run(main: Callable[[Options], None], options: Options) -> None:
    """Call `main`. An InputError ends in its one line and exit code 2, Ctrl-C in one line and exit code 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_INPUT_ERROR)
    except KeyboardInterrupt:
        _interrupted()


def _interrupted(*_: object) -> None:
    print("\ninterrupted; every file that was written is whole and stays", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)


def key_values(pairs: tuple[str, ...], flag: str) -> dict[str, str]:
    """`("injection=plucker_light", "camera_lr=1e-3")` as a dictionary. The first "=" divides; a value may contain more.

    Raises:
        InputError: a pair has no "=", or a key comes twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"{flag}: expected key=value, found {pair!r}")
        if key in values:
            raise InputError(f"{flag}: {key!r} is given twice")
        values[key] = value
    return values
