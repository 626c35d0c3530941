"""The one form of a camera path: poses and intrinsics, and what resizing, cropping and sampling frames do to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from camera.interpolate import interpolate
from camera.rays import scale_intrinsics
from core.errors import InputError

PoseFrame = Literal["scene", "first"]
FovAxis = Literal["horizontal", "vertical"]

ROTATION_TOLERANCE = 1e-5  # room for poses that went through float32 once


@dataclass(frozen=True, kw_only=True, eq=False)
class CameraPath:
    """Where a pinhole camera stands, looks and zooms in every frame of a clip.

    Args:
        c2w: camera-to-world poses, float64 [T, 4, 4], OpenCV axes (x right, y down, z forward).
        K: intrinsics in pixels of a frame of `height` x `width`, float64 [T, 3, 3]; the centre of the first pixel is at
            (0.5, 0.5), so the centre of the frame is at (width / 2, height / 2).
        height: pixels.
        width: pixels.
        fps: frames per second; None where no clock belongs to the path.
        pose_frame: "scene": coordinates as given, of one captured place; "first": relative to the first frame, whose
            pose is then the identity.
        scale_rule: how translations were scaled (see camera/scale.py); "none" means that they are as given.
        mean_depth: how far away what the first camera of the file sees is on average, along its forward axis and in the
            units of the positions; None where nobody knows. Parts of a path keep it: it is the scale of the place.

    Raises:
        InputError: a pose that is no rotation, a number that is not finite, a focal length or mean depth that is not
            positive; the message names the frame.
    """

    c2w: Tensor
    K: Tensor
    height: int
    width: int
    fps: float | None = None
    pose_frame: PoseFrame = "scene"
    scale_rule: str = "none"
    mean_depth: float | None = None

    def __post_init__(self) -> None:
        num_frames = self.c2w.shape[0]
        if self.c2w.shape != (num_frames, 4, 4) or self.K.shape != (num_frames, 3, 3) or num_frames == 0:
            raise ValueError(f"expected c2w [T, 4, 4] and K [T, 3, 3], found {[*self.c2w.shape]} and {[*self.K.shape]}")
        if self.c2w.dtype != torch.float64 or self.K.dtype != torch.float64:
            raise ValueError(f"expected c2w and K in float64, found {self.c2w.dtype} and {self.K.dtype}")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"expected a frame of at least one pixel, found {self.height}x{self.width}")
        if self.pose_frame not in ("scene", "first"):
            raise ValueError(f'expected pose_frame "scene" or "first", found {self.pose_frame!r}')
        finite = self.c2w.isfinite().all((-1, -2)) & self.K.isfinite().all((-1, -2))
        self._require(finite, "finite numbers")
        self._require(rotation_error(self.c2w[:, :3, :3]) < ROTATION_TOLERANCE, "a pose whose 3x3 part is a rotation")
        last_row = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        self._require((self.c2w[:, 3] == last_row).all(-1), "a pose whose last row is 0 0 0 1")
        pinhole = torch.zeros_like(self.K)
        for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)):
            pinhole[:, row, column] = self.K[:, row, column]
        pinhole[:, 2, 2] = 1
        self._require((self.K == pinhole).all((-1, -2)), "intrinsics [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")
        self._require((self.K[:, 0, 0] > 0) & (self.K[:, 1, 1] > 0), "a positive focal length")
        if self.pose_frame == "first":
            is_identity = (self.c2w[:1] - torch.eye(4, dtype=torch.float64)).abs().amax((-1, -2)) < ROTATION_TOLERANCE
            self._require(is_identity, 'the identity as the first pose of pose_frame "first"')
        if self.mean_depth is not None and not 0 < self.mean_depth < math.inf:
            raise InputError(f"camera path: expected a mean depth above 0, found {self.mean_depth:g}")

    def _require(self, holds: Tensor, what: str) -> None:
        if not holds.all():
            raise InputError(
                f"camera path: expected {what}, not so in frame {int((~holds).nonzero()[0])} (counted from 0)"
            )

    def __len__(self) -> int:
        return self.c2w.shape[0]

    @property
    def positions(self) -> Tensor:
        """Camera centres, [T, 3]."""
        return self.c2w[:, :3, 3]

    @property
    def rotations(self) -> Tensor:
        """Camera-to-world rotations; their columns are the camera's right, down and forward axes, [T, 3, 3]."""
        return self.c2w[:, :3, :3]

    def fov_degrees(self, axis: FovAxis = "horizontal") -> Tensor:
        """Full angle of view that a centred pinhole of this focal length sees along an axis, in degrees, [T]."""
        size, focal = (self.width, self.K[:, 0, 0]) if axis == "horizontal" else (self.height, self.K[:, 1, 1])
        return torch.rad2deg(2 * torch.atan(size / (2 * focal)))

    def frames(self, indices: Sequence[int], *, fps: float | None = None) -> CameraPath:
        """The path of the chosen frames, in the given order.

        Args:
            indices: frame numbers, 0 <= i < len(self).
            fps: of the chosen frames; None keeps the path's own (right only where no frame rate changes).

        Returns:
            The sampled path. Where pose_frame is "first", poses are made relative to the first chosen frame.

        Raises:
            InputError: an index outside the path.
        """
        chosen = [int(index) for index in indices]
        outside = [index for index in chosen if not 0 <= index < len(self)]
        if outside:
            raise InputError(
                f"camera path: expected frames 0 to {len(self) - 1}, found a request for frame {outside[0]}"
            )
        sampled = replace(self, c2w=self.c2w[chosen], K=self.K[chosen], fps=fps or self.fps, pose_frame="scene")
        return sampled.relative_to_first() if self.pose_frame == "first" else sampled

    def resampled(self, times: Tensor, *, fps: float | None = None) -> CameraPath:
        """The path at times between its frames (see camera/interpolate.py), in the given order.

        Args:
            times: frame positions, 0 <= time <= len(self) - 1, [N]; seconds times the path's fps are frame positions.
            fps: of the result; None keeps the path's own (right only where the times are one frame apart).

        Returns:
            A path of N frames. Where pose_frame is "first", poses are made relative to the first of the times.

        Raises:
            InputError: a time outside the path, or a half turn between two frames.
        """
        c2w, K = interpolate(self.c2w, self.K, times)
        sampled = replace(self, c2w=c2w, K=K, fps=fps or self.fps, pose_frame="scene")
        return sampled.relative_to_first() if self.pose_frame == "first" else sampled

    def cropped(
        self, *, resized_height: float, resized_width: float, top: float, left: float, height: int, width: int
    ) -> CameraPath:
        """The path of the frames after a resize to resized_* and then a crop, as the pixels were treated.

        Args:
            resized_height: pixels of the whole frame after the resize; need not be a whole number.
            resized_width: pixels of the whole frame after the resize.
            top: rows cut off above.
            left: columns cut off on the left.
            height: rows kept.
            width: columns kept.

        Returns:
            The same poses with the intrinsics of the processed frame.
        """
        beyond = max(-top, -left, top + height - resized_height, left + width - resized_width)
        if beyond > 1e-6:  # pixels; room for rounding where the resized size is not whole
            raise ValueError(
                f"crop of {height}x{width} at top {top}, left {left} leaves the {resized_height}x{resized_width} frame"
            )
        source, resized = (self.height, self.width), (resized_height, resized_width)
        K = scale_intrinsics(self.K, from_size=source, to_size=resized)  # [T, 3, 3]
        K[:, 0, 2] -= left
        K[:, 1, 2] -= top
        return replace(self, K=K, height=height, width=width)

    def relative_to_first(self) -> CameraPath:
        """The same motion in the coordinates of its first camera: pose_frame "first", first pose the identity."""
        relative = inverse_poses(self.c2w[:1]) @ self.c2w  # [T, 4, 4]
        relative[0] = torch.eye(4, dtype=torch.float64)
        return replace(self, c2w=relative, pose_frame="first")

    def held_to(self, num_frames: int) -> CameraPath:
        """The path with its last pose repeated until it has num_frames frames.

        Args:
            num_frames: at least len(self).

        Returns:
            A path of num_frames frames.
        """
        if num_frames < len(self):
            raise ValueError(f"a path of {len(self)} frames cannot be held to {num_frames}")
        indices = [min(index, len(self) - 1) for index in range(num_frames)]
        return replace(self, c2w=self.c2w[indices], K=self.K[indices])


