"""Whatever is wrong with a camera file is one line that names the file and the place; nothing is guessed or mended."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import BY_HAND, C2W, HEIGHT, W2C, WIDTH
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from camera.files.formats import FORMATS, read_camera, write_camera
from camera.files.settings import CAMERA_FORMATS
from camera.moves.trajectories import orbit
from camera.path import CameraPath
from core.errors import InputError

SHARED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(file: Path, **options: Any) -> CameraPath:
    return read_camera(file, height=HEIGHT, width=WIDTH, **options)


def fails(file: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(InputError) as error:
        read(file, **options)
    message = str(error.value)
    assert message.startswith(str(file.parent)) and "\n" not in message
    assert "does nothing" in message or "expected" in message
    for part in parts:
        assert part in message, message


def edited(case: str, folder: Path, edit: Callable[[Any], Any]) -> Path:
    """A JSON file by hand, changed."""
    file = BY_HAND[case][1](folder)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(edit(content) or content))
    return file


def put(*keys: Any) -> Callable[[Any], None]:
    """An edit that writes the last of `keys` where the others lead to."""

    def edit(content: Any) -> None:
        for key in keys[:-2]:
            content = content[key]
        content[keys[-2]] = keys[-1]

    return edit


def drop(*keys: Any) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit


MIRRORED = [[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (put("frames", []), ["frames", "an empty one"]),
        (drop("frames"), ["found the keys"]),
        (put("frames", 0, "x"), ["frame 0", "object"]),
        (drop("frames", 1, "transform_matrix"), ["frame 1", "'transform_matrix'"]),
        (put("frames", 1, "transform_matrix", [[1]]), ["frame 1 (./images/frame_9.png)", "4x4"]),
        (put("frames", 1, "transform_matrix", 0, 0, "1"), ["frame 1", "number", "'1'"]),
        (put("frames", 1, "transform_matrix", 0, 0, True), ["frame 1", "number", "True"]),
        (put("frames", 1, "transform_matrix", 0, 0, math.nan), ["frame 1", "finite"]),
        (put("frames", 1, "transform_matrix", 0, 0, 10**400), ["frame 1", "finite"]),
        (put("frames", 0, "transform_matrix", MIRRORED), ["frame 0", "determinant -1"]),
        (put("frames", 0, "transform_matrix", 0, 0, 2), ["frame 0", "rotation"]),
        (put("frames", 0, "transform_matrix", 3, [1, 0, 0, 1]), ["frame 0", "last row"]),
        (put("k1", -0.02), ["k1", "undistort"]),
        (put("frames", 0, "p2", 0.1), ["frame 0", "p2"]),
        (put("camera_model", "OPENCV_FISHEYE"), ["pinhole", "OPENCV_FISHEYE"]),
        (put("is_fisheye", True), ["is_fisheye"]),
        (drop("w"), ["fl_x", "w and h"]),
        (put("fl_x", 0), ["fl_x", "above 0"]),
        (put("fl_x", "100"), ["fl_x", "number"]),
        (put("cx", math.inf), ["cx"]),
        (put("camera_angle_x", 3.2), ["camera_angle_x", "below pi"]),
        (put("frames", 0, "file_path", "images/frame_9.png"), ["two for images/frame_9.png"]),
        (put("frames", 0, "file_path", 3), ["frame 0", "file_path"]),
        (put("camera_path", 3), ["camera_path", "object"]),
        (put("camera_path", {"pose_frame": "frist"}), ["pose_frame", "did you mean 'first'"]),
        (put("camera_path", {"pose_frame": "first"}), ["identity", "frame 0"]),
        (put("camera_path", {"fps": "fast"}), ["fps", "'fast'"]),
        (put("camera_path", {"scale_rule": "max"}), ["scale rule"]),
        (put("frame0", {"cam01": ""}), ["nerf and recammaster", "camera_format"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_transforms_json(tmp_path: Path, edit: Callable[[Any], Any], parts: list[str]) -> None:
    fails(edited("nerf", tmp_path, edit), *parts)


def test_an_angle_alone_needs_no_size_and_nothing_at_all_is_named(tmp_path: Path) -> None:
    fails(edited("nerf_angle", tmp_path, drop("camera_angle_x")), "frame 0", "fl_x", "camera_angle_x")


ROWS = "[1 0 0 0] [0 1 0 0] [0 0 1 0] "


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (drop("frame0"), ["frame0"]),
        (put("frame5", {"cam02": ROWS + "[0 0 0 1]"}), ["frame2"]),
        (put("frame01", {"cam02": ROWS + "[0 0 0 1]"}), ["once", "frame01"]),
        (put("fps", 24), ["'fps'"]),
        (put("frame1", {"cam01": ROWS}), ["frame1 cam02", "none"]),
        (put("frame1", "x"), ["frame1", "object"]),
        (put("frame1", "cam02", ROWS), ["frame1 cam02", "4x4"]),
        (put("frame1", "cam02", ROWS + "(0 0 0 1)"), ["frame1 cam02", "'(0 0 0 1)'"]),
        (put("frame1", "cam02", ROWS + "[0 0 x 1]"), ["frame1 cam02", "0 0 x 1"]),
        (put("frame1", "cam02", ROWS + "[0 0 nan 1]"), ["frame1 cam02", "finite"]),
        (put("frame1", "cam02", "[1 0 0 5] [0 1 0 5] [0 0 1 5] [0 0 0 1]"), ["frame1 cam02", "transpose"]),
        (put("frame1", "cam02", "[2 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1]"), ["frame1 cam02", "rotation"]),
        (put("frame1", "cam02", 3), ["frame1 cam02", "4x4"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_recammaster(tmp_path: Path, edit: Callable[[Any], Any], parts: list[str]) -> None:
    fails(edited("recammaster", tmp_path, edit), *parts, fov_degrees=60.0, name="cam02")


def test_a_file_of_several_cameras_and_no_field_of_view(tmp_path: Path) -> None:
    file = BY_HAND["recammaster"][1](tmp_path)
    fails(file, "cam01, cam02", "camera_name", fov_degrees=60.0)
    fails(file, "did you mean 'cam02'", fov_degrees=60.0, name="cam_02")
    fails(file, "field of view", "camera_fov", name="cam02")


@pytest.mark.parametrize(
    ("name", "old", "new", "parts"),
    [
        ("cameras", "PINHOLE", "OPENCV_FISHEYE", ["images.txt line 4", "OPENCV_FISHEYE", "undistort"]),
        ("cameras", "PINHOLE 200 120 100 100 100 60", "RADIAL 200 120 100 100 60 0.1 0", ["no lens distortion", "0.1"]),
        ("cameras", "100 100 100 60", "100 100 100", ["expected 4 parameters"]),
        ("cameras", "100 100 100 60", "-100 100 100 60", ["above 0"]),
        ("cameras", "100 100 100 60", "nan 100 100 60", ["cameras.txt line 2", "'nan'"]),
        ("cameras", "200 120", "0 120", ["images.txt line 4", "above 0", "0x120"]),
        ("cameras", "3 PINHOLE", "3 PINHOLE 200 120 1 1 1 1\n3 PINHOLE", ["cameras.txt line 3", "once"]),
        ("cameras", "200 120", "wide 120", ["cameras.txt line 2", "WIDTH"]),
        ("cameras", "3 PINHOLE 200 120 100 100 100 60", "3 PINHOLE", ["cameras.txt line 2", "2 words"]),
        ("cameras", "3 PIN", "4 PIN", ["line 4", "camera 3"]),
        ("images", " 3 a.png", "", ["images.txt line 4", "words"]),
        ("images", "10 20 5", "10 20", ["images.txt line 5", "triples"]),
        ("images", "10 20 5", "10 20 " + 25 * "9", ["images.txt line 5", "POINT3D_ID"]),
        ("images", "7 1 0 0 0", "7 2 0 0 0", ["images.txt line 4", "length 2"]),
        ("images", "7 1 0 0 0", "7 inf 0 0 0", ["images.txt line 4", "'inf'"]),
        ("images", "a.png", "b.png", ["two for b.png"]),
        ("points3D", "5 1 2 5 0 0 0 0.5", "5 1 2", ["points3D.txt line 1"]),
        ("points3D", "5 1 2 5", "5 1 2 x", ["points3D.txt line 1", "'x'"]),
    ],
)
def test_colmap_text(tmp_path: Path, name: str, old: str, new: str, parts: list[str]) -> None:
    model = BY_HAND["colmap_text"][1](tmp_path)
    file = model / f"{name}.txt"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    fails(model, *parts)


def test_missing_frames_of_a_model_are_named(tmp_path: Path) -> None:
    model = BY_HAND["colmap_text"][1](tmp_path)
    pose = "1 0 0 0 0 0 0 3"
    lines = [f"{i} {pose} frame_{i:04d}.png\n\n" for i in (1, 2, 3, 5, 6, 9)]
    (model / "images.txt").write_text("".join(lines))
    fails(model, "frame_0004.png, frame_0007.png, frame_0008.png")
    every_fifth = [f"{i} {pose} frame_{i:04d}.png\n\n" for i in (5, 10, 15)]
    (model / "images.txt").write_text("".join(every_fifth))
    assert len(read(model)) == 3


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_a_binary_model_that_is_cut_anywhere_is_an_error(tmp_path: Path, name: str) -> None:
    model = BY_HAND["colmap_binary"][1](tmp_path)
    file = model / f"{name}.bin"
    whole = file.read_bytes()
    for length in range(0, len(whole), 2):
        file.write_bytes(whole[:length])
        fails(model, f"{name}.bin", "cut off or damaged")
    file.write_bytes(whole + b"\0")
    fails(model, f"{name}.bin", "1 more")
    file.write_bytes(struct.pack("<Q", 2**63) + whole[8:])
    fails(model, f"{name}.bin")


@pytest.mark.parametrize(("name", "number"), [("cameras", 100.0), ("images", 4.0), ("points3D", 5.0)])
def test_numbers_of_a_binary_model_are_finite(tmp_path: Path, name: str, number: float) -> None:
    model = BY_HAND["colmap_binary"][1](tmp_path)
    file = model / f"{name}.bin"
    file.write_bytes(file.read_bytes().replace(struct.pack("<d", number), struct.pack("<d", math.nan), 1))
    fails(model, f"{name}.bin", "finite")


def test_a_folder_that_is_no_model_and_a_file_of_one(tmp_path: Path) -> None:
    fails(tmp_path, "folder without", "COLMAP")
    fails(tmp_path, "COLMAP", format="colmap")
    model = BY_HAND["colmap_text"][1](tmp_path)
    fails(model / "images.txt", f"name the folder {model}")
    (model / "transforms.json").write_text("{}")
    fails(model, "colmap and nerf", "camera_format")
    (tmp_path / "two" / "sparse").mkdir(parents=True)
    for number in "01":
        (tmp_path / "two" / "sparse" / number).mkdir()
        BY_HAND["colmap_text"][1](tmp_path / "two" / "sparse" / number).rename(
            tmp_path / "two" / "sparse" / f"m{number}"
        )
    fails(tmp_path / "two", "m0", "m1", "name one of them")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0 1 2 3 0 0 0 0\n", ["line 1", "length 0"]),
        ("0 1 2 3 1 1 0 0\n", ["line 1", "length 1.414"]),
        ("1 1 2 3 0 0 0 1\n0 1 2 3 0 0 0 1\n", ["line 2", "grow"]),
        ("1 1 2 3 0 0 0 1\n1 1 2 3 0 0 0 1\n", ["line 2", "grow"]),
        ("# fps: 8\n# fps: 9\n0 1 2 3 0 0 0 1\n", ["line 2", "one fps", "9.0 after 8.0"]),
        ("0 1 2 3 0 0 0 1\n1 1 2 3 0 0 0\n", ["line 2", "found 7"]),
        ("0 1 2 nan 0 0 0 1\n", ["line 1", "'nan'"]),
        ("# fov_degrees: 200\n0 1 2 3 0 0 0 1\n", ["line 1", "below 180"]),
        ("# fov_degrees: 50\n0 1 2 3 0 0 0 1\n", ["50 degrees", "camera_fov"]),
    ],
)
def test_tum(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "a.txt").write_text(text)
    fails(tmp_path / "a.txt", *parts, fov_degrees=60.0)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("0 .5 .5 .5 .5 0 0  1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 2", ["line 2", "last row"]),
        ("0 .5 .5 .5 .5 0 0  1 0 0 0 0 1 0 0 0 0 2 0 0 0 0 1", ["line 2", "rotation"]),
        ("0 50 50 .5 .5 0 1  1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", ["line 2", "distortion"]),
        ("0 500 50 .5 .5 0 0  1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1", ["line 2", "pixels"]),
        ("0 .5 .5 .5 .5 0 0  1 0 0 0 0 1 0 0 0 0 1 0 0 0 0", ["line 2", "found 22"]),
    ],
)
def test_comfy(tmp_path: Path, row: str, parts: list[str]) -> None:
    (tmp_path / "a.txt").write_text("0 .5 .5 .5 .5 0 0  1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1\n" + row)
    fails(tmp_path / "a.txt", *parts)


POSES, FOUR = np.array(C2W, dtype=float), np.array([100.0, 100, 100, 60])
GOOD: dict[str, Any] = {
    "poses": POSES,
    "intrinsics": FOUR,
    "height": 120,
    "width": 200,
    "direction": "c2w",
    "axes": "opencv",
}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"direction": None}, ["direction", "camera_direction", "c2w or w2c"]),
        ({"axes": None}, ["axes", "camera_axes"]),
        ({"axes": "opencl"}, ["axes", "did you mean"]),
        ({"direction": "w2c", "poses": None, "c2w": POSES}, ["direction", "c2w", "w2c"]),
        ({"width": None}, ["intrinsics", "camera_size"]),
        ({"height": 12.5}, ["height", "whole"]),
        ({"poses": None}, ["poses", "found height, intrinsics, width"]),
        ({"c2w": POSES}, ["one array of poses", "c2w and poses"]),
        ({"poses": POSES[0]}, ["poses", "[4, 4]"]),
        ({"poses": POSES[:0]}, ["poses", "[0, 4, 4]"]),
        ({"poses": POSES[None].repeat(2, 0)}, ["poses", "[2, 2, 4, 4]"]),
        ({"poses": POSES * np.array([[1.1], [1], [1], [1]])}, ["frame 0 of poses", "rotation"]),
        ({"poses": np.stack([POSES[0], POSES[1].T])}, ["frame 1 of poses", "last row"]),
        ({"poses": POSES * np.nan}, ["frame 0 of poses", "finite"]),
        ({"poses": POSES.astype(str)}, ["found"]),
        ({"intrinsics": np.ones((3, 4)) * 50}, ["intrinsics", "found 3"]),
        ({"intrinsics": np.ones(5)}, ["intrinsics", "[5]"]),
        ({"intrinsics": FOUR / 200}, ["intrinsics", "multiply"]),
        ({"intrinsics": FOUR * np.nan}, ["intrinsics", "finite"]),
        ({"intrinsics": FOUR * [1, -1, 1, 1]}, ["intrinsics", "above 0"]),
        ({"intrinsics": np.ones((3, 3)) * 50}, ["intrinsics", "[fx, 0, cx]"]),
        ({"intrinsics": None}, ["field of view", "camera_fov"]),
        ({"intrinsics": None, "focals": np.ones((2, 2))}, ["focals", "[2, 2]"]),
        ({"inds": np.array([0, 2])}, ["inds", "without 1"]),
        ({"inds": np.array([1, 0])}, ["inds", "order"]),
        ({"pose_frame": "first"}, ["identity"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_arrays(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    content = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    np.savez(tmp_path / "a.npz", **content)
    fails(tmp_path / "a.npz", *parts)


def test_what_the_user_says_may_not_contradict_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **GOOD)
    assert len(read(tmp_path / "a.npz", direction="c2w", axes="opencv", size=(120, 200))) == 2
    fails(tmp_path / "a.npz", "c2w", "w2c", direction="w2c")
    fails(tmp_path / "a.npz", "opencv", "opengl", axes="opengl")
    fails(tmp_path / "a.npz", "200x120", "200x100", size=(100, 200))
    fails(tmp_path / "a.npz", "camera_fov does nothing", fov_degrees=60.0)


def test_a_bare_npy_says_how_to_name_it(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", POSES)
    fails(tmp_path / "a.npy", "camera_direction")
    fails(tmp_path / "a.npy", "camera_axes", direction="c2w")
    fails(tmp_path / "a.npy", "camera_fov", direction="c2w", axes="opengl")
    assert len(read(tmp_path / "a.npy", direction="c2w", axes="opengl", fov_degrees=60.0)) == 2
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    fails(tmp_path / "a.npy", "write it again")


def test_safetensors(tmp_path: Path) -> None:
    file = BY_HAND["omnicam"][1](tmp_path)
    fails(file, "camera_direction")
    fails(file, "camera_axes", direction="w2c")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    fails(file, "safetensors", direction="w2c", axes="opencv")
    save_file({"w2c": np.array(W2C, dtype=float), "intrinsics": FOUR}, file)
    fails(file, "found 100", "looks like pixels", axes="opencv")


SETTINGS = {"direction": "c2w", "axes": "opencv", "fov_degrees": 60.0, "size": (60, 100), "name": "cam02"}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_setting_that_would_do_nothing_is_refused(tmp_path: Path, case: str) -> None:
    format, write, wanted = BY_HAND[case]
    camera = write(tmp_path)
    for setting, value in SETTINGS.items():
        if setting not in FORMATS[format].settings:
            fails(camera, f"camera_{setting.removesuffix('_degrees')}", "does nothing", **{**wanted, setting: value})


def test_writers_refuse_what_they_cannot_do(tmp_path: Path) -> None:
    path = orbit(30, radius=1.0, num_frames=3, height=HEIGHT, width=WIDTH)
    with pytest.raises(InputError, match="did you mean 'colmap'"):
        write_camera(path, tmp_path / "a", format="colmp")
    with pytest.raises(InputError, match=r"\.npz"):
        write_camera(path, tmp_path / "a.npy", format="arrays")
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"photo\.jpg"):
        write_camera(path, tmp_path / "album", format="colmap")
    assert [file.name for file in tmp_path.rglob("*")] == ["album", "photo.jpg"]


# ---- by the hundred --------------------------------------------------------------------------------------------------


def reads_or_says_why(file: Path, **options: Any) -> None:
    try:
        read(file, **options)
    except InputError as error:
        assert "\n" not in str(error)


ANY_SETTINGS = [{}, {"direction": "w2c", "axes": "opengl", "size": (120, 200)}, {"fov_degrees": 60.0, "name": "cam02"}]


@SHARED
@given(data=st.data())
def test_no_damage_to_a_file_is_more_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of a good file exchanged, cut out or put in, read under its own and under every other name."""
    case = data.draw(st.sampled_from(sorted(BY_HAND)))
    _, write, own = BY_HAND[case]
    camera = write(tmp_path_factory.mktemp("damaged"))
    file = data.draw(st.sampled_from(sorted(camera.iterdir()))) if camera.is_dir() else camera
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 12)))
        content[start:end] = data.draw(st.binary(max_size=12))
    file.write_bytes(content)
    format = data.draw(st.sampled_from(("auto", *FORMATS)))
    reads_or_says_why(camera, format=format, **data.draw(st.sampled_from([own, *ANY_SETTINGS])))


