"""Step 3: read every clip's camera file and apply to it what is done to the video.

    python cache_camera.py --dataset_config x.toml

Crop, resize and frame sampling of the clip act on its path; the pose frame (`scene` or `first`) is the data set's.
One safetensors file per clip with c2w, K and their conventions. Needs no model and no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset_config: Path
    """Dataset TOML; its [model] table may name the task."""
    task: str | None = None
    """t2v-A14B, i2v-A14B, ti2v-5B, t2v-1.3B, t2v-14B, i2v-14B, t2i-14B or tiny: decides which sizes fit."""
    skip_existing: bool = False
    """Leave caches alone that are current: same camera file, same crop, same conventions."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from tqdm import tqdm

from core.errors import InputError
from core.model_files import resolve_model
from dataset import cache
from dataset.cameras import read_clip_camera
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from wan_ext.configs import get_variant


def main(options: Options) -> None:
    config = read_dataset_config(options.dataset_config)
    files = resolve_model({"task": options.task}, table=config.model, table_source=options.dataset_config, needs=())
    variant = get_variant(files.task)
    clips = list_clips(config, spatial_stride=variant.spatial_stride, temporal_stride=variant.vae.stride[0])

    with_camera = [clip for clip in clips if clip.camera is not None]
    if not with_camera:
        raise InputError(
            f"{options.dataset_config}: no data set names cameras; write camera_directory (or camera_params for one "
            "scene) into its [[datasets]] table"
        )
    todo = with_camera
    if options.skip_existing:
        todo = [clip for clip in with_camera if not cache.is_current(clip, "camera")]
    print(f"{len(with_camera)} camera paths, {len(with_camera) - len(todo)} already cached")
    for clip in tqdm(todo, desc="cameras", unit="clip"):
        cache.write_camera(clip, read_clip_camera(clip))


if __name__ == "__main__":
    run(main, OPTIONS)
