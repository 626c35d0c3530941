"""From a checkpoint file to a diffusion transformer, and back.

The variant is read off the shapes and must be the one asked for: a wrong file would otherwise load, or fail on its
thousandth key. The model is built on the meta device and filled tensor by tensor (`wan_ext.assemble`), each in the
precision that the DiT computes with (`wan_ext.dit.storage_dtype`); with a recipe the linears of the blocks become 8
bits as they are read, so that a 28 GB expert needs 15 GB of memory from the first byte to the last. What
`write_quantized_dit` has once made of it is mapped instead (`wan_ext.quantized_files`), in a second.

What shapes cannot tell: the two experts of a mixture and Wan2.1's t2v-14B look alike. The user says which is which.

A Wan-Fun checkpoint has a camera adapter among its tensors, which becomes a part of the DiT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isqrt, prod
from pathlib import Path

import torch

from core.errors import InputError, listing
from core.files import atomic_path, fingerprint, save_safetensors
from memory.quant import RECIPES, QuantRecipe, parse_recipe
from wan_ext.assemble import Conversion, assign, quantize_linears
from wan_ext.checkpoint_files import Checkpoint, open_checkpoint
from wan_ext.configs import VARIANTS, DiTConfig, WanVariant
from wan_ext.control_adapter import PREFIX, RAY_CHANNELS
from wan_ext.dit import WanDiT, storage_dtype
from wan_ext.key_maps import dit_diffusers_name
from wan_ext.quantized_files import Report, quantized_file, refuse_quantized, write_quantized

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
BLOCK = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class DiTShape:
    """What the shapes of a checkpoint tell about its DiT."""

    dim: int
    ffn_dim: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_dim: int
    image_branch: bool
    first_last_positions: bool
    control_downscale: int | None
    """Pixels per latent pixel that the camera adapter folds, where there is one."""

    @classmethod
    def of_config(cls, config: DiTConfig) -> DiTShape:
        return cls(
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            in_dim=config.in_dim,
            out_dim=config.out_dim,
            text_dim=config.text_dim,
            image_branch=config.image_dim is not None,
            first_last_positions=config.first_last_positions,
            control_downscale=config.control_downscale,
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> DiTShape:
        """Read the shape off a checkpoint with native or diffusers names.

        Raises:
            InputError: it holds no Wan DiT.
        """
        name_in_file = names_of(checkpoint)
        try:
            patch, ffn, head, text = (
                checkpoint.shape(name_in_file(name))
                for name in (
                    "patch_embedding.weight",
                    "blocks.0.ffn.0.weight",
                    "head.head.weight",
                    "text_embedding.0.weight",
                )
            )
            return cls(
                dim=patch[0],
                ffn_dim=ffn[0],
                num_layers=1 + max(int(found[1]) for found in map(BLOCK.match, checkpoint.names()) if found),
                in_dim=patch[1],
                out_dim=head[0] // prod(patch[2:]),
                text_dim=text[1],
                image_branch=name_in_file("img_emb.proj.0.weight") in checkpoint,
                first_last_positions=name_in_file("img_emb.emb_pos") in checkpoint,
                control_downscale=control_downscale(checkpoint),
            )
        except (KeyError, IndexError, ZeroDivisionError):
            names = checkpoint.names()
            kind = "a LoRA" if any("lora_" in name for name in names) else "another model"
            raise InputError(
                f"{checkpoint.path}: expected a Wan diffusion transformer, found {kind} ({listing(names, 3)}); "
                "check which file is given for --dit"
            ) from None

    def __str__(self) -> str:
        extras = ", with image branch" if self.image_branch else ""
        extras += " and first-last positions" if self.first_last_positions else ""
        extras += f", with camera adapter (1/{self.control_downscale})" if self.control_downscale else ""
        return (
            f"{self.num_layers} layers of width {self.dim} (ffn {self.ffn_dim}), {self.in_dim} channels in, "
            f"{self.out_dim} out, text width {self.text_dim}{extras}"
        )


def detect_variant(shape: DiTShape) -> tuple[str, ...]:
    """The tasks whose DiT has this shape: none, one, or several that only the user can tell apart."""
    return tuple(name for name, variant in VARIANTS.items() if DiTShape.of_config(variant.dit) == shape)


def control_downscale(checkpoint: Checkpoint) -> int | None:
    """Pixels per latent pixel that the camera adapter of a checkpoint folds; None: it has no camera adapter."""
    name = f"{PREFIX}conv.weight"
    return isqrt(checkpoint.shape(name)[1] // RAY_CHANNELS) if name in checkpoint else None


def names_of(checkpoint: Checkpoint) -> Callable[[str], str]:
    """From our (native) names to the names in this checkpoint: the same ones, or diffusers'."""
    if dit_diffusers_name("time_embedding.0.weight") in checkpoint:
        return dit_diffusers_name
    return lambda name: name


