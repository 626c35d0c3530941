"""Small DiTs with lively random weights, and the same weights in diffusers' model through diffusers' own converter."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from torch import Tensor

from wan_ext.configs import DiTConfig
from wan_ext.dit import WanDiT, init_weights, storage_dtype

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

SMALL = DiTConfig(dim=96, ffn_dim=160, num_heads=4, num_layers=2, in_dim=16, out_dim=16, text_dim=48)
CONFIGS = {
    "t2v": SMALL,
    "i2v-A14B": replace(SMALL, in_dim=36),
    "ti2v-5B": replace(SMALL, in_dim=48, out_dim=48),
    "i2v-14B with CLIP": replace(SMALL, in_dim=36, image_dim=80),
    "flf2v-14B with CLIP": replace(SMALL, in_dim=36, image_dim=80, first_last_positions=True),
}


def lively_dit(config: DiTConfig, seed: int = 0) -> WanDiT:
    """A DiT in which every parameter matters: no zero bias, head or position, no norm at 1, modulation of order 1."""
    dit = WanDiT(config)
    generator = torch.Generator().manual_seed(seed)
    init_weights(dit, generator)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if parameter.ndim == 1 or name.startswith("head.head") or name == "img_emb.emb_pos":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            elif name.endswith("modulation"):
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
            if "cross_attn.norm" in name:
                parameter *= 2  # attention that tells tokens apart
            elif "embedding" in name:
                parameter *= 3
    return dit


def to_diffusers(dit: WanDiT, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """The same model as diffusers' WanTransformer3DModel, with the modules that it keeps in float32 kept so."""
    c = dit.config
    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=c.patch_size, num_attention_heads=c.num_heads, attention_head_dim=c.head_dim,
            in_channels=c.in_dim, out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
            num_layers=c.num_layers, eps=c.eps, image_dim=c.image_dim,
            added_kv_proj_dim=None if c.image_dim is None else c.dim,
            pos_embed_seq_len=2 * c.image_len if c.first_last_positions else None,
        )  # fmt: skip
    rope = type(model.rope)(c.head_dim, c.patch_size, 1024)  # holds buffers that are in no checkpoint
    model.rope = rope
    model.load_state_dict(diffusers_names(dit.state_dict(), dtype), assign=True)
    return model


def diffusers_names(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors by native name -> copies by diffusers' name."""
    converted = convert_wan_transformer_to_diffusers({name: tensor.clone() for name, tensor in tensors.items()})
    if "img_emb.emb_pos" in converted:  # the converter has no rule for the only learned position
        converted["condition_embedder.image_embedder.pos_embed"] = converted.pop("img_emb.emb_pos")
    keep = WanTransformer3DModel._keep_in_fp32_modules
    return {
        name: tensor if any(part in name.split(".") for part in keep) else tensor.to(dtype)
        for name, tensor in converted.items()
    }


def stored_in(dit: WanDiT, dtype: torch.dtype) -> WanDiT:
    """The model as it is loaded for computing in `dtype`."""
    with torch.device("meta"):
        stored = WanDiT(dit.config)
    tensors = {name: tensor.to(storage_dtype(name, dtype)) for name, tensor in dit.state_dict().items()}
    stored.load_state_dict(tensors, assign=True)
    return stored


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a DiT takes, and a tensor to weigh its output with."""

    noised: Tensor
    timestep: Tensor
    context: Tensor
    condition: Tensor | None
    image_context: Tensor | None
    weights: Tensor

    def keywords(self) -> dict[str, Tensor | None]:
        return {
            "timestep": self.timestep, "context": self.context, "condition": self.condition,
            "image_context": self.image_context,
        }  # fmt: skip


def random_inputs(
    config: DiTConfig,
    *,
    batch: int = 2,
    size: tuple[int, int, int] = (3, 4, 6),
    per_frame: bool = False,
    text_tokens: int = 37,
    seed: int = 1,
) -> Inputs:
    """Inputs of a config; timesteps differ between clips and, if asked, the first latent frame is clean."""
    g = torch.Generator().manual_seed(seed)
    timestep = torch.linspace(137.0, 800.0, batch)
    if per_frame:
        timestep = timestep[:, None].repeat(1, size[0])
        timestep[:, 0] = 0
    extra = config.in_dim - config.out_dim
    images = 2 if config.first_last_positions else 1
    return Inputs(
        noised=torch.randn(batch, config.out_dim, *size, generator=g),
        timestep=timestep,
        context=torch.randn(batch, text_tokens, config.text_dim, generator=g),
        condition=torch.randn(batch, extra, *size, generator=g) if extra else None,
        image_context=None
        if config.image_dim is None
        else torch.randn(batch, images * config.image_len, config.image_dim, generator=g),
        weights=torch.randn(batch, config.out_dim, *size, generator=g),
    )


def run_diffusers(model: WanTransformer3DModel, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same call in diffusers' words: channels joined, context padded, one timestep a token, image pairs folded."""
    x = inputs.noised if inputs.condition is None else torch.cat((inputs.noised, inputs.condition), dim=1)
    timestep = inputs.timestep
    if timestep.ndim == 2:
        timestep = timestep.repeat_interleave(x.shape[3] * x.shape[4] // 4, dim=1)  # [B, L]
    context = torch.nn.functional.pad(inputs.context, (0, 0, 0, 512 - inputs.context.shape[1]))
    image = inputs.image_context
    if image is not None and model.config.pos_embed_seq_len is not None:
        image = image.reshape(-1, image.shape[1] // 2, image.shape[2])  # [2 B, 257, image_dim]
    image = None if image is None else image.to(dtype)
    return model(x.to(dtype), timestep, context.to(dtype), image, return_dict=False)[0]


def golden_dit(name: str) -> tuple[WanDiT, dict[str, Tensor]]:
    """The model and the tensors of a golden file."""
    with safe_open(GOLDEN / f"dit_{name}.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    fields = {key: value for key, value in recorded.items() if key in DiTConfig.__dataclass_fields__}
    with torch.device("meta"):
        dit = WanDiT(DiTConfig(**(fields | {"patch_size": tuple(fields["patch_size"])})))
    weights = {key.removeprefix("weights."): value.float() for key, value in tensors.items() if "weights." in key}
    dit.load_state_dict(weights, assign=True)
    return dit, tensors
