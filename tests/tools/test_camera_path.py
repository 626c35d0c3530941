"""tools/camera_path.py: it writes what was asked for, prints what is true, leaves nothing behind after a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camera.files.formats import read_camera, write_camera
from camera.moves.tagged_text import read_tagged
from camera.moves.text import make_path
from core.errors import InputError
from core.options import run
from tools.camera_path import Convert, Estimate, Inspect, Make, Plot, main, names_of, with_command

ROOT = Path(__file__).parents[2]
TEXT = "orbit right 90deg; dolly in 0.5"
SIZE = {"height": 48, "width": 80}


def make(folder: Path, name: str, text: str = TEXT, frames: int = 9) -> Path:
    file = folder / name
    main(Make(text=text, frames=frames, output=file, video_size=(48, 80), format="ten"))
    return file


def test_make_writes_the_path_of_its_text_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Make(text=TEXT, frames=9, output=tmp_path / "p.txt", plot=tmp_path / "p.png", video_size=(48, 80), fov=50))
    found = read_camera(tmp_path / "p.txt", **SIZE)
    asked = make_path(TEXT, num_frames=9, fov_degrees=50, fps=16, **SIZE)
    torch.testing.assert_close(found.c2w, asked.c2w, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.K, asked.K, atol=1e-6, rtol=0)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    for words in ("9 of 48x80, 16 fps, 0.5 s", "50 degrees from left to right", "at most 90 from the first"):
        assert words in printed.out
    assert printed.err == ""


def test_make_reads_tagged_text_too(tmp_path: Path) -> None:
    text = (
        "Object: a cat ; Camera: <starttime>0</starttime> <endtime>0.5</endtime> <speed>high</speed> "
        "<direction>leftup30</direction> <rotate>stay</rotate> <sep>"
    )
    found = read_camera(make(tmp_path, "p.txt", text), **SIZE)
    torch.testing.assert_close(found.c2w, read_tagged(text, fps=16, num_frames=9, **SIZE).c2w, atol=1e-9, rtol=0)


def test_convert_keeps_the_path_and_changes_what_it_was_asked_to(tmp_path: Path) -> None:
    file = tmp_path / "scene.txt"
    path = make_path(TEXT, num_frames=9, **SIZE)
    moved = path.c2w.clone()
    moved[:, :3, 3] += torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)
    write_camera(type(path)(c2w=moved, K=path.K, **SIZE), file, format="ten")
    main(Convert(source=file, target=tmp_path / "same.txt", format="re10k", video_size=(48, 80)))
    torch.testing.assert_close(read_camera(tmp_path / "same.txt", **SIZE).c2w, moved, atol=1e-6, rtol=0)
    scaled = Convert(
        source=file, target=tmp_path / "first.txt", pose_frame="first", scale_rule="max_norm", video_size=(48, 80)
    )
    main(scaled)
    found = read_camera(tmp_path / "first.txt", **SIZE)
    torch.testing.assert_close(found.positions.norm(dim=-1).max(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(found.positions * path.positions.norm(dim=-1).max(), path.positions, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.rotations, path.rotations, atol=1e-6, rtol=0)


def test_inspect_prints_figures_and_warns_with_the_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = make(tmp_path, "good.txt", "truck right 2", 17)
    lines = good.read_text().splitlines()
    rows = [index for index, line in enumerate(lines) if not line.startswith("#")]
    lines[rows[8]] = "9" + lines[rows[8]][1:]
    (tmp_path / "bad.txt").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    main(Inspect(files=(good,), video_size=(48, 80)))
    printed = capsys.readouterr()
    for words in ("17 of 48x80", "60 degrees", "2 units, at most 2 from", "none"):
        assert words in printed.out
    assert printed.err == ""
    main(Inspect(files=(good, tmp_path / "bad.txt"), video_size=(48, 80)))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all("bad.txt: frame " in line for line in warnings)
    assert "frame 8: jumps" in warnings[0] and "frame 9: jumps" in warnings[1]


def test_plot_draws_several_files(tmp_path: Path) -> None:
    files = tuple(make(tmp_path, name) for name in ("a.txt", "b.txt"))
    main(Plot(files=files, output=tmp_path / "both.png", video_size=(48, 80)))
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert names_of((Path("x/a/cam.txt"), Path("x/b/cam.txt"))) == ["a/cam.txt", "b/cam.txt"]
    assert len(set(names_of((Path("a.txt"), Path("a.txt"))))) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"text": "orbit 90deg; doly in 1"}, "did you mean 'dolly'"),
        ({"text": TEXT, "frames": 0}, "at least 1 frame"),
        ({"text": TEXT, "video_size": (0, 80)}, "--video_size"),
        ({"text": TEXT, "fps": 0.0}, "frame rate above 0"),
        ({"text": TEXT, "fov": 180.0}, "between 0 and 180"),
        ({"text": "<starttime>0</starttime>"}, "segment 1"),
    ],
)
def test_a_mistake_leaves_nothing_behind(tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        main(Make(output=tmp_path / "p.txt", plot=tmp_path / "p.png", **options))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_ending_asks_for_the_format_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found '.camera'; name the format with --format"):
        main(Make(text="not a move", output=tmp_path / "p.camera"))


def test_files_that_are_no_cameras_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing.txt"):
        main(Inspect(files=(tmp_path / "nothing.txt",)))
    for empty in (Inspect(files=()), Plot(files=(), output=tmp_path / "p.png")):
        with pytest.raises(InputError, match="expected camera files"):
            main(empty)
    with pytest.raises(InputError, match="none.mp4"):
        main(Estimate(video=tmp_path / "none.mp4", output=tmp_path / "p.txt"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_may_be_left_out() -> None:
    assert with_command([TEXT, "--frames", "9"]) == ["make", TEXT, "--frames", "9"]
    for words in (["inspect", "a.txt"], ["--help"], []):
        assert with_command(words) == words


def test_a_person_gets_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(main, Make(text="pann 30", output=tmp_path / "p.txt"))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and list(tmp_path.iterdir()) == []
    assert error.startswith("error: camera moves") and error.count("\n") == 1


def test_help_comes_without_torch() -> None:
    check = (
        "import sys, runpy; sys.argv = ['camera_path.py', 'make', '--help']\n"
        "try: runpy.run_path('tools/camera_path.py', run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, timeout=120)
    assert result.returncode == 0 and b"--frames" in result.stdout
