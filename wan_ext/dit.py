"""The diffusion transformer of Wan2.1 and Wan2.2: text-, image- and text-image-to-video in one class.

Parameter names are those of the official checkpoints, so files load and LoRAs save without a map.

    noised, condition -> patches -> blocks -> head -> velocity
    block:  x += gate * self_attn(modulate(norm1(x)));  x += cross_attn(norm3(x));  x += gate * ffn(modulate(norm2(x)))

A camera enters at three places, each visible in a `forward`: the noised latents, the tokens after the patch embedding,
and `self_attn.camera` or `cross_attn.camera`, a `CameraBranch` that a network puts there. Without a camera all three
are passed by.

Precision: the residual stream `x`, the norms, the modulation, the time embedding, the patch embedding and the head are
float32; the linears of the blocks and of the text and image embeddings run in the dtype of their weights, which
`storage_dtype` gives them. A residual stream in bf16 would more than double the rounding error of the result.

How the blocks run (plain, checkpointed, streamed) is the argument `run_blocks` of `forward`.

Shapes: B clips, C latent channels, F H W latent frames, height, width, L = F * (H/2) * (W/2) tokens, S text tokens,
D model width, N heads, d channels of a head. Modulation has a frame axis of length 1 (one timestep a clip) or F.
Source: Wan-Video/Wan2.2 `wan/modules/model.py`; Wan-Video/Wan2.1 for the image branch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.errors import InputError
from memory.runners import BlockRunner, run_plain
from wan_ext.attention import attention, check_backend
from wan_ext.condition import (
    CameraBranch,
    CameraCondition,
    add_branch,
    add_camera_latents,
    add_camera_tokens,
    kept,
)
from wan_ext.configs import DiTConfig
from wan_ext.control_adapter import ControlAdapter
from wan_ext.norms import LayerNorm, ModulatedNorm, RMSNorm
from wan_ext.rope import rope_table, rotate
from wan_ext.rows import in_rows

CLIP_NORM_EPS = 1e-5
"""The image branch keeps torch's default where the rest of the model has 1e-6."""
HEAD_TOKENS = 2048
"""That the head computes together: its backward holds four float32 copies of them, 0.17 GB in a 14B model."""


