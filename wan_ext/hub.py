"""Paths that name a model on the Hugging Face hub: "hub:owner/name" and "hub:owner/name/file or folder".

The prefix is the user's word that something may be downloaded. A path without it never touches the network, however
much it looks like a hub id.
"""

from __future__ import annotations

from pathlib import Path

from core.errors import InputError

HUB = "hub:"


def resolve(path: Path | str) -> Path:
    """The local path of what the user named; "hub:" paths are downloaded into the hub's cache first.

    Raises:
        InputError: a "hub:" path is malformed, or cannot be downloaded.
    """
    if not str(path).startswith(HUB):
        return Path(path)
    owner, _, rest = str(path).removeprefix(HUB).partition("/")
    name, _, inside = rest.partition("/")
    if not owner or not name:
        raise InputError(f"{path}: expected hub:owner/name or hub:owner/name/path")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = f"{owner}/{name}"
    try:
        if Path(inside).suffix:
            return Path(hf_hub_download(repository, inside))
        patterns = [f"{inside}/*"] if inside else None
        return Path(snapshot_download(repository, allow_patterns=patterns)) / inside
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: cannot be downloaded from the hub ({reason})") from None
