"""Step 2: encode every caption of a dataset config with umT5.

    python cache_text.py --dataset_config x.toml
    python cache_text.py --dataset_config x.toml --task t2v-A14B --t5 models_t5_umt5-xxl-enc-bf16.pth --fp8_t5

One safetensors file per clip with the features of its caption, cut to the caption's length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    dataset_config: Path
    """Dataset TOML; its [model] table may name the task and the model's files."""
    task: str | None = None
    """t2v-A14B, i2v-A14B, ti2v-5B, t2v-1.3B, t2v-14B, i2v-14B, t2i-14B, tiny, tiny-i2v,
    fun-camera-A14B, fun-camera-5B, fun-camera-1.3B or fun-camera-14B."""
    ckpt_dir: Path | None = None
    """Folder in the layout that Wan's authors publish."""
    t5: Path | None = None
    """umT5 encoder checkpoint (.pth or .safetensors)."""
    tokenizer: Path | None = None
    """spiece.model, tokenizer.json or their folder. Default: google/umt5-xxl beside the checkpoint, or inside it."""
    t5_cpu: bool = False
    """Run the text encoder on the CPU."""
    fp8_t5: bool = False
    """Keep the encoder's linear weights in 8 bits: 6 GB instead of 11 GB for umT5-XXL."""
    device: str | None = None
    """Default: cuda where there is one, else cpu."""
    skip_existing: bool = False
    """Leave caches alone that are current: same caption, same encoder.
    What is not is written again, and the reason is said."""
    verify: bool = False
    """As --skip_existing, and read every cache whole: a damaged one is written again."""
    prune: bool = False
    """Remove caches that belong to no clip of the config. They are named otherwise."""
    keep_cache: bool = False
    """Keep caches that belong to no clip: the default."""
    reuse_musubi_caches: bool = False
    """Take over the captions that musubi-tuner has encoded in the cache directories; encode the others. Of each data
    set one caption is encoded all the same, and must agree."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from tqdm import tqdm

from core.files import fingerprint
from core.model_files import resolve_model
from core.processes import this_process
from dataset import cache
from dataset.caching import find_todo, prune_wanted, say, say_reused, tidy
from dataset.clips import Clip, list_clips, without_caption
from dataset.config import read_dataset_config
from dataset.musubi_caches import reuse_text
from memory.quant import RECIPES
from wan_ext.configs import get_variant
from wan_ext.text_encoder import load_text_encoder


def main(options: Options) -> None:
    config = read_dataset_config(options.dataset_config)
    flags = {
        "task": options.task,
        "ckpt_dir": options.ckpt_dir,
        "t5": options.t5,
        "tokenizer": options.tokenizer,
    }
    files = resolve_model(flags, table=config.model, table_source=options.dataset_config, needs=("t5",))
    variant = get_variant(files.task)
    process = this_process()
    gpu = f"cuda:{process.local_rank}" if torch.cuda.is_available() else "cpu"
    device = torch.device("cpu" if options.t5_cpu else options.device or gpu)
    clips = list_clips(config, spatial_stride=variant.spatial_stride, temporal_stride=variant.vae.stride[0])

    encoder = fingerprint(files.t5)
    clips += [without_caption(clip) for clip in clips if clip.caption_dropout]
    clips = list({clip.text_cache: clip for clip in clips}.values())  # clips cut from one video share its caption

    def problem(clip: Clip) -> str | None:
        flaw = cache.problem(clip, "text", encoder=encoder)
        return cache.damage(clip, "text") if options.verify and flaw is None else flaw

    tidy(clips, "text", prune=prune_wanted(options.prune, options.keep_cache), process=process)
    skip = options.skip_existing or options.verify
    todo = find_todo(clips, problem, kind="text", skip_existing=skip, process=process)
    say(todo, what="captions", process=process)
    if not todo.mine and not todo.others:
        return

    text_encoder = load_text_encoder(
        files.t5,
        variant.text_encoder,
        tokenizer=files.tokenizer,
        text_len=variant.dit.text_len,
        dtype=torch.bfloat16,
        device=device,
        recipe=RECIPES["fp8"] if options.fp8_t5 else None,
    )
    if options.reuse_musubi_caches:
        reused = reuse_text(
            todo.mine,
            lambda caption: text_encoder.encode([caption])[0].cpu(),
            all_clips=clips,
            encoder=encoder,
            longest=variant.dit.text_len,
            width=variant.text_encoder.dim,
        )
        say_reused(reused, what="captions")
        todo = replace(todo, mine=reused.left)
        if not todo.mine and not todo.others:
            return
    for clip in tqdm(todo, total=len(todo.mine), desc="text", unit="caption", disable=not process.is_main):
        (context,) = text_encoder.encode([clip.caption])  # [S, D]
        cache.write_text(clip, context.cpu(), encoder=encoder)


if __name__ == "__main__":
    run(main, OPTIONS)
