"""Step 5: generate a video along a camera path.

    python generate.py --dataset_config x.toml --network_weights out/my_camera_high_noise.safetensors \\
        out/my_camera_low_noise.safetensors --camera_params path.txt --save_path out/video.mp4
    python generate.py --dataset_config x.toml --network_weights out/moves_*_noise.safetensors --image_path room.png \\
        --camera_path "orbit 60deg; dolly in 0.5" --video_length 49 --save_path out/video.mp4
    python generate.py --task t2v-A14B --ckpt_dir Wan2.2-T2V-A14B --prompt "..." --video_size 480 832 --save_path out

What is not given comes from the [model] table of --dataset_config and from the metadata of --network_weights (task,
prompt of its scene, size, fps), then from the task; what was taken from where is printed and written beside the video.
A camera file of N poses gives N frames: the path is held to the next 4n+1 that Wan needs, and the surplus is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from camera.files.settings import Axes, CameraFileSettings, CameraFormat, Direction, FovAxis
from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    # ---- model ----------------------------------------------------------------------------------------------------
    dataset_config: Path | None = None
    """A TOML whose [model] table names the task and the model's files."""
    task: str | None = None
    """t2v-A14B, i2v-A14B, ti2v-5B, t2v-1.3B, t2v-14B, i2v-14B, t2i-14B, tiny, tiny-i2v,
    fun-camera-A14B, fun-camera-5B, fun-camera-1.3B or fun-camera-14B."""
    ckpt_dir: Path | None = None
    """Folder in the layout that Wan's authors publish."""
    dit: Path | None = None
    """The low-noise expert, or the only one: a folder of shards, .safetensors or .pth."""
    dit_high_noise: Path | None = None
    """The high-noise expert."""
    vae: Path | None = None
    """VAE checkpoint."""
    t5: Path | None = None
    """umT5 encoder checkpoint."""
    tokenizer: Path | None = None
    """spiece.model, tokenizer.json or their folder. Default: google/umt5-xxl beside the checkpoint, or inside it."""
    clip: Path | None = None
    """CLIP checkpoint; Wan2.1 I2V only."""
    network_weights: tuple[Path, ...] = ()
    """LoRA files, one per expert; a camera file beside one is found through its metadata."""
    lora_multiplier: float = 1.0
    """Strength of the LoRA (the camera encoder is not scaled)."""

    # ---- what to show ---------------------------------------------------------------------------------------------
    prompt: str | None = None
    """Default: the prompt of the scene that the network was trained on."""
    negative_prompt: str | None = None
    """Default: the task's."""
    camera_params: Path | None = None
    """Camera file, in any format of docs/cameras.md; a COLMAP model is a folder."""
    camera_format: CameraFormat = "auto"
    """Format of the camera file; auto recognises it from its content."""
    camera_direction: Direction | None = None
    """What matrices without a fixed direction map: camera to world, or world to camera."""
    camera_axes: Axes | None = None
    """The camera's axes in matrices without fixed ones."""
    camera_fov: float | None = None
    """Field of view in degrees, for camera files that hold poses only."""
    camera_name: str | None = None
    """Which camera of a file with several."""
    camera_size: tuple[int, int] | None = None
    """Height and width that intrinsics in pixels belong to, where the file does not say it."""
    fov_axis: FovAxis = "horizontal"
    """What a field of view spans, where the file does not say it."""
    camera_depth: float | None = None
    """Mean distance of what the first camera sees, in the path's units; for networks of scale rule mean_depth."""
    camera_path: str | None = None
    """Camera moves in words, such as "orbit 60deg; dolly in 0.5", instead of a camera file (docs/cameras.md)."""
    fov: float | None = None
    """Horizontal field of view of --camera_path, in degrees; default: 60, or that of the presets in it."""
    image_path: Path | None = None
    """First frame, for I2V and TI2V tasks; scaled to cover the size and cropped to its centre."""
    video_size: tuple[int, int] | None = None
    """Height and width in pixels."""
    video_length: int | None = None
    """Frames; with a camera file, its number of poses."""
    fps: int | None = None
    """Frames per second of the written video."""

    # ---- sampling -------------------------------------------------------------------------------------------------
    infer_steps: int | None = None
    """Solver steps."""
    sample_solver: Literal["unipc", "dpm++", "euler"] | None = None
    """Solver; default: unipc."""
    flow_shift: float | None = None
    """Shift of the noise schedule."""
    guidance_scale: float | None = None
    """Text guidance of the low-noise (or only) expert; 1: none, and half the time."""
    guidance_scale_high_noise: float | None = None
    """Text guidance of the high-noise expert."""
    camera_guidance: float | None = None
    """Camera guidance, beside that of the text; 1: none. Asks for a network trained with camera_dropout."""
    timestep_boundary: float | None = None
    """Where the experts hand over, in [0, 1]."""
    seed: int | None = None
    """The noise; default: 0."""

    # ---- memory ---------------------------------------------------------------------------------------------------
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the linears and their activations."""
    fp8_scaled: bool = False
    """Keep the linears of the blocks in 8 bits with block scales."""
    quantize: str | None = None
    """Keep the linears of the blocks in 8 bits by this recipe: fp8, int8, int8_rotated, int8_w8a8,
    int8_w8a8_transposed, fp8_w8a8 or fp8_w8a8_transposed (docs/quantization.md). A file of tools/quantize.py brings its
    own recipe."""
    vram: str | None = None
    """Device memory to stay within, such as 12GB. A plan is made, printed and kept: which blocks stay on the device and
    how they compute. Default: what is free on the GPU; on a CPU, no plan."""
    ram: str | None = None
    """Host memory to stay within, such as 64GB. Default: this machine's."""
    gpu: str | None = None
    """Card whose rates the plan reckons with: 3090, 4060ti, 4090, 4090-x8, 5090, h100 or h200.
    Default: the one here."""
    blocks_to_swap: int | None = None
    """Keep this many blocks in host memory and copy each to the device when it is needed.
    Default: the plan's choice; without a plan, none."""
    fp8_t5: bool = False
    """Keep the text encoder's linears in 8 bits."""
    t5_cpu: bool = False
    """Run the text encoder on the CPU."""
    attn_mode: Literal["sdpa", "flash", "sage"] = "sdpa"
    """Attention backend."""
    device: str | None = None
    """Default: cuda where there is one, else cpu."""

    # ---- output ---------------------------------------------------------------------------------------------------
    save_path: Path
    """A video (out.mp4), a frame pattern (frames/%04d.png), or a folder, in which the video gets a name."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from camera.path import CameraPath
from core.errors import InputError
from core.model_files import ModelFiles, resolve_model
from dataset.config import read_dataset_config
from dataset.results import write_results
from dataset.video import read_image
from evaluation.filming import decode_frames
from memory.card import find_card
from memory.machine import host_bytes, parse_bytes
from memory.plan import MemoryPlan
from memory.plan_table import plan_table
from memory.quant import RECIPES
from networks.files import load_network, network_rank, read_network_file
from networks.guided import Conditions, GuidedExpert
from networks.mechanisms.adapter import WAN_FUN_CONVENTIONS, RaysEncoder
from networks.mixture import sample_latents
from networks.requested_path import CameraRequest, requested_path, unused
from networks.video_settings import Settings, leading_metadata, settle
from wan_ext.condition import encode_first_frame, no_first_frame
from wan_ext.configs import Expert, WanVariant, get_variant
from wan_ext.image_encoder import load_image_encoder
from wan_ext.loading import chosen_recipe, load_dit
from wan_ext.placement import Placement, require_plan, stored_recipe
from wan_ext.planning import plan_generation
from wan_ext.quantized_files import recipe_name
from wan_ext.text_encoder import load_text_encoder
from wan_ext.vae import load_vae

FLAGS = {  # setting -> flag of another name
    "num_frames": "video_length",
    "steps": "infer_steps",
    "solver": "sample_solver",
    "shift": "flow_shift",
    "boundary": "timestep_boundary",
}


def main(options: Options) -> None:
    # ---- settle what is not given ---------------------------------------------------------------------------------
    network, metadata = leading_metadata({file: read_network_file(file) for file in options.network_weights})
    table = {} if options.dataset_config is None else dict(read_dataset_config(options.dataset_config).model)
    files, variant = settle_model(options, table, metadata)
    given = {name: getattr(options, FLAGS.get(name, name), None) for name in (field.name for field in fields(Settings))}
    given |= dict(zip(("height", "width"), options.video_size or (None, None), strict=True))
    settings, sources = settle(given, variant=variant, metadata=metadata, network=network)
    request = camera_request(options)
    if variant.hears_camera and not metadata.get("injection"):  # the model follows a path without any network
        network, metadata = variant.name, {**metadata, **WAN_FUN_CONVENTIONS}
    path = requested_path(request, settings, metadata, network=network)
    if path is not None and request.file is not None:
        settings = replace(settings, num_frames=len(path))
        sources["num_frames"] = f"poses of {request.file.name}"
    variant = replace(variant, boundary=settings.boundary)
    for name, value in asdict(settings).items():
        print(f"  {name:26} {value!s:40.80} {sources[name]}")
    for note in unused(request, settings, metadata):
        print(f"note: {note}")

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    padded_frames = -(-(settings.num_frames - 1) // 4) * 4 + 1  # the next 4n + 1
    camera = None if path is None else path.held_to(padded_frames)

    # ---- encode what conditions the model, with each encoder gone before the next comes ----------------------------
    prompt, negative_prompt = encode_text(options, files, variant, settings, device)
    vae = load_vae(files.vae, variant.vae, device=device)
    condition = image_context = first_latents = None
    if options.image_path is not None:
        image = read_image(options.image_path, height=settings.height, width=settings.width)  # uint8 [H, W, 3]
        frame = rearrange(image.float() / 127.5 - 1, "h w c -> c h w").to(device)
        if variant.dit.condition_channels:
            condition = encode_first_frame(vae.encode, frame, padded_frames, variant)[None]  # [1, Cc, F, h, w]
        if variant.keeps_first_frame:
            first_latents = vae.encode(frame[None, :, None])  # [1, C, 1, h, w]
        if variant.image_encoder is not None:
            clip = load_image_encoder(files.clip, variant.image_encoder, device=device)
            image_context = clip.encode(frame[None])
            del clip
    elif variant.hears_camera:
        condition, image_context = no_first_frame(variant, settings.height, settings.width, padded_frames, device)
    conditions = Conditions(
        prompt=prompt,
        negative_prompt=negative_prompt,
        condition=condition,
        image_context=image_context,
        first_latents=first_latents,
    )

    # ---- from noise to video --------------------------------------------------------------------------------------
    placement, keep = place_experts(options, files, variant, settings, padded_frames, device)
    loaded: dict[Expert, GuidedExpert] = {}

    def expert(name: Expert) -> GuidedExpert:
        if name not in loaded:
            if not keep:
                loaded.clear()  # the other expert's memory is free before this one comes
                placement.forget()
            loaded[name] = load_expert(options, files, variant, name, settings, conditions, camera, placement)
        return loaded[name]

    latents = sample_latents(
        expert,
        variant=variant,
        settings=settings,
        num_frames=padded_frames,
        first_latents=first_latents,
        device=device,
    )
    frames = decode_frames(vae, latents)[0]  # uint8 [T, H, W, 3]
    record = {"settings": asdict(settings), "sources": sources, "model": asdict(files), "options": asdict(options)}
    written = write_results(frames[: settings.num_frames], options.save_path, fps=settings.fps, record=record)
    for what, file in zip(("video", "contact sheet", "settings"), written, strict=True):
        print(f"{what + ':':14} {file}")


# ---- settings ------------------------------------------------------------------------------------------------------


def settle_model(
    options: Options, table: Mapping[str, str], metadata: Mapping[str, str]
) -> tuple[ModelFiles, WanVariant]:
    """The task and its files: from flags, the [model] table, the network's metadata (task only)."""
    names = ("task", "ckpt_dir", "dit", "dit_high_noise", "vae", "t5", "tokenizer", "clip")
    flags = {name: getattr(options, name) for name in names}
    table = ({"task": metadata["task"]} if "task" in metadata else {}) | table
    resolve = {"table": table, "table_source": options.dataset_config}
    variant = get_variant(resolve_model(flags, needs=(), **resolve).task)
    if metadata.get("task", variant.name) != variant.name:
        raise InputError(
            f"{options.network_weights[0]}: trained for {metadata['task']}, but the task is {variant.name}; give the "
            "base model that it was trained on"
        )
    needs = ["dit", "vae", "t5"]
    needs += ["dit_high_noise"] if "high" in variant.experts else []
    needs += ["clip"] if variant.image_encoder is not None and options.image_path is not None else []
    if variant.image_conditioning == "none" and options.image_path is not None:
        raise InputError(f"--image_path: {variant.name} takes no image; use an I2V or TI2V task")
    if variant.needs_first_frame and options.image_path is None:
        raise InputError(f"--image_path: {variant.name} needs a first frame")
    return resolve_model(flags, needs=needs, **resolve), variant


