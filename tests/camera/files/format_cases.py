"""Camera files written by hand from their formats' definitions, all of one and the same two-frame path; any path to
write, and how paths are compared.

Frame 0: the camera stands at (1, 2, 3) and looks along world z, unturned: c2w = [1 | (1, 2, 3)].
Frame 1: it stands at (1, 2, 4), turned 90 degrees to the right about its own down axis: it looks along world x, its
right axis is world -z, its down axis still world y. With columns right, down, forward:

    R = [[ 0, 0, 1],        c2w translation (1, 2, 4)
         [ 0, 1, 0],        R^T = [[0, 0, -1], [0, 1, 0], [1, 0, 0]]
         [-1, 0, 0]]        w2c translation -R^T (1, 2, 4) = (4, -2, -1)

The quaternion of R: half the angle is 45 degrees about +y: (x, y, z, w) = (0, s, 0, s) with s = sqrt(1/2).
The frame is 60 pixels high and 100 wide; fx = fy = 50, so the horizontal field of view is 2 atan(1) = 90 degrees; the
principal point is in the middle, (50, 30).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from camera.files.formats import read_camera
from camera.moves.trajectories import smooth_random_path
from camera.path import CameraPath

HEIGHT, WIDTH = 60, 100
S = math.sqrt(0.5)
C2W = [
    [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]],
    [[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 4], [0, 0, 0, 1]],
]
W2C = [
    [[1, 0, 0, -1], [0, 1, 0, -2], [0, 0, 1, -3], [0, 0, 0, 1]],
    [[0, 0, -1, 4], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]],
]
K = [[50, 0, 50], [0, 50, 30], [0, 0, 1]]


def expected(frames: tuple[int, ...] = (0, 1)) -> CameraPath:
    c2w = torch.tensor(C2W, dtype=torch.float64)[list(frames)]
    return CameraPath(
        c2w=c2w, K=torch.tensor(K, dtype=torch.float64).repeat(len(c2w), 1, 1), height=HEIGHT, width=WIDTH
    )


def ten(folder: Path) -> Path:
    """Position, right axis, down axis, field of view."""
    return _text(folder, "1 2 3  1 0 0  0 1 0  90\n1 2 4  0 0 -1  0 1 0  90\n")


def re10k(folder: Path) -> Path:
    """World-to-camera rows; fx = 50 / 100, fy = 50 / 60."""
    fy = 50 / 60
    return _text(
        folder,
        f"https://example.invalid/clip\n0 0.5 {fy} 0.5 0.5 0 0  1 0 0 -1  0 1 0 -2  0 0 1 -3\n"
        f"33 0.5 {fy} 0.5 0.5 0 0  0 0 -1 4  0 1 0 -2  1 0 0 -1\n",
    )


def comfy(folder: Path) -> Path:
    """The same seven columns, then camera-to-world with its last row."""
    fy = 50 / 60
    return _text(
        folder,
        f"0 0.5 {fy} 0.5 0.5 0 0  1 0 0 1  0 1 0 2  0 0 1 3  0 0 0 1\n"
        f"0 0.5 {fy} 0.5 0.5 0 0  0 0 1 1  0 1 0 2  -1 0 0 4  0 0 0 1\n",
    )


def tum(folder: Path) -> Path:
    """Seconds, position, quaternion with the real part last."""
    return _text(folder, f"# timestamp tx ty tz qx qy qz qw\n0.0 1 2 3 0 0 0 1\n0.0625 1 2 4 0 {S} 0 {S}\n")


def recammaster(folder: Path) -> Path:
    """Unreal: world x forward, y right, z up, in centimetres; row vectors, rows forward, right, up, position.

    A point of our world (x right, y down, z forward) is (forward, right, up) = (z, x, -y): (1, 2, 3) m is (300, 100,
    -200) cm. Frame 0: forward (0,0,1) -> (1,0,0); right (1,0,0) -> (0,1,0); up (0,-1,0) -> (0,0,1). Frame 1: forward
    (1,0,0) -> (0,1,0); right (0,0,-1) -> (-1,0,0); up as before.
    """
    content = {
        "frame0": {
            "cam01": "[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1] ",
            "cam02": "[1 0 0 0] [0 1 0 0] [0 0 1 0] [300 100 -200 1] ",
        },
        "frame1": {
            "cam01": "[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1] ",
            "cam02": "[0 1 0 0] [-1 0 0 0] [0 0 1 0] [400 100 -200 1] ",
        },
    }
    return _json(folder, content)


def nerf(folder: Path) -> Path:
    """OpenGL: the second and third columns (up, backward) are the negatives of down and forward.

    Stored at twice the size (200 x 120, so fl 100), and frame 1 before frame 0: file_path says the order.
    """
    first = [[1, 0, 0, 1], [0, -1, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1]]
    second = [[0, 0, -1, 1], [0, -1, 0, 2], [-1, 0, 0, 4], [0, 0, 0, 1]]
    frames = [
        {"file_path": "./images/frame_10.png", "transform_matrix": second},
        {"file_path": "./images/frame_9.png", "transform_matrix": first},
    ]
    content = {"w": 200, "h": 120, "fl_x": 100.0, "fl_y": 100.0, "cx": 100, "cy": 60, "k1": 0, "aabb_scale": 16}
    return _json(folder, {**content, "frames": frames})


def nerf_angle(folder: Path) -> Path:
    """The synthetic scenes' form: only the horizontal field of view, in radians."""
    first = [[1, 0, 0, 1], [0, -1, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1]]
    second = [[0, 0, -1, 1], [0, -1, 0, 2], [-1, 0, 0, 4], [0, 0, 0, 1]]
    frames = [{"file_path": f"./train/r_{i}", "transform_matrix": pose} for i, pose in enumerate((first, second))]
    return _json(folder, {"camera_angle_x": math.pi / 2, "frames": frames})