def load_dit(
    path: Path | str,
    variant: WanVariant,
    *,
    dtype: torch.dtype,
    recipe: QuantRecipe | None = None,
    device: torch.device | str = "cpu",
    attention_backend: str = "sdpa",
) -> WanDiT:
    """Load one expert (or the only one) of a variant, frozen.

    Args:
        path: .safetensors (native or ComfyUI, any precision, scaled fp8 included), .pth, a native sharded folder,
            diffusers' `transformer/` or `transformer_2/`, or a file of `write_quantized_dit`.
        variant: what the file must hold.
        dtype: in which the linears compute, and are stored unless quantised.
        recipe: how to keep the linears of the blocks in 8 bits; None: as `dtype`, or as a file of 8-bit weights has
            them. What a file holds in e4m3 already is kept where the recipe can use it.
        device: where the weights go; they are converted there.
        attention_backend: see `wan_ext.attention`.

    Raises:
        InputError: the file is broken, holds another variant or 8-bit weights of another recipe, or has missing,
            unexpected or unconsumed tensors.
    """
    checkpoint = open_checkpoint(path)
    ready = quantized_file(checkpoint, model="dit")
    _require_variant(checkpoint, variant)
    if ready is None:
        dit, conversion = _unfilled(checkpoint, variant, dtype=dtype, recipe=recipe)
        for name, tensor in conversion.tensors(device):
            assign(dit, name, tensor)
    else:
        dit = _empty(variant, dtype=dtype, recipe=ready.recipe_for(recipe))
        ready.fill(
            dit,
            blocks=list(dit.blocks),
            what=f"the DiT of {variant.name}",
            dtype_of=lambda name: storage_dtype(name, dtype),
            device=device,
        )
    dit.attention_backend = attention_backend
    return dit.eval()


def write_quantized_dit(
    path: Path | str,
    output: Path,
    *,
    recipe: QuantRecipe,
    variant: WanVariant | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> None:
    """Write a checkpoint's DiT with 8-bit weights: what `load_dit` with this recipe would make of it.

    Args:
        path: the checkpoint, of any kind that `load_dit` takes but this one.
        output: the .safetensors file to write, atomically.
        recipe: of the linears in the blocks.
        variant: what the checkpoint must hold; None: any.
        dtype: in which the model will compute; what is not quantised is stored for it.
        device: where weights are quantised.
        report: told after each tensor how far it is.

    Raises:
        InputError: as for `load_dit`; the checkpoint is quantised already; the disk is too small.
    """
    checkpoint = open_checkpoint(path)
    refuse_quantized(checkpoint, "to quantise")
    shape = DiTShape.of_checkpoint(checkpoint)
    names = detect_variant(shape)
    if variant is None:
        if not names:
            raise InputError(
                f"{checkpoint.path}: expected the DiT of a known task ({', '.join(VARIANTS)}), found one of {shape}"
            )
        variant = VARIANTS[names[0]]
    _require_variant(checkpoint, variant)
    dit, conversion = _unfilled(checkpoint, variant, dtype=dtype, recipe=recipe)
    write_quantized(
        output,
        dit,
        conversion.tensors(device),
        blocks=list(dit.blocks),
        model="dit",
        recipe=recipe,
        holds=f"{' or '.join(names) or variant.name}, {shape}",
        source=fingerprint(checkpoint.path),
        report=report,
    )


def chosen_recipe(name: str | None, *, fp8: bool) -> QuantRecipe | None:
    """The recipe that flags ask for.

    Args:
        name: of --quantize; None: not given.
        fp8: whether a flag that means "fp8" is given too.

    Raises:
        InputError: there is no such recipe, or the flags contradict each other.
    """
    if name is None:
        return RECIPES["fp8"] if fp8 else None
    recipe = parse_recipe(name)
    if fp8 and recipe != RECIPES["fp8"]:
        raise InputError(f"--quantize {name}: expected it without the flag for fp8, found both; give one of them")
    return recipe


def _require_variant(checkpoint: Checkpoint, variant: WanVariant) -> None:
    """Refuse the checkpoint of another variant."""
    found, expected = DiTShape.of_checkpoint(checkpoint), DiTShape.of_config(variant.dit)
    if found != expected:
        names = detect_variant(found)
        advice = f"give --task {names[0]} or another file" if names else "give the file of this task"
        raise InputError(
            f"{checkpoint.path}: expected {variant.name} ({expected}), "
            f"found {' or '.join(names) or 'no known variant'} ({found}); {advice}"
        )


def _empty(variant: WanVariant, *, dtype: torch.dtype, recipe: QuantRecipe | None) -> WanDiT:
    """The model on the meta device."""
    with torch.device("meta"):
        dit = WanDiT(variant.dit)
    if recipe is not None:
        quantize_linears(dit.blocks, recipe, bias_dtype=dtype)
    return dit


def _unfilled(
    checkpoint: Checkpoint, variant: WanVariant, *, dtype: torch.dtype, recipe: QuantRecipe | None
) -> tuple[WanDiT, Conversion]:
    """The model on the meta device, and what will fill it."""
    dit = _empty(variant, dtype=dtype, recipe=recipe)
    conversion = Conversion(
        dit,
        checkpoint,
        what=f"the DiT of {variant.name}",
        name_in_file=names_of(checkpoint),
        dtype_of=lambda name: storage_dtype(name, dtype),
    )
    return dit, conversion


def save_dit(dit: WanDiT, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write a DiT of plain linears in the native layout: one safetensors file and config.json.

    Args:
        folder: made if it is not there; each file appears whole or not at all.
        dtype: stored precision; None keeps the weights' own.
    """
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in dit.state_dict().items()}
    assert not any(name.endswith("weight_scale") for name in tensors), "save before quantising"
    save_safetensors(tensors, Path(folder) / WEIGHTS_NAME, {"format": "pt"})
    with atomic_path(Path(folder) / "config.json") as temporary:
        temporary.write_text(json.dumps({"_class_name": "WanModel", **asdict(dit.config)}, indent=2) + "\n")
