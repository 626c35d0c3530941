"""The caches of a clip: what stands in each file, where it came from, and every reason not to trust it.

Three safetensors files belong to a clip (named in dataset/clips.py). Tensors and their dtypes:

    latents   `latents` [C, F, H, W] float32, normalised; for image-to-video `condition` [Cc, F, H, W] float32 (mask and
              first-frame latents); with a CLIP branch `image_context` [tokens, width] float32
    text      `context` [S, D] bfloat16, the caption's true length S, without padding
    camera    `c2w` [T, 4, 4] float64 and `K` [T, 3, 3] float64, of the frames as they are encoded

The metadata of a file is its provenance: fingerprints of the source and of the encoder, the frames taken, the resize
and crop, the caption's hash, how the camera was read. A cache is current when every entry equals what the TOML and the
files ask for today. Files are written under a temporary name and renamed, so a killed command leaves whole caches only.
A checksum of everything in a file (dataset/checksum.py) is compared whenever its tensors are read: a flipped bit is an
error that names the clip.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from camera.files.formats import camera_files
from camera.path import CameraPath
from core.errors import InputError
from core.files import fingerprint, read_safetensors, read_safetensors_header, save_safetensors, text_hash
from dataset import checksum
from dataset.buckets import Crop
from dataset.clips import Clip
from dataset.config import CAMERA_FILE_KEYS
from dataset.video import list_frames

Kind = Literal["latents", "text", "camera"]
VERSIONS: dict[Kind, str] = {"latents": "2", "text": "2", "camera": "4"}
"""Of the schema above. A change of a kind's keys, shapes, dtypes or provenance raises its number."""
COMMANDS: dict[Kind, str] = {"latents": "cache_latents.py", "text": "cache_text.py", "camera": "cache_camera.py"}
DTYPES: dict[Kind, dict[str, str]] = {
    "latents": {"latents": "F32", "condition": "F32", "image_context": "F32"},
    "text": {"context": "BF16"},
    "camera": {"c2w": "F64", "K": "F64"},
}
OPTIONAL = ("condition", "image_context")
LABELS = {  # what a differing entry of the metadata means to a person
    "kind": "another kind of cache",
    "version": "another version of the cache format",
    "source_fingerprint": "the source file has changed",
    "frame_indices": "other frames",
    "crop": "another resolution",
    "caption_hash": "another caption",
    "camera_fingerprint": "the camera file has changed",
    "estimate_camera": "a camera from a file against one that is estimated",
    "estimator": "another estimator, or other settings of it",
    "frame_names": "other names of the frames",
    "camera_format": "another camera format",
    "camera_direction": "another direction of the poses",
    "camera_axes": "other camera axes",
    "camera_fov": "another field of view",
    "camera_name": "another camera of the file",
    "camera_size": "another size that the intrinsics belong to",
    "fov_axis": "another axis of the field of view",
    "pose_frame": "another pose frame",
    "scale_rule": "another scale rule",
    "camera_fps": "another rate of the camera file",
    "fps": "another frame rate",
    "times": "other times of the frames",
    "checksum": "the cache was exchanged after it was verified",
}


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What a latent cache holds."""

    latents: Tensor  # [C, F, H, W] float32
    condition: Tensor | None  # [Cc, F, H, W] float32
    image_context: Tensor | None  # [tokens, width] float32


def cache_path(clip: Clip, kind: Kind) -> Path:
    """The file of one kind of cache."""
    return {"latents": clip.latent_cache, "text": clip.text_cache, "camera": clip.camera_cache}[kind]


def source_fingerprint(clip: Clip) -> str:
    """What identifies the pixels of a clip's source. Of a folder only the frames count, not what else lies in it."""
    if not clip.source.is_dir():
        return _file_fingerprint(clip.source)
    digest = hashlib.sha256()
    for file in list_frames(clip.source):
        digest.update(f"{file.name} {_file_fingerprint(file)}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def write_latents(
    clip: Clip,
    latents: Tensor,
    *,
    encoder: str,
    crop: Crop,
    condition: Tensor | None = None,
    image_context: Tensor | None = None,
    origin: str | None = None,
) -> None:
    """Write the latent cache of a clip.

    Args:
        clip: from `list_clips`.
        latents: normalised, [C, F, H, W].
        encoder: fingerprint of the VAE's file.
        crop: what `read_clip` applied.
        condition: image-to-video channels, [Cc, F, H, W].
        image_context: CLIP features of the first frame, [tokens, width].
        origin: the file of another program that they were read from; for people, no part of the provenance.

    Raises:
        InputError: a NaN or an infinity in a tensor; the message names the clip.
    """
    tensors = {"latents": latents, "condition": condition, "image_context": image_context}
    metadata = {**_latents_provenance(clip, encoder, crop), "source": str(clip.source), **_origin(origin)}
    _write(clip, "latents", {k: v.float() for k, v in tensors.items() if v is not None}, metadata)


