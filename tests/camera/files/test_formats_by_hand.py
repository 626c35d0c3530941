"""Every format reads one hand-written path, gives back what was written, and agrees with independent readers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from format_cases import BY_HAND, C2W, HEIGHT, W2C, WIDTH, assert_same, expected, random_path, read
from safetensors.numpy import save_file
from scipy.spatial.transform import Rotation

from camera.files.formats import FORMATS, camera_files, declared_pose_frame, read_camera, recognise, write_camera
from camera.files.pose_arrays import POSE_NAMES
from camera.files.settings import CAMERA_FORMATS, CameraFileSettings
from core.errors import InputError

FILES = {  # format -> name that a path is written to
    "ten": "a.txt",
    "re10k": "a.txt",
    "comfy": "a.txt",
    "tum": "a.txt",
    "recammaster": "a.json",
    "nerf": "a.json",
    "colmap": "model",
    "arrays": "a.npz",
    "safetensors": "a.safetensors",
}
NEEDS_ONE_FOV = ("ten", "tum", "recammaster")
MISFITS = {  # frames, rows and columns of K to be made a tenth larger
    "zoom": (slice(3, 4), [0, 1], [0, 1]),
    "pixels that are not square": (slice(None), 1, 1),
    "off centre across": (slice(None), 0, 2),
    "off centre down": (slice(None), 1, 2),
}


def test_every_name_has_a_reader_a_writer_and_a_file_by_hand() -> None:
    assert tuple(FORMATS) == CAMERA_FORMATS[1:]
    by_hand = {format for format, _, _ in BY_HAND.values()}
    assert by_hand == set(FILES) == set(FORMATS) - {"tagged"}  # text of a motion, which has tests of its own


@pytest.mark.parametrize("case", BY_HAND)
@pytest.mark.parametrize("named", [False, True])
def test_a_file_written_by_hand_is_the_path_it_describes(tmp_path: Path, case: str, named: bool) -> None:
    format, write, settings = BY_HAND[case]
    file = write(tmp_path)
    assert recognise(file) == format
    path = read(file, **settings, **({"format": format} if named else {}))
    assert_same(path, expected())
    assert (path.pose_frame, path.scale_rule, path.fps) == ("scene", "none", None)
    assert declared_pose_frame(file) is None


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("zoom", [False, True])
@pytest.mark.parametrize("pose_frame", ["scene", "first"])
def test_what_is_written_is_read_with_everything_that_belongs_to_it(
    tmp_path: Path, format: str, zoom: bool, pose_frame: str
) -> None:
    path = random_path(zoom=zoom, fps=12.5)
    if pose_frame == "first":
        path = replace(path.relative_to_first(), scale_rule="metric:0.25", mean_depth=3.5)
    file = tmp_path / FILES[format]
    if zoom and format in NEEDS_ONE_FOV:
        with pytest.raises(InputError, match="square pixels and a centred camera"):
            write_camera(path, file, format=format)
        assert list(tmp_path.iterdir()) == []
        return
    write_camera(path, file, format=format)
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    assert recognise(file) == format
    found = read(file)
    assert_same(found, path)
    for name in ("fps", "pose_frame", "scale_rule", "mean_depth"):
        assert getattr(found, name) == getattr(path, name)
    assert declared_pose_frame(file) == pose_frame
    assert read_camera(file, height=HEIGHT, width=WIDTH, fps=8).fps == 8


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("format", NEEDS_ONE_FOV)
def test_what_one_field_of_view_cannot_say_is_not_left_out(tmp_path: Path, format: str, misfit: str) -> None:
    path = random_path()
    K = path.K.clone()
    K[MISFITS[misfit]] *= 1.1
    path = replace(path, K=K)
    if (format, misfit) == ("ten", "zoom"):  # it has one number for each frame
        write_camera(path, tmp_path / "a", format=format)
        assert_same(read(tmp_path / "a"), path)
    else:
        with pytest.raises(InputError, match="square pixels and a centred camera"):
            write_camera(path, tmp_path / "a", format=format)


@pytest.mark.parametrize("format", ["tum", "recammaster"])
def test_the_field_of_view_that_a_file_records_is_horizontal(tmp_path: Path, format: str) -> None:
    """Whatever fov_axis says, which is about a field of view that the caller gives."""
    path = random_path()
    write_camera(path, tmp_path / FILES[format], format=format)
    assert_same(read(tmp_path / FILES[format], fov_axis="vertical"), path)


def test_timestamps_are_the_times_of_the_frames(tmp_path: Path) -> None:
    """RealEstate10K counts microseconds, TUM seconds; without a rate there is no clock."""
    for format, unit, fps, still in (("re10k", 1e6, 12.5, 0), ("tum", 1.0, 12.5, 1), ("re10k", 1, None, 0)):
        write_camera(random_path(fps=fps), tmp_path / "a.txt", format=format)
        rows = [line.split() for line in (tmp_path / "a.txt").read_text().splitlines() if line and line[0] != "#"]
        times = [index / fps * unit if fps else still * index for index in range(7)]
        assert [float(row[0]) for row in rows] == pytest.approx(times)


@pytest.mark.parametrize("format", ["arrays", "safetensors", "nerf", "recammaster"])
def test_content_alone_tells_the_format_of_a_file_without_a_suffix(tmp_path: Path, format: str) -> None:
    write_camera(random_path(), tmp_path / FILES[format], format=format)
    content = (tmp_path / FILES[format]).read_bytes()
    if format in ("nerf", "recammaster"):
        content = b"\xef\xbb\xbf\n " + content  # a byte-order mark, as some editors write it
    (tmp_path / "camera").write_bytes(content)
    assert recognise(tmp_path / "camera") == format
    assert_same(read(tmp_path / "camera"), random_path())


@pytest.mark.parametrize("format", [name for name in FILES])
def test_a_path_is_read_at_the_size_that_is_asked_for(tmp_path: Path, format: str) -> None:
    """Twice the pixels, twice the focal length and centre, whatever size the file was written at."""
    path = random_path()
    write_camera(path, tmp_path / FILES[format], format=format)
    found = read_camera(tmp_path / FILES[format], height=2 * HEIGHT, width=2 * WIDTH)
    torch.testing.assert_close(found.K[:, :2], 2 * path.K[:, :2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["colmap_text", "tum"])
def test_quaternions_of_two_decimals_are_read_as_rotations(tmp_path: Path, case: str) -> None:
    _, write, settings = BY_HAND[case]
    file = write(tmp_path)
    text = file / "images.txt" if file.is_dir() else file
    text.write_text(text.read_text().replace(str(math.sqrt(0.5)), "0.71"))
    assert "0.71 0" in text.read_text()
    assert_same(read(file, **settings), expected())


def test_tum_quaternions_are_scipys(tmp_path: Path) -> None:
    rotations = Rotation.random(6, random_state=4)
    positions = np.random.default_rng(1).normal(size=(6, 3))
    rows = np.concatenate([np.arange(6)[:, None], positions, rotations.as_quat()], axis=1)
    np.savetxt(tmp_path / "a.txt", rows, fmt="%.9f")
    path = read(tmp_path / "a.txt", fov_degrees=70)
    np.testing.assert_allclose(path.rotations.numpy(), rotations.as_matrix(), atol=1e-8)
    np.testing.assert_allclose(path.positions.numpy(), positions, atol=1e-8)
    assert float(path.fov_degrees()[0]) == pytest.approx(70)
    assert float(
        read(tmp_path / "a.txt", fov_degrees=70, fov_axis="vertical").fov_degrees("vertical")[0]
    ) == pytest.approx(70)


def test_unreal_moves_are_the_moves_of_our_camera(tmp_path: Path) -> None:
    """An independent account: relative to frame 0, forward in Unreal is +z here, right +x, up -y, in metres."""
    rows = "[1 0 0 0] [0 1 0 0] [0 0 1 0] "
    text = [
        f'"frame{i}": {{"cam01": "{rows}[{x} {y} {z} 1] "}}' for i, (x, y, z) in enumerate([(0, 0, 0), (100, 20, 7)])
    ]
    (tmp_path / "a.json").write_text("{" + ",".join(text) + "}")
    path = read(tmp_path / "a.json", fov_degrees=60).relative_to_first()
    torch.testing.assert_close(path.positions[1], torch.tensor([0.2, -0.07, 1.0], dtype=torch.float64))


def nerf_with(folder: Path, **changes: object) -> Path:
    """The synthetic scenes' form by hand, with other entries; None takes one out."""
    file = BY_HAND["nerf_angle"][1](folder)
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return file


