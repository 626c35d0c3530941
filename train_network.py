"""Step 4: fit a LoRA, and a camera encoder beside it, to the cached clips by flow matching.

    accelerate launch train_network.py --dataset_config x.toml --network_module networks.lora_camera \\
        --network_dim 32 --network_alpha 32 --learning_rate 1e-4 \\
        --max_train_epochs 16 --fp8_scaled --gradient_checkpointing --blocks_to_swap 38 \\
        --output_dir out --output_name my_camera
    python train_network.py ...      the same in one process

A mixture of experts gets one adapter per expert, each with its own optimizer. A step belongs to one expert, drawn with
the probability that its noise interval has under the sampling law. Everything random is a function of
(seed, step, process, purpose), so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from core.options import key_values, parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    # ---- data and model -------------------------------------------------------------------------------------------
    dataset_config: Path
    """Dataset TOML; its [model] table may name the task and the model's files."""
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
    """To check that the latent caches were written with this VAE; loaded only to validate the camera."""
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
    quantize: str | None = None
    """Keep the frozen linears of the blocks in 8 bits by this recipe: fp8, int8, int8_rotated, int8_w8a8,
    int8_w8a8_transposed, fp8_w8a8 or fp8_w8a8_transposed (docs/quantization.md). A file of tools/quantize.py brings its
    own recipe."""
    vram: str | None = None
    """Device memory to stay within, such as 24GB. A plan is made, printed and kept: which blocks stay on the device,
    how they compute, what waits in host memory. Default: what is free on the GPU; on a CPU, no plan."""
    ram: str | None = None
    """Host memory to stay within, such as 64GB. Default: this machine's."""
    gpu: str | None = None
    """Card whose rates the plan reckons with: 3090, 4060ti, 4090, 4090-x8, 5090, h100 or h200.
    Default: the one here."""
    on_oom: Literal["stop", "replan"] = "stop"
    """When device memory runs out all the same: save the state and stop, or go on by the planner's next smaller
    plan."""
    blocks_to_swap: int | None = None
    """Keep this many blocks of each expert in host memory and copy each to the device when it is needed.
    Default: the plan's choice; without a plan, none."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs and recompute the rest in backward. Under a plan, and with --blocks_to_swap, this is
    always so."""
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
    train_control_adapter: bool = False
    """Wan-Fun: also train the camera adapter that the model has of its own, which is frozen otherwise."""
    network_dim: int = 16
    """Rank of the LoRA."""
    network_alpha: float = 1.0
    """The LoRA's output is scaled by alpha / rank."""
    network_dropout: float = 0.0
    """Share of the rank that a training step leaves out."""
    network_args: tuple[str, ...] = ()
    """key=value ...: injection=..., camera_rank=..., camera_lr=..., include_patterns=... (docs/mechanisms.md)"""

    # ---- optimisation ---------------------------------------------------------------------------------------------
    optimizer_type: str = "AdamW8bit"
    """AdamW, AdamW8bit, PagedAdamW8bit, Lion8bit, Adafactor, Prodigy, AdamWScheduleFree, RAdamScheduleFree,
    SGDScheduleFree, or any module.Class (docs/training.md)."""
    optimizer_args: tuple[str, ...] = ()
    """key=value ...: weight_decay=0.01 betas=0.9,0.999 eps=1e-8"""
    learning_rate: float = 1e-4
    """Of the LoRA, and of the camera encoder unless --network_args camera_lr says otherwise. Prodigy: 1."""
    lr_scheduler: str = "constant"
    """constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt,
    cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay or rex."""
    lr_warmup_steps: float = 0
    """Steps over which the learning rate rises from zero, or below 1 the share of all steps."""
    lr_decay_steps: float | None = None
    """Steps of the fall at the end, or their share; of warmup_stable_decay, which needs it."""
    lr_scheduler_num_cycles: int | None = None
    """Waves; of cosine_with_restarts, the cosines with min_lr, warmup_stable_decay. Default: 1."""
    lr_scheduler_power: float | None = None
    """Of polynomial. Default: 1."""
    lr_scheduler_min_lr_ratio: float | None = None
    """Share of the learning rate left at the end; the cosines with min_lr need it. Default elsewhere: 0."""
    lr_scheduler_timescale: int | None = None
    """Of inverse_sqrt. Default: the warm-up, or 10000."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never. A step whose norm is no number is skipped."""
    ema_decay: float | None = None
    """Also keep a moving average of the weights with this decay, such as 0.999: saved as OUTPUT_NAME-ema."""
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
    """Of `logit_normal`, the law or the scheme."""
    logit_std: float = 1.0
    """Of `logit_normal`, the law or the scheme."""
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = "none"
    """Which noise levels count how much: cosmap and sigma_sqrt weight the loss, logit_normal and mode the draws of the
    law `sigma`."""
    mode_scale: float | None = None
    """Of the scheme `mode`. Default: 1.29."""

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

    # ---- does it follow the camera? -------------------------------------------------------------------------------
    validate_camera_every: int | None = None
    """Every n steps and at the end: film held-out paths, recover their cameras, log the errors (docs/measuring.md)."""
    validation_config: Path | None = None
    """Dataset TOML of held-out clips with all their caches."""
    validate_camera_estimator: Literal["sfm", "render"] = "sfm"
    """sfm: structure from motion. render: alignment with the room, for clips of tools/render_scenes.py."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from accelerate import Accelerator
from tqdm import tqdm

from core.errors import InputError
from core.files import fingerprint
from core.model_files import ModelFiles
from core.randomness import generator_for
from dataset.batches import TrainingSet
from dataset.clips import list_clips
from dataset.config import read_dataset_config
from dataset.prefetch import run_ahead
from evaluation.filming import FilmingExpert
from evaluation.validation import CameraValidation
from memory.plan import GB, next_smaller
from memory.plan_table import plan_table
from networks.checkpoint import load_state, save_state, state_part
from networks.files import import_network_module, save_network
from networks.last_step import LastStep
from networks.optimization import create_optimizer, optimizer_name, weights_in_use
from networks.schedules import make_schedule
from training.ema import AdapterEMA
from training.ending import ending_early
from training.guard import BadSteps
from training.held_out import held_out_clips, validate
from training.memory_plan import plan_of_run
from training.model import settle_model, trained_experts
from training.step import TrainedExpert, accumulate_gradients, draw_expert
from training.weighting import density_of
from wan_ext import flow
from wan_ext.configs import Expert, WanVariant
from wan_ext.dit import WanDiT
from wan_ext.experts import expert_interval
from wan_ext.loading import chosen_recipe, load_dit
from wan_ext.placement import Placement, require_plan, stored_recipe
from wan_ext.vae import load_vae

SAVE_DTYPES = {"float": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(options: Options) -> None:
    # ---- configuration --------------------------------------------------------------------------------------------
    require_sensible(options)
    config = read_dataset_config(options.dataset_config)
    files, variant = settle_model(
        {name: getattr(options, name) for name in ("task", "ckpt_dir", "dit", "dit_high_noise", "vae", "t5")},
        table=config.model,
        table_source=options.dataset_config,
        experts=options.experts,
        timestep_boundary=options.timestep_boundary,
        filming=options.validate_camera_every is not None,
    )
    network_module = import_network_module(options.network_module)
    law = {
        "law": options.timestep_sampling,
        "shift": variant.shift if options.discrete_flow_shift is None else options.discrete_flow_shift,
        "sigmoid_scale": options.sigmoid_scale,
        "logit_mean": options.logit_mean,
        "logit_std": options.logit_std,
        **density_of(
            options.weighting_scheme,
            timestep_sampling=options.timestep_sampling,
            mode_scale=options.mode_scale,
        ),
    }
    accelerator = Accelerator(
        cpu=options.device == "cpu",
        log_with=options.log_with,
        project_dir=options.logging_dir if options.log_with else None,
    )
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes

    # ---- data: every cache is verified before anything large is loaded ----------------------------------------------
    training_set = TrainingSet(
        list_clips(config, spatial_stride=variant.spatial_stride, temporal_stride=variant.vae.stride[0]),
        need_camera=network_module.NEEDS_CAMERA,
        vae=fingerprint(files.vae) if files.vae else None,
        text_encoder=fingerprint(files.t5) if files.t5 else None,
        latent_channels=variant.vae.z_dim,
        context_width=variant.dit.text_dim,
        condition_channels=variant.dit.condition_channels,
        image_context=variant.image_encoder is not None,
    )
    held_out = held_out_clips(options.validation_config, training_set, variant) if options.validation_config else []

    batches_per_epoch = len(training_set.batches(seed=options.seed, epoch=0, rank=rank, world_size=world_size))
    steps_per_epoch = math.ceil(batches_per_epoch / options.gradient_accumulation_steps)
    max_steps = options.max_train_steps
    if options.max_train_epochs is not None:
        max_steps = options.max_train_epochs * steps_per_epoch
    schedule = make_schedule(
        options.lr_scheduler,
        max_steps=max_steps,
        warmup_steps=options.lr_warmup_steps,
        decay_steps=options.lr_decay_steps,
        num_cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
        min_lr_ratio=options.lr_scheduler_min_lr_ratio,
        timescale=options.lr_scheduler_timescale,
    )

    # ---- memory: a plan, before anything large is loaded ----------------------------------------------------------
    names = trained_experts(variant, options.experts)
    checkpoints = [files.dit_high_noise if name == "high" else files.dit for name in names]
    recipe = chosen_recipe(options.quantize, fp8=options.fp8_base or options.fp8_scaled)
    recipe, from_file = stored_recipe(checkpoints, recipe, device=device)
    plan = None
    if device.type == "cuda" or options.vram is not None:
        plan, note = plan_of_run(
            variant,
            training_set.clips,
            experts=names,
            recipe=recipe,
            from_file=from_file,
            network_module=network_module,
            network_args=network_arguments(options),
            network_dim=options.network_dim,
            pose_frame=training_set.pose_frame,
            bf16=options.mixed_precision == "bf16",
            optimizer=optimizer_name(options.optimizer_type),
            average=options.ema_decay is not None,
            blocks_to_swap=options.blocks_to_swap,
            vram=options.vram,
            ram=options.ram,
            gpu=options.gpu,
        )
        accelerator.print(plan_table(plan) + (f"\n  note: {note}" if note else ""))
    else:
        require_plan(ram=options.ram, gpu=options.gpu, on_oom=None if options.on_oom == "stop" else options.on_oom)
    placement = Placement(
        device,
        plan=plan,
        blocks_to_swap=options.blocks_to_swap or 0,
        checkpoint=options.gradient_checkpointing,
    )

    # ---- experts: frozen transformer, adapter, optimizer ----------------------------------------------------------
    experts = []
    for name, path in zip(names, checkpoints, strict=True):
        dit = load_base(options, path, variant, placement.load_device)
        network = network_module.create_network(
            dit,
            variant=variant,
            expert=name,
            rank=options.network_dim,
            alpha=options.network_alpha,
            dropout=options.network_dropout,
            network_args=network_arguments(options),
            pose_frame=training_set.pose_frame,
            scale_rule=training_set.scale_rule,
            generator=generator_for(options.seed, "network", name),
        )
        network.to(device).train()
        run_blocks = placement.place(dit)
        groups = network.parameter_groups(options.learning_rate)
        low, high = expert_interval(variant, name)
        experts.append(
            TrainedExpert(
                name=name,
                dit=dit,
                network=network,
                run_blocks=run_blocks,
                optimizer=create_optimizer(
                    options.optimizer_type,
                    groups,
                    learning_rate=options.learning_rate,
                    optimizer_args=key_values(options.optimizer_args, "--optimizer_args"),
                ),
                learning_rates=tuple(group["lr"] for group in groups),
                interval=(low, high),
                probability=flow.interval_probability(low=low, high=high, **law),
                clean_first_frame=variant.image_conditioning == "channels_and_first_frame",
            )
        )
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        accelerator.print(f"{name}-noise expert: sigma {low:g} to {high:g}, {num_parameters:,} trained parameters")

    if network_module.NEEDS_CAMERA and not any(expert.network.hears_camera for expert in experts):
        names = " and ".join(expert.name for expert in experts)
        raise InputError(
            f"network argument camera_experts: expected an expert that is trained ({names}), found only the other one"
        )

    # ---- where to begin -------------------------------------------------------------------------------------------
    networks = {expert.name: expert.network for expert in experts}
    optimizers = {expert.name: expert.optimizer for expert in experts}
    emas = {}
    if options.ema_decay is not None:
        emas = {expert.name: AdapterEMA(expert.network, decay=options.ema_decay) for expert in experts}
    averages = {name: ema.state() for name, ema in emas.items()}
    first_step = 0
    if options.resume is not None:
        first_step = load_state(options.resume, networks=networks, optimizers=optimizers, averages=averages)
        accelerator.print(f"resumed {options.resume} at step {first_step}")
    if options.log_with:
        accelerator.init_trackers(options.output_name)
    run_metadata = describe_run(options, files, variant, training_set)
    config_of_run = json.loads(run_metadata["ss_training_options"])

    def save(suffix: str, step: int, *, with_state: bool = options.save_state) -> None:
        if not accelerator.is_main_process:
            return
        name = options.output_name + suffix
        for expert in experts:
            metadata = run_metadata | {"ss_steps": str(step), "ss_epoch": str(step // steps_per_epoch)}
            kinds = [(name, weights_in_use(expert.optimizer))]
            if expert.name in emas:
                kinds.append((f"{name}-ema", emas[expert.name].in_use()))
            for title, in_use in kinds:
                with in_use:
                    paths = save_network(
                        expert.network,
                        options.output_dir,
                        title,
                        run_metadata=metadata,
                        dtype=SAVE_DTYPES[options.save_precision],
                    )
                for path in paths:
                    tqdm.write(f"saved {path}")
        if with_state:
            folder = options.output_dir / f"{name}-state"
            parts = {e.name: state_part(e.network, e.optimizer, averages.get(e.name)) for e in experts}
            save_state(folder, parts, step=step, config=config_of_run)
            tqdm.write(f"saved {folder}")

    def make_room(step: int) -> None:
        """Device memory ran out in a step: place everything by a smaller plan, or save and stop."""
        if placement.plan is None:
            raise InputError(f"step {step}: device memory ran out; give --vram, and the run is planned to fit")
        needed = placement.plan.vram_bytes / GB
        try:
            smaller = next_smaller(placement.plan).vram_bytes / GB
            advice = f"--vram {smaller:.2f}GB makes a smaller plan, --on_oom replan goes on by itself"
        except InputError as none:
            smaller, advice = None, str(none)
        if options.on_oom == "replan" and smaller is not None:
            placement.shrink()
            again = f"{smaller:.1f} GB instead of {needed:.1f}"
            tqdm.write(f"step {step}: device memory ran out; the step is done again by a plan of {again}")
            return
        save("-oom", step, with_state=True)
        state = options.output_dir / f"{options.output_name}-oom-state"
        raise InputError(f"step {step}: device memory ran out; go on with --resume {state}; {advice}")

    if held_out:
        filming = film_with(options, files, variant, experts, placement)
        validation = CameraValidation(
            held_out,
            variant=variant,
            vae=load_vae(files.vae, variant.vae),
            estimator=options.validate_camera_estimator,
            folder=options.output_dir / "validation",
            seed=options.seed,
            device=device,
        )

    # ---- the loop -------------------------------------------------------------------------------------------------
    order = training_set.in_order(
        seed=options.seed,
        first=first_step * options.gradient_accumulation_steps,
        count=(max_steps - first_step) * options.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
    )
    # Two batches are read while a GPU computes. On a CPU a second thread that uses torch leaves the first one core.
    data = run_ahead([lambda: order], threads=1, depth=2) if device.type == "cuda" else order
    smooth_loss: dict[str, float] = {}
    progress = tqdm(
        range(first_step, max_steps),
        initial=first_step,
        total=max_steps,
        desc="train",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of steps, not of loading
    last = LastStep(networks, optimizers, step=first_step, averages=averages)
    bad_steps = BadSteps()
    interrupted = options.output_dir / f"{options.output_name}-interrupted-state"
    with ending_early(last, interrupted, config=config_of_run, saves=accelerator.is_main_process):
        for step in progress:
            started = time.perf_counter()
            expert = draw_expert(experts, seed=options.seed, step=step)
            for group, learning_rate in zip(expert.optimizer.param_groups, expert.learning_rates, strict=True):
                group["lr"] = learning_rate * schedule.factor(step)

            batches = [next(data) for _ in range(options.gradient_accumulation_steps)]
            mean_loss = None
            while mean_loss is None:
                with suppress(torch.OutOfMemoryError):  # which goes with all that the step had made until then
                    mean_loss = accumulate_gradients(
                        expert,
                        batches,
                        seed=options.seed,
                        step=step,
                        rank=rank,
                        law=law,
                        weighting=options.weighting_scheme,
                        device=device,
                    )
                if mean_loss is None:
                    expert.optimizer.zero_grad(set_to_none=True)
                    make_room(step)

            parameters = [parameter for parameter in expert.network.parameters() if parameter.grad is not None]
            if world_size > 1:
                for parameter in parameters:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf).item()
            last.settle()
            if math.isfinite(grad_norm):
                expert.optimizer.step()
                if expert.name in emas:
                    emas[expert.name].update()
                bad_steps.good()
            else:
                clips = [key for batch in batches for key in batch.keys]
                tqdm.write(bad_steps.bad(step, expert=expert.name, loss=mean_loss, grad_norm=grad_norm, clips=clips))
            expert.optimizer.zero_grad(set_to_none=True)
            last.keep(expert.name, step=step + 1)
            if bad_steps.too_many is not None:
                save("-bad", step + 1, with_state=True)
                raise InputError(f"{bad_steps.too_many}; {options.output_name}-bad-state is from before them")

            # ---- what a person sees and keeps ---------------------------------------------------------------------
            if expert.name not in smooth_loss and placement.plan is not None and device.type == "cuda":
                measured = torch.cuda.max_memory_allocated(device) / GB
                tqdm.write(
                    f"memory of tensors: planned {placement.plan.tensor_bytes / GB:.2f} GB, measured {measured:.2f} GB"
                )
            if math.isfinite(mean_loss):
                smooth_loss[expert.name] = 0.98 * smooth_loss.get(expert.name, mean_loss) + 0.02 * mean_loss
            progress.set_postfix({f"loss {name}": f"{value:.4f}" for name, value in sorted(smooth_loss.items())})
            if options.log_with:
                curves = {f"loss/{expert.name}": mean_loss, f"grad_norm/{expert.name}": grad_norm}
                curves["skipped_steps"] = bad_steps.count
                for group in expert.optimizer.param_groups:
                    curves[f"lr/{group['name']}"] = group["lr"]
                if device.type == "cuda":
                    curves["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / GB
                accelerator.log(curves | {"seconds_per_step": time.perf_counter() - started}, step=step)
            done = step + 1
            if held_out and accelerator.is_main_process:
                if done % options.validate_camera_every == 0 or done == max_steps:
                    with ExitStack() as looking:
                        for optimizer in optimizers.values():
                            looking.enter_context(weights_in_use(optimizer))
                        accelerator.log(validate(validation, filming, step=done), step=step)
            if done < max_steps and options.save_every_n_steps and done % options.save_every_n_steps == 0:
                save(f"-step{done:08d}", done)
            elif done < max_steps and options.save_every_n_epochs:
                epochs, rest = divmod(done, steps_per_epoch)
                if rest == 0 and epochs % options.save_every_n_epochs == 0:
                    save(f"-{epochs:06d}", done)
        save("", max_steps)
    accelerator.end_training()


# ---- what the recipe names ----------------------------------------------------------------------------------------


def require_sensible(options: Options) -> None:
    """Refuse numbers and combinations that cannot train, before anything is read."""
    if options.sage_attn:
        raise InputError("--sage_attn: SageAttention computes no gradient; train with --sdpa or --flash_attn")
    if options.sdpa and options.flash_attn:
        raise InputError("--sdpa --flash_attn: expected one attention, found two")
    for name in (
        *("gradient_accumulation_steps", "max_train_steps", "max_train_epochs"),
        *("save_every_n_steps", "save_every_n_epochs", "validate_camera_every"),
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}: expected at least 1, found {value}")
    if (options.validate_camera_every is None) != (options.validation_config is None):
        raise InputError("--validate_camera_every --validation_config: expected both or none, found one")


def network_arguments(options: Options) -> dict[str, str]:
    """--network_args by name, with --train_control_adapter among them."""
    given = key_values(options.network_args, "--network_args")
    return given | ({"train_control_adapter": "yes"} if options.train_control_adapter else {})


def load_base(options: Options, path: Path, variant: WanVariant, device: torch.device) -> WanDiT:
    """The frozen transformer of one expert."""
    return load_dit(
        path,
        variant,
        dtype=torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32,
        recipe=chosen_recipe(options.quantize, fp8=options.fp8_base or options.fp8_scaled),
        device=device,
        attention_backend="flash" if options.flash_attn else "sdpa",
    )


def film_with(
    options: Options, files: ModelFiles, variant: WanVariant, experts: list[TrainedExpert], placement: Placement
) -> dict[Expert, FilmingExpert]:
    """Every expert of the task as validation films with it: one that is not trained runs as the base does."""
    filming = {e.name: FilmingExpert(dit=e.dit, network=e.network, run_blocks=e.run_blocks) for e in experts}
    for name in variant.experts:
        if name not in filming:
            path = files.dit_high_noise if name == "high" else files.dit
            dit = load_base(options, path, variant, placement.load_device).requires_grad_(False)
            filming[name] = FilmingExpert(dit=dit, run_blocks=placement.place(dit))
    return filming


def describe_run(options: Options, files: ModelFiles, variant: WanVariant, training_set: TrainingSet) -> dict[str, str]:
    """What the weights' metadata says of the run that made them. Keys with ss_ are those of musubi-tuner."""
    clip = training_set.clips[0]
    captions = {clip.caption for clip in training_set.clips}
    return {
        "boundary": str(variant.boundary),
        "prompt": clip.caption if len(captions) == 1 else "",
        "width": str(clip.width),
        "height": str(clip.height),
        "num_frames": str(clip.num_frames),
        "fps": str(round(clip.fps or variant.fps)),
        "ss_sd_model_name": ", ".join(path.name for path in (files.dit_high_noise, files.dit) if path),
        "ss_learning_rate": str(options.learning_rate),
        "ss_optimizer": options.optimizer_type,
        "ss_timestep_sampling": options.timestep_sampling,
        "ss_seed": str(options.seed),
        "ss_num_train_items": str(len(training_set.clips)),
        "ss_training_options": json.dumps(asdict(options), default=str),
    }


if __name__ == "__main__":
    run(main, OPTIONS)