def write_text(clip: Clip, context: Tensor, *, encoder: str, origin: str | None = None) -> None:
    """Write the text cache of a clip: its caption's features [S, D]. Clips of one source and caption share the file.

    `origin` as of `write_latents`.

    Raises:
        InputError: a NaN or an infinity; the message names the clip.
    """
    metadata = {**_text_provenance(clip, encoder), "caption": clip.caption, **_origin(origin)}
    _write(clip, "text", {"context": context.to(torch.bfloat16)}, metadata)


def write_camera(
    clip: Clip, path: CameraPath, *, estimator: str | None = None, figures: Mapping[str, object] | None = None
) -> None:
    """Write the camera cache of a clip.

    Args:
        clip: from `list_clips`.
        path: what `read_clip_camera` gave, or `estimate_clip_camera`.
        estimator: what found an estimated path, and with which settings.
        figures: how far to trust an estimated path; for reports, no part of the provenance.
    """
    metadata = {} if estimator is None else {"estimator": estimator, "estimate": json.dumps(figures)}
    metadata |= {
        **_camera_provenance(clip),
        "source": str(clip.camera.path if clip.camera else None),
        "pose_frame": path.pose_frame,
        "scale_rule": path.scale_rule,
        "mean_depth": json.dumps(path.mean_depth),
        "height": str(path.height),
        "width": str(path.width),
        "fps": json.dumps(path.fps),
    }
    _write(clip, "camera", {"c2w": path.c2w, "K": path.K}, metadata)


def problem(
    clip: Clip,
    kind: Kind,
    *,
    encoder: str | None = None,
    condition_channels: int = 0,
    image_context: bool = False,
    verified: str | None = None,
) -> str | None:
    """Why a cache cannot be used, from its header alone; None when it is current.

    Args:
        clip: from `list_clips`.
        kind: which of its caches.
        encoder: fingerprint of the VAE or text encoder that must have written it, or the estimator of cameras; None
            accepts any.
        condition_channels: channels of the first-frame condition that the model takes; 0: it takes none.
        image_context: whether the model needs CLIP features.
        verified: `recorded_checksum` of the cache when it was compared with its source. The source is then not looked
            at again; the cache must be the same file.

    Returns:
        One line: the clip, the file, what was expected, what was found, and which command mends it.
    """
    if kind == "camera" and clip.camera is None:
        return (
            f"{clip.key}: expected a camera, found none in the TOML; name camera_directory or camera_params there, or "
            "say estimate_camera = true"
        )
    file = cache_path(clip, kind)
    advice = f"re-run {COMMANDS[kind]} with the same dataset TOML"
    if kind == "camera" and clip.camera is not None and clip.camera.settings.estimate:
        advice = f"re-run {COMMANDS[kind]} --estimate with the same dataset TOML, or name the clip in exclude_clips"
    if not file.is_file():
        return f"{clip.key}: expected its {kind} cache {file}, found nothing; {advice}"
    try:
        tensors, metadata = read_safetensors_header(file)
    except InputError as error:
        return f"{clip.key}: {error}; {advice}"
    if kind == "latents":
        expected = _latents_provenance(clip, encoder, clip.crop, check_source=verified is None)
    elif kind == "text":
        expected = _text_provenance(clip, encoder)
    else:
        expected = _camera_provenance(clip, check_source=verified is None)
        if encoder is not None:
            expected["estimator"] = encoder
    if verified is not None:
        expected[checksum.KEY] = verified
    for name, value in expected.items():
        if metadata.get(name) != value:
            label = (
                LABELS[name] if name != "encoder" else "another VAE" if kind == "latents" else "another text encoder"
            )
            found = _shown(name, metadata.get(name))
            return f"{clip.key}: {file}: {label}: expected {_shown(name, value)}, found {found}; {advice}"
    flaw = _layout_flaw(clip, kind, tensors)
    channels = tensors["condition"][1][0] if "condition" in tensors else 0
    if flaw is None and condition_channels not in (0, channels):
        flaw = f"expected {condition_channels} first-frame channels for this model, found {channels or 'none'}"
    if flaw is None and image_context and "image_context" not in tensors:
        flaw = "expected CLIP features for a model with an image branch, found none"
    return flaw and f"{clip.key}: {file}: {flaw}; {advice}"


