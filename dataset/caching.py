"""What the three caching commands have in common: what is to be written, by which process, and what lies around.

A cache is written when it is missing or not current; where one that is there is not current, the reason is said.
Files that belong to no clip are named, and removed only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError
from core.files import read_safetensors_metadata, remove_abandoned
from core.processes import Process, share_of
from dataset import cache
from dataset.cache import Kind
from dataset.clips import Clip
from dataset.musubi_caches import Reused

SHOWN = 5  # reasons and files that are printed one by one


@dataclass(frozen=True, kw_only=True)
class Todo:
    """The caches that one process writes."""

    mine: tuple[Clip, ...]
    """Those of this process's share."""
    others: tuple[Clip, ...]
    """Those of the other shares; empty where all caches are written again, whatever stands."""
    problem: Callable[[Clip], str | None]
    current: int
    """Caches that are left alone, of all processes."""
    stale: tuple[str, ...]
    """Why caches that are there are written again, of all processes."""
    total: int

    def __iter__(self) -> Iterator[Clip]:
        """The clips to write: this process's share, then what the others have not come to."""
        yield from self.mine
        yield from self.left()

    def left(self) -> Iterator[Clip]:
        """What the other processes have not come to when this one asks for it.

        Their shares are taken from the ends, so that at most one clip a process is encoded twice.
        """
        for clip in reversed(self.others):
            if self.problem(clip) is not None:
                yield clip


def prune_wanted(prune: bool, keep_cache: bool) -> bool:
    """What --prune and --keep_cache say together. Raises InputError: both."""
    if prune and keep_cache:
        raise InputError("--prune --keep_cache: expected one of them, found both")
    return prune


def find_todo(
    clips: Sequence[Clip],
    problem: Callable[[Clip], str | None],
    *,
    kind: Kind,
    skip_existing: bool,
    process: Process,
) -> Todo:
    """Decide which caches are written, and which of them by this process.

    The clips are divided before anything is known of their caches, because processes that look at different moments
    see different caches.

    Args:
        clips: all that need a cache of this kind, one for each file.
        problem: why a cache cannot be used; None: it is current.
        kind: of the caches.
        skip_existing: leave alone what is current.
        process: the clips are divided by their number of pixels, captions by their length.
    """
    sizes = [clip.num_frames * clip.height * clip.width if kind != "text" else len(clip.caption) + 1 for clip in clips]
    share = set(map(id, share_of(clips, sizes, process)))
    found = [(clip, problem(clip) if skip_existing else "") for clip in clips]
    todo = [clip for clip, reason in found if reason is not None]
    return Todo(
        mine=tuple(clip for clip in todo if id(clip) in share),
        others=tuple(clip for clip in todo if id(clip) not in share) if skip_existing else (),
        problem=problem,
        current=len(clips) - len(todo),
        stale=tuple(reason for clip, reason in found if reason and cache.cache_path(clip, kind).exists()),
        total=len(clips),
    )


def say(todo: Todo, *, what: str, process: Process, write: Callable[[str], None] = print) -> None:
    """Print what is going to happen, once for all processes."""
    if not process.is_main:
        return
    write(f"{todo.total} {what}, {todo.current} already cached")
    for reason in todo.stale[:SHOWN]:
        write(f"written again: {reason}")
    if len(todo.stale) > SHOWN:
        write(f"written again: {len(todo.stale) - SHOWN} more")


def say_reused(reused: Reused, *, what: str, write: Callable[[str], None] = print) -> None:
    """Print what musubi-tuner's caches gave to this process, and why the others are encoded."""
    write(f"{len(reused.clips)} {what} taken over from musubi-tuner's caches, {len(reused.left)} left to encode")
    for reason in reused.reasons[:SHOWN]:
        write(f"encoded: {reason}")
    if len(reused.reasons) > SHOWN:
        write(f"encoded: {len(reused.reasons) - SHOWN} more")


def tidy(clips: Sequence[Clip], kind: Kind, *, prune: bool, process: Process) -> None:
    """Remove what killed runs left half-written, and name, or remove, caches that belong to no clip.

    Args:
        clips: all clips of the config, those that drop their captions too.
        kind: whose caches are looked at; those of other kinds and other programs are left alone.
        prune: whether orphans are removed.
        process: the first one does it.
    """
    if not process.is_main:
        return
    folders = sorted({clip.cache_directory for clip in clips})
    for folder in folders:
        remove_abandoned(folder)
    orphans = [file for folder in folders for file in _orphans(folder, clips, kind)]
    for file in orphans:
        if prune:
            file.unlink(missing_ok=True)
    if orphans:
        names = ", ".join(file.name for file in orphans[:SHOWN]) + (", ..." if len(orphans) > SHOWN else "")
        verb = "removed" if prune else "belong to no clip of this config (--prune removes them)"
        print(f"{len(orphans)} {kind} caches {verb}: {names}")


def _orphans(folder: Path, clips: Sequence[Clip], kind: Kind) -> list[Path]:
    known = {cache.cache_path(clip, kind).resolve() for clip in clips}
    files = sorted(folder.glob(f"*_{kind}.safetensors")) if folder.is_dir() else []
    return [file for file in files if file.resolve() not in known and _is_ours(file, kind)]


def _is_ours(file: Path, kind: Kind) -> bool:
    try:
        return read_safetensors_metadata(file).get("kind") == kind
    except InputError:
        return False  # a broken file of a name like ours may be anyone's
