"""A caption with camera tags is a camera file: the path of its text, or of the file that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from camera.files.formats import declared_pose_frame, read_camera_file, write_camera
from camera.files.settings import CameraFileSettings
from camera.moves.tagged_text import read_tagged
from camera.moves.text import make_path
from camera.path import CameraPath
from core.errors import InputError

TEXT = (
    "Object: a cat ; Camera: <starttime>0</starttime> <endtime>1</endtime> <speed>high</speed>\n"
    "<direction>left</direction> <rotate>stay</rotate> <sep>\n"
)
SIZE = {"height": 48, "width": 80}


def read(file: Path, num_frames: int | None = None, fps: float | None = 8, **settings: object) -> CameraPath:
    return read_camera_file(file, CameraFileSettings(**settings), fps=fps, num_frames=num_frames, **SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["auto", "tagged"])
@pytest.mark.parametrize("num_frames", [None, 9, 33])
def test_a_caption_is_read_on_the_clock_of_its_video(tmp_path: Path, format: str, num_frames: int | None) -> None:
    (tmp_path / "clip.txt").write_text(TEXT)
    found = read(tmp_path / "clip.txt", num_frames, format=format)
    expected = read_tagged(TEXT, fps=8, num_frames=num_frames, **SIZE)
    assert torch.equal(found.c2w, expected.c2w) and torch.equal(found.K, expected.K) and found.pose_frame == "first"
    assert len(found) == (num_frames or 9)
    narrow = read(tmp_path / "clip.txt", format=format, fov_degrees=40.0)
    torch.testing.assert_close(narrow.fov_degrees(), torch.full((9,), 40.0).double())


def test_a_named_file_is_read_from_beside_the_text(tmp_path: Path) -> None:
    path = make_path("truck right 1", num_frames=5, fps=8, **SIZE)
    write_camera(path, tmp_path / "motion.safetensors", format="safetensors")
    (tmp_path / "clip.txt").write_text("Object:a cat; Caption: it moves as #trajectory:{motion.safetensors}.")
    found = read(tmp_path / "clip.txt")
    torch.testing.assert_close(found.c2w, path.c2w, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.K, path.K, atol=1e-6, rtol=0)
    assert declared_pose_frame(tmp_path / "clip.txt") == declared_pose_frame(tmp_path / "motion.safetensors") == "first"
    (tmp_path / "clip.txt").write_text("#trajectory:{absent.safetensors}")
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        read(tmp_path / "clip.txt")


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "clip.txt"
    file.write_text(TEXT.replace("left", "lefft"))
    with pytest.raises(InputError, match=r"clip\.txt: tagged camera text, segment 1: .*did you mean 'left'"):
        read(file)
    file.write_text(TEXT)
    with pytest.raises(InputError, match="frame rate"):
        read(file, fps=None)
    with pytest.raises(InputError, match=r"segment 1: expected an end within the clip's 0\.5 s"):
        read(file, num_frames=4)
    for setting in ({"direction": "c2w"}, {"axes": "opencv"}, {"size": (48, 80)}):
        with pytest.raises(InputError, match=r"clip\.txt: .*no camera_direction, camera_axes or camera_size"):
            read(file, **setting)
    file.write_text("a plain caption")
    with pytest.raises(InputError, match="expected a text with camera tags, found none"):
        read(file, format="tagged")


def test_no_path_is_written_as_tags(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_camera(make_path("pan 30", num_frames=5, **SIZE), tmp_path / "a.txt", format="tagged")
    assert list(tmp_path.iterdir()) == []
