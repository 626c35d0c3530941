"""musubi-tuner's latent and text caches, read instead of encoding again: which fit which clip, and what is doubted.

A cache of format 1.0.1 lies in the data set's cache directory and is named by the stem of its source:

    STEM_START-FRAMES_WIDTHxHEIGHT_wan.safetensors   `latents_FxHxW_DTYPE` [C, F, H, W] of a video's clip; for
                                                     image-to-video `latents_image_FxHxW_DTYPE` [4 + C, F, H, W] and
                                                     `clip_DTYPE` [tokens, width]
    STEM_WIDTHxHEIGHT_wan.safetensors                the same of an image
    STEM_wan_te.safetensors                          `varlen_t5_DTYPE` [S, D], the caption in the metadata

It does not say which VAE wrote it, from which crop, at which frame rate, or from which version of the source. So a
source that is newer than its cache is encoded again; and of each data set and size the first clip that is reused is
encoded here as well, from frames reduced by musubi-tuner's filter (the mean over each pixel's area, where ours is
Lanczos). The two must agree within `LATENT_BOUND`; of captions, one of each data set within `TEXT_BOUND`.

What is reused keeps the precision it was stored in, bf16 by default. It costs one reading of the file and one writing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import InputError
from core.files import read_safetensors, read_safetensors_header
from dataset import cache
from dataset.buckets import Crop
from dataset.clip_frames import read_clips
from dataset.clips import Clip
from dataset.video import IMAGE_SUFFIXES, list_frames, resize_frame

LATENT_BOUND = 0.1
"""|theirs - ours| / |ours| of a clip's latents. Measured on rendered rooms with the tiny VAE: bf16 instead of float32
0.008, one pixel of crop 0.22 at least, every fifth frame left out 0.24. Where nothing moves, no rate is seen."""
TEXT_BOUND = 0.2
"""The same of a caption's features. 8-bit weights of the text encoder stay below 0.1; another encoder is above 1."""

FORMAT = {"architecture": "wan", "format_version": "1.0.1"}
DTYPES = ("F32", "F16", "BF16")
OF_VIDEO = re.compile(r"(?P<stem>.+)_(?P<start>\d{5,})-(?P<frames>\d{3,})_\d{4,}x\d{4,}_wan\.safetensors", re.DOTALL)
OF_IMAGE = re.compile(r"(?P<stem>.+)_\d{4,}x\d{4,}_wan\.safetensors", re.DOTALL)
KEYS = {  # ours -> theirs
    "latents": re.compile(r"latents_(\d+)x(\d+)x(\d+)_[a-z]+\d+"),
    "condition": re.compile(r"latents_image_(\d+)x(\d+)x(\d+)_[a-z]+\d+"),
    "control": re.compile(r"latents_control_(\d+)x(\d+)x(\d+)_[a-z]+\d+"),  # for models that no task here has
    "image_context": re.compile(r"clip_[a-z]+\d+"),
    "context": re.compile(r"varlen_t5_[a-z]+\d+"),
}

Encode = Callable[[Tensor], cache.Latents]
"""Our encoding of a clip's frames, uint8 [T, H, W, 3]."""


@dataclass(frozen=True, kw_only=True)
class Reused:
    """What became of the clips that were to be cached."""

    clips: tuple[Clip, ...]
    """Those whose caches are written."""
    left: tuple[Clip, ...]
    """Those to encode."""
    reasons: tuple[str, ...]
    """Why each of them is."""


class _Unfit(Exception):
    """Why no cache of musubi-tuner serves a clip."""


