"""Step 5: generate a video along a camera path.

    python generate.py --dataset_config x.toml --network_weights out/my_camera_high_noise.safetensors \\
        out/my_camera_low_noise.safetensors --camera_params path.txt --save_path out/video.mp4
    python generate.py --task t2v-A14B --ckpt_dir Wan2.2-T2V-A14B --prompt "..." --video_size 480 832 --save_path out

What is not given comes from the [model] table of --dataset_config and from the metadata of --network_weights (task,
prompt of its scene, size, fps), then from the task; what was taken from where is printed and written beside the video.
A camera file of N lines gives N frames: the path is held to the next 4n+1 that Wan needs, and the surplus is cut.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    # ---- model ----------------------------------------------------------------------------------------------------
    dataset_config: Path | None = None
    """A TOML whose [model] table names the task and the model's files."""
    task: str | None = None
    """t2v-A14B, i2v-A14B, ti2v-5B, t2v-1.3B, t2v-14B, i2v-14B, t2i-14B or tiny."""
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
    """Camera path: 10 numbers a line, or RealEstate10K."""
    camera_format: Literal["auto", "ten", "re10k"] = "auto"
    """Format of the camera file; auto recognises it."""
    fov_axis: Literal["horizontal", "vertical"] = "horizontal"
    """What the field of view in a 10-number file spans, where the file does not say."""
    image_path: Path | None = None
    """First frame, for I2V and TI2V tasks; scaled to cover the size and cropped to its centre."""
    video_size: tuple[int, int] | None = None
    """Height and width in pixels."""
    video_length: int | None = None
    """Frames; with a camera path, its number of lines."""
    fps: int | None = None
    """Frames per second of the written video."""

    # ---- sampling -------------------------------------------------------------------------------------------------
    infer_steps: int | None = None
    """Solver steps."""
    sample_solver: Literal["unipc", "dpm++", "euler"] = "unipc"
    """Solver."""
    flow_shift: float | None = None
    """Shift of the noise schedule."""
    guidance_scale: float | None = None
    """Text guidance of the low-noise (or only) expert; 1: none, and half the time."""
    guidance_scale_high_noise: float | None = None
    """Text guidance of the high-noise expert."""
    timestep_boundary: float | None = None
    """Where the experts hand over, in [0, 1]."""
    seed: int = 0
    """The noise."""

    # ---- memory ---------------------------------------------------------------------------------------------------
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the linears and their activations."""
    fp8_scaled: bool = False
    """Keep the linears of the blocks in 8 bits with block scales."""
    blocks_to_swap: int = 0
    """Keep this many blocks in host memory and copy each to the device when it is needed."""
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

from camera.formats import read_camera
from camera.path import CameraPath
from core.errors import InputError
from core.files import atomic_path
from core.model_files import ModelFiles, resolve_model
from core.randomness import generator_for
from dataset.config import read_dataset_config
from dataset.contact_sheet import contact_sheet
from dataset.video import read_image, write_frames, write_video
from memory.runners import BlockRunner, run_plain
from memory.swap import SwappedBlocks, move_all_but
from networks.files import load_network, read_network_file
from networks.guided import Conditions, GuidedExpert
from wan_ext import sampling
from wan_ext.condition import first_frame_condition, first_frame_video, with_first_frame
from wan_ext.configs import Expert, WanVariant, get_variant
from wan_ext.experts import expert_at
from wan_ext.image_encoder import load_image_encoder
from wan_ext.loading import load_dit
from wan_ext.text_encoder import load_text_encoder
from wan_ext.vae import load_vae


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every number that decides the video, wherever it came from."""

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    solver: str
    shift: float
    guidance_scale: float
    guidance_scale_high_noise: float
    boundary: float | None
    seed: int


