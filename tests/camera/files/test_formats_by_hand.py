"""Every format reads one hand-written path, gives back what was written, and agrees with independent readers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from format_cases import BY_HAND, HEIGHT, WIDTH, expected
from scipy.spatial.transform import Rotation

from camera.files.colmap import write_colmap
from camera.files.formats import FORMATS, camera_files, declared_pose_frame, read_camera, recognise, write_camera
from camera.files.settings import CAMERA_FORMATS, CameraFileSettings
from camera.moves.trajectories import smooth_random_path
from camera.path import CameraPath
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


def read(file: Path, **settings: object) -> CameraPath:
    return read_camera(file, height=HEIGHT, width=WIDTH, **settings)  # type: ignore[arg-type]


def random_path(*, zoom: bool = False, **changes: object) -> CameraPath:
    path = smooth_random_path(
        seed=3,
        num_frames=7,
        height=HEIGHT,
        width=WIDTH,
        position_low=(-2, -2, -2),
        position_high=(2, 2, 2),
    )
    K = path.K[:1].expand(7, 3, 3).clone()
    if zoom:  # a focal length that changes, pixels that are not square, a centre that is off
        K[:, 0, 0] += torch.arange(7)
        K[:, 1, 1] *= 1.1
        K[:, 0, 2] += 3
    return replace(path, K=K, **changes)  # type: ignore[arg-type]


def assert_same(found: CameraPath, wanted: CameraPath, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found.c2w, wanted.c2w, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.K, wanted.K, atol=1e-5, rtol=0)
    assert (found.height, found.width) == (wanted.height, wanted.width)


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


@pytest.mark.parametrize("case", ["colmap_text", "colmap_binary"])
def test_the_mean_depth_of_a_model_is_that_of_the_points_of_its_first_image(tmp_path: Path, case: str) -> None:
    assert read(BY_HAND[case][1](tmp_path)).mean_depth == pytest.approx(4)


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


@pytest.mark.parametrize("format", [name for name in FILES])
def test_a_path_is_read_at_the_size_that_is_asked_for(tmp_path: Path, format: str) -> None:
    """Twice the pixels, twice the focal length and centre, whatever size the file was written at."""
    path = random_path()
    write_camera(path, tmp_path / FILES[format], format=format)
    found = read_camera(tmp_path / FILES[format], height=2 * HEIGHT, width=2 * WIDTH)
    torch.testing.assert_close(found.K[:, :2], 2 * path.K[:, :2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("binary", [False, True])
def test_colmap_reads_what_is_written_here(tmp_path: Path, binary: bool) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    path = random_path(zoom=True)
    write_colmap(path, tmp_path / "model", binary=binary)
    model = pycolmap.Reconstruction(tmp_path / "model")
    images = sorted(model.images.values(), key=lambda image: image.name)
    assert len(images) == len(path)
    for image, c2w, K in zip(images, path.c2w.numpy(), path.K.numpy(), strict=True):
        np.testing.assert_allclose(image.cam_from_world().inverse().matrix(), c2w[:3], atol=1e-9)
        np.testing.assert_allclose(model.cameras[image.camera_id].calibration_matrix(), K, atol=1e-9)


@pytest.mark.parametrize("binary", [False, True])
def test_what_colmap_writes_is_read_here(tmp_path: Path, binary: bool) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    path = random_path()
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera.create_from_model_name(1, "OPENCV", float(path.K[0, 0, 0]), WIDTH, HEIGHT)
    model.add_camera_with_trivial_rig(camera)
    for index, pose in enumerate(path.c2w.inverse().numpy()):
        image = pycolmap.Image(f"f{20 - index:03d}.png", np.random.default_rng(index).random((5, 2)), 1, 20 - index)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose[:3]))
    (tmp_path / "sparse" / "0").mkdir(parents=True)
    (model.write_binary if binary else model.write_text)(str(tmp_path / "sparse" / "0"))
    found = read(tmp_path)  # the last image comes first by name
    assert_same(found, replace(path, c2w=path.c2w.flip(0)))


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


def test_the_frames_of_a_folder_are_matched_by_name(tmp_path: Path) -> None:
    file = BY_HAND["colmap_text"][1](tmp_path)
    assert_same(read(file, frame_names=["b.png", "a.png"]), expected((1, 0)))
    assert_same(read(file, frame_names=["b.jpg"]), expected((1,)))  # the same frame, converted
    with pytest.raises(InputError, match=r"model: .*none for c\.png, d\.png"):
        read(file, frame_names=["a.png", "c.png", "d.png"])


def test_one_camera_of_a_model_with_folders_of_images(tmp_path: Path) -> None:
    file = BY_HAND["colmap_text"][1](tmp_path)
    images = (file / "images.txt").read_text()
    (file / "images.txt").write_text(images.replace("b.png", "left/1.png").replace("a.png", "right/1.png"))
    assert_same(read(file, name="right"), expected((0,)))
    with pytest.raises(InputError, match="'middle', found them in left, right"):
        read(file, name="middle")
    with pytest.raises(InputError, match="camera_name"):
        read(file, frame_names=["1.png"])


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
        ({"name": " "}, "name"),
    ):
        with pytest.raises(InputError, match=found):
            CameraFileSettings(**settings)  # type: ignore[arg-type]
