"""Laws of CameraPath: what pixels go through, its rays go through; relative poses forget where the world was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from camera.moves.trajectories import orbit, poses, smooth_random_path
from camera.path import CameraPath, intrinsics_from_fov, inverse_poses, rotation_error
from camera.rays import pixel_directions
from core.errors import InputError


def random_path(seed: int = 0, num_frames: int = 9, height: int = 40, width: int = 64) -> CameraPath:
    return smooth_random_path(
        seed=seed,
        num_frames=num_frames,
        height=height,
        width=width,
        position_low=(-1, -0.5, -1),
        position_high=(1, 0.5, 1),
        fps=8,
    )


def random_rotation(seed: int) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(random_state=seed).as_matrix())


@pytest.mark.parametrize(
    ("resized", "crop"),
    [
        ((40, 64), (3, 11, 30, 40)),  # crop only, off-centre
        ((80, 128), (0, 0, 80, 128)),  # enlarged
        ((20, 32), (2, 5, 16, 24)),  # made smaller, then cropped off-centre
        ((30, 60), (4, 1, 24, 48)),  # another aspect
    ],
)
def test_rays_hit_what_the_processed_pixels_show(resized: tuple[int, int], crop: tuple[int, int, int, int]) -> None:
    """A wall shows its own coordinates as colours; after resize and crop, each pixel's ray must hit its colour."""
    distance, roll = 3.0, 0.3
    rotation = torch.from_numpy(Rotation.from_euler("z", [roll]).as_matrix())
    fov = torch.tensor([70.0], dtype=torch.float64)
    path = CameraPath(
        c2w=poses(torch.tensor([[0.4, -0.2, 0.0]], dtype=torch.float64), rotation),
        K=intrinsics_from_fov(fov, height=40, width=64),
        height=40,
        width=64,
    )

    def wall(seen: CameraPath) -> torch.Tensor:
        directions = pixel_directions(seen.c2w, seen.K, seen.height, seen.width)  # [1, 3, H, W]
        hits = seen.positions[:, :, None, None] + directions * (distance / directions[:, 2:])
        return hits[:, :2]  # [1, 2, H, W]

    top, left, height, width = crop
    pixels = F.interpolate(wall(path), size=resized, mode="bilinear", align_corners=False)  # exact on planes
    pixels = pixels[..., top : top + height, left : left + width]
    processed = path.cropped(
        resized_height=resized[0], resized_width=resized[1], top=top, left=left, height=height, width=width
    )
    inner = (..., slice(3, -3), slice(3, -3))  # at the frame's border a resampler repeats pixels
    assert (processed.height, processed.width) == (height, width)
    torch.testing.assert_close(wall(processed)[inner], pixels[inner], atol=1e-9, rtol=0)


def test_resizing_there_and_back_is_the_identity() -> None:
    path = random_path()
    there = path.cropped(resized_height=17, resized_width=90, top=0, left=0, height=17, width=90)
    back = there.cropped(resized_height=40, resized_width=64, top=0, left=0, height=40, width=64)
    torch.testing.assert_close(back.K, path.K)
    assert torch.equal(back.c2w, path.c2w)


def test_a_crop_outside_the_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves"):
        random_path().cropped(resized_height=40, resized_width=64, top=1, left=0, height=40, width=64)


