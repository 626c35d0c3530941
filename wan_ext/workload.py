"""What is computed, as numbers: tokens, weights of a block and around the blocks, operations of a block.

What: `Workload` says which model, how many tokens, which precision. The functions below give the bytes of frozen and
trained weights and the operations of matrix products, in closed form; nothing is allocated.

Exact: bytes to the byte, with the alignment of the ring's slots. Operations are those of the products alone.

Shapes: B clips, L tokens of a clip, D width, F width of the feed-forward, S text tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from memory.arena import aligned
from memory.quant.recipes import QuantRecipe
from wan_ext.configs import DiTConfig, WanVariant

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one step or one forward computes."""

    config: DiTConfig
    tokens: int
    """Of a clip, L."""
    batch: int = 1
    rank: int = 0
    """Of the LoRA on every linear of the blocks; 0: none."""
    recipe: QuantRecipe | None = None
    """How the blocks' linears are kept; None: in the precision of the activations."""
    element: Literal[2, 4] = 2
    """Bytes of an activation inside the blocks: bfloat16 or float32."""
    timesteps: int = 1
    """Rows of modulation a clip: 1, or one for each latent frame."""

    @property
    def rows(self) -> int:
        """Tokens of the whole batch."""
        return self.batch * self.tokens


def tokens_of(variant: WanVariant, *, frames: int, height: int, width: int) -> int:
    """Tokens of a clip: frames (4 n + 1) and pixels, multiples of what a token covers."""
    stride_t, stride_h, stride_w = variant.vae.stride
    patch_t, patch_h, patch_w = variant.dit.patch_size
    grid = (frames - 1) // stride_t + 1, height // stride_h, width // stride_w
    return (grid[0] // patch_t) * (grid[1] // patch_h) * (grid[2] // patch_w)


# ---- weights ----


def block_linears(config: DiTConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of each linear of a block, ten of them, twelve with an image branch."""
    d, f = config.dim, config.ffn_dim
    image = 0 if config.image_dim is None else 2
    return [(d, d)] * (8 + image) + [(d, f), (f, d)]


def linear_tensors(inputs: int, outputs: int, work: Workload) -> Iterator[int]:
    """Bytes of each frozen tensor of one linear."""
    recipe = work.recipe
    yield work.element * outputs  # bias
    if recipe is None:
        yield work.element * inputs * outputs
        return
    yield inputs * outputs
    if recipe.transposed:
        yield inputs * outputs
    runs = inputs // 64 if recipe.scales == "block64" and inputs % 64 == 0 else 1
    yield outputs * runs * (2 if recipe.scales == "block64" else FLOAT32)


def block_bytes(work: Workload) -> int:
    """Frozen tensors of a block as they lie in a slot of the ring."""
    config = work.config
    d = config.dim
    tensors = [size for shape in block_linears(config) for size in linear_tensors(*shape, work)]
    norms = 6 + (0 if config.image_dim is None else 1)  # q and k of both attentions, norm3's two; the image's k
    tensors += [FLOAT32 * d] * norms + [FLOAT32 * 6 * d]  # and the modulation
    return sum(map(aligned, tensors))


def outside_bytes(work: Workload) -> int:
    """Frozen tensors of one model outside its blocks."""
    config = work.config
    d, patch = config.dim, config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    patches = config.in_dim * patch * d + d
    head = d * patch * config.out_dim + patch * config.out_dim + 2 * d
    image = 0
    if config.image_dim is not None:
        i = config.image_dim
        image = work.element * (i * i + i + i * d + d) + FLOAT32 * (2 * i + 2 * d)
        image += FLOAT32 * 2 * config.image_len * i if config.first_last_positions else 0
    adapter = 0
    if config.control_downscale is not None:
        adapter = FLOAT32 * (24 * config.control_downscale**2 * 4 * d + d) + work.element * 2 * (9 * d * d + d)
    return embedding_bytes(work) + FLOAT32 * (patches + head) + image + adapter


def embedding_bytes(work: Workload) -> int:
    """Frozen tensors of one model that prepare text and timestep: almost all outside its blocks."""
    config, d = work.config, work.config.dim
    text = work.element * (config.text_dim * d + d + d * d + d)
    return text + FLOAT32 * (config.freq_dim * d + d + d * d + d + 6 * d * d + 6 * d)


def lora_parameters(work: Workload) -> int:
    """Trained parameters of one model's LoRA."""
    return work.config.num_layers * work.rank * sum(i + o for i, o in block_linears(work.config))


# ---- operations ----


def context_tokens(config: DiTConfig) -> int:
    """Tokens of text and image that a video token attends to."""
    return config.text_len + (0 if config.image_dim is None else config.image_len)


def linear_flop(work: Workload) -> float:
    """Products of one block with its frozen weights, forward."""
    config, d = work.config, work.config.dim
    on_video = 6 * d * d + 2 * d * config.ffn_dim
    on_context = 2 * d * d * context_tokens(config) * work.batch
    return 2.0 * (work.rows * on_video + on_context)


def lora_flop(work: Workload) -> float:
    """Products of one block with its adapters, forward."""
    config, d = work.config, work.config.dim
    on_video = 6 * 2 * d + 2 * (d + config.ffn_dim)
    on_context = 2 * 2 * d * context_tokens(config) * work.batch
    return 2.0 * work.rank * (work.rows * on_video + on_context)


def attention_flop(work: Workload) -> float:
    """Both products of every attention of one block, forward; backward has five of them."""
    return 4.0 * work.rows * (work.tokens + context_tokens(work.config)) * work.config.dim
