"""Step 4: fit a LoRA, and a camera encoder beside it, to the cached clips by flow matching.

    accelerate launch train_network.py --dataset_config x.toml --network_module networks.lora_camera \\
        --network_args injection=plucker --network_dim 32 --network_alpha 32 --learning_rate 1e-4 --max_train_epochs 16 \\
        --fp8_scaled --gradient_checkpointing --blocks_to_swap 38 --output_dir out --output_name my_camera
    python train_network.py ...      the same in one process

A mixture of experts gets one adapter per expert, each with its own optimizer. A step belongs to one expert, drawn with
the probability that its noise interval has under the sampling law. Everything random is a function of
(seed, step, process, purpose), so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from core.options import key_values, parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    # ---- data and model -------------------------------------------------------------------------------------------
    dataset_config: Path
    """Dataset TOML; its [model] table may name the task and the model's files."""
    task: str | None = None
    """t2v-A14B, i2v-A14B, ti2v-5B, t2v-1.3B, t2v-14B, i2v-14B, t2i-14B or tiny."""
    ckpt_dir: Path | None = None
    """Folder in the layout that Wan's authors publish."""
    dit: Path | None = None
    """The low-noise expert, or the only one: a folder of shards, .safetensors or .pth."""
    dit_high_noise: Path | None = None
    """The high-noise expert."""
    vae: Path | None = None
    """Only to check that the latent caches were written with this VAE; not loaded."""
    t5: Path | None = None
    """Only to check that the text caches were written with this encoder; not loaded."""
    experts: Literal["both", "high", "low"] = "both"
    """Which experts of a mixture are trained. Only their checkpoints are loaded."""
    timestep_boundary: float | None = None
    """Where the experts meet, in [0, 1] or [0, 1000]. Default: the task's (0.875 t2v-A14B, 0.9 i2v-A14B)."""

    # ---- memory ---------------------------------------------------------------------------------------------------
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the frozen linears and their activations; the residual stream and the adapters stay float32."""
    fp8_base: bool = False
    """Keep the frozen linears of the blocks in 8 bits with a scale per block of 64 weights."""
    fp8_scaled: bool = False
    """The same as --fp8_base: 8-bit weights are always scaled here."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs and recompute the rest in backward."""
    blocks_to_swap: int = 0
    """Keep this many blocks of each expert in host memory and copy each to the device when it is needed."""
    sdpa: bool = False
    """Attention by torch's scaled_dot_product_attention: the default."""
    flash_attn: bool = False
    """Attention by flash-attn, where it is installed."""
    sage_attn: bool = False
    """SageAttention has no gradient: asking for it here is an error."""
    device: str | None = None
    """Default: what accelerate finds."""

    # ---- what is trained ------------------------------------------------------------------------------------------
    network_module: str = "networks.lora_camera"
    """networks.lora or networks.lora_camera."""
    network_dim: int = 16
    """Rank of the LoRA."""
    network_alpha: float = 1.0
    """The LoRA's output is scaled by alpha / rank."""
    network_dropout: float = 0.0
    """Probability with which an input of a LoRA layer is dropped in training."""
    network_args: tuple[str, ...] = ()
    """key=value ...: injection=bias|plucker, camera_lr=..., include_patterns=..., exclude_patterns=..."""

    # ---- optimisation ---------------------------------------------------------------------------------------------
    optimizer_type: str = "AdamW8bit"
    """AdamW8bit (bitsandbytes) or AdamW (torch)."""
    optimizer_args: tuple[str, ...] = ()
    """key=value ...: weight_decay=0.01 betas=0.9,0.999 eps=1e-8"""
    learning_rate: float = 1e-4
    """Of the LoRA, and of the camera encoder unless --network_args camera_lr says otherwise."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up: not, or to zero at the last step."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    gradient_accumulation_steps: int = 1
    """Batches per step."""
    max_train_steps: int = 1600
    """Optimizer steps, of both experts together."""
    max_train_epochs: int | None = None
    """Passes over the data set; overrides --max_train_steps."""
    seed: int = 42
    """Start of everything random."""

    # ---- the law of the noise level -------------------------------------------------------------------------------
    timestep_sampling: Literal["uniform", "sigmoid", "shift", "logit_normal", "sigma"] = "shift"
    """The law sigma is drawn from, restricted to the expert's interval."""
    discrete_flow_shift: float | None = None
    """Shift of the laws `shift` and `sigma`. Default: the task's sampling shift."""
    sigmoid_scale: float = 1.0
    """Scale of the normal numbers under the sigmoid (`sigmoid`, `shift`)."""
    logit_mean: float = 0.0
    """Of `logit_normal`."""
    logit_std: float = 1.0
    """Of `logit_normal`."""

    # ---- output ---------------------------------------------------------------------------------------------------
    output_dir: Path
    """Folder of the weights and states."""
    output_name: str
    """Files are OUTPUT_NAME_high_noise.safetensors and so on."""
    save_precision: Literal["float", "bf16", "fp16"] = "float"
    """Precision of the saved weights."""
    save_every_n_epochs: int | None = None
    """Also save weights after every n epochs."""
    save_every_n_steps: int | None = None
    """Also save weights after every n steps."""
    save_state: bool = False
    """Save what a resumed run needs whenever weights are saved."""
    resume: Path | None = None
    """A saved state to go on from."""
    log_with: Literal["tensorboard"] | None = None
    """Where curves go."""
    logging_dir: Path = Path("logs")
    """Folder of the curves."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from core.errors import InputError
from core.files import fingerprint
from core.model_files import ModelFiles, resolve_model
from core.randomness import generator_for
from dataset.batches import Batch, TrainingSet
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from memory.runners import BlockRunner, run_checkpointed, run_plain
from memory.swap import SwappedBlocks
from networks.checkpoint import load_state, save_state
from networks.files import save_network
from wan_ext import flow
from wan_ext.configs import Expert, WanVariant, get_variant
from wan_ext.dit import WanDiT
from wan_ext.experts import expert_interval
from wan_ext.loading import load_dit

if TYPE_CHECKING:
    from networks.lora import Network


@dataclass(frozen=True, kw_only=True)
class TrainedExpert:
    """One expert: frozen transformer, what is trained on it, and its share of the noise levels."""

    name: Expert
    dit: WanDiT
    network: Network
    run_blocks: BlockRunner
    optimizer: torch.optim.Optimizer
    base_learning_rates: tuple[float, ...]
    interval: tuple[float, float]  # of sigma
    probability: float


def training_step(expert: TrainedExpert, batch: Batch, noise: Tensor, sigma: Tensor) -> Tensor:
    """The flow-matching loss of one batch. noise [B, C, F, H, W], sigma [B] -> scalar."""
    noised = flow.add_noise(batch.latents, noise, sigma)  # [B, C, F, H, W]
    camera = expert.network.encode_camera(batch.c2w, batch.K, batch.height, batch.width)
    velocity = expert.dit(
        noised,
        timestep=1000 * sigma,
        context=batch.context,
        condition=batch.condition,
        image_context=batch.image_context,
        camera=camera,
        run_blocks=expert.run_blocks,
    )  # [B, C, F, H, W]
    return F.mse_loss(velocity, flow.velocity_target(batch.latents, noise))


def main(options: Options) -> None:
    # ---- configuration --------------------------------------------------------------------------------------------
    config = read_dataset_config(options.dataset_config)
    files = model_files(options, config.model)
    variant = get_variant(files.task)
    network_module = import_network_module(options.network_module)
    network_args = key_values(options.network_args, "--network_args")
    law = {
        "law": options.timestep_sampling,
        "shift": variant.shift if options.discrete_flow_shift is None else options.discrete_flow_shift,
        "sigmoid_scale": options.sigmoid_scale,
        "logit_mean": options.logit_mean,
        "logit_std": options.logit_std,
    }
    boundary = boundary_of(options, variant)
    refuse_what_cannot_train(options)
    accelerator = Accelerator(
        cpu=options.device == "cpu",
        log_with=options.log_with,
        project_dir=str(options.logging_dir) if options.log_with else None,
    )
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes

    # ---- data: every cache is checked before anything large is loaded ---------------------------------------------
    clips = list_clips(config, spatial_stride=variant.spatial_stride, temporal_stride=variant.vae.stride[0])
    training_set = TrainingSet(
        clips,
        need_camera=network_module.NEEDS_CAMERA,
        vae=fingerprint(files.vae) if files.vae else None,
        text_encoder=fingerprint(files.t5) if files.t5 else None,
    )
    batches_per_epoch = len(training_set.batches(seed=options.seed, epoch=0, rank=rank, world_size=world_size))
    max_steps = options.max_train_steps
    if options.max_train_epochs is not None:
        max_steps = options.max_train_epochs * math.ceil(batches_per_epoch / options.gradient_accumulation_steps)

    # ---- experts: frozen transformer, adapter, optimizer ----------------------------------------------------------
    experts: list[TrainedExpert] = []
    for name in trained_experts(options, variant):
        dit = load_dit(
            files.dit_high_noise if name == "high" else files.dit,
            variant,
            dtype=torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32,
            quantize=options.fp8_base or options.fp8_scaled,
            device="cpu" if options.blocks_to_swap else device,
            attention_backend="flash" if options.flash_attn else "sdpa",
        )
        network = network_module.create_network(
            dit,
            variant=variant,
            expert=name,
            rank=options.network_dim,
            alpha=options.network_alpha,
            dropout=options.network_dropout,
            network_args=network_args,
            pose_frame=training_set.pose_frame,
            generator=generator_for(options.seed, "network", name),
        )
        dit.train()
        if options.blocks_to_swap:
            run_blocks = SwappedBlocks(
                dit.blocks,
                num_swapped=options.blocks_to_swap,
                device=device,
                checkpoint=options.gradient_checkpointing,
            )
        else:
            run_blocks = run_checkpointed if options.gradient_checkpointing else run_plain
        dit.to(device)
        network.to(device)
        groups = network.parameter_groups(options.learning_rate)
        low, high = expert_interval(variant, name, boundary=boundary)
        experts.append(
            TrainedExpert(
                name=name,
                dit=dit,
                network=network,
                run_blocks=run_blocks,
                optimizer=create_optimizer(options, groups),
                base_learning_rates=tuple(group["lr"] for group in groups),
                interval=(low, high),
                probability=flow.interval_probability(low=low, high=high, **law),
            )
        )
        num_parameters = sum(p.numel() for p in network.parameters())
        accelerator.print(f"{name}-noise expert: sigma [{low}, {high}), {num_parameters:,} trained parameters")

    # ---- where to begin -------------------------------------------------------------------------------------------
    networks = {expert.name: expert.network for expert in experts}
    optimizers = {expert.name: expert.optimizer for expert in experts}
    first_step = 0
    if options.resume is not None:
        first_step = load_state(options.resume, networks=networks, optimizers=optimizers)
        accelerator.print(f"resumed {options.resume} at step {first_step}")
    if options.log_with:
        accelerator.init_trackers(options.output_name)
    run_metadata = describe_run(options, files, variant, training_set)

    def save(suffix: str, step: int) -> None:
        if not accelerator.is_main_process:
            return
        for expert in experts:
            for path in save_network(
                expert.network,
                options.output_dir,
                options.output_name + suffix,
                run_metadata=run_metadata | {"ss_steps": str(step)},
                dtype={"float": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.save_precision],
            ):
                tqdm.write(f"saved {path}")
        if options.save_state:
            folder = options.output_dir / f"{options.output_name}{suffix}-state"
            save_state(folder, networks=networks, optimizers=optimizers, step=step)
            tqdm.write(f"saved {folder}")

    # ---- the loop -------------------------------------------------------------------------------------------------
    progress = tqdm(
        range(first_step, max_steps),
        initial=first_step,
        total=max_steps,
        desc="train",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    smooth_loss: dict[str, float] = {}
    for step in progress:
        started = time.perf_counter()
        expert = draw_expert(experts, seed=options.seed, step=step)
        factor = learning_rate_factor(
            step, kind=options.lr_scheduler, warmup_steps=options.lr_warmup_steps, max_steps=max_steps
        )
        for group, learning_rate in zip(expert.optimizer.param_groups, expert.base_learning_rates, strict=True):
            group["lr"] = learning_rate * factor

        loss_sum = 0.0
        for micro_step in range(options.gradient_accumulation_steps):
            epoch, index = divmod(step * options.gradient_accumulation_steps + micro_step, batches_per_epoch)
            groups = training_set.batches(seed=options.seed, epoch=epoch, rank=rank, world_size=world_size)
            batch = training_set.load(groups[index]).to(device)
            generator = generator_for(options.seed, "noise", step, micro_step, rank)
            sigma = flow.sample_sigma(
                len(batch.keys), low=expert.interval[0], high=expert.interval[1], generator=generator, **law
            )
            noise = torch.randn(batch.latents.shape, generator=generator)
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # dropout draws from the global state
            loss = training_step(expert, batch, noise.to(device), sigma.to(device))
            (loss / options.gradient_accumulation_steps).backward()
            loss_sum += loss.item() / options.gradient_accumulation_steps

        parameters = [p for p in expert.network.parameters() if p.grad is not None]
        if world_size > 1:
            for parameter in parameters:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        max_norm = options.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
        if not math.isfinite(grad_norm):
            raise InputError(
                f"step {step}: the gradient is not finite (loss {loss_sum}, clips {', '.join(batch.keys)}); lower "
                "--learning_rate, or check those clips"
            )
        expert.optimizer.step()
        expert.optimizer.zero_grad(set_to_none=True)

        # ---- what a person sees -----------------------------------------------------------------------------------
        previous = smooth_loss.get(expert.name, loss_sum)
        smooth_loss[expert.name] = 0.98 * previous + 0.02 * loss_sum
        progress.set_postfix({f"loss {name}": f"{value:.4f}" for name, value in sorted(smooth_loss.items())})
        if options.log_with:
            accelerator.log(
                {
                    f"loss/{expert.name}": loss_sum,
                    f"grad_norm/{expert.name}": grad_norm,
                    "lr": options.learning_rate * factor,
                    "seconds_per_step": time.perf_counter() - started,
                },
                step=step,
            )
        done = step + 1
        steps_per_epoch = math.ceil(batches_per_epoch / options.gradient_accumulation_steps)
        if done < max_steps and options.save_every_n_steps and done % options.save_every_n_steps == 0:
            save(f"-step{done:08d}", done)
        elif done < max_steps and options.save_every_n_epochs and done % (options.save_every_n_epochs * steps_per_epoch) == 0:
            save(f"-{done // steps_per_epoch:06d}", done)

    save("", max_steps)
    accelerator.end_training()


# ---- the choices that the recipe names ----------------------------------------------------------------------------


def model_files(options: Options, table: dict[str, str]) -> ModelFiles:
    """The files of the experts that are trained; VAE and text encoder only where they are named."""
    flags = {key: getattr(options, key) for key in ("task", "ckpt_dir", "dit", "dit_high_noise", "vae", "t5")}
    files = resolve_model(flags, table=table, table_source=options.dataset_config, needs=())
    names = trained_experts(options, get_variant(files.task))
    needs = [{"low": "dit", "high": "dit_high_noise"}[name] for name in names]
    return resolve_model(flags, table=table, table_source=options.dataset_config, needs=needs)


def trained_experts(options: Options, variant: WanVariant) -> tuple[Expert, ...]:
    if options.experts == "both":
        return variant.experts
    if options.experts not in variant.experts:
        raise InputError(f"--experts {options.experts}: {variant.name} has one expert, called low")
    return (options.experts,)


def boundary_of(options: Options, variant: WanVariant) -> float | None:
    if options.timestep_boundary is None:
        return variant.boundary
    if variant.boundary is None:
        raise InputError(f"--timestep_boundary: {variant.name} has one expert and no boundary")
    boundary = options.timestep_boundary / 1000 if options.timestep_boundary > 1 else options.timestep_boundary
    if not 0 < boundary < 1:
        raise InputError(f"--timestep_boundary: expected a number between 0 and 1 (or 1000), found {options.timestep_boundary}")
    return boundary


def refuse_what_cannot_train(options: Options) -> None:
    if options.sage_attn:
        raise InputError("--sage_attn: SageAttention computes no gradient; train with --sdpa or --flash_attn")
    if options.sdpa and options.flash_attn:
        raise InputError("--sdpa --flash_attn: give one of them")
    for name in ("network_dim", "gradient_accumulation_steps", "max_train_steps", "max_train_epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}: expected at least 1, found {value}")


def import_network_module(name: str):
    """The module behind --network_module; only the project's own follow its protocol."""
    known = ("networks.lora", "networks.lora_camera")
    if name not in known:
        from core.errors import nearest

        raise InputError(f"--network_module: expected {' or '.join(known)}, found {name!r}{nearest(name, known)}")
    return import_module(name)


