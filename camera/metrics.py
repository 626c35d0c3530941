"""How far one camera path is from another: RotErr, TransErr, CamMC and ATE as the literature has them.

Papers sum or average over frames, in radians or degrees, after one normalisation of scale or another, so that their
numbers cannot be set beside one another; here each choice is a name. Poses are c2w [T, 4, 4], the recovered path
against the asked one.

Sources: the CamI2V evaluation protocol (Zheng et al. 2024, arXiv:2410.15957) for RotErr, TransErr, CamMC and the
normalisation "max"; Umeyama 1991 for the similarity; Sturm et al. 2012 for ATE.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from camera.path import inverse_poses

ScaleMatch = Literal["none", "max", "lstsq"]
SCALE_MATCHES: tuple[ScaleMatch, ...] = get_args(ScaleMatch)
SMALLEST_LENGTH = 1e-9
"""Paths no longer than this stand still and have no scale."""


@dataclass(frozen=True, kw_only=True)
class PathErrors:
    """Errors of one path, as sums and means over all T frames (of relative paths, frame 0 counts as exactly 0)."""

    rot_err_sum_radians: float
    rot_err_mean_radians: float
    rot_err_sum_degrees: float
    rot_err_mean_degrees: float
    rot_err_median_degrees: float
    trans_err_sum: float
    trans_err_mean: float
    trans_err_median: float
    cam_mc_sum: float
    cam_mc_mean: float
    ate_rmse: float | None
    """After the best similarity; None where a path stands still or there are fewer than 3 frames."""

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def path_errors(recovered: Tensor, asked: Tensor, *, relative: bool = True, scale: ScaleMatch = "max") -> PathErrors:
    """All errors of a recovered path.

    Args:
        recovered: c2w, float64 [T, 4, 4].
        asked: c2w, float64 [T, 4, 4].
        relative: both relative to their first frame (pose frame "first"). False compares poses as they stand (pose
            frame "scene", where both are in the coordinates of one place); scale must then be "none".
        scale: how translations are made comparable: "none"; "max", each path by its own largest distance from its
            first camera; "lstsq", the recovered path times the factor that brings it nearest to the asked one.

    Returns:
        The errors, translations in the unit that `scale` leaves.
    """
    if recovered.shape != asked.shape or recovered.shape[1:] != (4, 4):
        raise ValueError(f"expected two paths [T, 4, 4], found {[*recovered.shape]} and {[*asked.shape]}")
    if scale not in SCALE_MATCHES or (not relative and scale != "none"):
        raise ValueError(f"expected a scale of {SCALE_MATCHES}, and none for poses as they stand, found {scale!r}")
    ate = ate_rmse(recovered[:, :3, 3], asked[:, :3, 3])
    if relative:
        recovered, asked = relative_to_first(recovered), relative_to_first(asked)
        recovered, asked = matched_scale(recovered, asked, scale)
    rot, trans, both = rotation_errors(recovered, asked), translation_errors(recovered, asked), cam_mc(recovered, asked)
    return PathErrors(
        rot_err_sum_radians=float(rot.sum()),
        rot_err_mean_radians=float(rot.mean()),
        rot_err_sum_degrees=float(torch.rad2deg(rot).sum()),
        rot_err_mean_degrees=float(torch.rad2deg(rot).mean()),
        rot_err_median_degrees=float(torch.rad2deg(rot).median()),
        trans_err_sum=float(trans.sum()),
        trans_err_mean=float(trans.mean()),
        trans_err_median=float(trans.median()),
        cam_mc_sum=float(both.sum()),
        cam_mc_mean=float(both.mean()),
        ate_rmse=ate,
    )


def relative_to_first(c2w: Tensor) -> Tensor:
    """Poses in the coordinates of the first camera: w2c_0 c2w_i. [T, 4, 4] -> [T, 4, 4]"""
    return inverse_poses(c2w[:1]) @ c2w


def matched_scale(recovered: Tensor, asked: Tensor, scale: ScaleMatch) -> tuple[Tensor, Tensor]:
    """Two relative paths with comparable translations; see `path_errors`. A path that stands still is not scaled."""
    recovered, asked = recovered.clone(), asked.clone()
    if scale == "max":
        for path in (recovered, asked):
            length = path[:, :3, 3].norm(dim=-1).max()
            if length > SMALLEST_LENGTH:
                path[:, :3, 3] /= length
    elif scale == "lstsq":
        squared = recovered[:, :3, 3].square().sum()
        if squared > SMALLEST_LENGTH**2:
            recovered[:, :3, 3] *= (recovered[:, :3, 3] * asked[:, :3, 3]).sum() / squared
    return recovered, asked


def rotation_errors(recovered: Tensor, asked: Tensor) -> Tensor:
    """The angle of R_recovered R_asked^T for each frame, in radians, [T].

    CamI2V writes arccos((tr - 1) / 2), which has no precision near 0 and pi; this is the same angle by atan2.
    """
    relative = recovered[:, :3, :3] @ asked[:, :3, :3].mT
    axis = torch.stack([relative[:, i, j] - relative[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], -1)
    return torch.atan2(axis.norm(dim=-1), relative.diagonal(dim1=1, dim2=2).sum(-1) - 1)


def translation_errors(recovered: Tensor, asked: Tensor) -> Tensor:
    """|t_asked - t_recovered| for each frame, [T]."""
    return (asked[:, :3, 3] - recovered[:, :3, 3]).norm(dim=-1)


def cam_mc(recovered: Tensor, asked: Tensor) -> Tensor:
    """Norm of the difference of the 3 x 4 matrices [R | t] for each frame, [T]."""
    return (asked[:, :3] - recovered[:, :3]).flatten(1).norm(dim=-1)


def similarity(source: Tensor, target: Tensor) -> tuple[float, Tensor, Tensor] | None:
    """The similarity s R x + t that brings points nearest to others, by least squares (Umeyama).

    Args:
        source: [T, 3]
        target: [T, 3]

    Returns:
        s, R [3, 3], t [3]; None where there is no scale: fewer than 3 points, or points that are all one.
    """
    center, goal = source.mean(0), target.mean(0)
    from_center, from_goal = source - center, target - goal
    spread = from_center.square().sum()
    if len(source) < 3 or min(spread, from_goal.square().sum()) <= SMALLEST_LENGTH**2:
        return None
    u, sizes, vh = torch.linalg.svd(from_goal.T @ from_center)
    signs = torch.ones_like(sizes)
    signs[-1] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))  # a rotation, no mirror
    rotation = u @ torch.diag(signs) @ vh
    factor = float((sizes * signs).sum() / spread)
    return factor, rotation, goal - factor * rotation @ center


def ate_rmse(recovered: Tensor, asked: Tensor) -> float | None:
    """Absolute trajectory error: root mean square distance of positions after the best similarity, in asked units.

    Args:
        recovered: positions [T, 3].
        asked: positions [T, 3].

    Returns:
        None where there is no similarity; see `similarity`.
    """
    found = similarity(recovered, asked)
    if found is None:
        return None
    factor, rotation, shift = found
    return float((factor * recovered @ rotation.T + shift - asked).square().sum(-1).mean().sqrt())