def is_current(
    clip: Clip, kind: Kind, *, encoder: str | None = None, condition_channels: int = 0, image_context: bool = False
) -> bool:
    """Whether writing a cache again would change nothing: what --skip_existing asks. Arguments as of `problem`."""
    return (
        problem(clip, kind, encoder=encoder, condition_channels=condition_channels, image_context=image_context) is None
    )


def damage(clip: Clip, kind: Kind) -> str | None:
    """Why the content of a cache whose header is in order cannot be used: read whole, it is not what was written."""
    try:
        _read(clip, kind, None)
    except InputError as error:
        return str(error)
    return None


def read_latents(
    clip: Clip,
    *,
    encoder: str | None = None,
    condition_channels: int = 0,
    image_context: bool = False,
    verified: str | None = None,
) -> Latents:
    """Read the latent cache of a clip. Arguments as of `problem`.

    Raises:
        InputError: the cache is missing, damaged, not current, or holds a NaN or an infinity.
    """
    tensors, _ = _read(
        clip,
        "latents",
        problem(
            clip,
            "latents",
            encoder=encoder,
            condition_channels=condition_channels,
            image_context=image_context,
            verified=verified,
        ),
    )
    return Latents(
        latents=tensors["latents"],
        condition=tensors["condition"] if condition_channels else None,
        image_context=tensors["image_context"] if image_context else None,
    )


def read_text(clip: Clip, *, encoder: str | None = None) -> Tensor:
    """Read the text cache of a clip: context [S, D] bfloat16. Raises InputError as `read_latents` does."""
    return _read(clip, "text", problem(clip, "text", encoder=encoder))[0]["context"]


def read_camera(clip: Clip, *, verified: str | None = None) -> CameraPath:
    """Read the camera cache of a clip. Raises InputError as `read_latents` does."""
    tensors, metadata = _read(clip, "camera", problem(clip, "camera", verified=verified))
    try:
        return CameraPath(
            c2w=tensors["c2w"],
            K=tensors["K"],
            height=clip.height,
            width=clip.width,
            fps=clip.fps,
            pose_frame="first" if metadata["pose_frame"] == "first" else "scene",
            scale_rule=metadata["scale_rule"],
            mean_depth=json.loads(metadata["mean_depth"]),
        )
    except InputError as error:
        file = clip.camera_cache
        raise InputError(f"{clip.key}: {file}: {error}; delete it and re-run {COMMANDS['camera']}") from None


def read_estimate(clip: Clip) -> dict[str, Any]:
    """The figures that `write_camera` was given with an estimated path. Raises InputError as `read_latents` does."""
    _, metadata = _read(clip, "camera", problem(clip, "camera"))
    return json.loads(metadata["estimate"])