def main(options: Options) -> None:
    # ---- settle what is not given ---------------------------------------------------------------------------------
    network_metadata = [read_network_file(path) for path in options.network_weights]
    table = {} if options.dataset_config is None else read_dataset_config(options.dataset_config).model
    with_camera = [each for each in network_metadata if each.get("injection")]
    metadata = next(iter(with_camera + network_metadata), {})
    files, variant = settle_model(options, table, metadata)
    settings, sources = settle(options, variant, metadata)
    variant = replace(variant, boundary=settings.boundary)
    for name, value in asdict(settings).items():
        print(f"  {name:26} {value!s:40.80} {sources[name]}")

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    padded_frames = -(-(settings.num_frames - 1) // 4) * 4 + 1  # the next 4n + 1
    camera = None
    if options.camera_params is not None:
        camera = read_camera_for(options, settings, metadata).held_to(padded_frames)
    elif metadata.get("injection"):
        print("note: without --camera_params the network's camera encoder is not used")

    # ---- encode what conditions the model, with each encoder gone before the next comes ----------------------------
    contexts = encode_text(options, files, variant, settings, device)
    vae = load_vae(files.vae, variant.vae, device=device)
    condition = image_context = first_latents = None
    if options.image_path is not None:
        image = read_image(options.image_path, height=settings.height, width=settings.width)  # uint8 [H, W, 3]
        frame = rearrange(image.float() / 127.5 - 1, "h w c -> c h w").to(device)
        if variant.image_conditioning == "channels":
            known = first_frame_video(frame, padded_frames)  # [3, T, H, W]
            condition = first_frame_condition(vae.encode(known[None])[0])[None]
        else:
            first_latents = vae.encode(frame[None, :, None])  # [1, C, 1, h, w]
        if variant.image_encoder is not None:
            clip = load_image_encoder(files.clip, variant.image_encoder, device=device)
            image_context = clip.encode(frame[None])
            del clip
    prompt, negative_prompt = contexts
    conditions = Conditions(
        prompt=prompt,
        negative_prompt=negative_prompt,
        condition=condition,
        image_context=image_context,
        first_latents=first_latents,
    )

    # ---- from noise to video --------------------------------------------------------------------------------------
    started = time.perf_counter()
    latents = sample_latents(options, files, variant, settings, conditions, camera, padded_frames, device)
    print(f"sampled in {time.perf_counter() - started:.1f} s; decoding")
    video = vae.decode(latents)[0]  # [3, T, H, W] in [-1, 1]
    frames = rearrange(((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), "c t h w -> t h w c").cpu()
    write_results(options, settings, sources, frames[: settings.num_frames], files)


# ---- settings ------------------------------------------------------------------------------------------------------


def settle_model(options: Options, table: dict[str, str], metadata: dict[str, str]) -> tuple[ModelFiles, WanVariant]:
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
    needs += ["clip"] if variant.image_encoder is not None else []
    if variant.image_conditioning == "none" and options.image_path is not None:
        raise InputError(f"--image_path: {variant.name} takes no image; use an I2V or TI2V task")
    if variant.image_conditioning == "channels" and options.image_path is None:
        raise InputError(f"--image_path: {variant.name} needs a first frame")
    return resolve_model(flags, needs=needs, **resolve), variant


def settle(options: Options, variant: WanVariant, metadata: dict[str, str]) -> tuple[Settings, dict[str, str]]:
    """Each setting from its flag, else from the network's metadata, else from the task; and where it came from."""
    weights = options.network_weights[0].name if options.network_weights else ""
    sources: dict[str, str] = {}

    def choose(name: str, flag: str, given: Any, key: str | None, default: Any) -> Any:
        if given is not None:
            sources[name] = f"from --{flag}"
            return given
        if key is not None and metadata.get(key):
            sources[name] = f"from {weights}"
            return type(default)(metadata[key])
        sources[name] = f"default of {variant.name}"
        return default

    height, width = options.video_size or (None, None)
    camera_frames = None
    if options.camera_params is not None:
        camera_frames = len(
            read_camera(
                options.camera_params, height=64, width=64, fov_axis=options.fov_axis, format=options.camera_format
            )
        )
    if camera_frames and options.video_length and options.video_length != camera_frames:
        raise InputError(
            f"{options.camera_params}: {camera_frames} poses, but --video_length is {options.video_length}; leave the "
            "flag out to get one frame per pose"
        )
    boundary = options.timestep_boundary
    if boundary is not None and (variant.boundary is None or not 0 < boundary < 1):
        raise InputError(
            f"--timestep_boundary {boundary}: expected a number between 0 and 1, for a task of two experts"
        )
    high_noise = variant.guidance_scale_high_noise or variant.guidance_scale
    settings = Settings(
        prompt=choose("prompt", "prompt", options.prompt, "prompt", ""),
        negative_prompt=choose(
            "negative_prompt", "negative_prompt", options.negative_prompt, None, variant.negative_prompt
        ),
        height=choose("height", "video_size", height, "height", variant.height),
        width=choose("width", "video_size", width, "width", variant.width),
        num_frames=choose("num_frames", "video_length", options.video_length, "num_frames", variant.num_frames),
        fps=choose("fps", "fps", options.fps, "fps", variant.fps),
        steps=choose("steps", "infer_steps", options.infer_steps, None, variant.steps),
        solver=choose("solver", "sample_solver", options.sample_solver, None, ""),
        shift=choose("shift", "flow_shift", options.flow_shift, None, variant.shift),
        guidance_scale=choose("guidance_scale", "guidance_scale", options.guidance_scale, None, variant.guidance_scale),
        guidance_scale_high_noise=choose(
            "guidance_scale_high_noise",
            "guidance_scale_high_noise",
            options.guidance_scale_high_noise,
            None,
            high_noise,
        ),
        boundary=choose("boundary", "timestep_boundary", boundary, None, variant.boundary),
        seed=choose("seed", "seed", options.seed, None, 0),
    )
    if camera_frames:
        settings = replace(settings, num_frames=camera_frames)
        sources["num_frames"] = f"lines of {options.camera_params.name}"
    if not settings.prompt:
        raise InputError("--prompt: not given, and the metadata of --network_weights names none")
    stride = variant.spatial_stride
    if settings.height % stride or settings.width % stride or settings.height < stride or settings.width < stride:
        fit = " ".join(str(max(stride, round(size / stride) * stride)) for size in (settings.height, settings.width))
        raise InputError(
            f"video_size: height and width must be multiples of {stride}, found {settings.height} {settings.width}; "
            f"the nearest that fits is {fit}"
        )
    if settings.num_frames < 1 or settings.steps < 1:
        raise InputError(
            f"video_length and infer_steps: expected at least 1, found {settings.num_frames}, {settings.steps}"
        )
    return settings, sources


def read_camera_for(options: Options, settings: Settings, metadata: dict[str, str]) -> CameraPath:
    """The path in the pose frame that the network was trained in."""
    if not options.network_weights:
        raise InputError("--camera_params: only a network with a camera follows a path; give --network_weights")
    if not metadata.get("injection"):
        raise InputError(
            f"{options.network_weights[0]}: has no camera encoder, so --camera_params has nothing to act on"
        )
    path = read_camera(
        options.camera_params,
        height=settings.height,
        width=settings.width,
        fov_axis=options.fov_axis,
        format=options.camera_format,
        fps=settings.fps,
    )
    return path.relative_to_first() if metadata["pose_frame"] == "first" else path


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
        quantize=options.fp8_t5,
    )
    prompt, negative = encoder.encode([settings.prompt, settings.negative_prompt])
    return prompt[None].to(device), negative[None].to(device)


def sample_latents(
    options: Options,
    files: ModelFiles,
    variant: WanVariant,
    settings: Settings,
    conditions: Conditions,
    camera: CameraPath | None,
    num_frames: int,
    device: torch.device,
) -> Tensor:
    """Noise to clean latents [1, C, F, h, w], with one expert in memory at a time."""
    stride_t, stride_h, stride_w = variant.vae.stride
    shape = (
        1,
        variant.vae.z_dim,
        (num_frames - 1) // stride_t + 1,
        settings.height // stride_h,
        settings.width // stride_w,
    )
    noise = torch.randn(shape, generator=generator_for(settings.seed, "generate")).to(device)
    loaded: dict[Expert, GuidedExpert] = {}

    def velocity(latents: Tensor, timestep: float) -> Tensor:
        name = expert_at(variant, timestep)
        if name not in loaded:
            loaded.clear()  # the other expert's memory is free before this one comes
            progress.write(f"loading the {name}-noise expert" if len(variant.experts) > 1 else "loading the DiT")
            loaded[name] = load_expert(options, files, variant, name, settings, conditions, camera, device)
        return loaded[name].velocity(latents, timestep)

    constrain = None
    if conditions.first_latents is not None:
        first_latents = conditions.first_latents

        def constrain(latents: Tensor) -> Tensor:
            return with_first_frame(latents, first_latents)

    with tqdm(total=settings.steps, desc="sample", unit="step") as progress:
        return sampling.sample(
            velocity,
            noise,
            solver=settings.solver,
            steps=settings.steps,
            shift=settings.shift,
            constrain=constrain,
            on_step=lambda *_: progress.update(),
        )


def load_expert(
    options: Options,
    files: ModelFiles,
    variant: WanVariant,
    name: Expert,
    settings: Settings,
    conditions: Conditions,
    path: CameraPath | None,
    device: torch.device,
) -> GuidedExpert:
    """One expert with its adapters, its camera encoded, ready to run."""
    dit = load_dit(
        files.dit_high_noise if name == "high" else files.dit,
        variant,
        dtype=torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32,
        quantize=options.fp8_scaled,
        device=torch.device("cpu") if options.blocks_to_swap else device,
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
    if options.network_weights and not networks:
        tqdm.write(f"note: no file of --network_weights is for the {name}-noise expert, which runs as it is")
    run_blocks: BlockRunner = run_plain
    if options.blocks_to_swap:
        run_blocks = SwappedBlocks(dit.blocks, num_swapped=options.blocks_to_swap, device=device, checkpoint=False)
        move_all_but(dit, dit.blocks, device)
    return GuidedExpert(
        dit=dit.eval(),
        conditions=conditions,
        guidance_scale=settings.guidance_scale_high_noise if name == "high" else settings.guidance_scale,
        camera=camera,
        run_blocks=run_blocks,
    )


# ---- results ---------------------------------------------------------------------------------------------------------


def write_results(
    options: Options, settings: Settings, sources: dict[str, str], frames: Tensor, files: ModelFiles
) -> None:
    """The video or frames, a contact sheet and the settings, beside each other. frames uint8 [T, H, W, 3]"""
    target = options.save_path
    if "%" in target.name:
        write_frames(frames, target)
        stem = target.resolve().parent  # beside the folder of frames, not among them
    else:
        if target.suffix.lower() != ".mp4":
            target = target / f"{time.strftime('%Y%m%d-%H%M%S')}_{settings.seed}.mp4"
        write_video(frames, target, fps=settings.fps)
        stem = target.with_suffix("")
    sheet, record = stem.with_name(stem.name + "_sheet.png"), stem.with_name(stem.name + ".json")
    with atomic_path(sheet) as temporary:
        contact_sheet({"": frames}).save(temporary)
    with atomic_path(record) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "settings": asdict(settings),
                    "sources": sources,
                    "model": asdict(files),
                    "network_weights": options.network_weights,
                    "camera_params": options.camera_params,
                },
                indent=2,
                default=str,
                ensure_ascii=False,
            )
        )
    print(f"video:         {target}\ncontact sheet: {sheet}\nsettings:      {record}")


if __name__ == "__main__":
    run(main, OPTIONS)
