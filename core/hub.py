"""Paths that name a file or folder on the Hugging Face hub: "hub:owner/name/path".

The prefix is the user's word that something may be downloaded. A path without it never touches the network, however
much it looks like a hub id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.errors import InputError

HUB = "hub:"


def resolve(path: Path | str, *, patterns: Sequence[str] | None = None) -> Path:
    """The local path of what the user named; "hub:" paths are downloaded into the hub's cache first.

    Args:
        path: a local path, or "hub:owner/name/path" with the path of a file or folder in that repository.
        patterns: the only files wanted of a folder. Without them a whole repository ("hub:owner/name") is refused:
            those of Wan hold over a hundred gigabytes.

    Raises:
        InputError: a "hub:" path is malformed, or cannot be downloaded.
    """
    if not str(path).startswith(HUB):
        return Path(path)
    owner, _, rest = str(path).removeprefix(HUB).partition("/")
    name, _, inside = rest.partition("/")
    if not owner or not name or not (inside or patterns):
        raise InputError(f"{path}: expected hub:owner/name/path with the path of a file or folder in the repository")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository = f"{owner}/{name}"
    try:
        if Path(inside).suffix:
            return Path(hf_hub_download(repository, inside))
        wanted = [f"{inside}/{pattern}" if inside else pattern for pattern in patterns or ["*"]]
        return Path(snapshot_download(repository, allow_patterns=wanted)) / inside
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path}: cannot be downloaded from the hub ({reason})") from None