def camera_request(options: Options) -> CameraRequest:
    """What the flags say about the camera."""
    return CameraRequest(
        file=options.camera_params,
        file_settings=CameraFileSettings(
            format=options.camera_format,
            fov_axis=options.fov_axis,
            direction=options.camera_direction,
            axes=options.camera_axes,
            fov_degrees=options.camera_fov,
            name=options.camera_name,
            size=options.camera_size,
        ),
        moves=options.camera_path,
        num_frames=options.video_length,
        fov_degrees=options.fov,
        mean_depth=options.camera_depth,
    )


# ---- models ----------------------------------------------------------------------------------------------------------


def encode_text(
    options: Options, files: ModelFiles, variant: WanVariant, settings: Settings, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The prompt and the negative prompt, each [1, S, D]; the encoder is gone when this returns."""
    text_device = torch.device("cpu") if options.t5_cpu else device
    encoder = load_text_encoder(
        files.t5,
        variant.text_encoder,
        tokenizer=files.tokenizer,
        text_len=variant.dit.text_len,
        dtype=torch.bfloat16,
        device=text_device,
        recipe=RECIPES["fp8"] if options.fp8_t5 else None,
    )
    prompt, negative = encoder.encode([settings.prompt, settings.negative_prompt])
    return prompt[None].to(device), negative[None].to(device)


def place_experts(
    options: Options, files: ModelFiles, variant: WanVariant, settings: Settings, num_frames: int, device: torch.device
) -> tuple[Placement, bool]:
    """Where experts run, by a plan that is printed; and whether one stays in memory while the other one runs."""
    swap = options.blocks_to_swap
    checkpoints = [files.dit_high_noise if name == "high" else files.dit for name in variant.experts]
    asked = chosen_recipe(options.quantize, fp8=options.fp8_scaled)
    recipe, from_file = stored_recipe(checkpoints, asked, device=device)
    if device.type != "cuda" and options.vram is None:
        require_plan(ram=options.ram, gpu=options.gpu)
        return Placement(device, blocks_to_swap=swap or 0), False
    card = find_card(vram=options.vram, gpu=options.gpu)
    ram_bytes = host_bytes() if options.ram is None else parse_bytes(options.ram, "--ram")
    ranks = [network_rank(file) for file in options.network_weights]
    rank = max(sum(rank for expert, rank in ranks if expert in (None, name)) for name in variant.experts)

    def plan(at_once: int) -> MemoryPlan:
        return plan_generation(
            variant,
            frames=num_frames,
            height=settings.height,
            width=settings.width,
            recipe=None if recipe is None else recipe_name(recipe),
            vram_bytes=card.vram_bytes,
            ram_bytes=ram_bytes,
            rates=card.rates,
            rank=rank,
            bf16=options.mixed_precision == "bf16",
            from_file=from_file,
            blocks_to_swap=swap,
            experts_at_once=at_once,
        )

    try:
        found, keep = plan(len(variant.experts)), True
    except InputError:
        found, keep = plan(1), False
        print("note: memory holds one expert at a time; the second is loaded when the first is done")
    print(plan_table(found) + (f"\n  note: {card.note}" if card.note else ""))
    return Placement(device, plan=found), keep


def load_expert(
    options: Options,
    files: ModelFiles,
    variant: WanVariant,
    name: Expert,
    settings: Settings,
    conditions: Conditions,
    path: CameraPath | None,
    placement: Placement,
) -> GuidedExpert:
    """One expert with its adapters, its camera encoded, ready to run."""
    device = placement.device
    dit = load_dit(
        files.dit_high_noise if name == "high" else files.dit,
        variant,
        dtype=torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32,
        recipe=chosen_recipe(options.quantize, fp8=options.fp8_scaled),
        device=placement.load_device,
        attention_backend=options.attn_mode,
    )
    camera, networks = None, []
    for file in options.network_weights:
        network = load_network(dit, file, variant=variant, expert=name, multiplier=options.lora_multiplier)
        if network is None:  # a file of the other expert
            continue
        networks.append(network.to(device))
        if path is not None:
            c2w, K = path.c2w[None].to(device), path.K[None].to(device)
            camera = network.encode_camera(c2w, K, settings.height, settings.width) or camera
    if camera is None and path is not None and variant.hears_camera:
        c2w, K = path.c2w[None].to(device), path.K[None].to(device)
        camera = RaysEncoder(variant)(c2w, K, settings.height, settings.width)
    if options.network_weights and not networks:
        tqdm.write(f"note: no file of --network_weights is for the {name}-noise expert, which runs as it is")
    return GuidedExpert(
        dit=dit.eval(),
        conditions=conditions,
        guidance_scale=settings.guidance_scale_high_noise if name == "high" else settings.guidance_scale,
        camera=camera,
        camera_guidance=settings.camera_guidance,
        run_blocks=placement.place(dit),
    )


if __name__ == "__main__":
    run(main, OPTIONS)