def test_relative_to_first_is_idempotent_and_starts_at_the_identity() -> None:
    once = random_path().relative_to_first()
    assert once.pose_frame == "first"
    assert torch.equal(once.c2w[0], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(once.relative_to_first().c2w, once.c2w, atol=1e-14, rtol=0)


def test_relative_to_first_forgets_a_rigid_motion_of_the_world() -> None:
    path = random_path()
    motion = poses(torch.tensor([[3.0, -7.0, 2.0]], dtype=torch.float64), random_rotation(5)[None])
    moved = replace(path, c2w=motion @ path.c2w)
    assert (moved.c2w - path.c2w).abs().max() > 1
    torch.testing.assert_close(moved.relative_to_first().c2w, path.relative_to_first().c2w, atol=1e-12, rtol=0)


def test_relative_to_first_keeps_distances_and_turns() -> None:
    path = random_path()
    relative = path.relative_to_first()
    torch.testing.assert_close(
        torch.cdist(relative.positions, relative.positions), torch.cdist(path.positions, path.positions)
    )
    turns = [p.rotations[3].T @ p.rotations[7] for p in (path, relative)]
    torch.testing.assert_close(turns[0], turns[1])


def test_sampling_frames_commutes_with_relative_to_first() -> None:
    path, indices = random_path(), [2, 5, 6, 8]
    sampled_first = path.frames(indices).relative_to_first()
    relative_first = path.relative_to_first().frames(indices)
    torch.testing.assert_close(sampled_first.c2w, relative_first.c2w, atol=1e-14, rtol=0)
    assert relative_first.pose_frame == "first" and path.frames(indices).pose_frame == "scene"


def test_frames_picks_the_frames_asked_for() -> None:
    path = random_path()
    sampled = path.frames([0, 4, 8], fps=4)
    assert torch.equal(sampled.c2w, path.c2w[[0, 4, 8]]) and torch.equal(sampled.K, path.K[[0, 4, 8]])
    assert sampled.fps == 4 and path.frames([1]).fps == 8
    for outside in (-1, 9):
        with pytest.raises(InputError, match=f"frame {outside}"):
            path.frames([0, outside])


def test_held_to_repeats_the_last_pose() -> None:
    path = random_path(num_frames=7)
    held = path.held_to(9)
    assert len(held) == 9 and torch.equal(held.c2w[:7], path.c2w)
    assert torch.equal(held.c2w[7:], path.c2w[-1:].expand(2, -1, -1)) and torch.equal(
        held.K[7:], path.K[-1:].expand(2, -1, -1)
    )
    assert torch.equal(path.held_to(7).c2w, path.c2w)
    with pytest.raises(ValueError, match="held"):
        path.held_to(6)


def test_field_of_view_and_intrinsics_are_inverse_along_both_axes() -> None:
    fov = torch.tensor([20.0, 60.0, 120.0], dtype=torch.float64)
    for axis in ("horizontal", "vertical"):
        K = intrinsics_from_fov(fov, height=40, width=64, axis=axis)
        path = CameraPath(c2w=random_path(num_frames=3).c2w, K=K, height=40, width=64)
        torch.testing.assert_close(path.fov_degrees(axis), fov)
        assert torch.equal(K[:, 0, 0], K[:, 1, 1])
    wider = CameraPath(c2w=path.c2w, K=K, height=40, width=64).fov_degrees("horizontal")
    assert (wider > fov).all()  # a vertical angle of a landscape frame spans more sideways


def test_inverse_poses_and_rotation_error() -> None:
    c2w = random_path().c2w
    torch.testing.assert_close(
        inverse_poses(c2w) @ c2w, torch.eye(4, dtype=torch.float64).expand_as(c2w), atol=1e-14, rtol=0
    )
    assert (rotation_error(c2w[:, :3, :3]) < 1e-14).all()
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert rotation_error(mirror) == torch.inf
    assert rotation_error(torch.eye(3, dtype=torch.float64) * 1.1) > 0.1


def _broken(name: str) -> dict[str, torch.Tensor | str]:
    path = random_path()
    c2w, K = path.c2w.clone(), path.K.clone()
    if name == "nan":
        c2w[4, 0, 3] = torch.nan
    if name == "scaled":
        c2w[4, :3, :3] *= 1.01
    if name == "mirror":
        c2w[4, :3, 0] *= -1
    if name == "last row":
        c2w[4, 3, 0] = 0.1
    if name == "skew":
        K[4, 0, 1] = 1
    if name == "focal":
        K[4, 1, 1] = -K[4, 1, 1]
    return {"c2w": c2w, "K": K}


@pytest.mark.parametrize("name", ["nan", "scaled", "mirror", "last row", "skew", "focal"])
def test_a_path_that_is_no_camera_names_the_frame(name: str) -> None:
    with pytest.raises(InputError, match="frame 4"):
        replace(random_path(), **_broken(name))


def test_pose_frame_first_needs_the_identity_first() -> None:
    with pytest.raises(InputError, match="identity"):
        replace(random_path(), pose_frame="first")
    assert replace(orbit(30, radius=1, num_frames=5, height=4, width=4), pose_frame="first").pose_frame == "first"
