"""Where the clips of a data set come from: a folder, a list with one JSON object a line, or one scene of frames.

A line of a list names a video or an image (`video_path`, `image_path`), its `caption`, and, of a video, its `camera`:

    {"video_path": "videos/hall.mp4", "caption": "a hall", "camera": "cameras/hall.txt"}

Relative paths start at the current directory, as in the TOML.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.files.settings import CAMERA_SUFFIXES
from camera.moves.tagged_text import caption_of
from core.errors import InputError, fail, listing, nearest
from core.files import text_hash
from dataset.config import AnyDataset, FramesDataset, ImageDataset, VideoDataset
from dataset.keys import some_path
from dataset.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video, image or folder of frames."""

    path: Path
    name: str  # what its caches are called; unique within a data set
    caption: str
    camera: Path | None


def list_sources(where: str, dataset: AnyDataset, on_problem: Callable[[InputError], None] = fail) -> list[Source]:
    """The sources of one data set, in the order of their names, or of a list's lines.

    Args:
        where: file and table, for messages.
        dataset: from `read_dataset_config`.
        on_problem: called with what is wrong about single files or lines of a list, which are then left out. The
            default raises it.

    Raises:
        InputError: a folder, file, caption or camera file is missing, a list cannot be read, or names a file twice.
    """
    if isinstance(dataset, FramesDataset):
        return [_scene(where, dataset)]
    if dataset.jsonl_file is not None:
        return _listed(where, dataset, dataset.jsonl_file, on_problem)
    assert dataset.folder is not None
    return _folder(where, dataset, dataset.folder, on_problem)


def _scene(where: str, dataset: FramesDataset) -> Source:
    if dataset.camera_params is not None and not dataset.camera_params.exists():
        raise InputError(f"{where}: expected the camera file camera_params, missing: {dataset.camera_params}")
    return Source(
        path=dataset.folder,
        name=dataset.folder.resolve().name,
        caption=dataset.prompt.strip(),
        camera=dataset.camera_params,
    )


# ---- folders ---------------------------------------------------------------------------------------------------------


def _folder(
    where: str, dataset: VideoDataset | ImageDataset, folder: Path, on_problem: Callable[[InputError], None]
) -> list[Source]:
    kind = "video" if isinstance(dataset, VideoDataset) else "image"
    suffixes = VIDEO_SUFFIXES if kind == "video" else IMAGE_SUFFIXES
    if not folder.is_dir():
        raise InputError(
            f"{where} {kind}_directory: expected a folder at {folder}, found "
            f"{'a file' if folder.exists() else 'nothing'}; relative paths start at the current directory, "
            f"{Path.cwd()}"
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes and not file.name[0] == ".")
    if not files:
        raise InputError(f"{where} {kind}_directory: expected {kind}s ({', '.join(suffixes)}) in {folder}, found none")
    captions = {file: file.with_suffix(dataset.caption_extension) for file in files}
    captions = _present(where, f"a caption beside every {kind}", captions, on_problem)
    cameras: dict[Path, Path] = {}
    if isinstance(dataset, VideoDataset) and dataset.camera_directory is not None:
        cameras = {file: _camera_of(where, dataset.camera_directory, file) for file in captions}
        cameras = _present(where, "a camera file for every video", cameras, on_problem)
        captions = {file: captions[file] for file in cameras}
    sources = []
    for file, caption in captions.items():
        try:
            sources.append(Source(path=file, name=file.name, caption=_read_caption(caption), camera=cameras.get(file)))
        except InputError as problem:
            on_problem(problem)
    return sources


def _present(
    where: str, what: str, needed: dict[Path, Path], on_problem: Callable[[InputError], None]
) -> dict[Path, Path]:
    """Those files of the sources that are there; what is missing is one problem."""
    missing = [str(file) for file in needed.values() if not file.exists()]
    if missing:
        on_problem(InputError(f"{where}: expected {what}, missing: {listing(missing)}"))
    return {source: file for source, file in needed.items() if file.exists()}


def _camera_of(where: str, folder: Path, video: Path) -> Path:
    """The camera file of a video, or the folder of its reconstruction; NAME.txt where nothing is there."""
    candidates = [folder / f"{video.stem}{suffix}" for suffix in CAMERA_SUFFIXES]
    found = [file for file in candidates if file.is_file()]
    found += [inner for inner in [folder / video.stem] if inner.is_dir()]
    if len(found) > 1:
        raise InputError(
            f"{where} camera_directory: expected one camera for {video}, found {' and '.join(map(str, found))}; move "
            "the others"
        )
    return found[0] if found else candidates[0]


