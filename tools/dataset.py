"""Check a data set, begin one, and look at what is trained on.

    python tools/dataset.py check x.toml                      every clip and every problem, without loading a model
    python tools/dataset.py new videos/ --output x.toml       a commented TOML for a folder of videos
    python tools/dataset.py show x.toml --clip 3              what the trainer sees, decoded from the latent cache

`check` ends with exit code 2 where it found a problem. docs/datasets.md describes every key of the TOML.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tyro.conf import Positional, subcommand

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Model:
    dataset_config: Positional[Path]
    """Dataset TOML; its [model] table may name the task and the model's files."""
    task: str | None = None
    """The task, where the TOML does not name it."""
    ckpt_dir: Path | None = None
    """Folder in the layout that Wan's authors publish."""
    vae: Path | None = None
    """VAE checkpoint; check compares its fingerprint with that of the caches."""
    t5: Path | None = None
    """Text encoder checkpoint, likewise."""


@dataclass(frozen=True, kw_only=True)
class Check(Model):
    """List every clip that will be used, and everything that is wrong."""

    megapixels_per_second: float | None = None
    """Rate of cache_latents.py on your machine, as it prints it at its end; for the time that caching will take."""
    json: bool = False
    """Print everything as JSON."""


@dataclass(frozen=True, kw_only=True)
class New:
    """Write a commented TOML to start from."""

    source: Positional[Path]
    """A folder of videos, a .jsonl list of videos, or a folder of frames of one scene."""
    output: Path
    """TOML to write."""
    cameras: Path | None = None
    """Folder of camera files; of one scene, its camera file."""
    prompt: str | None = None
    """Caption of one scene."""
    task: str = "t2v-A14B"
    """The task that it is for."""
    overwrite: bool = False
    """Replace a TOML that is there."""


@dataclass(frozen=True, kw_only=True)
class Show(Model):
    """Draw one clip: its frames as they are encoded, the same decoded from its latent cache, caption, times, camera."""

    clip: int = 0
    """Its place in the list that check prints."""
    output: Path = Path("clip.png")
    """PNG to write."""
    device: str | None = None
    """Where the VAE decodes. Default: cuda where there is one, else cpu."""


Options = (
    Annotated[Check, subcommand("check")] | Annotated[New, subcommand("new")] | Annotated[Show, subcommand("show")]
)

if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)  # type: ignore[arg-type]  # tyro reads a union as subcommands

import json

from core.errors import InputError
from core.files import atomic_path, fingerprint
from core.model_files import ModelFiles, resolve_model
from dataset.clips import list_clips
from dataset.config import DatasetConfig, read_dataset_config
from dataset.report import ClipReport, DatasetReport, Encoders, as_json, report
from dataset.starting_point import describe_source, starting_toml
from wan_ext.configs import WanVariant, get_variant

CACHES = ("latents", "text", "camera")


def main(options: Check | New | Show) -> None:
    if isinstance(options, New):
        begin(options)
        return
    config = read_dataset_config(options.dataset_config)
    flags = {"task": options.task, "ckpt_dir": options.ckpt_dir, "vae": options.vae, "t5": options.t5}
    needs = ("vae",) if isinstance(options, Show) else ()
    files = resolve_model(flags, table=config.model, table_source=options.dataset_config, needs=needs)
    variant = get_variant(files.task)
    if isinstance(options, Show):
        show(options, config, files, variant)
    else:
        check(options, config, files, variant)


def check(options: Check, config: DatasetConfig, files: ModelFiles, variant: WanVariant) -> None:
    """Print the report; raises InputError where it holds problems."""
    found = report(config, encoders_of(files, variant))
    print(json.dumps(as_json(found), indent=1) if options.json else in_words(found, options.megapixels_per_second))
    if found.problems:
        raise InputError(f"{config.path}: {len(found.problems)} problem{'s' * (len(found.problems) > 1)}, see above")


def encoders_of(files: ModelFiles, variant: WanVariant) -> Encoders:
    return Encoders(
        spatial_stride=variant.spatial_stride,
        temporal_stride=variant.vae.stride[0],
        latent_stride=variant.vae.stride[1],
        latent_channels=variant.vae.z_dim,
        condition_channels=variant.dit.condition_channels,
        image_context=variant.image_encoder is not None,
        context_width=variant.dit.text_dim,
        vae=fingerprint(files.vae) if files.vae else None,
        text_encoder=fingerprint(files.t5) if files.t5 else None,
    )


