"""Film procedural rooms along exactly known camera paths: videos, camera files, captions, and the TOML that names them.

    python tools/render_scenes.py --output rendered                                        8 rooms, 2 clips each, 96x64
    python tools/render_scenes.py --output sfm --size 320 192 --frames 25 --supersample 3  for structure from motion

Writes OUTPUT/videos/0000.mp4 and 0000.txt (caption), OUTPUT/cameras/0000.txt (10 numbers a frame), OUTPUT/dataset.toml
(one room: cameras in its own coordinates; several: relative to the first frame) and OUTPUT/scenes.json, from which
every clip can be rendered again. The same flags go on after an interruption.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run

Move = Literal["orbit", "pan", "truck", "dolly", "pedestal", "wander"]
MOVES: tuple[Move, ...] = get_args(Move)


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    """Folder to write."""
    scenes: int = 8
    """Number of rooms."""
    clips_per_scene: int = 2
    """Clips filmed in each room, along different paths."""
    size: tuple[int, int] = (96, 64)
    """Width and height in pixels, both even."""
    frames: int = 17
    """Frames of a clip."""
    fps: float = 8.0
    """Frames per second."""
    first_scene: int = 0
    """Seed of the first room; the others follow. The embedded model has seen rooms 1000 to 1599, none below."""
    seed: int = 0
    """Seed of the first path in each room; the others follow."""
    move: tuple[Move, ...] = MOVES
    """Kinds of camera moves; each clip is one of them."""
    supersample: int = 2
    """Samples along each side of a pixel."""
    batch_size: int = 2
    """Clips of a training batch, for the TOML."""
    task: Literal["tiny", "tiny-i2v"] = "tiny"
    """Embedded model that the TOML names: from text, or from text and a first frame."""
    pose_frame: Literal["scene", "first"] | None = None
    """Coordinates of the cameras, for the TOML; when not given: of the scene where there is one room, else first."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

from tqdm import tqdm

from camera.files.formats import write_ten
from core.errors import InputError
from core.files import atomic_path
from dataset.video import write_video
from scenes.motion import film
from scenes.render import Renderer
from scenes.scene import caption, make_scene


def main(options: Options) -> None:
    check(options)
    width, height = options.size
    clips = plan(options)
    start_folder(options.output, clips)
    write_text(options.output / "dataset.toml", dataset_toml(options))
    scene_seed = renderer = None
    for clip in tqdm(clips, desc="render", unit="clip"):
        video = options.output / "videos" / f"{clip['name']}.mp4"
        if video.exists():  # written last, so that clip is whole
            continue
        scene = make_scene(clip["scene"])
        if scene_seed != scene.seed or renderer is None:
            scene_seed, renderer = scene.seed, Renderer(scene, height)
        path = film(
            scene,
            clip["path"],
            num_frames=options.frames,
            height=height,
            width=width,
            fps=options.fps,
            move=options.move,
        )
        frames = renderer(path, supersample=options.supersample)
        write_ten(path, options.output / "cameras" / f"{clip['name']}.txt")
        write_text(video.with_suffix(".txt"), caption(scene) + "\n")
        write_video(frames, video, options.fps)


def check(options: Options) -> None:
    """Refuse numbers that make no clip."""
    for name in ("scenes", "clips_per_scene", "frames", "supersample", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected at least 1, found {getattr(options, name)}")
    if options.fps <= 0:
        raise InputError(f"--fps: expected a number above 0, found {options.fps}")
    if any(side < 16 or side % 2 for side in options.size):
        raise InputError(f"--size: expected even numbers from 16 up, found {options.size[0]} {options.size[1]}")


def plan(options: Options) -> list[dict]:
    """What scenes.json lists: for every clip its name, its seeds and all that its rendering depends on."""
    return [
        {
            "name": f"{index * options.clips_per_scene + clip:04d}",
            "scene": options.first_scene + index,
            "path": options.seed + clip,
            "size": list(options.size),
            "frames": options.frames,
            "fps": options.fps,
            "move": list(options.move),
            "supersample": options.supersample,
        }
        for index in range(options.scenes)
        for clip in range(options.clips_per_scene)
    ]


def start_folder(output: Path, clips: list[dict]) -> None:
    """Make the folder, or check that what stands in it is the same plan, perhaps unfinished.

    Raises:
        InputError: the folder holds other files.
    """
    listed, text = output / "scenes.json", json.dumps(clips, indent=1) + "\n"
    if listed.exists():
        if listed.read_text(encoding="utf-8") != text:
            raise InputError(
                f"--output {output}: expected a new folder or clips of the same flags, found clips of other flags "
                f"({listed}); choose another folder or delete it"
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: expected a new or empty folder, found other files; choose another folder")
    for name in ("videos", "cameras"):
        (output / name).mkdir(parents=True, exist_ok=True)
    write_text(listed, text)


def dataset_toml(options: Options) -> str:
    """The dataset config of all clips, for the embedded model."""
    model = relative("tiny-wan")
    experts = ""
    if options.task == "tiny-i2v":
        i2v = relative("tiny-wan-i2v")
        experts = f'dit = "{i2v}/low_noise_model"\ndit_high_noise = "{i2v}/high_noise_model"\n'
    folder = options.output.as_posix()
    width, height = (side // 16 * 16 for side in options.size)
    return f"""# {options.scenes * options.clips_per_scene} rendered clips with known cameras.
# docs/datasets.md describes every key.

[model]
task = "{options.task}"
ckpt_dir = "{model}"
{experts}
[general]
resolution = [{width}, {height}]
batch_size = {options.batch_size}

[[datasets]]
video_directory = "{folder}/videos"
camera_directory = "{folder}/cameras"
cache_directory = "{folder}/cache"
target_frames = [{(options.frames - 1) // 4 * 4 + 1}]
pose_frame = "{options.pose_frame or ("scene" if options.scenes == 1 else "first")}"
"""


def relative(asset: str) -> str:
    """A folder of assets as the TOML names it: relative to the current directory where it lies below."""
    folder = ROOT / "assets" / asset
    return (folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder).as_posix()


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main, OPTIONS)
