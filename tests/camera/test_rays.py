"""Laws of rays: agreement with the published camera models, and what Plücker coordinates must not depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from camera.files.formats import read_camera
from camera.moves.trajectories import smooth_random_path
from camera.path import CameraPath
from camera.rays import fold_frames, pixel_directions, plucker_rays, scale_intrinsics, unfold_frames

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def random_path(seed: int = 0) -> CameraPath:
    return smooth_random_path(
        seed=seed, num_frames=5, height=12, width=20, position_low=(-1, -1, -1), position_high=(1, 1, 1)
    )


def test_agrees_with_the_published_pipeline() -> None:
    """1280x720 to 48x32 keeps the height and cuts the sides, which those models express by scaling fx alone."""
    golden = load_file(GOLDEN / "fun_camera.safetensors")
    path = read_camera(GOLDEN / "re10k_camera.txt", height=720, width=1280).relative_to_first()
    resized_width = 32 * 1280 / 720
    path = path.cropped(
        resized_height=32, resized_width=resized_width, top=0, left=(resized_width - 48) / 2, height=32, width=48
    )
    rays = plucker_rays(path.c2w.float()[None], path.K.float()[None], 32, 48).transpose(1, 2)  # [1, 6, T, H, W]
    assert rays.dtype == torch.float32
    torch.testing.assert_close(rays, golden["plucker"], atol=1e-5, rtol=0)
    torch.testing.assert_close(fold_frames(rays), golden["folded"], atol=1e-5, rtol=0)


def test_directions_are_unit_and_moments_orthogonal_to_them() -> None:
    path = random_path()
    rays = plucker_rays(path.c2w, path.K, 12, 20)
    moment, direction = rays[:, :3], rays[:, 3:]
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(5, 12, 20, dtype=torch.float64))
    torch.testing.assert_close(
        (moment * direction).sum(1), torch.zeros(5, 12, 20, dtype=torch.float64), atol=1e-14, rtol=0
    )
    assert moment.abs().max() > 0.1


def test_rays_pass_through_the_pixels_that_points_project_to() -> None:
    path = random_path()
    directions = pixel_directions(path.c2w, path.K, 12, 20)
    points = path.positions[:, :, None, None] + 2.5 * directions  # [T, 3, H, W]
    w2c = torch.linalg.inv(path.c2w)
    in_camera = torch.einsum("tij,tjhw->tihw", w2c[:, :3, :3], points) + w2c[:, :3, 3, None, None]
    pixels = torch.einsum("tij,tjhw->tihw", path.K, in_camera / in_camera[:, 2:])
    assert (in_camera[:, 2] > 0).all()
    torch.testing.assert_close(pixels[:, 0], (torch.arange(20.0, dtype=torch.float64) + 0.5).expand(5, 12, 20))
    torch.testing.assert_close(pixels[:, 1], (torch.arange(12.0, dtype=torch.float64) + 0.5)[:, None].expand(5, 12, 20))


def test_moving_along_a_ray_leaves_its_coordinates_unchanged() -> None:
    path = random_path()
    rays = plucker_rays(path.c2w, path.K, 12, 20)
    moved = path.c2w.clone()
    moved[:, :3, 3] += 1.7 * rays[:, 3:, 4, 15]
    after = plucker_rays(moved, path.K, 12, 20)
    torch.testing.assert_close(after[:, :, 4, 15], rays[:, :, 4, 15])
    assert (after[:, :, 9, 2] - rays[:, :, 9, 2]).abs().max() > 0.1


def test_batches_and_float32_give_the_same_rays() -> None:
    paths = [random_path(seed) for seed in (1, 2, 3)]
    c2w, K = torch.stack([p.c2w for p in paths]), torch.stack([p.K for p in paths])
    together = plucker_rays(c2w.float(), K.float(), 12, 20)  # [3, T, 6, H, W]
    assert together.shape == (3, 5, 6, 12, 20) and together.dtype == torch.float32
    for rays, path in zip(together, paths, strict=True):
        torch.testing.assert_close(rays.double(), plucker_rays(path.c2w, path.K, 12, 20), atol=2e-6, rtol=0)
    assert plucker_rays(paths[0].c2w[0], paths[0].K[0], 12, 20).shape == (6, 12, 20)


def test_a_coarser_grid_sees_the_centres_of_its_cells() -> None:
    """With an odd factor the centre of a coarse pixel is the centre of a fine one."""
    path = random_path()
    fine = pixel_directions(path.c2w, scale_intrinsics(path.K, from_size=(12, 20), to_size=(36, 60)), 36, 60)
    torch.testing.assert_close(fine[..., 1::3, 1::3], pixel_directions(path.c2w, path.K, 12, 20))


def test_fold_puts_frame_i_of_a_group_into_channel_4c_plus_i() -> None:
    frames = torch.arange(2 * 6 * 9, dtype=torch.float32).reshape(2, 6, 9, 1, 1).expand(2, 6, 9, 2, 3)
    folded = fold_frames(frames)
    assert folded.shape == (2, 24, 3, 2, 3)
    for channel in range(6):
        for sub in range(4):
            assert torch.equal(folded[:, channel * 4 + sub, 0], frames[:, channel, 0])  # the first frame, four times
            for latent in (1, 2):
                assert torch.equal(folded[:, channel * 4 + sub, latent], frames[:, channel, 4 * latent - 3 + sub])
    assert torch.equal(unfold_frames(folded), frames)


def test_fold_of_one_frame_and_of_a_wrong_number() -> None:
    frame = torch.randn(1, 6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unfold_frames(fold_frames(frame)), frame)
    with pytest.raises(ValueError, match="4n"):
        fold_frames(torch.zeros(1, 6, 8, 2, 2))
