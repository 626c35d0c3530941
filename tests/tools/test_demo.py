"""The demo runs from one command to a video, and touches no folder that is not its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def demo(*words):
    return subprocess.run([sys.executable, "tools/demo.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow  # five commands, each of which imports torch: a minute or two
def test_a_short_demo_ends_with_its_three_files(tmp_path):
    for _ in range(2):  # the second replaces the first
        result = demo("--output", tmp_path / "demo", "--clips", 5, "--steps", 4)
        assert result.returncode == 0, result.stderr
    for name in ("video.mp4", "contact_sheet.png", "path.png"):
        assert (tmp_path / "demo" / name).stat().st_size > 1000
    commands = [line for line in result.stdout.splitlines() if line.startswith("$ ")]
    scripts = ("render_scenes", "cache_latents", "cache_text", "cache_camera", "train_network", "generate")
    assert len(commands) == len(scripts)
    assert all(script in line for script, line in zip(scripts, commands, strict=True))


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = demo("--output", tmp_path)
    assert result.returncode == 2
    assert str(tmp_path) in result.stderr
    assert (tmp_path / "thesis.txt").exists()