def colmap_text(folder: Path) -> Path:
    """World-to-camera, real part first; the inverse rotation has the quaternion (s, 0, -s, 0). Twice the size.

    Image 7 is frame 0: names give the order. It sees the points at (1, 2, 5) and (3, 2, 9), whose depths are 2 and 6.
    """
    folder = folder / "model"
    folder.mkdir()
    (folder / "cameras.txt").write_text("# cameras\n3 PINHOLE 200 120 100 100 100 60\n")
    (folder / "images.txt").write_text(
        f"# images\n4 {S} 0 -{S} 0 4 -2 -1 3 b.png\n\n7 1 0 0 0 -1 -2 -3 3 a.png\n10 20 5 11 21 6 12 22 -1\n"
    )
    (folder / "points3D.txt").write_text("5 1 2 5 0 0 0 0.5 7 0\n6 3 2 9 0 0 0 0.5 7 1\n7 1 2 100 0 0 0 0.5 4 0 4 1\n")
    return folder


def colmap_binary(folder: Path) -> Path:
    """The same model, byte by byte; a radial camera whose distortion is zero."""
    folder = folder / "model"
    folder.mkdir()
    camera = struct.pack("<IiQQ", 3, 2, 200, 120) + struct.pack("<4d", 100, 100, 60, 0)
    (folder / "cameras.bin").write_bytes(struct.pack("<Q", 1) + camera)
    second = struct.pack("<I7dI", 4, S, 0, -S, 0, 4, -2, -1, 3) + b"b.png\0" + struct.pack("<Q", 0)
    points = struct.pack("<Q", 3) + struct.pack("<ddqddqddq", 10, 20, 5, 11, 21, 6, 12, 22, -1)
    first = struct.pack("<I7dI", 7, 1, 0, 0, 0, -1, -2, -3, 3) + b"a.png\0" + points
    (folder / "images.bin").write_bytes(struct.pack("<Q", 2) + second + first)
    bodies = [
        struct.pack("<Q3d3BdQ", number, *xyz, 0, 0, 0, 0.5, 1) + struct.pack("<II", 7, 0)
        for number, xyz in ((5, (1, 2, 5)), (6, (3, 2, 9)))
    ]
    (folder / "points3D.bin").write_bytes(struct.pack("<Q", 2) + b"".join(bodies))
    return folder


