"""The Wan models as rows of a table: shapes, schedules and conditioning of each task. Imports no torch.

Sources: Wan-Video/Wan2.1 and Wan2.2 `wan/configs/*.py` and `wan/modules/{model,vae2_1,vae2_2,t5,clip}.py` for shapes
and sampling defaults; the latent means and deviations stand in `wan/modules/vae2_1.py` and `vae2_2.py`. Wan-Fun:
the examples `predict_v2v_control_camera*.py` and the folder `config` of VideoX-Fun, and the shapes of its checkpoints
in the tables of DiffSynth-Studio.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from core.errors import InputError, nearest

Expert = Literal["high", "low"]
ImageConditioning = Literal["none", "channels", "first_frame", "channels_and_first_frame"]


# What Wan is guided away from unless the user says otherwise; the models were tuned with it.
# Source: Wan-Video/Wan2.2 `wan/configs/shared_config.py` (sample_neg_prompt).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of one diffusion transformer."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    """Channels of the patch embedding: those of the latents, and of the condition (20 for I2V; 16, 20, 52: Wan-Fun)."""
    out_dim: int
    """Latent channels."""
    text_dim: int = 4096
    text_len: int = 512
    """Text is zero-padded to this many tokens, all of which are attended."""
    freq_dim: int = 256
    """Width of the sinusoidal embedding of the timestep."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None
    """Width of CLIP image features; None: the model has no image branch."""
    image_len: int = 257
    """CLIP tokens of one image: 16 x 16 patches and a class token."""
    first_last_positions: bool = False
    """Wan2.1 FLF2V: a learned position embedding over the tokens of two images."""
    control_downscale: int | None = None
    """Wan-Fun: pixels per latent pixel, which its camera adapter folds; None: the model has no camera adapter."""

    @property
    def condition_channels(self) -> int:
        """Channels of the condition, which stand after those of the noised latents; 0: the model takes none."""
        return self.in_dim - self.out_dim

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of one causal video autoencoder, in the words of diffusers' AutoencoderKLWan."""

    name: Literal["wan2.1", "wan2.2"]
    z_dim: int
    base_dim: int
    decoder_base_dim: int | None
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    patch_size: int | None
    """Pixels folded into channels before the encoder (Wan2.2), or None."""
    is_residual: bool
    """Wan2.2's average and duplicate shortcuts around each stage."""
    stride: tuple[int, int, int]
    """Video frames, rows and columns of one latent position."""
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Shape of a umT5 encoder."""

    vocab_size: int
    dim: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Shape of a CLIP vision transformer."""

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int


