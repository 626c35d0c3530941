"""COLMAP models: COLMAP and this code read each other, images are found by name, points in view give the depth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from format_cases import BY_HAND, HEIGHT, WIDTH, assert_same, expected, random_path, read

from camera.files.colmap import write_colmap
from camera.files.colmap_model import CAMERA_MODELS, NUM_FOCALS
from camera.files.formats import camera_files
from camera.files.frame_names import frame_order
from core.errors import InputError


@pytest.mark.parametrize("case", ["colmap_text", "colmap_binary"])
def test_the_mean_depth_of_a_model_is_that_of_the_points_of_its_first_image(tmp_path: Path, case: str) -> None:
    assert read(BY_HAND[case][1](tmp_path)).mean_depth == pytest.approx(4)


def test_points_behind_the_first_camera_have_no_mean_depth(tmp_path: Path) -> None:
    model = BY_HAND["colmap_text"][1](tmp_path)
    (model / "points3D.txt").write_text("5 1 2 -5 0 0 0 0.5 7 0\n6 3 2 -9 0 0 0 0.5 7 1\n")
    assert read(model).mean_depth is None


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


def test_the_camera_models_are_colmap_s_own(tmp_path: Path) -> None:
    """Numbers and lengths of all models, and where focal lengths and centre stand in those that are pinholes."""
    pycolmap = pytest.importorskip("pycolmap")
    models = {name: model for name, model in pycolmap.CameraModelId.__members__.items() if name != "INVALID"}
    cameras = {name: pycolmap.Camera.create_from_model_name(1, name, 90.0, WIDTH, HEIGHT) for name in models}
    assert {name: (int(models[name]), len(cameras[name].params)) for name in models} == CAMERA_MODELS
    for name in NUM_FOCALS:
        camera, folder = cameras[name], tmp_path / name
        params = camera.params.copy()
        for place, index in enumerate([*camera.focal_length_idxs(), *camera.principal_point_idxs()]):
            params[index] = 40.0 + place
        camera.params = params
        model = pycolmap.Reconstruction()
        model.add_camera_with_trivial_rig(camera)
        model.add_image_with_trivial_frame(pycolmap.Image("a.png", np.empty((0, 2)), 1, 1), pycolmap.Rigid3d())
        folder.mkdir()
        model.write_binary(str(folder))
        np.testing.assert_allclose(read(folder).K[0], camera.calibration_matrix())


@pytest.mark.parametrize("place", [".", "sparse", "sparse/0", "0"])
def test_a_model_is_found_where_reconstructions_put_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "clip" / place).parent.mkdir(parents=True, exist_ok=True)
    BY_HAND["colmap_text"][1](tmp_path).rename(tmp_path / "clip" / place)
    assert_same(read(tmp_path / "clip"), expected())
    names = [file.name for file in camera_files(tmp_path / "clip")]
    assert names == ["cameras.txt", "images.txt", "points3D.txt"]


def test_a_binary_model_goes_before_a_text_model_in_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    model, binary = BY_HAND["colmap_text"][1](tmp_path), BY_HAND["colmap_binary"][1](tmp_path / "b")
    (model / "images.txt").write_text("older than the binary one")
    for file in binary.iterdir():
        file.rename(model / file.name)
    assert_same(read(model), expected())


def test_a_name_may_have_spaces(tmp_path: Path) -> None:
    file = BY_HAND["colmap_text"][1](tmp_path)
    (file / "images.txt").write_text((file / "images.txt").read_text().replace("a.png", "my first a.png"))
    assert_same(read(file, frame_names=["my first a.png", "b.png"]), expected())


def test_the_frames_of_a_folder_are_matched_by_name(tmp_path: Path) -> None:
    file = BY_HAND["colmap_text"][1](tmp_path)
    assert_same(read(file, frame_names=["b.png", "a.png"]), expected((1, 0)))
    assert_same(read(file, frame_names=["b.jpg"]), expected((1,)))  # the same frame, converted
    with pytest.raises(InputError, match=r"model: .*none for c\.png, d\.png"):
        read(file, frame_names=["a.png", "c.png", "d.png"])


def test_one_camera_of_a_model_with_folders_of_images(tmp_path: Path) -> None:
    file = BY_HAND["colmap_text"][1](tmp_path)
    images = (file / "images.txt").read_text()
    (file / "images.txt").write_text(images.replace("b.png", "rightmost/1.png").replace("a.png", "right/1.png"))
    for name in ("right", "right/"):
        assert_same(read(file, name=name), expected((0,)))
    with pytest.raises(InputError, match="'middle', found them in right, rightmost"):
        read(file, name="middle")
    with pytest.raises(InputError, match="camera_name"):
        read(file, frame_names=["1.png"])


@pytest.mark.parametrize(
    ("names", "wanted", "order"),
    [
        (["x/a.jpg", "x/a.png"], ["a.png"], [1]),  # without folders before without suffix
        (["y/a.png", "x/a.png"], ["x/a.png"], [1]),  # as it stands before anything else
        (["f_10.png", "f_9.png", "f_8.png"], None, [2, 1, 0]),
        (["a_1.png", "a_2.png", "b_9.png"], None, [0, 1, 2]),  # two series, so nothing is missing between them
        (["x2/f_1.png", "x10/f_2.png", "x2/f_3.png"], None, [0, 2, 1]),
    ],
)
def test_the_order_of_images(names: list[str], wanted: list[str] | None, order: list[int]) -> None:
    assert frame_order(names, wanted, file=Path("model")) == order
