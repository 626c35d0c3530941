"""From a checkpoint file to a diffusion transformer, and back.

The variant is read off the shapes and must be the one asked for: a wrong file would otherwise load, or fail on its
thousandth key. The model is built on the meta device and filled tensor by tensor (`wan_ext.assemble`), each in the
precision that the DiT computes with (`wan_ext.dit.storage_dtype`); with `quantize` the linears of the blocks become 8
bits as they are read, so that a 28 GB expert needs 15 GB of memory from the first byte to the last.

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
from core.files import atomic_path, save_safetensors
from wan_ext.assemble import fill_module, quantize_linears
from wan_ext.checkpoint_files import Checkpoint, open_checkpoint
from wan_ext.configs import VARIANTS, DiTConfig, WanVariant
from wan_ext.control_adapter import PREFIX, RAY_CHANNELS
from wan_ext.dit import WanDiT, storage_dtype
from wan_ext.key_maps import dit_diffusers_name

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
    quantize: bool = False,
    device: torch.device | str = "cpu",
    attention_backend: str = "sdpa",
) -> WanDiT:
    """Load one expert (or the only one) of a variant, frozen.

    Args:
        path: .safetensors (native or ComfyUI, any precision, scaled fp8 included), .pth, a native sharded folder, or
            diffusers' `transformer/` or `transformer_2/`.
        variant: what the file must hold.
        dtype: in which the linears compute, and are stored unless quantised.
        quantize: keep the linears of the blocks as e4m3 with block scales. What a file holds in e4m3 already is kept.
        device: where the weights go; they are converted there.
        attention_backend: see `wan_ext.attention`.

    Raises:
        InputError: the file is broken, holds another variant, or has missing, unexpected or unconsumed tensors.
    """
    checkpoint = open_checkpoint(path)
    found, expected = DiTShape.of_checkpoint(checkpoint), DiTShape.of_config(variant.dit)
    if found != expected:
        names = detect_variant(found)
        advice = f"give --task {names[0]} or another file" if names else "give the file of this task"
        raise InputError(
            f"{checkpoint.path}: expected {variant.name} ({expected}), "
            f"found {' or '.join(names) or 'no known variant'} ({found}); {advice}"
        )
    with torch.device("meta"):
        dit = WanDiT(variant.dit, attention_backend=attention_backend)
    if quantize:
        quantize_linears(dit.blocks, bias_dtype=dtype)
    fill_module(
        dit,
        checkpoint,
        what=f"the DiT of {variant.name}",
        name_in_file=names_of(checkpoint),
        dtype_of=lambda name: storage_dtype(name, dtype),
        device=device,
    )
    return dit.eval()


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
