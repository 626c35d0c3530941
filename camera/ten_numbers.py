"""The 10-number camera as a tensor: position, two columns of the rotation, field of view.

`x y z  r00 r10 r20  r01 r11 r21  fov`: the first three numbers are the camera's position in the world, the next three
its right axis and the three after them its down axis in world coordinates (the first two columns of the camera-to-world
rotation), the last one its field of view in degrees. camera/files/ten.py reads and writes them as text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camera.path import FovAxis, intrinsics_from_fov


def ten_numbers(c2w: Tensor, K: Tensor, width: int) -> Tensor:
    """The ten numbers of each camera: position, right axis, down axis, horizontal field of view in degrees.

    Args:
        c2w: camera-to-world poses, [..., 4, 4].
        K: intrinsics in pixels, [..., 3, 3]. Only fx counts: ten numbers say nothing of cx, cy and fy.
        width: pixels of the frame that K belongs to.

    Returns:
        [..., 10]; the two axes are orthonormal, as those of c2w are.
    """
    fov = torch.rad2deg(2 * torch.atan(width / (2 * K[..., 0, 0])))  # [...]
    return torch.cat([c2w[..., :3, 3], c2w[..., :3, 0], c2w[..., :3, 1], fov[..., None]], -1)


def from_ten_numbers(
    numbers: Tensor, *, height: int, width: int, fov_axis: FovAxis = "horizontal"
) -> tuple[Tensor, Tensor]:
    """Poses and intrinsics of ten numbers, by Gram-Schmidt: the right axis stays, the down axis turns orthogonal to it.

    Args:
        numbers: [T, 10]; the rotation vectors need not be unit or orthogonal, but neither zero nor parallel.
        height: pixels.
        width: pixels.
        fov_axis: the side of the frame that the field of view spans.

    Returns:
        c2w [T, 4, 4] and K [T, 3, 3], in the dtype of `numbers`.
    """
    first, second = scaled_to_one(numbers[:, 3:6]), scaled_to_one(numbers[:, 6:9])  # [T, 3]
    right = first / first.norm(dim=-1, keepdim=True)
    down = second - (second * right).sum(-1, keepdim=True) * right
    down = down / down.norm(dim=-1, keepdim=True)
    c2w = torch.eye(4, dtype=numbers.dtype).repeat(len(numbers), 1, 1)  # [T, 4, 4]
    c2w[:, :3, :3] = torch.stack([right, down, torch.linalg.cross(right, down)], -1)
    c2w[:, :3, 3] = numbers[:, :3]
    return c2w, intrinsics_from_fov(numbers[:, 9], height=height, width=width, axis=fov_axis)


def scaled_to_one(vectors: Tensor) -> Tensor:
    """Vectors [..., 3] divided by their largest component, so that squares of it neither overflow nor vanish."""
    return vectors / vectors.abs().amax(-1, keepdim=True)