def test_any_angle_or_focal_length_says_the_lens_and_a_frame_goes_before_the_file(tmp_path: Path) -> None:
    down = 2 * math.atan(30 / 50)
    assert_same(read(nerf_with(tmp_path, camera_angle_x=None, camera_angle_y=down)), expected())
    size = {"w": 200, "h": 120}
    assert_same(read(nerf_with(tmp_path, camera_angle_x=None, fl_y=100, **size)), expected())
    narrow = read(nerf_with(tmp_path, camera_angle_y=2 * math.atan(30 / 100)))
    assert narrow.K[0, [0, 1], [0, 1]].tolist() == pytest.approx([50, 100])
    frames = json.loads(BY_HAND["nerf_angle"][1](tmp_path).read_text())["frames"]
    frames[1] |= {"fl_x": 50, "cx": 90}
    found = read(nerf_with(tmp_path, fl_x=100, **size, frames=frames))
    assert found.K[:, 0, 0].tolist() == pytest.approx([50, 25]) and found.K[:, 0, 2].tolist() == pytest.approx([50, 45])


def test_frames_without_names_are_in_the_order_of_the_list(tmp_path: Path) -> None:
    frames = json.loads(BY_HAND["nerf_angle"][1](tmp_path).read_text())["frames"]
    poses = [{"transform_matrix": frame["transform_matrix"]} for frame in reversed(frames)]
    assert_same(read(nerf_with(tmp_path, frames=poses)), expected((1, 0)))