def reuse_latents(
    clips: Sequence[Clip],
    encode: Encode,
    *,
    all_clips: Sequence[Clip],
    encoder: str,
    shape: Callable[[Clip], tuple[int, int, int, int]],
    condition_channels: int,
    image_context: bool,
) -> Reused:
    """Write the latent caches of those clips that musubi-tuner has cached.

    Args:
        clips: to be cached.
        encode: ours, for the clips that are compared.
        all_clips: of the config: of two sources with one stem, musubi-tuner's file may be either's.
        encoder: fingerprint of the VAE that `encode` runs.
        shape: of a clip's latents, [C, F, H, W].
        condition_channels: of the first-frame condition that the model takes; 0: it takes none.
        image_context: whether the model needs CLIP features.

    Raises:
        InputError: the data sets' cache directories hold no latent cache of musubi-tuner, or one that is compared
            differs from what `encode` gives.
    """
    found = _index(all_clips)
    owners: dict[object, set[Path]] = {}
    for clip in all_clips:
        owners.setdefault((*_musubi_name(clip), clip.height, clip.width), set()).add(clip.source)
    compared: set[tuple[int, ...]] = set()
    reused, left, reasons = [], [], []
    for clip in clips:
        try:
            _require_one_rate(clip)
            _require_alone(clip, owners[(*_musubi_name(clip), clip.height, clip.width)])
            file = _fitting(clip, found.get(_musubi_name(clip), []), shape(clip))
            latents = _read_latents(clip, file, shape(clip), condition_channels, image_context)
        except _Unfit as reason:
            left.append(clip)
            reasons.append(f"{clip.key}: {reason}")
            continue
        kind = (clip.dataset, clip.num_frames, clip.height, clip.width)
        if kind not in compared:
            _compare_latents(clip, file, latents, encode(read_as_musubi(clip)))
            compared.add(kind)
        cache.write_latents(
            clip,
            latents.latents,
            condition=latents.condition,
            image_context=latents.image_context,
            encoder=encoder,
            crop=clip.crop,
            origin=str(file),
        )
        reused.append(clip)
    return Reused(clips=tuple(reused), left=tuple(left), reasons=tuple(reasons))


def reuse_text(
    clips: Sequence[Clip],
    encode: Callable[[str], Tensor],
    *,
    all_clips: Sequence[Clip],
    encoder: str,
    longest: int,
    width: int,
) -> Reused:
    """Write the text caches of those clips whose captions musubi-tuner has encoded.

    Args:
        clips: to be cached, one for each caption.
        encode: ours, caption -> features [S, D], for the captions that are compared.
        all_clips: of the config.
        encoder: fingerprint of the text encoder that `encode` runs.
        longest: S at most.
        width: D.

    Raises:
        InputError: as of `reuse_latents`.
    """
    folders = {clip.cache_directory for clip in all_clips}
    _require_any(folders, "*_wan_te.safetensors")
    compared: set[int] = set()
    reused, left, reasons = [], [], []
    for clip in clips:
        file = clip.cache_directory / f"{clip.source.stem}_wan_te.safetensors"
        try:
            context = _read_text(clip, file, longest, width)
        except _Unfit as reason:
            left.append(clip)
            reasons.append(f"{clip.text_cache}: {reason}")
            continue
        if clip.dataset not in compared:
            _compare(clip, file, "features of its caption", context, encode(clip.caption), TEXT_BOUND)
            compared.add(clip.dataset)
        cache.write_text(clip, context, encoder=encoder, origin=str(file))
        reused.append(clip)
    return Reused(clips=tuple(reused), left=tuple(left), reasons=tuple(reasons))


def read_as_musubi(clip: Clip) -> Tensor:
    """The frames of a clip as musubi-tuner brings them to their size, uint8 [T, H, W, 3]."""
    ((_, frames),) = read_clips([clip], resize=area_resize)
    return frames


def area_resize(frame: np.ndarray, crop: Crop) -> np.ndarray:
    """As `resize_frame`, but a frame that shrinks is averaged over the area of each new pixel.

    Where it grows, both programs take Lanczos. uint8 [H, W, 3] -> [crop.height, crop.width, 3]
    """
    height, width, _ = frame.shape
    if crop.resized_height > height or crop.resized_width > width or (height, width) == (crop.height, crop.width):
        return resize_frame(frame, crop)
    rows = _overlaps(height, crop.resized_height)[crop.top : crop.top + crop.height]
    columns = _overlaps(width, crop.resized_width)[crop.left : crop.left + crop.width]
    small = torch.einsum("yh,hwc->ywc", rows, torch.from_numpy(frame).float())
    small = torch.einsum("xw,ywc->yxc", columns, small)
    return small.round().clamp(0, 255).to(torch.uint8).numpy()


def _overlaps(source: int, target: int) -> Tensor:
    """The share of each source pixel in each target pixel along one side. Rows sum to 1. [target, source]"""
    edges = torch.arange(target + 1, dtype=torch.float64) * source / target
    pixels = torch.arange(source, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp(min=0) * target / source).float()


# ---- which file ------------------------------------------------------------------------------------------------------


