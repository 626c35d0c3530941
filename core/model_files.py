"""Which files a task's models are in: from flags, from the `[model]` table of a dataset TOML, or from one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError
from core.hub import resolve

# Names in the folders that Wan's authors publish, relative to `ckpt_dir`; the first that exists is taken.
OFFICIAL_NAMES = {
    "dit": ("low_noise_model", "."),
    "dit_high_noise": ("high_noise_model",),
    "vae": ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "Wan2.2_VAE.pth", "Wan2.2_VAE.safetensors"),
    "t5": ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors"),
    "tokenizer": ("google/umt5-xxl",),
    "clip": (
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
    ),
}
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The task and the files of its models; None where none was given. `dit` is the low-noise or only expert."""

    task: str
    dit: Path | None = None
    dit_high_noise: Path | None = None
    vae: Path | None = None
    t5: Path | None = None
    tokenizer: Path | None = None
    clip: Path | None = None


def resolve_model(
    flags: Mapping[str, str | Path | None],
    *,
    table: Mapping[str, str],
    table_source: Path | None,
    needs: Sequence[str],
) -> ModelFiles:
    """Take each value from its flag, else from the `[model]` table, else from the official name inside `ckpt_dir`.

    A path "hub:owner/name/file" is downloaded first; no other path touches the network (see `core.hub`).

    Args:
        flags: task, ckpt_dir, dit, dit_high_noise, vae, t5, tokenizer, clip as given on the command line, or None.
        table: the `[model]` table, possibly empty.
        table_source: the TOML it stands in, for messages.
        needs: which of dit, dit_high_noise, vae, t5, clip must be found ("task" always must).

    Raises:
        InputError: a needed value is given in neither way, or a given path does not exist.
    """
    given = {key: value for key, value in table.items() if value} | {
        key: value for key, value in flags.items() if value is not None
    }
    missing = [key for key in ("task", *needs) if key not in given and (key == "task" or "ckpt_dir" not in given)]
    if missing:
        flag_form = " ".join(f"--{key} ..." for key in missing)
        table_form = "; ".join(f'{key} = "..."' for key in missing)
        raise InputError(
            f"{', '.join(missing)}: not given; give the flag{'s' if len(missing) > 1 else ''} {flag_form}, or write "
            f"[model] {table_form} into {table_source or 'the TOML that --dataset_config names'}"
            + (' (or ckpt_dir = "FOLDER" for the official folder layout)' if missing != ["task"] else "")
        )

    paths: dict[str, Path] = {}
    for key, names in OFFICIAL_NAMES.items():
        if key in given:
            paths[key] = resolve(given[key], patterns=TOKENIZER_FILES if key == "tokenizer" else None)
            if not paths[key].exists():
                where = f"flag --{key}" if flags.get(key) is not None else f"{table_source}, [model] {key}"
                raise InputError(f"{where}: expected a file or folder at {paths[key]}, found nothing")
        elif "ckpt_dir" in given:
            folder = Path(given["ckpt_dir"])
            if not folder.is_dir():
                raise InputError(f"ckpt_dir: expected the folder of a Wan model at {folder}, found nothing")
            found = next((folder / name for name in names if (folder / name).exists()), None)
            if found is not None:
                paths[key] = found
            elif key in needs:
                raise InputError(f"{folder}: expected {' or '.join(names)} in it; or give --{key}")
    return ModelFiles(task=str(given["task"]), **paths)
