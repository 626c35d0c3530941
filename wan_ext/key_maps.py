"""What a tensor is called in each kind of file: one pure function from a module's own name to the name in the file.

Modules keep the names of the library that they come from (diffusers, transformers) or, for our DiT, those of the native
checkpoint. One direction is enough: to load, the module's names are asked for one by one; to save, they are renamed.

Sources: the state dicts of Wan-Video/Wan2.2 (`wan/modules/{vae2_1,vae2_2,t5,clip,model}.py`) and of the classes named
below; each map is held to its library by the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Rules = tuple[tuple[str, str], ...]


def rename(name: str, rules: Rules) -> str:
    """Apply every rule (pattern, replacement) in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# --- VAE: diffusers' AutoencoderKLWan -> native ----------------------------------------------------------------------

VAE: Rules = (
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.conv_in\.", ".conv1."),  # after the residual blocks' own conv1
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)


def vae_native_name(name: str, *, num_res_blocks: int, is_residual: bool) -> str:
    """The native name of a tensor of diffusers' AutoencoderKLWan.

    Wan2.1 numbers the blocks of all stages through, its resamplers included; Wan2.2 numbers them within each stage.

    Args:
        name: name in AutoencoderKLWan's state dict.
        num_res_blocks: of the encoder's stages; the decoder's have one more.
        is_residual: True for Wan2.2.
    """
    name = rename(name, VAE)
    if is_residual:
        return rename(
            name,
            (
                (r"\.down_blocks\.(\d+)\.resnets\.", r".downsamples.\1.downsamples."),
                (r"\.down_blocks\.(\d+)\.downsampler\.", rf".downsamples.\1.downsamples.{num_res_blocks}."),
                (r"\.up_blocks\.(\d+)\.resnets\.", r".upsamples.\1.upsamples."),
                (r"\.up_blocks\.(\d+)\.upsampler\.", rf".upsamples.\1.upsamples.{num_res_blocks + 1}."),
            ),
        )
    per_stage = num_res_blocks + 2
    name = re.sub(r"\.down_blocks\.", ".downsamples.", name)
    name = re.sub(
        r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.",
        lambda found: f".upsamples.{int(found[1]) * per_stage + int(found[2])}.",
        name,
    )
    return re.sub(
        r"\.up_blocks\.(\d+)\.upsamplers\.0\.",
        lambda found: f".upsamples.{(int(found[1]) + 1) * per_stage - 1}.",
        name,
    )


# --- text encoder: transformers' UMT5EncoderModel -> native ----------------------------------------------------------

UMT5: Rules = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (
        r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        r"blocks.\1.pos_embedding.embedding.",
    ),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attn."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)


def umt5_native_name(name: str) -> str:
    """The native name of a tensor of transformers' UMT5EncoderModel."""
    return rename(name, UMT5)


# --- image encoder: transformers' CLIPVisionModel -> native ----------------------------------------------------------

CLIP: Rules = (
    (r"^embeddings\.class_embedding$", "visual.cls_embedding"),
    (r"^embeddings\.position_embedding\.weight$", "visual.pos_embedding"),
    (r"^embeddings\.patch_embedding\.", "visual.patch_embedding."),
    (r"^pre_layrnorm\.", "visual.pre_norm."),
    (r"^post_layernorm\.", "visual.post_norm."),
    (r"^encoder\.layers\.(\d+)\.layer_norm([12])\.", r"visual.transformer.\1.norm\2."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.", r"visual.transformer.\1.attn.to_qkv."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"visual.transformer.\1.attn.proj."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc1\.", r"visual.transformer.\1.mlp.0."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc2\.", r"visual.transformer.\1.mlp.2."),
)


def clip_native_name(name: str) -> str:
    """The native name of a tensor of transformers' CLIPVisionModel (which older versions put under `vision_model.`).

    Native files hold q, k and v as one tensor: three names map to it.
    """
    return rename(name.removeprefix("vision_model."), CLIP)


# --- DiT: native (which is ours) -> diffusers' WanTransformer3DModel -------------------------------------------------

DIT_MODULES: Mapping[str, str] = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
BLOCK_MODULES: Mapping[str, str] = {
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
ATTENTIONS: Mapping[str, str] = {"self_attn": "attn1", "cross_attn": "attn2"}
PROJECTIONS: Mapping[str, str] = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "norm_k_img": "norm_added_k",
}
DIT_WHOLE: Mapping[str, str] = {
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}


def dit_diffusers_name(name: str) -> str:
    """The name in diffusers' WanTransformer3DModel of a tensor of the native DiT."""
    if name in DIT_WHOLE:
        return DIT_WHOLE[name]
    module, _, leaf = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{DIT_MODULES.get(module, module)}.{leaf}"
    if leaf == "modulation":
        return f"{module}.scale_shift_table"
    _, block, inner = module.split(".", 2)
    attention, _, projection = inner.partition(".")
    if attention in ATTENTIONS:
        inner = f"{ATTENTIONS[attention]}.{PROJECTIONS[projection]}"
    else:
        inner = BLOCK_MODULES.get(inner, inner)
    return f"blocks.{block}.{inner}.{leaf}"