def create_optimizer(options: Options, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW or AdamW8bit with the values of --optimizer_args."""
    import ast

    values = {}
    for key, text in key_values(options.optimizer_args, "--optimizer_args").items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise InputError(f"--optimizer_args: expected {key}=number, found {key}={text}") from None
    if options.optimizer_type.lower() == "adamw":
        optimizer_class = torch.optim.AdamW
    elif options.optimizer_type.lower() == "adamw8bit":
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    else:
        raise InputError(f"--optimizer_type: expected AdamW8bit or AdamW, found {options.optimizer_type!r}")
    try:
        return optimizer_class(groups, lr=options.learning_rate, **values)
    except TypeError as error:
        raise InputError(f"--optimizer_args: {options.optimizer_type} does not take them ({error})") from None


def draw_expert(experts: list[TrainedExpert], *, seed: int, step: int) -> TrainedExpert:
    """The expert of one step, the same on every process, with the probability of its interval under the law."""
    weights = torch.tensor([expert.probability for expert in experts])
    index = torch.multinomial(weights, 1, generator=generator_for(seed, "expert", step))
    return experts[int(index)]


def learning_rate_factor(step: int, *, kind: str, warmup_steps: int, max_steps: int) -> float:
    """What the learning rate is multiplied with at a step: a rise from 0 over the warm-up, then the schedule."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def describe_run(options: Options, files: ModelFiles, variant: WanVariant, training_set: TrainingSet) -> dict[str, str]:
    """What the weights' metadata says about the run that made them. Keys with ss_ are those of musubi-tuner."""
    clip = training_set.clips[0]
    return {
        "task": variant.name,
        "boundary": str(boundary_of(options, variant)),
        "prompt": clip.caption if len({c.caption for c in training_set.clips}) == 1 else "",
        "width": str(clip.width),
        "height": str(clip.height),
        "num_frames": str(clip.num_frames),
        "fps": str(variant.fps if clip.fps is None else clip.fps),
        "ss_base_model_version": f"wan_{variant.name}",
        "ss_sd_model_name": files.dit.name if files.dit else "",
        "ss_learning_rate": str(options.learning_rate),
        "ss_optimizer": options.optimizer_type,
        "ss_timestep_sampling": options.timestep_sampling,
        "ss_seed": str(options.seed),
        "ss_num_train_items": str(len(training_set.clips)),
        "options": json.dumps(asdict(options), default=str),
    }


if __name__ == "__main__":
    run(main, OPTIONS)
