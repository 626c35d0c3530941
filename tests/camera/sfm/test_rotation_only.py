"""camera/sfm/rotation_only.py: rotations from matched points, by laws on points whose motion is known."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from camera.sfm.rotation_only import chain_rotations, fit_rotation, rotation_residual

K = np.array([[280.0, 0, 160], [0, 280.0, 96], [0, 0, 1]])


def turned_points(rotation: np.ndarray, seed: int = 0, translation=(0, 0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of 200 points 2 to 6 units away before and after a camera motion, [200, 2] each."""
    rng = np.random.default_rng(seed)
    points = np.stack([rng.uniform(-1, 1, 200), rng.uniform(-0.6, 0.6, 200), np.ones(200)], -1)
    points *= rng.uniform(2, 6, (200, 1))
    after = points @ rotation.T + np.array(translation)
    return tuple((p @ K.T)[:, :2] / p[:, 2:] for p in (points, after))


@pytest.mark.parametrize("angles", [(0, 0, 0), (3, -8, 1), (0, 25, 0)])
def test_a_turn_is_found_exactly(angles):
    asked = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    first, second = turned_points(asked)
    found = fit_rotation(first, second, K)
    np.testing.assert_allclose(found, asked, atol=1e-9)
    assert rotation_residual(first, second, K, found).max() < 1e-6
    np.testing.assert_allclose(fit_rotation(second, first, K), asked.T, atol=1e-9)


def test_wrong_matches_do_not_turn_it():
    asked = Rotation.from_euler("xyz", (2, 6, 0), degrees=True).as_matrix()
    first, second = turned_points(asked)
    second[:40] += np.random.default_rng(1).uniform(-60, 60, (40, 2))
    error = Rotation.from_matrix(fit_rotation(first, second, K) @ asked.T).magnitude()
    assert np.degrees(error) < 0.05


def test_parallax_is_what_a_rotation_leaves():
    asked = Rotation.from_euler("xyz", (0, 4, 0), degrees=True).as_matrix()
    residuals = []
    for step in (0.0, 0.05, 0.2):
        first, second = turned_points(asked, translation=(step, 0, 0))
        residuals.append(np.median(rotation_residual(first, second, K, fit_rotation(first, second, K))))
    assert residuals[0] < 1e-6 and residuals[0] < residuals[1] < residuals[2]


def test_chained_steps_are_the_whole_turn():
    c2w = Rotation.from_euler("y", [[0], [4], [9], [7]], degrees=True).as_matrix()
    steps = np.stack([after.T @ before for before, after in zip(c2w[:-1], c2w[1:], strict=True)])
    np.testing.assert_allclose(chain_rotations(steps), c2w, atol=1e-12)