def in_words(found: DatasetReport, megapixels_per_second: float | None) -> str:
    """The report as a table and lines."""
    lines = ["   #  frames    fps  size       caches  camera                caption"]
    lines += [row(number, each) for number, each in enumerate(found.clips)]
    missing = {kind: sum(getattr(each, kind) is not None for each in found.clips) for kind in CACHES}
    stale = [
        reason
        for each in found.clips
        for kind in CACHES
        if (reason := getattr(each, kind)) and "found nothing" not in reason
    ]
    lines += [
        "",
        f"{len(found.clips)} clips. Caches: L latents, T text, C camera; a dot is one that is not there or not current",
    ]
    lines += [f"warning: {warning}" for warning in found.warnings]
    lines += [f"not current: {reason}" for reason in dict.fromkeys(stale)]
    if any(missing.values()):
        lines.append(
            "to cache: "
            + ", ".join(f"{count} {kind}" for kind, count in missing.items() if count)
            + f"; {found.pixels_to_encode / 1e6:,.1f} megapixels to encode"
            + f", {found.bytes_to_write / 1e6:,.2f} MB to write"
        )
        if megapixels_per_second and found.pixels_to_encode:
            lines.append(f"about {found.pixels_to_encode / 1e6 / megapixels_per_second:,.0f} s for the latents")
    elif found.clips:
        lines.append("every cache is current")
    lines += [f"problem: {problem}" for problem in found.problems]
    return "\n".join(lines)


def row(number: int, each: ClipReport) -> str:
    clip = each.clip
    states = [("L", each.latents), ("T", each.text)] + ([("C", each.camera)] if clip.camera else [])
    caches = "".join(letter if reason is None else "." for letter, reason in states)
    camera = "-" if clip.camera is None else "estimated" if clip.camera.settings.estimate else clip.camera.path.name
    fps = "-" if clip.fps is None else f"{clip.fps:g}"
    size = f"{clip.width}x{clip.height}"
    columns = f"{number:4d}  {clip.num_frames:6d}  {fps:>5.5}  {size:9}  {caches:6}  {camera:20.20}"
    return f"{columns}  {clip.name}: {clip.caption:.60}"


def begin(options: New) -> None:
    """Write a TOML whose values fit what lies in the source."""
    if options.output.exists() and not options.overwrite:
        raise InputError(f"{options.output}: is there already; choose another --output, or say --overwrite")
    variant = get_variant(options.task)
    source = describe_source(options.source)
    text = starting_toml(
        source,
        task=options.task,
        cameras=options.cameras,
        prompt=options.prompt,
        fps=variant.fps,
        spatial_stride=variant.spatial_stride,
        temporal_stride=variant.vae.stride[0],
        output=options.output,
    )
    with atomic_path(options.output) as temporary:
        temporary.write_text(text)
    print(f"{options.output}: {source.summary()}\nnext: python tools/dataset.py check {options.output}")


def show(options: Show, config: DatasetConfig, files: ModelFiles, variant: WanVariant) -> None:
    """Draw one clip."""
    import torch
    from PIL import Image

    from camera.plots import plot_path
    from dataset import cache
    from dataset.clip_frames import read_clip
    from dataset.clip_sheet import clip_sheet
    from evaluation.filming import decode_frames
    from wan_ext.vae import load_vae

    clips = list_clips(config, spatial_stride=variant.spatial_stride, temporal_stride=variant.vae.stride[0])
    if not 0 <= options.clip < len(clips):
        raise InputError(f"--clip: expected 0 to {len(clips) - 1}, found {options.clip}; check lists them")
    clip = clips[options.clip]
    latents = cache.read_latents(clip, encoder=fingerprint(files.vae)).latents
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    decoded = decode_frames(load_vae(files.vae, variant.vae, device=device), latents[None].to(device))[0]
    picture = clip_sheet(clip, read_clip(clip)[0], decoded)
    if clip.camera is not None:
        plot = options.output.with_name(f".{options.output.stem}.camera.png")
        try:
            plot_path({clip.name: cache.read_camera(clip)}, plot)
            with Image.open(plot) as image:
                picture = above(picture, image.convert("RGB"))
        finally:
            plot.unlink(missing_ok=True)
    with atomic_path(options.output) as temporary:
        picture.save(temporary, format="PNG")
    print(f"{options.output}: {clip.name}, {clip.num_frames} frames of {clip.width}x{clip.height}")


def above(top, bottom):
    """Two pictures, one over the other, the lower one as wide as the upper."""
    from PIL import Image

    bottom = bottom.resize((top.width, round(bottom.height * top.width / bottom.width)))
    both = Image.new("RGB", (top.width, top.height + bottom.height), "white")
    both.paste(top, (0, 0))
    both.paste(bottom, (0, top.height))
    return both


if __name__ == "__main__":
    run(main, OPTIONS)