class WanDiT(nn.Module):
    """Predicts the velocity noise - latents of noised video latents."""

    def __init__(self, config: DiTConfig, *, attention_backend: str = "sdpa"):
        """Parameters are uninitialised in the sense of training: load a checkpoint or call `init_weights`.

        Args:
            config: shape of the model.
            attention_backend: sdpa, flash or sage (see `wan_ext.attention`).
        """
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        downscale = config.control_downscale
        self.control_adapter = None if downscale is None else ControlAdapter(dim, downscale)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_emb = None if config.image_dim is None else ImageEmbedding(config)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.attention_backend = attention_backend

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the linears of the blocks compute."""
        return next(self.text_embedding.parameters()).dtype

    @property
    def embeddings(self) -> tuple[nn.Module, ...]:
        """What prepares text and timestep for the blocks: almost all weights outside of them, needed once a pass.

        They may lie in host memory; `run_linears` then copies them to the device for one product each.
        """
        return self.text_embedding, self.time_embedding, self.time_projection

    @property
    def attention_backend(self) -> str:
        """The backend of every attention; assign to change it."""
        return self._attention_backend

    @attention_backend.setter
    def attention_backend(self, backend: str) -> None:
        self._attention_backend = check_backend(backend)
        for module in self.blocks.modules():
            if isinstance(module, SelfAttention):
                module.backend = backend

    def forward(
        self,
        noised: Tensor,
        *,
        timestep: Tensor,
        context: Tensor,
        condition: Tensor | None = None,
        image_context: Tensor | None = None,
        camera: CameraCondition | None = None,
        run_blocks: BlockRunner = run_plain,
    ) -> Tensor:
        """The velocity at a noise level.

        Args:
            noised: noised latents; a single image is F = 1. [B, C, F, H, W]
            timestep: 1000 * sigma, one a clip, or one a latent frame for TI2V. [B] or [B, F]
            context: text features, S <= text_len; zero-padded here and attended without a mask. [B, S, text_dim]
            condition: I2V channels, 4 mask and 16 latent. [B, 20, F, H, W]
            image_context: CLIP features, for models with an image branch. [B, 257, 1280]
            camera: what a network's encoder made of a camera path.
            run_blocks: how the blocks run.

        Returns:
            float32. [B, out_dim, F, H, W]

        Raises:
            InputError: shapes do not fit each other or this model.
        """
        self._check(noised, timestep, context, condition, image_context)
        patch_size = self.config.patch_size
        if camera is not None:
            noised = add_camera_latents(noised, camera)
        if condition is not None:
            noised = torch.cat((noised, condition.to(noised)), dim=1)
        frames, height, width = (size // patch for size, patch in zip(noised.shape[2:], patch_size, strict=True))
        grid = (frames, height, width)
        x = self.embed_patches(noised)  # [B, L, D]
        if camera is not None:
            x = add_camera_tokens(x, camera, grid)
        if camera is not None and camera.rays is not None:
            x = x + kept(self.embed_rays(camera.rays, grid), camera.keep)

        time = self.embed_time(timestep)  # [B, 1|F, D]
        modulation = run_linears(self.time_projection, time).unflatten(-1, (6, -1))  # [B, 1|F, 6, D]
        context = self.embed_text(context)  # [B, text_len, D]
        rope = rope_table(*grid, head_dim=self.config.head_dim, device=x.device)
        if self.img_emb is not None:
            image_context = self.img_emb(image_context, self.dtype)  # [B, 257, D]

        features, keep = (None, None) if camera is None else (camera.features, camera.keep)
        x = run_blocks(list(self.blocks), x, modulation, context, rope, image_context, features, keep)
        x = self.head(x, time)  # [B, L, out_dim * 4]
        return self.unpatchify(x, grid)

    def embed_patches(self, noised: Tensor) -> Tensor:
        """The patch embedding as one matrix product: its convolution's stride is its kernel. -> [B, L, D]"""
        pf, ph, pw = self.config.patch_size
        patches = rearrange(noised.float(), "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=pf, ph=ph, pw=pw)
        weight, bias = (parameter.float() for parameter in self.patch_embedding.parameters())
        return F.linear(patches, weight.flatten(1), bias)

    def embed_rays(self, rays: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Wan-Fun: what the model's own camera adapter makes of the rays. [B, 24, F, 8 H, 8 W] -> [B, L, D]"""
        if self.control_adapter is None:
            raise InputError("camera rays: expected a model with a camera adapter (Wan-Fun), found one without")
        term = self.control_adapter(rays)  # [B, F, h, w, D]
        if term.shape[1:4] != grid:
            raise InputError(f"camera rays: expected them to cover {grid} tokens, found {tuple(term.shape[1:4])}")
        return term.flatten(1, 3)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """timestep [B] or [B, F] -> [B, 1|F, D]"""
        if timestep.ndim == 1:
            timestep = timestep[:, None]
        return run_linears(self.time_embedding, sinusoid(timestep, self.config.freq_dim))

    def embed_text(self, context: Tensor) -> Tensor:
        """Zero-pad to text_len and project: the padding becomes tokens too, as in training. -> [B, text_len, D]"""
        context = F.pad(context.to(self.dtype), (0, 0, 0, self.config.text_len - context.shape[1]))
        return run_linears(self.text_embedding, context, self.dtype)

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens back to latents; within a token the channel comes last. [B, L, 4 C] -> [B, C, F, H, W]"""
        (f, h, w), (pf, ph, pw) = grid, self.config.patch_size
        return rearrange(x, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", f=f, h=h, w=w, pf=pf, ph=ph, pw=pw)

    def _check(
        self,
        noised: Tensor,
        timestep: Tensor,
        context: Tensor,
        condition: Tensor | None,
        image_context: Tensor | None,
    ) -> None:
        """Turn what would fail deep inside, or broadcast silently, into a sentence."""
        config = self.config
        batch, channels, *size = noised.shape
        channels += 0 if condition is None else condition.shape[1]
        if channels != config.in_dim:
            raise InputError(
                f"model input: expected {config.in_dim} channels (noised latents and condition), found {channels}"
            )
        if condition is not None and condition.shape[2:] != noised.shape[2:]:
            raise InputError(
                f"condition: expected frames, height and width {tuple(size)}, found {tuple(condition.shape[2:])}"
            )
        if any(s % p for s, p in zip(size, config.patch_size, strict=True)):
            raise InputError(
                f"latents: frames, height and width {tuple(size)} must be multiples of {config.patch_size}; "
                "choose a width and height that fit the patch grid"
            )
        if timestep.shape not in ((batch,), (batch, size[0])):
            raise InputError(f"timestep: expected [{batch}] or [{batch}, {size[0]}], found {list(timestep.shape)}")
        if context.shape[1] > config.text_len or context.shape[2] != config.text_dim:
            raise InputError(
                f"context: expected at most {config.text_len} tokens of width {config.text_dim}, "
                f"found {context.shape[1]} of width {context.shape[2]}; was it cached with another text encoder?"
            )
        if (image_context is None) != (config.image_dim is None):
            raise InputError(
                "image_context: this model needs CLIP features, found none"
                if image_context is None
                else "image_context: this model has no image branch, found CLIP features"
            )


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each added to the float32 residual stream."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.dim
        self.norm1 = ModulatedNorm(config.eps)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = ModulatedNorm(config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim).mul_(dim**-0.5))  # a quotient on meta would take a second

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        context: Tensor,
        rope: Tensor,
        image_context: Tensor | None = None,
        features: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: the residual stream, float32. [B, L, D]
            modulation: from the time projection, float32. [B, 1|F, 6, D]
            context: embedded text; its dtype is the one the linears compute in. [B, text_len, D]
            rope: from `rope_table`. [2, L, 1, d/2]
            image_context: embedded CLIP tokens. [B, 257, D]
            features: of the camera, for the branches at the attentions; None: they are passed by.
            keep: 0 where a clip's camera is dropped. [B]

        Returns:
            [B, L, D]
        """
        dtype = context.dtype
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = (
            self.modulation.float()[:, None] + modulation
        ).unbind(2)  # [B, 1|F, D]
        attended = self.self_attn(self.norm1(x, shift_attn, scale_attn, dtype), rope, features, keep)
        x = add_gated(x, attended, gate_attn)
        x = x + self.cross_attn(self.norm3(x, dtype), context, image_context, features, keep)
        return add_gated(x, self.ffn(self.norm2(x, shift_ffn, scale_ffn, dtype)), gate_ffn)


class SelfAttention(nn.Module):
    """Attention among the video's tokens, with rotary positions."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.backend = "sdpa"
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)
        self.camera: CameraBranch | None = None

    def forward(self, x: Tensor, rope: Tensor, features: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """x [B, L, D], rope [2, L, 1, d/2], features and keep as in the block -> [B, L, D]"""
        if self.camera is not None and features is not None:
            x = add_branch(x, self.camera.before(x, features), keep)
        v = self.heads(self.v(x))
        q = rotate(self.heads(self.norm_q(self.q(x))), rope).to(v.dtype)  # [B, L, N, d]
        k = rotate(self.heads(self.norm_k(self.k(x))), rope).to(v.dtype)
        out = self.o(attention(q, k, v, backend=self.backend).flatten(2))
        if self.camera is not None and features is not None:
            out = add_branch(out, self.camera.after(out, x, q, features), keep)
        return out

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, N, d]"""
        return x.unflatten(-1, (self.num_heads, -1))


class CrossAttention(SelfAttention):
    """Attention from the video's tokens to the text's and, where there is an image branch, to the image's."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        if config.image_dim is not None:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor,
        image_context: Tensor | None = None,
        features: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, D], context [B, S, D], image_context [B, 257, D], the rest as in the block -> [B, L, D]"""
        v = self.heads(self.v(context))
        q = self.heads(self.norm_q(self.q(x)).to(v.dtype))
        k = self.heads(self.norm_k(self.k(context)).to(v.dtype))
        out = attention(q, k, v, backend=self.backend)
        if image_context is not None:
            k = self.heads(self.norm_k_img(self.k_img(image_context)).to(v.dtype))
            out = out + attention(q, k, self.heads(self.v_img(image_context)), backend=self.backend)
        out = self.o(out.flatten(2))
        if self.camera is not None and features is not None:
            out = add_branch(out, self.camera.after(out, x, q, features), keep)
        return out


class ImageEmbedding(nn.Module):
    """CLIP tokens to the model's width."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        assert config.image_dim is not None
        width = config.image_dim
        self.proj = nn.Sequential(
            LayerNorm(width, CLIP_NORM_EPS),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.dim),
            LayerNorm(config.dim, CLIP_NORM_EPS),
        )
        if config.first_last_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, 2 * config.image_len, width))

    def forward(self, image_context: Tensor, dtype: torch.dtype) -> Tensor:
        """Features of one image, or of two with first and last frame: [B, S, image_dim] -> [B, S, D] of `dtype`."""
        norm_in, first, gelu, second, norm_out = self.proj
        x = image_context.float()
        if hasattr(self, "emb_pos"):
            x = x + self.emb_pos
        return norm_out(second(gelu(first(norm_in(x, dtype)))).float(), dtype)


class Head(nn.Module):
    """The last norm, modulated by the time embedding itself, and the projection to patches; `HEAD_TOKENS` at a time."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm = ModulatedNorm(config.eps)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim).mul_(config.dim**-0.5))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, D], time [B, 1|F, D] -> float32 [B, L, out_dim * patch]"""
        shift, scale = (self.modulation.float()[:, None] + time[:, :, None]).flatten(0, 1)[:, None].unbind(2)
        clips = x.unflatten(1, (time.shape[1], -1)).flatten(0, 1)  # [B 1|F, L or L/F, D]: one row of modulation each
        weight, bias = self.head.weight.float(), self.head.bias.float()
        out = in_rows(self._rows, clips, shift, scale, weight, bias, rows=max(1, HEAD_TOKENS // clips.shape[0]))
        return out.reshape(*x.shape[:2], -1)

    def _rows(self, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [B, n, D], shift and scale [B, 1, D] -> [B, n, out_dim * patch]"""
        return F.linear(self.norm(x, shift, scale, torch.float32), weight, bias)


def add_gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch in float32. x, branch [B, L, D], gate [B, 1|F, D] -> [B, L, D]"""
    frames = branch.unflatten(1, (gate.shape[1], -1))
    return x + (frames * gate[:, :, None]).flatten(1, 2)


def run_linears(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A linear, or a sequence with linears, outside the blocks: where x is and in `dtype`, however weights are kept.

    A weight that lies elsewhere, or in another dtype, is copied for its one product.
    """
    if isinstance(module, nn.Sequential):
        for part in module:
            x = run_linears(part, x, dtype)
        return x
    if isinstance(module, nn.Linear):
        to_device = x.is_cuda  # from pinned memory without waiting; in the other direction that would not be safe
        weight, bias = (p.to(x.device, dtype, non_blocking=to_device) for p in (module.weight, module.bias))
        return F.linear(x.to(dtype), weight, bias)
    return module(x)


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """cos and sin of timestep * 10000^(-i / half), i = 0 .. half - 1; float64 inside. [...] -> float32 [..., width]"""
    half = width // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


FLOAT32_MODULES = ("patch_embedding.", "control_adapter.conv.", "time_embedding.", "time_projection.", "head.")


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """In which dtype to keep a parameter of the DiT when its linears compute in `dtype`.

    Everything that `forward` uses in float32 is kept so: norms, modulation, time embedding, patch embedding, head.
    (A model with all of them in bf16 works too; it only copies them to float32 at every use.)

    Args:
        name: native parameter name, e.g. "blocks.0.self_attn.q.weight".
        dtype: the compute dtype.
    """
    is_norm = ".norm" in name or name.startswith(("img_emb.proj.0.", "img_emb.proj.4.")) or name == "img_emb.emb_pos"
    if name.startswith(FLOAT32_MODULES) or name.endswith("modulation") or is_norm:
        return torch.float32
    return dtype


def init_weights(dit: WanDiT, generator: torch.Generator) -> None:
    """Fill a new model for training from scratch, as the official code does; the head is zero, so velocity 0 first.

    Source: Wan-Video/Wan2.2 `wan/modules/model.py` (`init_weights`).
    """
    for name, parameter in dit.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(parameter, std=dit.config.dim**-0.5, generator=generator)
        elif "norm" in name or name.startswith(("img_emb.proj.0.", "img_emb.proj.4.")):
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        elif name.startswith(("text_embedding.", "time_embedding.")) and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name.endswith("weight") and not name.startswith("head."):
            nn.init.xavier_uniform_(parameter.data.flatten(1), generator=generator)
        else:  # every bias, the head, the learned positions of two images
            nn.init.zeros_(parameter)