@dataclass(frozen=True, kw_only=True)
class WanVariant:
    """One task: its models and the numbers it is sampled with."""

    name: str
    dit: DiTConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig | None = None
    boundary: float | None = None
    """The sigma at which the high-noise expert hands over to the low-noise one; None: there is one expert."""
    shift: float
    steps: int
    guidance_scale: float
    """Of the low-noise expert, or of the only one."""
    guidance_scale_high_noise: float | None = None
    fps: int
    num_frames: int
    height: int = 480
    width: int = 832
    negative_prompt: str = NEGATIVE_PROMPT
    image_conditioning: ImageConditioning = "none"
    """How a first frame enters: not at all, as condition channels, as clean latents at timestep 0 (TI2V), or both."""

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The experts in the order of sampling. A model without a boundary has one, called "low"."""
        return ("low",) if self.boundary is None else ("high", "low")

    @property
    def hears_camera(self) -> bool:
        """Whether the model itself takes a camera: the Wan-Fun models with a camera adapter."""
        return self.dit.control_downscale is not None

    @property
    def keeps_first_frame(self) -> bool:
        """Whether a known first frame stands as clean latents in the place of the first latent frame."""
        return self.image_conditioning in ("first_frame", "channels_and_first_frame")

    @property
    def needs_first_frame(self) -> bool:
        """Whether the model cannot do without a first frame. Wan-Fun takes a condition of zeros instead."""
        return self.image_conditioning == "channels" and not self.hears_camera

    @property
    def spatial_stride(self) -> int:
        """Pixels per token: width and height of a video must be multiples of it."""
        return self.vae.stride[1] * self.dit.patch_size[1]


# fmt: off
VAE_2_1 = VAEConfig(
    name="wan2.1", z_dim=16, base_dim=96, decoder_base_dim=None, dim_mult=(1, 2, 4, 4), num_res_blocks=2,
    temporal_downsample=(False, True, True), patch_size=None, is_residual=False, stride=(4, 8, 8),
    latents_mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
                  -0.1922, -0.9497, 0.2503, -0.2921),
    latents_std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
                 1.6382, 1.1253, 2.8251, 1.9160),
)
VAE_2_2 = VAEConfig(
    name="wan2.2", z_dim=48, base_dim=160, decoder_base_dim=256, dim_mult=(1, 2, 4, 4), num_res_blocks=2,
    temporal_downsample=(False, True, True), patch_size=2, is_residual=True, stride=(4, 16, 16),
    latents_mean=(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
                  0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
                  -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
                  -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681,
                  -0.0667),
    latents_std=(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
                 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
                 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
                 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
UMT5_XXL = TextEncoderConfig(vocab_size=256384, dim=4096, head_dim=64, ffn_dim=10240, num_layers=24, num_heads=64)
CLIP_VIT_H = ImageEncoderConfig(dim=1280, ffn_dim=5120, num_layers=32, num_heads=16, patch_size=14, image_size=224)

# The 14B transformer with the input channels of text-to-video. Most rows differ from it in a few numbers.
DIT_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)
T2V_14B = WanVariant(
    name="t2v-14B", dit=DIT_14B, vae=VAE_2_1, text_encoder=UMT5_XXL, shift=5.0, steps=50, guidance_scale=5.0, fps=16,
    num_frames=81)
DIT_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16)
TI2V_5B = WanVariant(
    name="ti2v-5B", dit=DiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
    vae=VAE_2_2, text_encoder=UMT5_XXL, shift=5.0, steps=50, guidance_scale=5.0, fps=24, num_frames=121,
    height=704, width=1280, image_conditioning="first_frame")

TINY = WanVariant(
    name="tiny",
    dit=DiTConfig(dim=192, ffn_dim=512, num_heads=6, num_layers=6, in_dim=16, out_dim=16, text_dim=64, text_len=48),
    vae=VAEConfig(
        name="wan2.1", z_dim=16, base_dim=16, decoder_base_dim=None, dim_mult=(1, 2, 3, 4), num_res_blocks=1,
        temporal_downsample=(False, True, True), patch_size=None, is_residual=False, stride=(4, 8, 8),
        latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16),
    text_encoder=TextEncoderConfig(vocab_size=512, dim=64, head_dim=16, ffn_dim=160, num_layers=2, num_heads=4),
    boundary=0.875, shift=3.0, steps=20, guidance_scale=3.0, guidance_scale_high_noise=3.0, fps=8, num_frames=17,
    height=64, width=96, negative_prompt="")

VARIANTS: dict[str, WanVariant] = {variant.name: variant for variant in (
    # Wan2.2
    replace(
        T2V_14B, name="t2v-A14B", boundary=0.875, shift=12.0, steps=40, guidance_scale=3.0,
        guidance_scale_high_noise=4.0),
    replace(
        T2V_14B, name="i2v-A14B", dit=replace(DIT_14B, in_dim=36), boundary=0.900, steps=40, guidance_scale=3.5,
        guidance_scale_high_noise=3.5, image_conditioning="channels"),
    TI2V_5B,
    # Wan2.1
    replace(T2V_14B, name="t2v-1.3B", dit=DIT_1_3B),
    T2V_14B,
    replace(
        T2V_14B, name="i2v-14B", dit=replace(DIT_14B, in_dim=36, image_dim=1280), image_encoder=CLIP_VIT_H, steps=40,
        image_conditioning="channels"),
    replace(T2V_14B, name="t2i-14B", num_frames=1),
    # Wan-Fun with a camera adapter
    replace(
        T2V_14B, name="fun-camera-A14B", dit=replace(DIT_14B, in_dim=36, control_downscale=8), boundary=0.900,
        guidance_scale=6.0, guidance_scale_high_noise=6.0, image_conditioning="channels"),
    replace(
        TI2V_5B, name="fun-camera-5B", dit=replace(TI2V_5B.dit, in_dim=100, control_downscale=16), guidance_scale=6.0,
        num_frames=81, image_conditioning="channels_and_first_frame"),
    replace(
        T2V_14B, name="fun-camera-1.3B", dit=replace(DIT_1_3B, in_dim=32, image_dim=1280, control_downscale=8),
        image_encoder=CLIP_VIT_H, shift=3.0, guidance_scale=6.0, image_conditioning="channels"),
    replace(
        T2V_14B, name="fun-camera-14B", dit=replace(DIT_14B, in_dim=32, image_dim=1280, control_downscale=8),
        image_encoder=CLIP_VIT_H, shift=3.0, guidance_scale=6.0, image_conditioning="channels"),
    # The mixtures of experts that ship in assets/, for laptops and tests.
    TINY,
    replace(TINY, name="tiny-i2v", dit=replace(TINY.dit, in_dim=36), image_conditioning="channels"),
)}
# fmt: on


def get_variant(task: str) -> WanVariant:
    """The variant called `task`.

    Raises:
        InputError: there is none of that name.
    """
    if task not in VARIANTS:
        raise InputError(f"task: expected one of {', '.join(VARIANTS)}, found {task!r}{nearest(task, VARIANTS)}")
    return VARIANTS[task]
