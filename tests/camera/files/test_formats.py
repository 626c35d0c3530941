"""Laws of camera files: read undoes write, the axes are the documented ones, and whatever is wrong names its line."""

from __future__ import annotations

import codecs
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.spatial.transform import Rotation

from camera.files.formats import read_camera, write_re10k, write_ten
from camera.moves.trajectories import smooth_random_path
from camera.path import CameraPath, rotation_error
from camera.ten_numbers import from_ten_numbers, ten_numbers
from core.errors import InputError

HEIGHT, WIDTH = 48, 80
TEN = "0.5 -1 2  1 0 0  0 1 0  60"
RE10K = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 0.1 0 1 0 0.2 0 0 1 0.3"


def random_path(seed: int = 0) -> CameraPath:
    return smooth_random_path(
        seed=seed,
        num_frames=7,
        height=HEIGHT,
        width=WIDTH,
        position_low=(-2, -2, -2),
        position_high=(2, 2, 2),
        fps=12.5,
    )


def read(folder: Path, text: str | bytes, **options: object) -> CameraPath:
    file = folder / "camera.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_camera(file, height=HEIGHT, width=WIDTH, **options)  # type: ignore[arg-type]


def assert_same(first: CameraPath, second: CameraPath) -> None:
    torch.testing.assert_close(first.c2w, second.c2w, atol=1e-12, rtol=0)
    torch.testing.assert_close(first.K, second.K, atol=1e-9, rtol=0)
    for name in ("height", "width", "fps", "pose_frame", "scale_rule"):
        assert getattr(first, name) == getattr(second, name)


@pytest.mark.parametrize("format", ["auto", "ten"])
@pytest.mark.parametrize("seed", range(3))
def test_ten_numbers_read_what_was_written(tmp_path: Path, format: str, seed: int) -> None:
    path = random_path(seed)
    write_ten(path, tmp_path / "camera.txt")
    assert_same(read_camera(tmp_path / "camera.txt", height=HEIGHT, width=WIDTH, format=format, fps=12.5), path)


@pytest.mark.parametrize("format", ["auto", "re10k"])
@pytest.mark.parametrize("header", ["", "https://example.invalid/watch?v=1#t=2,3", "a clip of a room", "20240131"])
def test_re10k_reads_what_was_written(tmp_path: Path, format: str, header: str) -> None:
    """Off-centre crops and unequal focal lengths included, which ten numbers cannot hold."""
    path = random_path().cropped(resized_height=60, resized_width=90, top=1, left=7, height=HEIGHT, width=WIDTH)
    write_re10k(path, tmp_path / "camera.txt", header=header)
    assert_same(read_camera(tmp_path / "camera.txt", height=HEIGHT, width=WIDTH, format=format, fps=12.5), path)


