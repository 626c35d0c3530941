"""Matrices as camera files hold them: which way they map, which axes their camera has, whether they are rotations.

A c2w matrix of another convention becomes one with OpenCV axes (x right, y down, z forward) by a change of the camera's
axes, c2w C, with a column of C for each OpenCV axis. Unreal's world is left-handed, so there the world changes with the
camera: C^T c2w C, which makes x right, y down and z forward of the world as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from camera.files.settings import Axes, Direction
from camera.path import CameraPath, inverse_poses, rotation_error
from core.errors import InputError

FILE_ROTATION_TOLERANCE = 2e-3  # matrices printed with three decimals pass
LARGEST_FOCAL = 50.0  # widths; a longer lens than any, so the number is in pixels
SMALLEST_PIXEL_FOCAL = 10.0  # pixels; a wider lens than any, so the number is divided by the frame's size

_AXES: dict[Axes, list[list[float]]] = {  # rows: the file's axes, written in OpenCV's right, down, forward
    "opencv": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "opengl": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],  # right, up, backward
    "pytorch3d": [[-1, 0, 0], [0, -1, 0], [0, 0, 1]],  # left, up, forward
    "unreal": [[0, 0, 1], [1, 0, 0], [0, -1, 0]],  # forward, right, up
}


def to_opencv(c2w: Tensor, axes: Axes) -> Tensor:
    """Camera-to-world poses with OpenCV axes from poses with other ones, [..., 4, 4]; see the module's docstring."""
    C = torch.eye(4, dtype=c2w.dtype)
    C[:3, :3] = torch.tensor(_AXES[axes], dtype=c2w.dtype)
    return C.mT @ c2w @ C if axes == "unreal" else c2w @ C


def from_opencv(c2w: Tensor, axes: Axes) -> Tensor:
    """The inverse of `to_opencv`, [..., 4, 4]."""
    C = torch.eye(4, dtype=c2w.dtype)
    C[:3, :3] = torch.tensor(_AXES[axes], dtype=c2w.dtype)
    return C @ c2w @ C.mT if axes == "unreal" else c2w @ C.mT


def nearest_rotations(matrices: Tensor) -> Tensor:
    """The rotation nearest to each matrix that is almost one, [..., 3, 3]."""
    left, _, right = torch.linalg.svd(matrices)
    return left @ right


def poses_from_matrices(matrices: Tensor, *, direction: Direction, axes: Axes, where: list[str]) -> Tensor:
    """Camera-to-world poses with OpenCV axes from the matrices of a file.

    Args:
        matrices: [T, 4, 4] or [T, 3, 4], float64; column vectors, translation in the last column.
        direction: what they map.
        axes: of the camera.
        where: what an error calls each of them, file included.

    Returns:
        c2w, [T, 4, 4]; the rounding of printed digits is taken away from the rotations.

    Raises:
        InputError: a number that is not finite, a 3x3 part that is no rotation, a last row that is not 0 0 0 1.
    """
    poses = torch.eye(4, dtype=torch.float64).repeat(len(matrices), 1, 1)
    poses[:, :3] = matrices[:, :3]
    finite = matrices.isfinite().flatten(1).all(-1)
    if not finite.all():
        raise InputError(f"{where[_first(~finite)]}: expected finite numbers in the matrix, found NaN or infinity")
    rotation = poses[:, :3, :3]
    wrong = ~(rotation_error(rotation) < FILE_ROTATION_TOLERANCE)
    if wrong.any():
        first = _first(wrong)
        transposed = matrices.shape[1] == 4 and matrices[first, 3, :3].abs().max() > 1e-6
        advice = "; it looks transposed (translation in the last row)" if transposed else ""
        raise InputError(
            f"{where[first]}: expected a matrix whose 3x3 part is a rotation, found one with determinant "
            f"{torch.linalg.det(rotation[first]):.4g}{advice}; take scale and mirroring out of it"
        )
    if matrices.shape[1] == 4:
        last_row = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        wrong = (matrices[:, 3] - last_row).abs().amax(-1) > 1e-6
        if wrong.any():
            found = " ".join(f"{number:.4g}" for number in matrices[_first(wrong), 3].tolist())
            raise InputError(
                f"{where[_first(wrong)]}: expected a last row of 0 0 0 1, found {found}; write the matrix for column "
                "vectors, with the translation in its last column"
            )
    poses[:, :3, :3] = nearest_rotations(rotation)
    return to_opencv(inverse_poses(poses) if direction == "w2c" else poses, axes)


def pinhole(numbers: Tensor) -> Tensor:
    """K [T, 3, 3] of fx, fy, cx, cy [T, 4]."""
    K = numbers.new_zeros(len(numbers), 3, 3)
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2] = numbers.unbind(-1)
    K[:, 2, 2] = 1
    return K


def focal_and_centre(K: Tensor) -> Tensor:
    """fx, fy, cx, cy [T, 4] of K [T, 3, 3]."""
    return torch.stack([K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]], -1)


def pixel_intrinsics(numbers: Tensor, *, height: float, width: float) -> Tensor:
    """K [T, 3, 3] in pixels from fx, cx over the width and fy, cy over the height, [T, 4] in the order fx fy cx cy."""
    return pinhole(numbers * torch.tensor([width, height, width, height], dtype=numbers.dtype))


def normalised_intrinsics(path: CameraPath) -> Tensor:
    """fx, fy, cx, cy divided by the width or height of the path's frame, [T, 4]."""
    size = torch.tensor([path.width, path.height, path.width, path.height], dtype=torch.float64)
    return focal_and_centre(path.K) / size


def frame_places(file: Path, num_frames: int, key: str = "") -> list[str]:
    """What errors call the frames of a file without names: "poses.npz frame 3 of extrinsics"."""
    return [f"{file} frame {frame}{f' of {key}' if key else ''}" for frame in range(num_frames)]


def _first(mask: Tensor) -> int:
    return int(rearrange(mask.nonzero(), "n 1 -> n")[0])