def test_a_folder_with_a_transforms_json_is_that_file(tmp_path: Path) -> None:
    path = random_path().relative_to_first()
    write_camera(path, tmp_path / "transforms.json", format="nerf")
    assert recognise(tmp_path) == "nerf" and declared_pose_frame(tmp_path) == "first"
    assert_same(read(tmp_path), path)
    assert camera_files(tmp_path) == [tmp_path / "transforms.json"]


@pytest.mark.parametrize("name", POSE_NAMES)
def test_a_name_that_says_the_direction_is_believed_and_any_other_needs_it_said(tmp_path: Path, name: str) -> None:
    matrices, direction = (W2C, "w2c") if name in ("w2c", "world2cam") else (C2W, "c2w")
    np.savez(tmp_path / "a.npz", **{name: np.array(matrices, dtype=float)})
    options = {"axes": "opencv", "fov_degrees": 90.0}
    if "2" in name:
        assert_same(read(tmp_path / "a.npz", **options), expected())
    else:
        with pytest.raises(InputError, match="camera_direction"):
            read(tmp_path / "a.npz", **options)
    assert_same(read(tmp_path / "a.npz", direction=direction, **options), expected())


@pytest.mark.parametrize("names", [("focals", "principal_points"), ("focal", "pp"), ("im_focals", "im_pp")])
@pytest.mark.parametrize("each", [False, True])
def test_principal_points_go_with_focal_lengths(tmp_path: Path, names: tuple[str, str], each: bool) -> None:
    centres = np.array([[90.0, 70.0], [90.0, 70.0]] if each else [[90.0, 70.0]])
    arrays = {"c2w": np.array(C2W, dtype=float), names[0]: np.full((2, 1), 100.0), names[1]: centres}
    np.savez(tmp_path / "a.npz", **arrays)
    K = read(tmp_path / "a.npz", axes="opencv", size=(120, 200)).K
    assert K[1].tolist() == [[50, 0, 45], [0, 50, 35], [0, 0, 1]]


@pytest.mark.parametrize(
    "intrinsics",
    [
        {"K": np.array([[100.0, 0, 100], [0, 100, 60], [0, 0, 1]])},
        {"focals": np.full(2, 100.0)},
        {"intrinsics": np.array([[0.5, 0, 0.5], [0, 50 / 60, 0.5], [0, 0, 1]])},
    ],
    ids=lambda arrays: next(iter(arrays)),
)
def test_in_safetensors_only_intrinsics_are_divided_by_the_size(tmp_path: Path, intrinsics: dict[str, object]) -> None:
    arrays = {"c2w": np.array(C2W, dtype=float), **intrinsics}
    save_file(arrays, tmp_path / "a.safetensors", {"fps": "null", "mean_depth": "null", "axes": "opencv"})
    size = {} if "intrinsics" in intrinsics else {"size": (120, 200)}
    found = read(tmp_path / "a.safetensors", **size)
    assert_same(found, expected())
    assert found.fps is None and found.mean_depth is None


def test_the_files_of_a_camera_are_those_that_are_read(tmp_path: Path) -> None:
    for case, names in {
        "colmap_text": ["cameras.txt", "images.txt", "points3D.txt"],
        "lingbot": ["poses.npy", "intrinsics.npy"],
        "vipe": ["a.npz", "a.npz"],
        "ten": ["a.txt"],
    }.items():
        (tmp_path / case).mkdir()
        camera = BY_HAND[case][1](tmp_path / case)
        (camera / "photo.png").write_bytes(b"x") if camera.is_dir() else None
        assert [file.name for file in camera_files(camera)] == names


def test_settings_say_what_is_wrong_with_them() -> None:
    for settings, found in (
        ({"axes": "opencl"}, "did you mean 'opengl'"),
        ({"direction": "c2v"}, "did you mean"),
        ({"format": "colmp"}, "did you mean 'colmap'"),
        ({"fov_degrees": 180.0}, "found 180"),
        ({"size": (0, 3)}, "size"),
        ({"size": (3, 0)}, "size"),
        ({"name": " "}, "name"),
    ):
        with pytest.raises(InputError, match=found):
            CameraFileSettings(**settings)  # type: ignore[arg-type]
