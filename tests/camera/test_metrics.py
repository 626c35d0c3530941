"""Errors of paths: by hand, against what each normalisation leaves alone, and against the evo package."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from camera.metrics import ate_rmse, path_errors, rotation_errors, similarity


def random_path(seed, frames=9):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(frames, 3, generator=generator, dtype=torch.float64).cumsum(0) * 0.2
    c2w = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    c2w[:, :3, :3] = torch.from_numpy(Rotation.from_rotvec(vectors.numpy()).as_matrix())
    c2w[:, :3, 3] = torch.randn(frames, 3, generator=generator, dtype=torch.float64).cumsum(0)
    return c2w


def test_by_hand():
    asked = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    asked[1, 0, 3], asked[2, 0, 3] = 1.0, 2.0
    recovered = asked.clone()
    recovered[2, :3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # a quarter turn
    recovered[:, 0, 3] = torch.tensor([0.0, 1.0, 4.0])
    none = path_errors(recovered, asked, scale="none")
    assert none.rot_err_sum_radians == pytest.approx(math.pi / 2)
    assert none.rot_err_mean_degrees == pytest.approx(30)
    assert none.rot_err_median_degrees == pytest.approx(0)
    assert none.trans_err_sum == pytest.approx(2)
    assert none.trans_err_mean == pytest.approx(2 / 3)
    assert none.cam_mc_sum == pytest.approx(math.sqrt(4 + 4))  # |R| differs by 1, 1, 1, 1 and t by 2
    scaled = path_errors(recovered, asked, scale="max")  # 0, 1/4, 1 against 0, 1/2, 1
    assert scaled.trans_err_sum == pytest.approx(0.25)
    least = path_errors(recovered, asked, scale="lstsq")  # factor 9/17: 0, 9/17, 36/17
    assert least.trans_err_sum == pytest.approx(8 / 17 + 2 / 17)


def test_equal_paths_have_no_error_and_relative_errors_know_no_frame():
    path, other = random_path(0), random_path(1)
    place = random_path(2)[:1]
    for scale in ("none", "max", "lstsq"):
        assert max(v for v in path_errors(path, path, scale=scale).as_dict().values()) < 1e-6
        before = path_errors(other, path, scale=scale).as_dict()
        assert path_errors(place @ other, path, scale=scale).as_dict() == pytest.approx(before, abs=1e-9)
    assert path_errors(place @ path, path, relative=False, scale="none").trans_err_mean > 0.1


@pytest.mark.parametrize("scale", ["max", "lstsq"])
def test_a_factor_of_length_does_not_count(scale):
    path, other = random_path(0), random_path(1)
    longer = other.clone()
    longer[:, :3, 3] *= 7
    expected = path_errors(other, path, scale=scale).as_dict()
    assert path_errors(longer, path, scale=scale).as_dict() == pytest.approx(expected, abs=1e-9)
    assert path_errors(longer, path, scale="none").trans_err_sum > expected["trans_err_sum"]


def test_angles_are_exact_from_nothing_to_half_a_turn():
    angles = torch.tensor([0.0, 1e-8, 1.0, math.pi - 1e-8, math.pi], dtype=torch.float64)
    c2w = torch.eye(4, dtype=torch.float64).repeat(5, 1, 1)
    c2w[:, :3, :3] = torch.from_numpy(Rotation.from_rotvec((angles[:, None] * torch.eye(3)[1]).numpy()).as_matrix())
    found = rotation_errors(c2w, torch.eye(4, dtype=torch.float64).repeat(5, 1, 1))
    torch.testing.assert_close(found, angles, atol=1e-12, rtol=0)


def test_a_path_that_stands_still_has_errors_but_no_similarity():
    still = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    moving = random_path(3, 4)
    errors = path_errors(still, moving)
    assert errors.ate_rmse is None
    assert math.isfinite(errors.trans_err_sum)
    assert similarity(moving[:2, :3, 3], moving[:2, :3, 3]) is None


def test_the_similarity_is_found_and_is_no_mirror():
    points = random_path(4)[:, :3, 3]
    rotation = torch.from_numpy(Rotation.from_rotvec([0.3, -1.0, 2.0]).as_matrix())
    factor, found, shift = similarity(points, 2.5 * points @ rotation.T + 1)
    assert factor == pytest.approx(2.5)
    torch.testing.assert_close(found, rotation)
    torch.testing.assert_close(shift, torch.ones(3, dtype=torch.float64))
    mirrored = points * torch.tensor([1.0, 1.0, -1.0])
    assert torch.linalg.det(similarity(points, mirrored)[1]) == pytest.approx(1)
    assert ate_rmse(points, mirrored) > 0.01


def test_against_evo():
    evo_metrics = pytest.importorskip("evo.core.metrics", reason="the package evo is the independent implementation")
    from evo.core.trajectory import PosePath3D

    asked, recovered = random_path(5, 12), random_path(6, 12)
    ours = path_errors(recovered, asked, relative=True, scale="none")
    reference = PosePath3D(poses_se3=list((torch.linalg.inv(asked[0]) @ asked).numpy()))
    estimate = PosePath3D(poses_se3=list((torch.linalg.inv(recovered[0]) @ recovered).numpy()))

    def ape(relation, other):
        metric = evo_metrics.APE(relation)
        metric.process_data((reference, other))
        return metric.get_all_statistics()

    kinds = evo_metrics.PoseRelation
    assert ape(kinds.rotation_angle_rad, estimate)["mean"] == pytest.approx(ours.rot_err_mean_radians)
    assert ape(kinds.translation_part, estimate)["mean"] == pytest.approx(ours.trans_err_mean)
    estimate.align(reference, correct_scale=True)
    assert ape(kinds.translation_part, estimate)["rmse"] == pytest.approx(ours.ate_rmse)


def test_wrong_arguments_are_refused():
    path = random_path(0)
    with pytest.raises(ValueError, match="two paths"):
        path_errors(path, path[:3])
    with pytest.raises(ValueError, match="as they stand"):
        path_errors(path, path, relative=False, scale="max")