@SHARED
@given(st.text(alphabet='0123456789.-e #:,[]{}"\nanif', max_size=80), st.sampled_from(CAMERA_FORMATS))
def test_no_text_is_more_than_an_error(tmp_path_factory: pytest.TempPathFactory, text: str, format: str) -> None:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text(text)
    reads_or_says_why(file, format=format)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", ROWS + "[0 0 0 1]", "OPENCV"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["frames", "transform_matrix", "frame0", "cam01", "w", "h", "fl_x", "camera_path", "fps", "k1"]
            ),
            inner,
            max_size=4,
        )
        | st.just(MIRRORED)
        | st.just(C2W[1])
    ),
    max_leaves=12,
)


@SHARED
@given(JSON, st.sampled_from(["auto", "nerf", "recammaster"]))
def test_no_json_is_more_than_an_error(tmp_path_factory: pytest.TempPathFactory, content: Any, format: str) -> None:
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_text(json.dumps(content))
    reads_or_says_why(file, format=format, **({"fov_degrees": 60.0} if format == "recammaster" else {}))


@pytest.mark.parametrize(
    "text", ["[" * 100000, '{"frames": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}', "{", "[]", '{"a": [1,]}']
)
def test_json_that_parsers_choke_on(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    fails(tmp_path / "a.json")