def _index(clips: Iterable[Clip]) -> dict[tuple, list[Path]]:
    """musubi-tuner's latent caches in the cache directories, by folder, stem and (start, frames) or None."""
    folders = {clip.cache_directory for clip in clips}
    found: dict[tuple, list[Path]] = {}
    for file in _require_any(folders, "*_wan.safetensors"):
        if match := OF_VIDEO.fullmatch(file.name):
            window = (int(match["start"]), int(match["frames"]))
            found.setdefault((file.parent, match["stem"], window), []).append(file)
        elif match := OF_IMAGE.fullmatch(file.name):
            found.setdefault((file.parent, match["stem"], None), []).append(file)
    return found


def _require_any(folders: Iterable[Path], pattern: str) -> list[Path]:
    folders = sorted(folders)
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob(pattern))]
    if not files:
        raise InputError(
            f"--reuse_musubi_caches: expected caches of musubi-tuner ({pattern}) in {', '.join(map(str, folders))}, "
            "found none; set cache_directory to the folder where they lie, or leave the flag out"
        )
    return files


def _musubi_name(clip: Clip) -> tuple:
    """What names a clip's latents there, its size aside."""
    is_image = clip.source.suffix.lower() in IMAGE_SUFFIXES and not clip.source.is_dir()
    window = None if is_image else (clip.frame_indices[0], clip.num_frames)
    return clip.cache_directory, clip.source.stem, window


def _require_one_rate(clip: Clip) -> None:
    """Frames that are left out are chosen by another rule there."""
    first = clip.frame_indices[0]
    if clip.frame_indices != tuple(range(first, first + clip.num_frames)) or clip.fps != clip.source_fps:
        raise _Unfit("its frames are sampled at target_fps, which musubi-tuner does by another rule")


def _require_alone(clip: Clip, sources: set[Path]) -> None:
    others = sorted(str(source) for source in sources - {clip.source})
    if others:
        raise _Unfit(f"{clip.source} and {others[0]} have one file there, which may be of either")


def _fitting(clip: Clip, files: Sequence[Path], shape: tuple[int, ...]) -> Path:
    """The one file whose latents have the clip's size."""
    if not files:
        raise _Unfit("musubi-tuner has no cache of these frames")
    reasons, fitting = [], []
    for file in files:
        try:
            _require_size(clip, file, shape)
            fitting.append(file)
        except _Unfit as reason:
            reasons.append(str(reason))
    if len(fitting) > 1:
        raise _Unfit(f"expected one cache of these frames, found {' and '.join(file.name for file in fitting)}")
    if not fitting:
        raise _Unfit(reasons[0])
    return fitting[0]


def _require_size(clip: Clip, file: Path, shape: tuple[int, ...]) -> None:
    layout, metadata = _header(file)
    name = _key(file, layout, "latents")
    if name is None:
        raise _Unfit(f"{file}: expected latents_FxHxW_DTYPE, found {', '.join(sorted(layout)) or 'nothing'}")
    if layout[name][1] != shape:
        raise _Unfit(f"{file}: expected latents {[*shape]}, found {[*layout[name][1]]}")
    frames = metadata.get("frame_count", "1")  # images have no such entry
    if frames != str(clip.num_frames):
        raise _Unfit(f"{file}: expected frame_count {clip.num_frames}, found {frames}")
    found = (metadata.get("height"), metadata.get("width"))
    crop = clip.crop
    sizes = [(crop.source_height, crop.source_width), (crop.height, crop.width)]
    if found not in [(str(height), str(width)) for height, width in sizes]:
        raise _Unfit(
            f"{file}: expected frames of {crop.source_width}x{crop.source_height} or {crop.width}x{crop.height} "
            f"pixels, found {found[1]}x{found[0]}"
        )


# ---- what is in it ---------------------------------------------------------------------------------------------------