def lingbot(folder: Path) -> Path:
    """A folder with poses.npy (c2w, OpenCV) and intrinsics.npy [N, 4] in pixels of 200 x 120, which nothing records."""
    folder = folder / "clip"
    folder.mkdir()
    np.save(folder / "poses.npy", np.array(C2W, dtype=np.float32))
    np.save(folder / "intrinsics.npy", np.array([[100, 100, 100, 60]] * 2, dtype=np.float32))
    return folder


def vggt(folder: Path) -> Path:
    """extrinsic [1, N, 3, 4] world-to-camera and intrinsic [1, N, 3, 3] in pixels of 200 x 120."""
    K2 = [[100, 0, 100], [0, 100, 60], [0, 0, 1]]
    np.savez(folder / "a.npz", extrinsic=np.array([W2C])[:, :, :3], intrinsic=np.array([[K2, K2]]), depth=np.ones(3))
    return folder / "a.npz"


def dust3r(folder: Path) -> Path:
    """im_poses [N, 4, 4] camera-to-world and focals [N] in pixels of 200 x 120, centred."""
    np.savez(folder / "a.npz", im_poses=np.array(C2W, dtype=np.float64), focals=np.array([[100.0], [100.0]]))
    return folder / "a.npz"


def vipe(folder: Path) -> Path:
    """pose/NAME.npz and intrinsics/NAME.npz, each with data and the numbers of its frames."""
    for name in ("pose", "intrinsics"):
        (folder / name).mkdir()
    np.savez(folder / "pose" / "a.npz", data=np.array(C2W, dtype=np.float32), inds=np.arange(2))
    np.savez(folder / "intrinsics" / "a.npz", data=np.array([[100.0, 100, 100, 60]] * 2), inds=np.arange(2))
    return folder / "pose" / "a.npz"


def omnicam(folder: Path) -> Path:
    """extrinsics [N, 4, 4] world-to-camera, intrinsics [4] divided by width and height."""
    intrinsics = np.array([0.5, 50 / 60, 0.5, 0.5])
    save_file({"extrinsics": np.array(W2C, dtype=np.float32), "intrinsics": intrinsics}, folder / "a.safetensors")
    return folder / "a.safetensors"


def pytorch3d(folder: Path) -> Path:
    """The same for a camera with the axes left, up, forward: the first two rows of w2c change their sign."""
    extrinsics = np.diag([-1.0, -1, 1, 1]) @ np.array(W2C, dtype=np.float64)
    save_file({"extrinsics": extrinsics, "intrinsics": np.array([0.5, 50 / 60, 0.5, 0.5])}, folder / "a.safetensors")
    return folder / "a.safetensors"


CONVENTIONS: dict[str, object] = {"direction": "c2w", "axes": "opencv"}
BY_HAND: dict[str, tuple[str, Callable[[Path], Path], dict[str, object]]] = {  # case -> format, writer, settings
    "ten": ("ten", ten, {}),
    "re10k": ("re10k", re10k, {}),
    "comfy": ("comfy", comfy, {}),
    "tum": ("tum", tum, {"fov_degrees": 90.0}),
    "recammaster": ("recammaster", recammaster, {"fov_degrees": 90.0, "name": "cam02"}),
    "nerf": ("nerf", nerf, {}),
    "nerf_angle": ("nerf", nerf_angle, {}),
    "colmap_text": ("colmap", colmap_text, {}),
    "colmap_binary": ("colmap", colmap_binary, {}),
    "lingbot": ("arrays", lingbot, {**CONVENTIONS, "size": (120, 200)}),
    "vggt": ("arrays", vggt, {"direction": "w2c", "axes": "opencv", "size": (120, 200)}),
    "dust3r": ("arrays", dust3r, {**CONVENTIONS, "size": (120, 200)}),
    "vipe": ("arrays", vipe, {**CONVENTIONS, "size": (120, 200)}),
    "omnicam": ("safetensors", omnicam, {"direction": "w2c", "axes": "opencv"}),
    "pytorch3d": ("safetensors", pytorch3d, {"direction": "w2c", "axes": "pytorch3d"}),
}


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


def _text(folder: Path, text: str) -> Path:
    (folder / "a.txt").write_text(text)
    return folder / "a.txt"


def _json(folder: Path, content: object) -> Path:
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"