def recorded_checksum(clip: Clip, kind: Kind) -> str:
    """What a current cache says that it holds, from its header. Raises InputError where it cannot be read."""
    return read_safetensors_header(cache_path(clip, kind))[1][checksum.KEY]


def cached_encoder(clip: Clip, kind: Literal["latents", "text"]) -> str | None:
    """The fingerprint of the encoder that wrote a cache; None where the cache is missing, damaged or not current."""
    if problem(clip, kind) is not None:
        return None
    return read_safetensors_header(cache_path(clip, kind))[1].get("encoder")


def cached_shape(clip: Clip, kind: Kind, name: str) -> tuple[int, ...]:
    """The shape of one tensor of a cache, from its header. Raises InputError where it cannot be read."""
    return read_safetensors_header(cache_path(clip, kind))[0][name][1]


def _origin(file: str | None) -> dict[str, str]:
    return {} if file is None else {"origin": file}


def _provenance(kind: Kind) -> dict[str, str]:
    return {"kind": kind, "version": VERSIONS[kind]}


def _latents_provenance(clip: Clip, encoder: str | None, crop: Crop, check_source: bool = True) -> dict[str, str]:
    expected = _provenance("latents") | _sampling_provenance(clip, crop)
    if encoder is not None:
        expected["encoder"] = encoder
    if check_source:
        expected["source_fingerprint"] = source_fingerprint(clip)
    return expected


def _text_provenance(clip: Clip, encoder: str | None) -> dict[str, str]:
    expected = _provenance("text") | {"caption_hash": text_hash(clip.caption)}
    return expected if encoder is None else expected | {"encoder": encoder}


def _camera_provenance(clip: Clip, check_source: bool = True) -> dict[str, str]:
    assert clip.camera is not None  # read_clip_camera and problem refuse such clips with a message
    settings = clip.camera.settings
    expected = _provenance("camera") | _sampling_provenance(clip, clip.crop)
    expected |= {key: str(getattr(settings, field)) for key, field in CAMERA_FILE_KEYS.items()}
    expected |= {
        "pose_frame": settings.pose_frame,
        "scale_rule": settings.scale,
        "camera_fps": json.dumps(settings.fps),
        "estimate_camera": str(settings.estimate),
        "fps": json.dumps(clip.fps),
    }
    if clip.times is not None:
        expected["times"] = json.dumps(clip.times)
    if check_source:
        expected["camera_fingerprint"] = (
            source_fingerprint(clip) if settings.estimate else _camera_fingerprint(clip.camera.path)
        )
        if clip.source.is_dir():  # formats that name images are matched by these
            expected["frame_names"] = text_hash("\n".join(file.name for file in list_frames(clip.source)))
    return expected


def _sampling_provenance(clip: Clip, crop: Crop) -> dict[str, str]:
    return {"frame_indices": json.dumps(clip.frame_indices), "crop": json.dumps(asdict(crop))}


def _shown(name: str, value: str | None) -> str:
    """An entry of the metadata, short enough for one line."""
    if value is None:
        return "none"
    try:
        if name == "frame_indices" and (frames := json.loads(value)):
            return f"{len(frames)} frames from {frames[0]} to {frames[-1]}"
        if name == "crop":
            crop = json.loads(value)
            source = f"{crop['source_width']}x{crop['source_height']}"
            return f"{crop['width']}x{crop['height']} at left {crop['left']}, top {crop['top']} of {source} pixels"
    except (ValueError, KeyError, TypeError):
        pass
    return value


