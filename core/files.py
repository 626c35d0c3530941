"""Files that are whole or absent: atomic writes, safetensors that name themselves when broken, fingerprints."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

WHOLE_FILE_BYTES = 64 * 2**20  # below this size a fingerprint reads every byte
NUM_SAMPLES, SAMPLE_BYTES = 64, 64 * 2**10
TEMPORARY = ".tmp"
"""In the names of files that are being written."""


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` when the block ends, and vanishes if it fails.

    The temporary name keeps the suffix, for writers that choose a format by it. The rename is atomic because both names
    are in one folder; the data is flushed to the disk first, so that a crash leaves the old file or the new one. The
    temporary name says which process writes, so that `remove_abandoned` knows what a dead one left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}.", suffix=f".{this_writer()}{TEMPORARY}{path.suffix}", dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; a result has the rights of any new file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A process as it stands in the names of its temporary files: "machine-boot-pid-start"."""

    machine: str
    boot: str
    """Of the machine: what an earlier one left is nobody's."""
    pid: int
    start: str
    """Of the process: a number that is given again belongs to another one."""

    def __str__(self) -> str:
        return f"{self.machine}-{self.boot}-{self.pid}-{self.start}"

    @classmethod
    def parse(cls, text: str) -> Writer | None:
        found = re.fullmatch(r"(\w+)-(\w+)-(\d+)-(\w+)", text)
        return found and cls(machine=found[1], boot=found[2], pid=int(found[3]), start=found[4])

    def is_dead(self) -> bool:
        """Whether this process is known to be gone; of another machine nothing is known."""
        here = this_writer()
        if self.machine != here.machine:
            return False
        return self.boot != here.boot or self.start != _start_of(self.pid)


def this_writer() -> Writer:
    """This process."""
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
    boot_id = Path("/proc/sys/kernel/random/boot_id")  # Linux; elsewhere a boot is not told from another
    boot = boot_id.read_text().strip().replace("-", "")[:6] if boot_id.exists() else "0"
    return Writer(machine=machine, boot=boot, pid=os.getpid(), start=_start_of(os.getpid()))


def _start_of(pid: int) -> str:
    """When a process started, in clock ticks since the boot; "0" where only its number can be asked for, "" if gone."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            return stat.read_text().rpartition(")")[2].split()[19]
        except OSError:
            return ""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OSError):
        return ""
    return "0"


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove the temporary files that killed processes left in a folder; those of living processes stay.

    Returns:
        What was removed.
    """
    removed = []
    for file in sorted(folder.glob(f".*{TEMPORARY}*")) if folder.is_dir() else []:
        writer = Writer.parse(file.name.rpartition(TEMPORARY)[0].rpartition(".")[2])
        if writer is not None and writer.is_dead():
            file.unlink(missing_ok=True)
            removed.append(file)
    return removed


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that takes its name when the block ends; an old one is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.replace(replaced / path.name)
            temporary.replace(path)
            shutil.rmtree(replaced)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_safetensors(tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to `path`, atomically. Tensors are made contiguous and copied to the CPU."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(ready, temporary, metadata=dict(metadata))


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        InputError: the file is missing, truncated, or not a safetensors file.
    """
    with _open_safetensors(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_safetensors_metadata(path: Path | str) -> dict[str, str]:
    """The metadata alone, without reading tensors and without torch. Raises InputError as `read_safetensors` does."""
    with _open_safetensors(path, framework="numpy") as file:
        return file.metadata() or {}


def read_safetensors_header(path: Path | str) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Dtype name ("F32", "BF16", ...) and shape of every tensor, and the metadata, without reading tensors or torch.

    A truncated file is found here already: its size differs from what the header says. Raises InputError as
    `read_safetensors` does.
    """
    with _open_safetensors(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        tensors = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
        return tensors, file.metadata() or {}


@contextmanager
def _open_safetensors(path: Path | str, framework: str) -> Iterator:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected a safetensors file, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        file = safe_open(path, framework=framework)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a whole safetensors file, found {path.stat().st_size} bytes that cannot be read as one "
            f"({error}); write or download it again"
        ) from None
    with file as opened:
        yield opened


def fingerprint(path: Path | str) -> str:
    """What identifies the content of a file: "sha256:" and 16 hexadecimal digits.

    Files below 64 MiB are read whole. Of larger ones the size, the first and last MiB and 64 evenly spaced samples of
    64 KiB are read: 6 MiB of a 28 GB checkpoint, which tells two trained checkpoints apart in milliseconds. A folder's
    fingerprint covers the names and fingerprints of its files. Dates and the path itself do not count.

    Raises:
        InputError: nothing is there.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for member in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{member.relative_to(path)} {fingerprint(member)}\n".encode())
        return f"sha256:{digest.hexdigest()[:16]}"
    if not path.is_file():
        raise InputError(f"{path}: expected a file, found nothing")
    size = path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        if size < WHOLE_FILE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(2**20))
            for index in range(NUM_SAMPLES):
                file.seek(size * index // NUM_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
            file.seek(-(2**20), os.SEEK_END)
            digest.update(file.read())
    return f"sha256:{digest.hexdigest()[:16]}"


def text_hash(text: str) -> str:
    """What identifies a text: "sha256:" and 16 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