def _header(file: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    try:
        layout, metadata = read_safetensors_header(file)
    except InputError as damage:
        raise _Unfit(str(damage)) from None
    for name, value in FORMAT.items():
        if metadata.get(name) != value:
            raise _Unfit(f"{file}: expected {name} {value}, found {metadata.get(name, 'none')}")
    for name, (dtype, shape) in layout.items():
        known = [pattern for pattern in KEYS.values() if pattern.fullmatch(name)]
        if not known:
            raise _Unfit(f"{file}: expected tensors of a clip, found {name}")
        if dtype not in DTYPES or not all(shape):
            raise _Unfit(f"{file}: expected {name} in {', '.join(DTYPES)} and not empty, found {dtype} {[*shape]}")
        sizes = tuple(map(int, known[0].fullmatch(name).groups()))  # type: ignore[union-attr]  # it is one that matches
        if sizes and shape[1:] != sizes:
            raise _Unfit(f"{file}: expected {name} of the size in its name, found {[*shape]}")
    return layout, metadata


def _key(file: Path, layout: Iterable[str], ours: str) -> str | None:
    """The name of one of our tensors in their file."""
    names = [name for name in layout if KEYS[ours].fullmatch(name)]
    if len(names) > 1:
        raise _Unfit(f"{file}: expected one of {' and '.join(sorted(names))}, found {len(names)}")
    return names[0] if names else None


def _read(file: Path, wanted: Mapping[str, tuple[int, ...] | None]) -> dict[str, Tensor]:
    """Our tensors out of their file, finite and of the shapes wanted; None: of any."""
    try:
        content, _ = read_safetensors(file)
    except InputError as damage:
        raise _Unfit(str(damage)) from None
    tensors = {}
    for ours, shape in wanted.items():
        name = _key(file, content, ours)
        if name is None:
            raise _Unfit(f"{file}: this model needs {KEYS[ours].pattern.split('_(')[0]}, which is not in it")
        tensor = content[name]
        if shape is not None and tensor.shape != shape:
            raise _Unfit(f"{file}: expected {name} {[*shape]}, found {[*tensor.shape]}")
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise _Unfit(f"{file}: expected finite {name}, found {bad} of {tensor.numel()} numbers NaN or infinite")
        tensors[ours] = tensor
    return tensors


def _read_latents(
    clip: Clip, file: Path, shape: tuple[int, ...], condition_channels: int, image_context: bool
) -> cache.Latents:
    sources = list_frames(clip.source) if clip.source.is_dir() else [clip.source]
    if max(source.stat().st_mtime_ns for source in sources) > file.stat().st_mtime_ns:
        raise _Unfit(f"{clip.source} has changed since {file} was written")
    wanted: dict[str, tuple[int, ...] | None] = {"latents": shape}
    if condition_channels:
        wanted["condition"] = (condition_channels, *shape[1:])
    if image_context:
        wanted["image_context"] = None
    tensors = _read(file, wanted)
    context = tensors.get("image_context")
    if context is not None and context.ndim != 2:
        raise _Unfit(f"{file}: expected CLIP features [tokens, width], found {[*context.shape]}")
    return cache.Latents(latents=tensors["latents"], condition=tensors.get("condition"), image_context=context)


def _read_text(clip: Clip, file: Path, longest: int, width: int) -> Tensor:
    if not file.is_file():
        raise _Unfit("musubi-tuner has no cache of this caption")
    _, metadata = _header(file)
    if metadata.get("caption1") != clip.caption:
        raise _Unfit(f"{file}: another caption: expected {clip.caption!r}, found {metadata.get('caption1')!r}")
    context = _read(file, {"context": None})["context"]
    if context.ndim != 2 or not len(context) <= longest or context.shape[1] != width:
        raise _Unfit(f"{file}: expected features [1..{longest}, {width}], found {[*context.shape]}")
    return context


# ---- against ours ----------------------------------------------------------------------------------------------------


def _compare_latents(clip: Clip, file: Path, theirs: cache.Latents, ours: cache.Latents) -> None:
    for name, other, own in (
        ("latents", theirs.latents, ours.latents),
        ("first-frame channels", theirs.condition, ours.condition),
        ("CLIP features", theirs.image_context, ours.image_context),
    ):
        if other is not None:
            assert own is not None  # both follow from the model
            _compare(clip, file, name, other, own, LATENT_BOUND)


def _compare(clip: Clip, file: Path, what: str, theirs: Tensor, ours: Tensor, bound: float) -> None:
    """Refuse a file that cannot come from the same source and encoder."""
    if what.startswith("features"):
        made_by, causes = "this text encoder makes", "another text encoder or tokenizer"
    else:
        made_by, causes = f"this VAE makes of {clip.source}", "another VAE, another crop or another frame rate"
    if theirs.shape != ours.shape:
        found = f"shape {[*theirs.shape]} where ours is {[*ours.shape]}"
    else:
        theirs, ours = theirs.float(), ours.float().to(theirs.device)
        error = float((theirs - ours).norm() / ours.norm())
        if error <= bound:
            return
        found = f"{error:.2g} of their size away (at most {bound:g})"
    raise InputError(
        f"{clip.key}: {file}: expected the {what} that {made_by}, found {found}: {causes}; encode without "
        "--reuse_musubi_caches"
    )