def _layout_flaw(clip: Clip, kind: Kind, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """What is wrong with the names, dtypes and shapes of a cache."""
    known = DTYPES[kind]
    required = [name for name in known if name not in OPTIONAL]
    if not set(required) <= set(tensors) <= set(known):
        return f"expected the tensors {', '.join(required)}, found {', '.join(sorted(tensors)) or 'none'}"
    for name, (dtype, shape) in tensors.items():
        if dtype != known[name]:
            return f"expected {name} in {known[name]}, found {dtype}"
        if not all(shape):
            return f"expected {name} with numbers in it, found shape {[*shape]}"
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    num_frames = clip.num_frames
    if kind == "camera" and (shapes["c2w"], shapes["K"]) != ((num_frames, 4, 4), (num_frames, 3, 3)):
        return f"expected {num_frames} poses, found c2w {[*shapes['c2w']]} and K {[*shapes['K']]}"
    if kind == "text" and len(shapes["context"]) != 2:
        return f"expected context [S, D], found {[*shapes['context']]}"
    if kind == "latents":
        latents = shapes["latents"]
        if len(latents) != 4 or not _fits(clip, *latents[1:]):
            return (
                f"expected latents [C, F, H, W] of {num_frames} frames {clip.width}x{clip.height}, found {[*latents]}"
            )
        if "condition" in shapes and shapes["condition"][1:] != latents[1:]:
            return f"expected condition of the latents' size {[*latents[1:]]}, found {[*shapes['condition']]}"
    return None


def _fits(clip: Clip, num_latent_frames: int, height: int, width: int) -> bool:
    """Whether latents of this size can belong to the clip: one stride for both sides, one for the later frames."""
    if clip.height % height or clip.width % width or clip.height // height != clip.width // width:
        return False
    if num_latent_frames == 1 or clip.num_frames == 1:
        return num_latent_frames == clip.num_frames
    return (clip.num_frames - 1) % (num_latent_frames - 1) == 0


def _write(clip: Clip, kind: Kind, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    for name, tensor in tensors.items():
        _require_finite(clip, name, tensor, f"{cache_path(clip, kind)} is not written; look at {clip.source}")
    layout = {name: (DTYPES[kind][name], tuple(tensor.shape)) for name, tensor in tensors.items()}
    flaw = _layout_flaw(clip, kind, layout)
    if flaw:
        raise ValueError(f"{clip.key}: {kind} cache: {flaw}")
    save_safetensors(tensors, cache_path(clip, kind), checksum.with_checksum(tensors, metadata))


def _read(clip: Clip, kind: Kind, flaw: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, once it holds what was written."""
    if flaw:
        raise InputError(flaw)
    file = cache_path(clip, kind)
    advice = f"{file} is damaged; delete it and re-run {COMMANDS[kind]}"
    tensors, metadata = read_safetensors(file)
    for name, tensor in tensors.items():
        _require_finite(clip, name, tensor, advice)
    recorded, found = metadata.get(checksum.KEY), checksum.checksum_of(tensors, metadata)
    if recorded != found:
        raise InputError(f"{clip.key}: expected a content of checksum {recorded or '(none)'}, found {found}; {advice}")
    return tensors, metadata


def _require_finite(clip: Clip, name: str, tensor: Tensor, consequence: str) -> None:
    if not tensor.isfinite().all():
        bad = int((~tensor.isfinite()).sum())
        raise InputError(
            f"{clip.key}: expected finite {name}, found {bad} of {tensor.numel()} numbers NaN or infinite; "
            f"{consequence}"
        )


def _camera_fingerprint(camera: Path) -> str:
    """What identifies the content of a camera file, or of all files that a camera's folder or format consists of."""
    files = camera_files(camera)
    if files == [camera]:
        return _file_fingerprint(camera)
    return text_hash("\n".join(f"{file} {_file_fingerprint(file)}" for file in files))


def _file_fingerprint(file: Path) -> str:
    """The fingerprint of a file, computed again only when its size or its time of change differs."""
    if not file.is_file():
        raise InputError(f"{file}: expected a file, found nothing")
    state = file.stat()
    return _remembered_fingerprint(file, state.st_size, state.st_mtime_ns)


@functools.cache
def _remembered_fingerprint(file: Path, size: int, changed_ns: int) -> str:
    return fingerprint(file)
