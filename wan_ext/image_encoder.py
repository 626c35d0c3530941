"""Wan2.1's image encoder for image-to-video: one frame to CLIP tokens.

The network is transformers' `CLIPVisionModel` (ViT-H/14); weights come from native, ComfyUI or Hugging Face files. The
DiT was trained on the output of the last layer but one, of frames squashed to a square whatever their aspect.

Source: Wan-Video/Wan2.1 `wan/modules/clip.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from core.errors import InputError
from wan_ext.assemble import fill_module
from wan_ext.checkpoint_files import open_checkpoint
from wan_ext.configs import ImageEncoderConfig
from wan_ext.key_maps import clip_native_name

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
PACKED = ("q_proj", "k_proj", "v_proj")  # the order in a native to_qkv
# What CLIP files hold besides the visual tower that is used here.
OTHER_PARTS = (
    "textual.",
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "visual.head",
    "log_scale",
    "logit_scale",
    "embeddings.position_ids",
    "vision_model.embeddings.position_ids",
)


class ImageEncoder:
    """A frozen CLIP visual tower. `network` is the CLIPVisionModel inside."""

    def __init__(self, network: CLIPVisionModel, config: ImageEncoderConfig):
        self.network = network.eval().requires_grad_(False)
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def to(self, device: torch.device | str) -> ImageEncoder:
        """Move the weights; returns itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Tokens of the last layer but one: the class token, then the patches.

        Args:
            image: any size, values in [-1, 1]; squashed to the encoder's square. [B, 3, H, W]

        Returns:
            float32 on the device of `image`. [B, 257, 1280] for ViT-H
        """
        pixels = preprocess(image.to(self.device), self.config.image_size)
        hidden = self.network(pixels.to(self.dtype), output_hidden_states=True).hidden_states
        return hidden[-2].float().to(image.device)


def preprocess(image: Tensor, size: int) -> Tensor:
    """Squash to size x size by bicubic interpolation and normalise as CLIP expects.

    Args:
        image: values in [-1, 1]. [B, 3, H, W]
        size: of the square, in pixels.

    Returns:
        float32 [B, 3, size, size]
    """
    image = F.interpolate(image.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (rearrange(torch.tensor(v, device=image.device), "c -> c 1 1") for v in (MEAN, STD))
    return (image * 0.5 + 0.5 - mean) / std


def build_image_encoder(config: ImageEncoderConfig) -> CLIPVisionModel:
    """A CLIPVisionModel of this shape with fresh weights, on the default device."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            patch_size=config.patch_size,
            image_size=config.image_size,
            hidden_act="gelu",
        )
    )


def load_image_encoder(
    path: Path | str,
    config: ImageEncoderConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ImageEncoder:
    """Load the visual tower of a native (open-clip XLM-R), ComfyUI or Hugging Face CLIP file.

    Args:
        path: file (.pth, .safetensors) or folder.
        config: shape of the tower.
        dtype: precision of the weights and the computation.
        device: where it runs.

    Raises:
        InputError: the file is broken, or holds another model.
    """
    checkpoint = open_checkpoint(path, stems=("model", "pytorch_model"))
    is_native = "visual.cls_embedding" in checkpoint
    prefix = "vision_model." if "vision_model.embeddings.class_embedding" in checkpoint else ""
    if not is_native and f"{prefix}embeddings.class_embedding" not in checkpoint:
        raise InputError(f"{checkpoint.path}: expected a CLIP image encoder, found a checkpoint of another kind")
    with torch.device("meta"):
        network = build_image_encoder(config)
    fill_module(
        network,
        checkpoint,
        what="the CLIP image encoder",
        name_in_file=clip_native_name if is_native else lambda name: prefix + name.removeprefix("vision_model."),
        dtype_of=lambda name: dtype,
        device=device,
        is_ignored=lambda name: name.startswith(OTHER_PARTS),
        adapt=_from_native if is_native else None,
    )
    for module in network.modules():
        if "position_ids" in module._buffers:  # belongs to no file
            num_positions = (config.image_size // config.patch_size) ** 2 + 1
            module._buffers["position_ids"] = torch.arange(num_positions, device=device)[None]
    return ImageEncoder(network, config)


def _from_native(name: str, tensor: Tensor) -> Tensor:
    """A native tensor in the layout of the tensor `name` of CLIPVisionModel."""
    if name.endswith("class_embedding"):
        return tensor.flatten()  # from [1, 1, D]
    if name.endswith("position_embedding.weight"):
        return tensor[0]  # from [1, 257, D]
    projection = name.split(".")[-2]
    if projection in PACKED:
        return tensor.chunk(3)[PACKED.index(projection)]  # from [3 D, ...]
    return tensor