def intrinsics_from_fov(fov_degrees: Tensor, *, height: int, width: int, axis: FovAxis = "horizontal") -> Tensor:
    """Intrinsics of a centred pinhole with square pixels.

    Args:
        fov_degrees: full angle of view along `axis`, in degrees, [...].
        height: pixels.
        width: pixels.
        axis: the side of the frame that the angle spans.

    Returns:
        K in pixels, [..., 3, 3].
    """
    size = width if axis == "horizontal" else height
    focal = size / (2 * torch.tan(torch.deg2rad(fov_degrees) / 2))
    K = fov_degrees.new_zeros((*fov_degrees.shape, 3, 3))
    K[..., 0, 0] = K[..., 1, 1] = focal
    K[..., 0, 2] = width / 2
    K[..., 1, 2] = height / 2
    K[..., 2, 2] = 1
    return K


def inverse_poses(poses: Tensor) -> Tensor:
    """Inverse of rigid transforms, [..., 4, 4] -> [..., 4, 4]: c2w from w2c and back."""
    rotation = poses[..., :3, :3].mT
    inverse = torch.zeros_like(poses)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3:] = -rotation @ poses[..., :3, 3:]
    inverse[..., 3, 3] = 1
    return inverse


def rotation_error(matrices: Tensor) -> Tensor:
    """Largest entry of |R R^T - 1|, infinite for a mirror: 0 where a 3x3 matrix is a rotation, [..., 3, 3] -> [...]."""
    identity = torch.eye(3, dtype=matrices.dtype, device=matrices.device)
    error = (matrices @ matrices.mT - identity).abs().amax((-1, -2))
    return error.where(torch.linalg.det(matrices) > 0, torch.inf)
