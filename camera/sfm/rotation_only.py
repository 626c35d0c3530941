"""Cameras that turn on the spot: the rotation between two frames from matched points, and how well it explains them.

Without parallax there is no depth, and structure from motion has nothing to work with; the rotation is then all there
is to find, and matched points determine it directly. Pure maths on arrays; camera/sfm/turning.py brings the matches.
"""

from __future__ import annotations

import numpy as np

ROBUST_STEPS = 5  # re-weightings; the rotation stands still to 1e-6 degrees after three
ROBUST_PIXELS = 1.0  # a match this far off counts half


def fit_rotation(first: np.ndarray, second: np.ndarray, K: np.ndarray) -> np.ndarray:
    """The rotation that takes the rays of one frame's points to those of the other's, least influenced by outliers.

    Args:
        first: pixels (x, y) in one frame, [N, 2], N >= 2.
        second: the same points in the other frame, [N, 2].
        K: intrinsics in pixels of both frames, [3, 3].

    Returns:
        R [3, 3] with ray_second = R ray_first: the first camera's axes seen from the second.

    Source: W. Kabsch, "A solution for the best rotation to relate two sets of vectors", Acta Cryst. A32, 1976; weights
        of a Cauchy loss, by iterative re-weighting.
    """
    ray_first, ray_second = rays(first, K), rays(second, K)
    weights = np.ones(len(first))
    rotation = np.eye(3)
    for _ in range(ROBUST_STEPS):
        u, _, vt = np.linalg.svd((ray_second * weights[:, None]).T @ ray_first)
        rotation = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
        weights = 1 / (1 + (rotation_residual(first, second, K, rotation) / ROBUST_PIXELS) ** 2)
    return rotation


def rotation_residual(first: np.ndarray, second: np.ndarray, K: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Distance in pixels between where a rotation takes each point and where it was found, [N]; parallax and noise.

    Args:
        first: pixels (x, y) in one frame, [N, 2].
        second: the same points in the other frame, [N, 2].
        K: intrinsics in pixels of both frames, [3, 3].
        rotation: from `fit_rotation`.
    """
    turned = rays(first, K) @ rotation.T @ K.T  # [N, 3]
    in_front = turned[:, 2] > 1e-6
    pixels = turned[:, :2] / np.where(in_front, turned[:, 2], 1)[:, None]
    return np.where(in_front, np.linalg.norm(pixels - second, axis=-1), np.inf)


def rays(pixels: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Unit directions in camera axes of pixels (x, y), [N, 2] -> [N, 3]."""
    homogeneous = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
    directions = homogeneous @ np.linalg.inv(K).T
    return directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def chain_rotations(steps: np.ndarray) -> np.ndarray:
    """Camera-to-world rotations of a clip from the rotations between neighbours; the first is the identity.

    Args:
        steps: `fit_rotation` of frames t and t + 1, [T - 1, 3, 3].

    Returns:
        [T, 3, 3]
    """
    rotations = [np.eye(3)]
    for step in steps:
        u, _, vt = np.linalg.svd(rotations[-1] @ step.T)  # takes away the rounding that products gather
        rotations.append(u @ vt)
    return np.stack(rotations)
