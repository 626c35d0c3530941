"""What a person at a terminal meets: help at once, errors in one line with exit code 2, Ctrl-C without wreckage."""

import signal
import subprocess
import sys

import pytest

from core.files import read_safetensors
from tests.commands.conftest import ROOT

COMMANDS = ("cache_latents", "cache_text", "cache_camera", "train_network", "generate")


def run(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_torch(command):
    probe = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path('{command}.py', run_name='__main__')\n"
        "except SystemExit as end: print('code', end.code, 'torch', 'torch' in sys.modules)"
    )
    result = run("-c", probe)
    assert result.stdout.strip().endswith("code 0 torch False"), result.stdout + result.stderr
    assert "--dataset_config" in result.stdout


def test_a_misspelt_flag_is_named():
    result = run("cache_text.py", "--dataset_confgi", "x.toml")
    assert result.returncode == 2
    assert "--dataset_confgi" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.replace("target_frames", "taget_frames"), ["taget_frames", "target_frames"]),
        (lambda text: text.replace("task =", "# task ="), ["--task", "[model]"]),
        (lambda text: text.replace("[48, 32]", "[50, 32]"), ["resolution", "16"]),
        (lambda text: text.replace("/videos", "/vidoes"), ["video_directory", "vidoes"]),
        (lambda text: "[[datasets\n" + text, ["dataset.toml", "line 1"]),
    ],
)
def test_a_mistake_in_the_toml_is_one_line(world, change, named):
    world.toml.write_text(change(world.toml.read_text()))
    result = run("cache_camera.py", "--dataset_config", world.toml)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("error: ")
    assert all(word in line for word in named), line


def test_an_undecodable_video_is_named(world):
    (world.folder / "videos/0001.mp4").write_bytes(b"not a video" * 100)
    result = run("cache_latents.py", "--dataset_config", world.toml)
    assert result.returncode == 2
    assert "0001.mp4" in result.stderr
    assert "Traceback" not in result.stderr


def many_clips(world):
    """Work for long enough to be interrupted."""
    for index in range(200):
        for folder, suffix in (("videos", "mp4"), ("videos", "txt"), ("cameras", "txt")):
            source = world.folder / folder / f"0000.{suffix}"
            (source.parent / f"more{index}.{suffix}").hardlink_to(source)
    return ["--dataset_config", str(world.toml)]


def training(world):
    return [
        *("--dataset_config", str(world.toml), "--mixed_precision", "no"),
        *("--output_dir", str(world.folder / "out"), "--output_name", "net"),
    ]


def generation(world):
    return [
        *("--dataset_config", str(world.toml), "--mixed_precision", "no", "--prompt", "a room"),
        *("--infer_steps", "5000", "--save_path", str(world.folder / "out")),
    ]


@pytest.mark.parametrize(
    ("command", "words", "bar"),
    [
        ("cache_latents", many_clips, "latents:"),
        ("cache_text", many_clips, "text:"),
        ("cache_camera", many_clips, "cameras:"),
        ("train_network", training, "train:"),
        ("generate", generation, "sample:"),
    ],
)
def test_interrupted_commands_leave_nothing_half_written(world, command, words, bar):
    before = {file for file in world.folder.rglob("*") if file.is_file()}
    process = subprocess.Popen(
        [sys.executable, f"{command}.py", *words(world)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
    )
    seen = b""
    while bar.encode() not in seen:
        byte = process.stderr.read(1)
        assert byte, seen.decode()
        seen += byte
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read().decode()
    assert process.wait(timeout=60) == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    for file in {file for file in world.folder.rglob("*") if file.is_file()} - before - inputs(world):
        read_safetensors(file)  # whole, and nothing but caches


def inputs(world):
    return {file for folder in ("videos", "cameras") for file in (world.folder / folder).iterdir()}
