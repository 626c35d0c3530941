"""Make a file of 8-bit weights of a checkpoint, which then starts in seconds because it is mapped instead of read.

    python tools/quantize.py --dit Wan2.2-T2V-A14B/high_noise_model --output high_int8.safetensors --recipe int8_rotated
    python tools/quantize.py --t5 models_t5_umt5-xxl-enc-bf16.pth --output t5_fp8.safetensors

The file goes wherever --dit, --dit_high_noise or --t5 goes, and brings its recipe; the weights are bit for bit those of
--quantize RECIPE (--fp8_scaled, --fp8_t5) on the checkpoint. docs/quantization.md compares the recipes. A 28 GB expert
becomes 15 GB (29 GB with a transposed copy) and takes 1 GB of memory meanwhile. After Ctrl-C nothing is left.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    dit: Path | None = None
    """A transformer to quantise: a folder of shards, .safetensors or .pth. The two experts are two files."""
    t5: Path | None = None
    """A text encoder to quantise; give this or --dit."""
    output: Path
    """The .safetensors file to write; nothing may be there."""
    recipe: str = "fp8"
    """fp8, int8, int8_rotated, int8_w8a8, int8_w8a8_transposed, fp8_w8a8 or fp8_w8a8_transposed."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """The precision that the model will compute in. What stays whole is stored for it; another one still loads, but is
    converted in memory."""
    tokenizer: Path | None = None
    """For --t5: spiece.model, tokenizer.json or their folder. Default: beside the checkpoint, or inside it. A
    spiece.model goes into the file."""
    device: str | None = None
    """Where weights are quantised. Default: cuda where there is one, else cpu."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from tqdm import tqdm

from core.errors import InputError
from memory.quant import parse_recipe
from wan_ext.loading import write_quantized_dit
from wan_ext.text_encoder import write_quantized_text_encoder


def main(options: Options) -> None:
    check(options)
    recipe = parse_recipe(options.recipe)
    dtype = torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(desc="quantise", unit="B", unit_scale=True) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if options.dit is not None:
            write_quantized_dit(options.dit, options.output, recipe=recipe, dtype=dtype, device=device, report=report)
        else:
            assert options.t5 is not None
            write_quantized_text_encoder(
                options.t5,
                options.output,
                recipe=recipe,
                tokenizer=options.tokenizer,
                dtype=dtype,
                device=device,
                report=report,
            )
    flag = "--dit" if options.dit is not None else "--t5"
    size = tqdm.format_sizeof(options.output.stat().st_size, "B")
    print(f"{options.output}: {size}, {options.recipe}; give it as {flag}")


def check(options: Options) -> None:
    """Refuse flags that make no file."""
    if (options.dit is None) == (options.t5 is None):
        found = "neither" if options.dit is None else "both"
        raise InputError(f"expected --dit or --t5, found {found}; one run writes one file")
    if options.tokenizer is not None and options.t5 is None:
        raise InputError("--tokenizer: expected it with --t5, found --dit; leave it away")
    if options.output.suffix != ".safetensors":
        raise InputError(f"--output {options.output}: expected a name that ends in .safetensors")
    if options.output.exists():
        raise InputError(
            f"--output {options.output}: expected a path where nothing is, found something; choose another name or "
            "remove it"
        )


if __name__ == "__main__":
    run(main, OPTIONS)
