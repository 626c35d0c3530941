"""One run of the bake-off: train a mechanism by the project's own command, film the unseen paths, score the videos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from benchmarks.mechanisms.worlds import HEIGHT, WIDTH, World, stacked, test_cases
from camera.metrics import rotation_errors, translation_errors
from core.errors import InputError
from core.files import atomic_path, read_safetensors, save_safetensors
from core.model_files import ModelFiles, resolve_model
from dataset.config import read_dataset_config
from dataset.video import write_video
from evaluation.candidates import closest
from evaluation.filming import Cameras, FilmingExpert, Sampling, film_paths, to_pictures
from networks.files import load_network, network_paths
from networks.guided import Conditions
from scenes.align import PathFinder
from scenes.render import Renderer
from scenes.scene import caption, make_scene
from wan_ext.condition import first_frame_condition, first_frame_video
from wan_ext.configs import WanVariant, get_variant
from wan_ext.loading import load_dit
from wan_ext.text_encoder import load_text_encoder
from wan_ext.vae import WanVAE, load_vae
from wan_ext.whole_vae import WholeClip

ROOT = Path(__file__).resolve().parents[2]
BASE = "base"
"""No mechanism and no training: the embedded model as it ships."""
NONE = "none"
"""The mechanism that is none: a LoRA alone, trained on the same clips for the same steps."""
SHARE_OF_RATE = {"plucker": 0.1}
"""Of the camera's learning rate, where the whole of it does not train: the loss of the convolutions diverges."""
FILMED_AT_ONCE = 10


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all runs have in common."""

    steps: int
    rank: int
    learning_rate: float
    camera_learning_rate: float
    shift: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A mechanism trained with one seed in one world."""

    world: World
    mechanism: str
    seed: int
    training: Training
    work: Path
    """Folder of the whole bake-off."""

    @property
    def folder(self) -> Path:
        return self.work / "runs" / f"{self.world.name}_{self.mechanism}_{self.seed}_{self.training.steps}"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    @property
    def dataset(self) -> Path:
        return self.work / self.world.name / "dataset.toml"


def prepare(world: World, work: Path) -> None:
    """Film a world's training clips and cache them; what stands is left alone."""
    folder = work / world.name
    command(
        "tools/render_scenes.py",
        *("--output", folder, "--first_scene", world.first_scene, "--scenes", world.scenes),
        *("--clips_per_scene", world.clips_per_scene, "--move", *world.moves, "--task", world.task),
        *("--pose_frame", world.pose_frame, "--batch_size", 4, "--supersample", 1),
    )
    for cache in ("latents", "text", "camera"):
        command(f"cache_{cache}.py", "--dataset_config", folder / "dataset.toml", "--skip_existing")
    candidates_of(world, work)


def candidates_of(world: World, work: Path) -> Tensor:
    """Renderings of every test video's eight paths, its own first: uint8 [videos, 8, T, H, W, 3]. Made once."""
    file = work / world.name / "candidates.safetensors"
    if not file.exists():
        videos: dict[int, Tensor] = {}  # by path: test videos of one room share their paths
        cases = []
        for case in tqdm(test_cases(world), desc="candidates", unit="video"):
            renderer = Renderer(make_scene(case.scene), HEIGHT)
            for path in (case.asked, *case.others):
                if id(path) not in videos:
                    videos[id(path)] = renderer(path)
            cases.append(torch.stack([videos[id(path)] for path in (case.asked, *case.others)]))
        save_safetensors({"candidates": torch.stack(cases)}, file, {})
    return read_safetensors(file)[0]["candidates"]


def train_and_score(run: Run) -> None:
    """Train, film, score and write the result; a run that has its result is not touched."""
    if run.result_file.exists():
        return
    torch.set_num_threads(1)
    started = time.perf_counter()
    if run.mechanism != BASE:
        train(run)
    trained = time.perf_counter()
    scores = score(run)
    with atomic_path(run.result_file) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "world": run.world.name,
                    "mechanism": run.mechanism,
                    "seed": run.seed,
                    "training": asdict(run.training),
                    "seconds_training": round(trained - started, 1),
                    "seconds_scoring": round(time.perf_counter() - trained, 1),
                    **scores,
                },
                indent=1,
            )
        )


def train(run: Run) -> None:
    """Both experts, by `train_network.py` on one thread."""
    if all(path.exists() for path in weight_files(run)):
        return
    training = run.training
    network: tuple[object, ...] = ("--network_module", "networks.lora")
    if run.mechanism != NONE:
        network = ("--network_module", "networks.lora_camera", "--network_args", f"injection={run.mechanism}")
        network += (f"camera_lr={training.camera_learning_rate * SHARE_OF_RATE.get(run.mechanism, 1.0):g}",)
    command(
        "train_network.py",
        *("--dataset_config", run.dataset, *network),
        *("--network_dim", training.rank, "--network_alpha", training.rank),
        *("--learning_rate", training.learning_rate, "--lr_scheduler", "cosine", "--lr_warmup_steps", 20),
        *("--optimizer_type", "AdamW", "--max_train_steps", training.steps),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", training.shift),
        *("--mixed_precision", "no", "--device", "cpu", "--seed", run.seed),
        *("--output_dir", run.folder, "--output_name", "room"),
        log=run.folder / "train.log",
    )


def weight_files(run: Run) -> list[Path]:
    """The LoRA file of each expert."""
    return [network_paths(run.folder, "room", run.world.task, expert)[0] for expert in ("high", "low")]


