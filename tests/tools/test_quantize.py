"""tools/quantize.py: its files go wherever --dit and --t5 go, and what makes none is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import generate
from core.errors import InputError
from dataset.video import read_frames
from memory.quant import RECIPES, QuantLinear
from tools.quantize import Options, main
from wan_ext.configs import get_variant
from wan_ext.loading import load_dit

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny-wan"
T5 = TINY / "models_t5_umt5-xxl-enc-bf16.safetensors"


def quantize(**options) -> Path:
    main(Options(**({"device": "cpu"} | options)))
    return options["output"]


def test_a_video_from_the_files_is_the_video_of_quantising_on_the_fly(tmp_path, capsys):
    recipe = "int8_rotated"
    files = {
        "dit": quantize(dit=TINY / "low_noise_model", output=tmp_path / "low.safetensors", recipe=recipe),
        "dit_high_noise": quantize(dit=TINY / "high_noise_model", output=tmp_path / "high.safetensors", recipe=recipe),
        "t5": quantize(t5=T5, output=tmp_path / "t5.safetensors"),
    }
    assert f"MB, {recipe}; give it as --dit" in capsys.readouterr().out
    common = {"task": "tiny", "ckpt_dir": TINY, "prompt": "a red ball", "infer_steps": 2, "device": "cpu"}
    common |= {"video_size": (32, 48), "video_length": 5, "guidance_scale": 1.0}

    def pictures(name: str, **options) -> torch.Tensor:
        generate.main(generate.Options(**common, save_path=tmp_path / name / "%03d.png", **options))
        return read_frames(tmp_path / name)

    ready, made = pictures("ready", **files), pictures("made", quantize=recipe, fp8_t5=True)
    assert torch.equal(ready, made)
    assert not torch.equal(made, pictures("whole"))


def test_the_recipe_is_the_one_asked_for(tmp_path):
    dit = TINY / "low_noise_model"
    for recipe in ("fp8", "int8_w8a8_transposed"):
        for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
            output = tmp_path / f"{recipe}_{precision}.safetensors"
            quantize(dit=dit, output=output, recipe=recipe, mixed_precision=precision)
            loaded = load_dit(output, get_variant("tiny"), dtype=dtype)
            linears = [module for module in loaded.modules() if isinstance(module, QuantLinear)]
            assert {linear.recipe for linear in linears} == {RECIPES[recipe]}
            assert all(linear.bias.dtype == dtype and linear.bias.data_ptr() % 256 == 0 for linear in linears)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected --dit or --t5, found neither"),
        ({"dit": TINY / "low_noise_model", "t5": T5}, "expected --dit or --t5, found both"),
        ({"dit": TINY / "low_noise_model", "tokenizer": T5}, "--tokenizer: expected it with --t5"),
        ({"dit": TINY / "low_noise_model", "output": Path("x.pth")}, r"--output x\.pth: .* ends in \.safetensors"),
        ({"dit": TINY / "low_noise_model", "output": T5}, "expected a path where nothing is, found something"),
        ({"dit": TINY / "low_noise_model", "recipe": "int8_rotate"}, r"found 'int8_rotate' \(did you mean 'int8_rot"),
        ({"dit": T5}, r"expected a Wan diffusion transformer, found another model"),
        ({"t5": TINY / "low_noise_model", "tokenizer": TINY / "google" / "umt5-xxl"}, "expected the umT5 text encoder"),
        ({"dit": TINY / "nothing"}, "found nothing"),
    ],
)
def test_what_makes_no_file_is_said(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        quantize(**({"output": tmp_path / "w.safetensors"} | options))
    assert not list(tmp_path.iterdir())
