"""Generation as laws: N poses give N frames, another camera another video, the same seed the same video."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cache_camera
import generate
from camera.files.formats import write_ten
from camera.moves.text import make_path
from core.errors import InputError
from core.files import read_safetensors, save_safetensors
from dataset.video import read_frames
from scenes.motion import film
from scenes.scene import make_scene
from tests.commands.conftest import TINY


@pytest.fixture
def path_file(tmp_path):
    def write(seed: int, num_frames: int = 5) -> Path:
        file = tmp_path / f"path{seed}.txt"
        write_ten(film(make_scene(5), seed, num_frames=num_frames, height=32, width=48), file)
        return file

    return write


def options_for(trained: Path, save_path: Path, **options) -> generate.Options:
    defaults = {
        "ckpt_dir": TINY,
        "network_weights": (trained / "net_high_noise.safetensors", trained / "net_low_noise.safetensors"),
        "mixed_precision": "no",
        "infer_steps": 3,
        "device": "cpu",
        "save_path": save_path,
    }
    return generate.Options(**(defaults | options))


def film_with(trained, save_path, **options) -> torch.Tensor:
    generate.main(options_for(trained, save_path, **options))
    return read_frames(save_path)


def pictures_with(trained, folder, **options) -> torch.Tensor:
    """As `film_with`, without a codec between: a level more in one picture must not become a block of another video."""
    generate.main(options_for(trained, folder / "%03d.png", **options))
    return read_frames(folder)


def test_one_frame_per_pose_and_a_record_of_everything(trained_once, tmp_path, path_file, capsys):
    frames = film_with(trained_once, tmp_path / "a.mp4", camera_params=path_file(9, num_frames=7))
    assert frames.shape == (7, 32, 48, 3)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"]["prompt"] == "a room with red walls and a blue ball"
    assert record["sources"]["prompt"] == "from net_high_noise.safetensors"
    assert record["sources"]["num_frames"] == "poses of path9.txt"
    assert record["options"]["camera_params"].endswith("path9.txt")
    assert record["options"]["camera_format"] == "auto"
    assert (tmp_path / "a_sheet.png").stat().st_size > 1000
    assert "from net_high_noise.safetensors" in capsys.readouterr().out


def test_seed_and_camera_decide_the_video(trained_once, tmp_path, path_file):
    first = film_with(trained_once, tmp_path / "a.mp4", camera_params=path_file(9))
    again = film_with(trained_once, tmp_path / "b.mp4", camera_params=path_file(9))
    elsewhere = film_with(trained_once, tmp_path / "c.mp4", camera_params=path_file(10))
    other_noise = film_with(trained_once, tmp_path / "d.mp4", camera_params=path_file(9), seed=5)
    assert torch.equal(first, again)
    assert not torch.equal(first, elsewhere)
    assert not torch.equal(first, other_noise)


def test_swapped_and_resident_give_the_same_video(trained_once, tmp_path, path_file):
    resident = film_with(trained_once, tmp_path / "a.mp4", camera_params=path_file(9))
    swapped = film_with(trained_once, tmp_path / "b.mp4", camera_params=path_file(9), blocks_to_swap=6)
    assert torch.equal(resident, swapped)


@pytest.mark.parametrize("limits", [{}, {"ram": "4.02GB", "blocks_to_swap": 6}], ids=["roomy", "one_expert_at_a_time"])
def test_a_plan_is_printed_and_changes_no_picture(trained_once, tmp_path, path_file, capsys, limits):
    plain = pictures_with(trained_once, tmp_path / "plain", camera_params=path_file(9))
    capsys.readouterr()
    given = {"vram": "4GB", "ram": "16GB", "gpu": "4090"} | limits
    planned = pictures_with(trained_once, tmp_path / "planned", camera_params=path_file(9), **given)
    said = capsys.readouterr().out
    assert "device memory at the worst moment" in said and ("one expert at a time" in said) == bool(limits)
    assert (planned.int() - plain.int()).abs().max() <= 1  # sums in another order, at the edge of a level
    with pytest.raises(InputError, match=r"expected at least .* of device memory"):
        pictures_with(trained_once, tmp_path / "none", camera_params=path_file(9), **given | {"vram": "0.5GB"})


def test_frames_by_pattern_are_the_frames_of_the_video(trained_once, tmp_path, path_file):
    video = film_with(trained_once, tmp_path / "a.mp4", camera_params=path_file(9))
    generate.main(options_for(trained_once, tmp_path / "frames/%03d.png", camera_params=path_file(9)))
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == [f"{i:03d}.png" for i in range(5)]
    error = (read_frames(tmp_path / "frames").float() - video.float()).abs().mean()
    assert error < 6  # H.264 keeps half of the colour


def test_what_is_left_unused_is_said(trained_once, tmp_path, path_file, capsys):
    high = trained_once / "net_high_noise.safetensors"
    film_with(trained_once, tmp_path / "a.mp4", camera_params=path_file(9), network_weights=(high,))
    assert "low-noise expert, which runs as it is" in capsys.readouterr().out
    film_with(trained_once, tmp_path / "b.mp4")
    said = capsys.readouterr().out
    assert "camera encoder is not used" in said
    assert "runs as it is" not in said


def test_without_a_network_the_base_model_films(tmp_path):
    options = generate.Options(
        task="tiny",
        ckpt_dir=TINY,
        prompt="a room",
        video_length=5,
        video_size=(32, 48),
        infer_steps=2,
        device="cpu",
        save_path=tmp_path,
    )
    generate.main(options)
    assert len(list(tmp_path.glob("*.mp4"))) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"video_size": (30, 48)}, "multiples of 16"),
        ({"task": "t2v-1.3B"}, "trained for tiny"),
        ({"image_path": Path("x.png")}, "image_path"),
        ({"sample_solver": "unipcc"}, "unipc"),
        ({"video_length": 9}, "poses"),
        ({"timestep_boundary": 1.5}, "timestep_boundary"),
        ({"vae": Path("nothing.pth")}, "nothing.pth"),
        ({"camera_params": Path("nowhere.txt")}, "nowhere.txt"),
        ({"infer_steps": 0}, "infer_steps"),
        ({"camera_path": "orbit 60deg"}, "expected one camera path"),
        ({"camera_axes": "opengl"}, "path9.*axes"),
    ],
)
def test_what_cannot_be_generated_is_named(trained_once, tmp_path, path_file, options, named):
    options = {"camera_params": path_file(9)} | options
    with pytest.raises(InputError, match=named):
        generate.main(options_for(trained_once, tmp_path / "out" / "a.mp4", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("1 2 3 1 0 0 0 1 0", "10"),
        ("1 2 3 1 0 0 0 1 0 60 5", "10"),
        ("1 2 3 1 0 zero 0 1 0 60", "zero"),
        ("1 2 3 1 0 nan 0 1 0 60", "nan"),
        ("1 2 3 0 0 0 0 1 0 60", "rotation|zero|column"),
    ],
)
def test_a_broken_camera_file_is_named_with_its_line(trained_once, tmp_path, path_file, line, named):
    file = path_file(9)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError, match=rf"path9\.txt.*({named})"):
        generate.main(options_for(trained_once, tmp_path / "a.mp4", camera_params=file))


def test_a_lora_of_another_model_is_refused(trained_once, tmp_path, path_file):
    tensors, metadata = read_safetensors(trained_once / "net_low_noise.safetensors")
    wider = {name: torch.cat([t, t], dim=-1) if name.endswith("lora_A.weight") else t for name, t in tensors.items()}
    metadata.pop("camera_file")
    save_safetensors(wider, tmp_path / "wide.safetensors", metadata)
    with pytest.raises(InputError, match="wide.safetensors"):
        generate.main(options_for(trained_once, tmp_path / "a.mp4", network_weights=(tmp_path / "wide.safetensors",)))
    assert not (tmp_path / "a.mp4").exists()


def with_metadata(trained: Path, folder: Path, **metadata: str) -> Path:
    """A copy of the networks that says something else of itself."""
    folder.mkdir()
    for file in trained.glob("net_*.safetensors"):
        tensors, old = read_safetensors(file)
        save_safetensors(tensors, folder / file.name, old | metadata)
    return folder


def test_words_film_what_the_file_of_the_same_path_films(trained_once, tmp_path, capsys):
    folder = with_metadata(trained_once, tmp_path / "first", pose_frame="first", scale_rule="max_norm")
    moves, short = "truck right 0.3; hold", {"infer_steps": 1}
    words = pictures_with(folder, tmp_path / "a", camera_path=moves, fov=50.0, video_length=9, **short).float()
    assert words.shape[0] == 9
    path = make_path(moves, num_frames=9, height=32, width=48, fov_degrees=50.0, fps=8)
    c2w = path.c2w.clone()
    c2w[:, :3, 3] *= 7  # the rule forgets the unit
    for name, same in (("path", path), ("far", replace(path, c2w=c2w))):
        write_ten(same, tmp_path / f"{name}.txt")
        file = pictures_with(folder, tmp_path / name, camera_params=tmp_path / f"{name}.txt", **short)
        assert (words - file).abs().mean() < 0.05  # digits in the file
    other = pictures_with(folder, tmp_path / "other", camera_path="truck left 0.3", video_length=9, **short)
    assert (words - other).abs().mean() > 0.5
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["options"]["camera_path"] == moves
    assert record["options"]["fov"] == 50.0
    with pytest.raises(InputError, match="pose frame"):
        film_with(trained_once, tmp_path / "d.mp4", camera_path=moves)


def test_networks_of_two_conventions_are_refused(trained_once, tmp_path, path_file):
    other = with_metadata(trained_once, tmp_path / "other", scale_rule="metric:2")
    pair = (trained_once / "net_high_noise.safetensors", other / "net_low_noise.safetensors")
    with pytest.raises(InputError, match="net_low_noise.safetensors: expected the scale rule of net_high_noise"):
        film_with(trained_once, tmp_path / "a.mp4", network_weights=pair, camera_params=path_file(9))


def test_camera_guidance_changes_the_video_and_warns_a_network_that_never_missed_its_camera(
    trained_once, tmp_path, path_file, capsys
):
    plain = film_with(trained_once, tmp_path / "a.mp4", camera_params=path_file(9))
    assert "camera_dropout" not in capsys.readouterr().out
    guided = film_with(trained_once, tmp_path / "b.mp4", camera_params=path_file(9), camera_guidance=8.0)
    assert "trained without camera_dropout" in capsys.readouterr().out
    assert not torch.equal(plain, guided)
    assert json.loads((tmp_path / "b.json").read_text())["settings"]["camera_guidance"] == 8.0


def test_the_scale_rule_of_the_toml_reaches_the_network_and_its_videos(world, tmp_path):
    """Trained on max_norm, the network films a path and the same path in another unit alike."""
    for file in (world.folder / "cameras").glob("*.txt"):  # as from a tracker that says nothing of itself
        file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("#")))
    text = world.toml.read_text().replace('pose_frame = "scene"', 'pose_frame = "first"\ncamera_scale = "max_norm"')
    world.toml.write_text(text)
    with pytest.raises(InputError, match="cache_camera.py"):
        world.train("stale")
    cache_camera.main(cache_camera.Options(dataset_config=world.toml))
    trained = world.train("scaled", max_train_steps=2)
    for file in trained.glob("net_*_noise.safetensors"):
        metadata = read_safetensors(file)[1]
        assert (metadata["pose_frame"], metadata["scale_rule"]) == ("first", "max_norm")
    file = world.folder / "cameras/0001.txt"
    near = pictures_with(trained, tmp_path / "a", camera_params=file, infer_steps=1)
    rows = [[float(number) for number in line.split()] for line in file.read_text().splitlines()]
    far = tmp_path / "far.txt"
    far.write_text("\n".join(" ".join(map(str, [*(4 * x for x in row[:3]), *row[3:]])) for row in rows))
    again = pictures_with(trained, tmp_path / "b", camera_params=far, infer_steps=1)
    assert (near.float() - again.float()).abs().mean() < 0.05


def test_a_camera_without_a_network_is_refused(tmp_path, path_file):
    options = generate.Options(task="tiny", ckpt_dir=TINY, prompt="x", camera_params=path_file(9), save_path=tmp_path)
    with pytest.raises(InputError, match="network_weights"):
        generate.main(options)
