"""The stages of the recipe: each reads what earlier ones wrote, and writes its files of the finished model."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from core.errors import InputError
from core.files import atomic_path
from scenes.scene import caption, make_scene
from tools.tiny_wan.clips import held_out_clips, to_video, training_clips
from tools.tiny_wan.dit import Material, generate, train_dit
from tools.tiny_wan.text import train_text_encoder
from tools.tiny_wan.vae import encode_all, encode_first_frames, evaluate_vae, train_vae
from wan_ext.condition import first_frame_condition, first_frame_video
from wan_ext.configs import Expert, get_variant
from wan_ext.dit import WanDiT
from wan_ext.loading import load_dit, save_dit
from wan_ext.text_encoder import TextEncoder, load_text_encoder, save_text_encoder_native
from wan_ext.vae import WanVAE, load_vae, save_vae_native

VARIANT, I2V_VARIANT = get_variant("tiny"), get_variant("tiny-i2v")
VAE_FILE, TEXT_FILE, SPIECE_FILE = "Wan2.1_VAE.safetensors", "models_t5_umt5-xxl-enc-bf16.safetensors", "spiece.model"
TOKENIZER_FOLDER = "google/umt5-xxl"
EXPERT_FOLDERS: dict[Expert, str] = {"high": "high_noise_model", "low": "low_noise_model"}
STORED = torch.bfloat16
SHEET_SCENES = 8  # generated clips of the contact sheet


def vae_stage(output: Path, work: Path, *, num_scenes: int, steps: int, learning_rate: float, seed: int) -> None:
    """Train the autoencoder and write it."""
    vae = train_vae(
        VARIANT.vae, work, num_scenes=num_scenes, steps=steps, batch_size=2, learning_rate=learning_rate, seed=seed
    )
    output.mkdir(parents=True, exist_ok=True)
    save_vae_native(vae, output / VAE_FILE, dtype=STORED)


def text_stage(output: Path, work: Path, *, steps: int, seed: int) -> None:
    """Train tokenizer and text encoder and write them."""
    encoder, spiece = train_text_encoder(VARIANT, work, steps=steps, batch_size=32, learning_rate=3e-3, seed=seed)
    (output / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
    with atomic_path(output / TOKENIZER_FOLDER / SPIECE_FILE) as temporary:
        temporary.write_bytes(spiece)
    save_text_encoder_native(encoder, output / TEXT_FILE, dtype=STORED)


def dit_stage(
    output: Path,
    work: Path,
    *,
    expert: Expert | None,
    num_scenes: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train the model on all noise levels, or from it an expert, which is written.

    Args:
        output, work: folders of the finished model and of what leads to it.
        expert: which; None for the model that both start from.
        num_scenes, steps, learning_rate, batch_size, seed: of the training.
    """
    start = None if expert is None else trained_in(work, "both", advice="run the stage both first")
    dit = train_dit(
        VARIANT,
        material_of(output, work, num_scenes, first_frames=False),
        work / f"dit_{expert or 'both'}.pt",
        expert=expert,
        start=start,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    if expert is not None:
        save_dit(dit, output / EXPERT_FOLDERS[expert], dtype=STORED)


def i2v_stage(
    output: Path,
    i2v_output: Path,
    work: Path,
    *,
    expert: Expert,
    num_scenes: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train an expert that continues a first frame, from the text-to-video expert of the same noise levels.

    Args:
        output: folder of the finished text-to-video model, whose VAE and text encoder serve both.
        i2v_output: folder of the finished expert.
        work: folder of what leads to it.
        expert, num_scenes, steps, learning_rate, batch_size, seed: of the training.
    """
    dit = train_dit(
        I2V_VARIANT,
        material_of(output, work, num_scenes, first_frames=True),
        work / f"i2v_{expert}.pt",
        expert=expert,
        start=trained_in(work, expert, advice=f"run the stage {expert} first"),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    save_dit(dit, i2v_output / EXPERT_FOLDERS[expert], dtype=STORED)


def material_of(output: Path, work: Path, num_scenes: int, *, first_frames: bool) -> Material:
    """What the experts learn from, with the condition channels of the first frames or without."""
    text, network = text_encoder_in(output), vae_in(output).network
    clips, captions = training_clips(work / "clips", num_scenes)
    context, empty = contexts(text, captions)
    condition = None
    if first_frames:
        condition = encode_first_frames(network, clips, work / "first_frame_latents.safetensors")
    latents = encode_all(network, clips, work / "dit_latents.safetensors")
    return Material(latents=latents, context=context, empty_context=empty, condition=condition)


def trained_in(work: Path, name: str, *, advice: str) -> WanDiT:
    """The averaged weights of an earlier stage."""
    checkpoint = work / f"dit_{name}.pt"
    if not checkpoint.exists():
        raise InputError(f"{work}: expected {checkpoint.name}, which this stage starts from; {advice}")
    dit = WanDiT(VARIANT.dit)
    dit.load_state_dict(torch.load(checkpoint, weights_only=True)["average"])
    return dit


def evaluate_stage(output: Path, i2v_output: Path, work: Path, *, scale: float | None, seed: int) -> None:
    """Print the VAE's figures; write contact sheets of reconstructions, and of clips generated from captions alone and
    from captions and first frames."""
    vae, text = vae_in(output), text_encoder_in(output)
    quality = evaluate_vae(vae)
    print(
        f"VAE, {len(quality)} held-out clips of 17 x 64 x 96: "
        f"mean PSNR {quality.mean():.2f} dB, worst {quality.min():.2f} dB"
    )
    videos = to_video(held_out_clips(4)[0])
    pairs = torch.stack([videos, vae.decode(vae.encode(videos))], dim=1).flatten(0, 1)
    save_sheet(pairs, work / "vae.png")
    experts: dict[Expert, WanDiT] = {
        expert: load_dit(output / folder, VARIANT, dtype=torch.float32) for expert, folder in EXPERT_FOLDERS.items()
    }
    contact_sheet(work / "generated.png", vae, text, experts, seed=seed, scale=scale)
    experts = {
        expert: load_dit(i2v_output / folder, I2V_VARIANT, dtype=torch.float32)
        for expert, folder in EXPERT_FOLDERS.items()
    }
    i2v_contact_sheet(work / "continued.png", vae, text, experts, seed=seed)
    for folder in (output, i2v_output):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"all files of {folder}: {size / 1e6:.1f} MB")
    print(f"look at {work}: vae.png (clip above its reconstruction), generated.png and continued.png")


def contact_sheet(
    file: Path, vae: WanVAE, text: TextEncoder, experts: dict[Expert, WanDiT], *, seed: int, scale: float | None
) -> None:
    """Generate clips of the first held-out scenes from their captions alone, and write one row of frames for each."""
    context, empty = contexts(text, [caption(make_scene(scene)) for scene in range(SHEET_SCENES)])
    shape = (VARIANT.dit.out_dim, 5, VARIANT.height // 8, VARIANT.width // 8)
    latents = generate(VARIANT, experts, context, empty, shape=shape, seed=seed, scale=scale)
    save_sheet(vae.decode(latents), file)


def i2v_contact_sheet(file: Path, vae: WanVAE, text: TextEncoder, experts: dict[Expert, WanDiT], *, seed: int) -> None:
    """Continue the first frames of clips of the first held-out scenes, and write one row of frames for each."""
    clips, captions = held_out_clips(SHEET_SCENES)
    context, empty = contexts(text, captions)
    known = torch.stack([first_frame_video(video[:, 0], video.shape[1]) for video in to_video(clips)])
    condition = torch.stack([first_frame_condition(latents) for latents in vae.encode(known)])
    latents = generate(
        I2V_VARIANT,
        experts,
        context,
        empty,
        shape=tuple(condition[:, 4:].shape[1:]),
        seed=seed,
        scale=1.0,
        condition=condition,
    )
    save_sheet(vae.decode(latents), file)


def save_sheet(videos: Tensor, file: Path, *, enlarge: int = 2) -> None:
    """Six frames of every clip, [N, 3, T, H, W] in [-1, 1], as a picture; two clips beside each other."""
    shown = videos[:, :, :: (videos.shape[2] - 1) // 5][:, :, :6]
    picture = rearrange(shown, "(n two) c t h w -> (n h) (two t w) c", two=2)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    image = Image.fromarray(pixels)
    with atomic_path(file) as temporary:
        image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST).save(
            temporary, format="PNG"
        )


def contexts(text: TextEncoder, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Contexts [N, S, D] of captions, zero-padded to the longest that the model takes, and that of "" [S, D]."""
    unique = list(dict.fromkeys(captions))
    known = dict(zip(unique, text.encode(unique), strict=True))

    def padded(features: Tensor) -> Tensor:
        return torch.nn.functional.pad(features, (0, 0, 0, text.text_len - len(features)))

    (empty,) = text.encode([""])
    return torch.stack([padded(known[caption].float()) for caption in captions]), padded(empty.float())


def vae_in(output: Path) -> WanVAE:
    """The autoencoder of a finished model."""
    return load_vae(output / VAE_FILE, VARIANT.vae)


def text_encoder_in(output: Path) -> TextEncoder:
    """The text encoder of a finished model."""
    return load_text_encoder(
        output / TEXT_FILE, VARIANT.text_encoder, tokenizer=None, text_len=VARIANT.dit.text_len, dtype=torch.float32
    )