def _read_caption(file: Path) -> str:
    try:
        return caption_of(file.read_text(encoding="utf-8-sig"))  # without camera tags, which are no words
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected a caption in UTF-8, found a byte that is not, at {error.start}") from None


# ---- lists -----------------------------------------------------------------------------------------------------------


def _listed(
    where: str, dataset: VideoDataset | ImageDataset, file: Path, on_problem: Callable[[InputError], None]
) -> list[Source]:
    lines: dict[Path, int] = {}
    sources: list[Source] = []
    for number, text in enumerate(_lines(where, file), 1):
        if text.strip():
            try:
                source = _source_of_line(f"{file}, line {number}", text, dataset)
                other = lines.setdefault(source.path.resolve(), number)
                if other != number:
                    raise InputError(
                        f"{file}, line {number}: expected each file once, found {source.path} in line {other} too"
                    )
                sources.append(source)
            except InputError as problem:
                on_problem(problem)
    if not sources:
        raise InputError(f"{where}: expected lines in {file}, found none")
    without = [source for source in sources if source.camera is None]
    if without and len(without) < len(sources):
        raise InputError(
            f"{file}, line {lines[without[0].path.resolve()]}: expected a camera in every line or in none, found none "
            f"here ({len(without)} of {len(sources)} lines)"
        )
    return sources


def _source_of_line(at: str, text: str, dataset: VideoDataset | ImageDataset) -> Source:
    is_video = isinstance(dataset, VideoDataset)
    path_key = "video_path" if is_video else "image_path"
    entry = _entry(at, text, (path_key, "caption", "camera") if is_video else (path_key, "caption"))
    path = _required_path(at, entry, path_key)
    if not path.exists():
        raise InputError(f"{at} {path_key}: expected a file at {path}, found nothing; paths start at {Path.cwd()}")
    camera = _required_path(at, entry, "camera") if "camera" in entry else None
    if camera is not None and isinstance(dataset, VideoDataset) and dataset.camera.estimate:
        raise InputError(f"{at} camera: does nothing with estimate_camera = true; remove one of the two")
    if camera is not None and not camera.exists():
        raise InputError(f"{at} camera: expected a file at {camera}, found nothing; paths start at {Path.cwd()}")
    caption = entry.get("caption")
    if not isinstance(caption, str) or not _is_unicode(caption):
        raise InputError(f"{at} caption: expected text, found {caption!r}")
    return Source(path=path, name=_unique_name(path), caption=caption_of(caption), camera=camera)


def _lines(where: str, file: Path) -> list[str]:
    if not file.is_file():
        raise InputError(
            f"{where}: expected a list at {file}, found {'a folder' if file.is_dir() else 'nothing'}; relative paths "
            f"start at the current directory, {Path.cwd()}"
        )
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected text in UTF-8, found a byte that is not, at {error.start}") from None


def _entry(at: str, text: str, known: Sequence[str]) -> dict[str, Any]:
    try:
        entry = json.loads(text, object_pairs_hook=lambda pairs: _without_twins(at, pairs))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{at}: expected one JSON object, found a mistake ({error})") from None
    if not isinstance(entry, dict):
        raise InputError(f"{at}: expected a JSON object such as {{{known[0]!r}: ...}}, found {text.strip()[:40]!r}")
    for key in entry:
        if key.startswith("control_path"):
            raise InputError(f"{at} control_path: no model here takes a control video or image; remove it")
        if key not in known:
            raise InputError(f"{at}: unknown key {key!r}{nearest(key, known)}; expected {', '.join(known)}")
    return entry


def _without_twins(at: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{at}: expected every key once, found {twin!r} twice")
    return entry


def _is_unicode(text: str) -> bool:
    """Whether a text is more than an escape such as \\ud800, half a character, which no file can hold."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _required_path(at: str, entry: dict[str, Any], key: str) -> Path:
    try:
        return some_path(entry.get(key))
    except ValueError as error:
        raise InputError(f"{at} {key}: expected {error}, found {entry.get(key)!r}") from None


def _unique_name(path: Path) -> str:
    """The file's name and six digits that tell it from a file of the same name in another folder."""
    return f"{path.name}-{text_hash(path.as_posix()).removeprefix('sha256:')[:6]}"