def test_ten_numbers_are_position_right_axis_down_axis_and_field_of_view(tmp_path: Path) -> None:
    """Written by hand: the camera stands at (0.5, -1, 2), right is world z, down is world y, so it looks along -x."""
    path = read(tmp_path, "0.5 -1 2  0 0 1  0 1 0  90")
    expected = torch.tensor([[0, 0, -1, 0.5], [0, 1, 0, -1], [1, 0, 0, 2], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(path.c2w[0], expected)
    torch.testing.assert_close(path.K[0], torch.tensor([[40, 0, 40], [0, 40, 24], [0, 0, 1]], dtype=torch.float64))
    assert path.pose_frame == "scene" and path.scale_rule == "none" and path.fps is None


def test_re10k_is_world_to_camera_with_intrinsics_over_the_frame_size(tmp_path: Path) -> None:
    """Written by hand: a camera at (1, 2, 3) that looks along world -x has w2c = [R | -R c], rows its axes."""
    path = read(tmp_path, "clip\n33 0.5 0.75 0.4 0.6 0 0  0 0 1 -3  0 1 0 -2  -1 0 0 1")
    expected = torch.tensor([[0, 0, -1, 1], [0, 1, 0, 2], [1, 0, 0, 3], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(path.c2w[0], expected)
    torch.testing.assert_close(path.K[0], torch.tensor([[40, 0, 32], [0, 36, 28.8], [0, 0, 1]], dtype=torch.float64))


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    path = random_path()
    write_ten(path, tmp_path / "ten.txt")
    write_re10k(path, tmp_path / "re10k.txt")
    assert_same(*(read_camera(tmp_path / f"{name}.txt", height=HEIGHT, width=WIDTH) for name in ("ten", "re10k")))


def test_the_examples_in_the_docs_are_one_camera(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[3] / "docs" / "cameras.md").read_text(encoding="utf-8")
    ten, re10k = re.findall(r"(?:^    .+\n)+", docs, flags=re.MULTILINE)[:2]
    paths = []
    for text in (ten, re10k):
        (tmp_path / "camera.txt").write_text(text)
        paths.append(read_camera(tmp_path / "camera.txt", height=720, width=1280))
    assert torch.equal(paths[0].c2w, torch.eye(4, dtype=torch.float64)[None])
    assert torch.equal(paths[1].c2w, paths[0].c2w)
    torch.testing.assert_close(paths[0].K, paths[1].K, atol=1e-4, rtol=0)


def test_the_tensor_of_ten_numbers_is_the_row_of_the_file(tmp_path: Path) -> None:
    path = random_path()
    write_ten(path, tmp_path / "camera.txt")
    lines = (tmp_path / "camera.txt").read_text().splitlines()
    rows = [list(map(float, line.split())) for line in lines if line[0] != "#"]
    numbers = ten_numbers(path.c2w[None].float(), path.K[None].float(), WIDTH)
    assert numbers.shape == (1, 7, 10) and numbers.dtype == torch.float32
    torch.testing.assert_close(numbers[0].double(), torch.tensor(rows, dtype=torch.float64), atol=1e-5, rtol=1e-6)


def test_gram_schmidt_forgets_lengths_and_skew() -> None:
    rotations = torch.from_numpy(Rotation.random(5, random_state=1).as_matrix())
    generator = torch.Generator().manual_seed(2)
    fov = torch.full((5, 1), 60.0, dtype=torch.float64)
    right, down = rotations[:, :, 0], rotations[:, :, 1]
    lengths = torch.rand(5, 2, dtype=torch.float64, generator=generator) * 10 + 0.1
    skew = torch.randn(5, 1, dtype=torch.float64, generator=generator)
    numbers = torch.cat([torch.zeros(5, 3), lengths[:, :1] * right, lengths[:, 1:] * (down + skew * right), fov], -1)
    c2w, _ = from_ten_numbers(numbers, height=HEIGHT, width=WIDTH)
    torch.testing.assert_close(c2w[:, :3, :3], rotations)


@pytest.mark.parametrize("scale", [1e-8, 1e200])
def test_rotation_vectors_of_extreme_length_are_read(tmp_path: Path, scale: float) -> None:
    path = read(tmp_path, f"0 0 0 {scale} 0 0 0 {scale} 0 60")
    assert torch.equal(path.c2w[0], torch.eye(4, dtype=torch.float64))


def test_field_of_view_spans_the_axis_that_caller_or_file_names(tmp_path: Path) -> None:
    assert read(tmp_path, TEN).fov_degrees("horizontal") == pytest.approx(60)
    assert read(tmp_path, TEN, fov_axis="vertical").fov_degrees("vertical") == pytest.approx(60)
    stated = "# fov_axis: vertical\n" + TEN
    assert read(tmp_path, stated).fov_degrees("vertical") == pytest.approx(60)
    assert read(tmp_path, stated.replace("vertical", "Horizontal"), fov_axis="vertical").fov_degrees() == pytest.approx(
        60
    )


@pytest.mark.parametrize(
    "text",
    [
        f"# a comment\n\n{TEN}  # the first frame\n   \n{TEN}\n\n",
        f"{TEN}\r\n{TEN}\r\n",
        f"{TEN}\r{TEN}",
        f"\ufeff{TEN}\n{TEN}",
        codecs.BOM_UTF16_LE + f"{TEN}\n{TEN}\n".encode("utf-16-le"),
        "\n".join([",".join(TEN.split())] * 2),
        "\n".join([" ,\t".join(TEN.split())] * 2),
        "\n".join(["\t".join(TEN.split())] * 2),
        f"{TEN}\n+.5e0 -1. 2E+0 1 -0 0 0 1 0 60.",
    ],
    ids=["comments", "CRLF", "CR", "BOM", "UTF-16", "commas", "commas and blanks", "tabs", "number spellings"],
)
def test_harmless_differences_do_not_matter(tmp_path: Path, text: str | bytes) -> None:
    assert_same(read(tmp_path, text), read(tmp_path, f"{TEN}\n{TEN}"))


@pytest.mark.parametrize(
    "header", ["", "\n", "https://example.invalid/clip\n", "\ufeffhttps://example.invalid/clip\n\n"]
)
def test_re10k_headers(tmp_path: Path, header: str) -> None:
    path = read(tmp_path, f"{header}{RE10K}\n{RE10K}\n")
    assert len(path) == 2
    torch.testing.assert_close(path.positions[0], torch.tensor([-0.1, -0.2, -0.3], dtype=torch.float64))


def test_printed_digits_of_a_rotation_are_rounded_back(tmp_path: Path) -> None:
    matrix = Rotation.from_euler("xyz", [0.3, -0.5, 0.2]).as_matrix()
    row = " ".join(f"{v:.3f}" for v in torch.cat([torch.from_numpy(matrix), torch.zeros(3, 1)], 1).flatten().tolist())
    for text in (f"clip\n0 0.5 0.9 0.5 0.5 0 0 {row}", f"0 0.5 0.9 0.5 0.5 0 0 {row} 0 0 0 1"):  # ComfyUI's too
        path = read(tmp_path, text)
        rotation = path.rotations[0] if text.endswith("1") else path.rotations[0].T
        torch.testing.assert_close(rotation, torch.from_numpy(matrix), atol=1e-3, rtol=0)
        assert rotation_error(rotation) < 1e-14


def replaced(row: str, column: int, value: str) -> str:
    words = row.split()
    words[column - 1] = value
    return " ".join(words)


@pytest.mark.parametrize(
    ("text", "format", "line", "found"),
    [
        (f"{TEN}\n{' '.join(TEN.split()[:9])}", "auto", 2, "found 9"),
        (f"{TEN}\n{TEN} 1", "auto", 2, "found 11"),
        (" ".join(TEN.split()[:9]), "auto", 1, "found 9"),
        (f"{TEN} 1", "ten", 1, "found 11"),
        (f"# c\n{replaced(TEN, 5, 'zero')}", "auto", 2, "'zero' in column 5"),
        (f"x y z\n{TEN}", "auto", 1, "'x'"),
        (replaced(TEN, 3, "nan"), "auto", 1, "'nan' in column 3"),
        (replaced(TEN, 3, "-inf"), "auto", 1, "'-inf'"),
        (replaced(TEN, 3, "1e999"), "auto", 1, "'1e999'"),
        (replaced(TEN, 3, "1_0"), "auto", 1, "'1_0'"),
        (replaced(TEN, 3, "１"), "auto", 1, "'１'"),
        (f"{TEN}\n0 0 0 0 0 0 0 1 0 60", "auto", 2, "right axis in columns 4 to 6, found a zero vector"),
        (f"{TEN}\n0 0 0 1 0 0 0 0 0 60", "auto", 2, "down axis in columns 7 to 9, found a zero vector"),
        ("0 0 0 1 2 3 -2 -4 -6 60", "auto", 1, "parallel"),
        ("0 0 0 1e300 0 0 1e-8 1e-15 0 60", "auto", 1, "parallel"),
        (replaced(TEN, 10, "0"), "auto", 1, "found 0"),
        (replaced(TEN, 10, "-60"), "auto", 1, "found -60"),
        (replaced(TEN, 10, "180"), "auto", 1, "found 180"),
        ("0,5 1 2 1 0 0 0 1 0 60", "auto", 1, "commas or spaces"),
        ("0,5 1,0 2,0 1,0 0,6", "auto", 1, "commas or spaces"),
        ("0,1,2,1,0,0,,1,0,60", "auto", 1, "both sides of every comma"),
        (";".join(TEN.split()), "ten", 1, "found '0.5;-1;2"),
        (f"# fov_axis: vertcal\n{TEN}", "auto", 1, "did you mean 'vertical'"),
        (f"# fov_axis: vertical\n{TEN}\n# fov_axis: horizontal", "auto", 3, "after vertical"),
        (f"{TEN}\n{RE10K}", "auto", 2, "found 19"),
        (f"clip\n{RE10K}\n{TEN}", "auto", 3, "found 10"),
        (f"clip\n{' '.join(RE10K.split()[:18])}", "re10k", 2, "found 18"),
        (f"clip\n{TEN}", "re10k", 2, "found 10"),
        (f"clip\n{replaced(RE10K, 9, 'inf')}", "auto", 2, "'inf' in column 9"),
        (replaced(RE10K, 1, "frame0"), "auto", 1, "'frame0' in column 1"),
        (f"\nclip\n{RE10K}", "re10k", 2, "'clip' in column 1"),
        (f"clip\n{replaced(RE10K, 8, '1.1')}", "auto", 2, "no rotation"),
        (f"clip\n{replaced(RE10K, 8, '-1')}", "auto", 2, "determinant -1"),
        (f"clip\n{replaced(RE10K, 2, '0')}", "auto", 2, "positive focal"),
        (f"clip\n{replaced(RE10K, 3, '-0.5')}", "auto", 2, "positive focal"),
        (f"clip\n{replaced(RE10K, 2, '665.6')}", "auto", 2, "look like pixels"),
        (f"clip\n{replaced(RE10K, 6, '0.01')}", "auto", 2, "distortion"),
        (f"clip\n{replaced(RE10K, 7, '0.01')}", "auto", 2, "distortion"),
        (b"0 0 0\n1 \xff 2", "auto", 2, "0xff"),
    ],
)
def test_wrong_content_names_file_line_and_finding(
    tmp_path: Path, text: str | bytes, format: str, line: int, found: str
) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, text, format=format)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'camera.txt'} line {line}: expected")
    assert found in message and "\n" not in message


@pytest.mark.parametrize("format", ["auto", "ten", "re10k"])
@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "\ufeff"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, text: str, format: str) -> None:
    with pytest.raises(InputError, match=r"camera\.txt: expected a row of numbers"):
        read(tmp_path, text, format=format)


def test_what_is_no_file_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing"):
        read_camera(tmp_path / "absent.txt", height=HEIGHT, width=WIDTH)
    with pytest.raises(InputError, match="found a folder"):
        read_camera(tmp_path, height=HEIGHT, width=WIDTH)
    with pytest.raises(InputError, match="did you mean 're10k'"):
        read(tmp_path, TEN, format="re10")
    with pytest.raises(InputError, match="did you mean 'vertical'"):
        read(tmp_path, TEN, fov_axis="vertica")


def test_ten_numbers_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    path = random_path()
    off_centre = path.cropped(resized_height=HEIGHT, resized_width=WIDTH + 8, top=0, left=0, height=HEIGHT, width=WIDTH)
    stretched = replace(path, K=path.K * torch.tensor([1.0, 1.2, 1.0], dtype=torch.float64)[:, None])
    for misfit in (off_centre, stretched):
        with pytest.raises(InputError, match=r"camera\.txt.*frame 0.*RealEstate10K"):
            write_ten(misfit, tmp_path / "camera.txt")
    assert list(tmp_path.iterdir()) == []  # nothing half-written