@torch.no_grad()
def score(run: Run) -> dict[str, object]:
    """Figures of the videos along unseen paths: top-1 of 8, errors of the recovered cameras."""
    variant, files = get_variant(run.world.task), model_files(run)
    experts = {}
    for expert, path in zip(("high", "low"), weight_files(run), strict=True):
        dit = load_dit(files.dit_high_noise if expert == "high" else files.dit, variant, dtype=torch.float32)
        network = None if run.mechanism == BASE else load_network(dit, path, variant=variant, expert=expert)
        experts[expert] = FilmingExpert(dit=dit, network=network)
    vae = load_vae(files.vae, variant.vae)
    contexts = context_of_scenes(run.world, variant, files)
    cases = test_cases(run.world)
    finders: dict[int, PathFinder] = {}
    videos = []
    for start in range(0, len(cases), FILMED_AT_ONCE):
        batch = cases[start : start + FILMED_AT_ONCE]
        c2w, K = stacked([case.asked for case in batch])
        if run.world.pose_frame == "first":
            c2w = torch.stack([case.asked.relative_to_first().c2w for case in batch])
        latents = film_paths(
            experts,
            variant=variant,
            cameras=Cameras(c2w=c2w, K=K, height=HEIGHT, width=WIDTH),
            conditions=Conditions(
                prompt=torch.stack([contexts[case.scene] for case in batch]),
                negative_prompt=contexts[None][None],
                condition=first_frames(batch, vae) if variant.image_conditioning == "channels" else None,
            ),
            seeds=[run.seed * 1000 + start + place for place in range(len(batch))],
            sampling=Sampling(steps=variant.steps, shift=variant.shift),
        )
        videos += to_pictures(WholeClip(vae.network).decode(latents))
    rendered = candidates_of(run.world, run.work)
    scored = []
    order = sorted(range(len(cases)), key=lambda number: cases[number].scene)  # a bank of views serves one room
    for number in order:
        case, video = cases[number], videos[number]
        if case.scene not in finders:
            finders.clear()
            finders[case.scene] = PathFinder(Renderer(make_scene(case.scene), HEIGHT))
        finder = finders[case.scene]
        candidates = rendered[number]
        start_pose = case.asked.c2w[0] if run.world.pose_frame == "first" else None
        found = {
            "video": number,
            "scene": case.scene,
            "top1": closest(video, candidates) == 0,
            "psnr": psnr(video, candidates[0]),
        }
        if (number + number // len(run.world.test_scenes)) % run.world.recovered == 0:  # in every room
            c2w, error = finder.recover(video, K=case.asked.K[0], start=start_pose)
            found |= camera_errors(c2w, case.asked.c2w) | {"alignment_error": error}
        scored.append(found)
    write_video(torch.cat(videos[:8], dim=2), run.folder / "first_eight.mp4", fps=8)
    return {"parameters": parameters(run), "videos": scored}


def camera_errors(recovered: Tensor, asked: Tensor) -> dict[str, float]:
    """Angle and distance between two paths in the same coordinates, [T, 4, 4], means over the frames."""
    return {
        "rotation_degrees": float(rotation_errors(recovered, asked).rad2deg().mean()),
        "position_metres": float(translation_errors(recovered, asked).mean()),
    }


def first_frames(batch: list, vae: WanVAE) -> Tensor:
    """Condition channels of the asked paths' first views, [B, 20, F, h, w]."""
    found = []
    for case in batch:
        view = Renderer(make_scene(case.scene), HEIGHT)(case.asked.frames([0]))[0]  # uint8 [H, W, 3]
        frame = rearrange(view.float() / 127.5 - 1, "h w c -> c h w")
        known = first_frame_video(frame, len(case.asked))[None]
        found.append(first_frame_condition(WholeClip(vae.network).encode(known)[0]))
    return torch.stack(found)


def context_of_scenes(world: World, variant: WanVariant, files: ModelFiles) -> dict[int | None, Tensor]:
    """Text features of each test room's caption, and of no caption under None, all padded to [text_len, D]."""
    encoder = load_text_encoder(
        files.t5, variant.text_encoder, tokenizer=files.tokenizer, text_len=variant.dit.text_len, dtype=torch.float32
    )
    names: list[int | None] = [None, *sorted(set(world.test_scenes))]
    texts = ["" if scene is None else caption(make_scene(scene)) for scene in names]
    features = encoder.encode(texts)
    return {
        name: torch.nn.functional.pad(feature.float(), (0, 0, 0, variant.dit.text_len - len(feature)))
        for name, feature in zip(names, features, strict=True)
    }


def model_files(run: Run) -> ModelFiles:
    """The base model that the data set names."""
    return resolve_model(
        {},
        table=read_dataset_config(run.dataset).model,
        table_source=run.dataset,
        needs=("dit", "dit_high_noise", "vae", "t5"),
    )


def parameters(run: Run) -> int:
    """Trained numbers beside the LoRA, of one expert: what the camera costs."""
    camera_file = network_paths(run.folder, "room", run.world.task, "high")[1]
    if not camera_file.exists():
        return 0
    return sum(tensor.numel() for tensor in read_safetensors(camera_file)[0].values())


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; both uint8."""
    error = (video.float() - reference.float()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def command(script: str, *arguments: object, log: Path | None = None) -> None:
    """Run one of the project's commands on one thread; with a log, it prints there.

    Raises:
        InputError: it failed; the message names the log.
    """
    words = [sys.executable, str(ROOT / script), *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if log is None:
        code = subprocess.run(words, cwd=ROOT, env=environment).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            code = subprocess.run(words, cwd=ROOT, env=environment, stdout=stream, stderr=stream).returncode
    if code:
        raise InputError(f"{script} ended with code {code}" + (f"; see {log}" if log else ""))
