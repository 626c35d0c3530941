"""Photometric refinement of cameras: Gauss-Newton on the difference between pictures and the rendered scene.

A picture I is compared with the rendering R of the scene at a pose; a small motion (w, v) of the camera in its own
axes, pose <- pose exp(w, v), moves what a pixel at (x, y) of depth Z sees (in units of the focal length) by

    du = fx ( x y w_x - (1 + x^2) w_y + y w_z - v_x / Z + x v_z / Z)
    dv = fy ((1 + y^2) w_x - x y w_y - x w_z - v_y / Z + y v_z / Z)

and so changes the rendering by -(dR/du du + dR/dv dv). One rendering with depth gives all derivatives of a step. What
the pictures show otherwise than the scene (noise, blobs, other colours) is weighted down, and a common gain and offset
of each colour channel is fitted.

Sources: Lucas and Kanade 1981; Baker and Matthews 2004 (image alignment); Chaumette and Hutchinson 2006 (the
interaction matrix above); Geman and McClure 1987 (the weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scenes.render import Renderer

NOISE_FLOOR = 0.01  # of a colour, standard deviation
OUTLIER_COLOR = 0.15  # distance of colours from which on two pictures do not show the same thing
CORRELATED_PIXELS = 30.0  # neighbours err alike: so many pixels count as one
COARSE_TOLERANCE, FINE_TOLERANCE = 4.0, 2.0  # far from the solution large differences are no outliers
TYPICAL_TILT = 0.1  # radians; cameras are mostly level
MAX_TURN, MAX_MOVE = 0.14, 0.25  # radians and metres of one step
TURN_CHANGE, MOVE_CHANGE = 0.02, 0.03  # radians and metres by which the motion from frame to frame changes, typically


@dataclass(frozen=True, kw_only=True)
class Target:
    """Pictures whose cameras are sought, at one resolution."""

    pictures: Tensor  # [T, h, w, 3] in [0, 1], blurred
    K: Tensor  # [3, 3], pixels of h x w


@dataclass(frozen=True, kw_only=True)
class Linearized:
    """The squared error of each picture around a pose, as a quadratic function of a small motion."""

    hessian: Tensor  # [T, 6, 6]
    gradient: Tensor  # [T, 6]: the step is hessian^-1 gradient
    error: Tensor  # [T], robust, 0 (the same) to 1 (nothing in common)


def make_target(frames: Tensor, K: Tensor, shrink: int) -> Target:
    """Pictures reduced by a whole factor.

    Args:
        frames: [T, H, W, 3] in [0, 1].
        K: pixels of H x W, [3, 3].
        shrink: factor; the sides are rounded.
    """
    height, width = frames.shape[1:3]
    rows, columns = max(round(height / shrink), 6), max(round(width / shrink), 6)
    small = F.adaptive_avg_pool2d(frames.permute(0, 3, 1, 2), (rows, columns)).permute(0, 2, 3, 1)
    scaled = K.clone()
    scaled[0] *= columns / width
    scaled[1] *= rows / height
    return Target(pictures=blurred(small), K=scaled)


def linearize(renderer: Renderer, target: Target, c2w: Tensor, *, fit_color: bool, tolerance: float) -> Linearized:
    """Compare pictures with the scene at their poses.

    Args:
        renderer: of the scene.
        target: T pictures.
        c2w: float64 [T, 4, 4].
        fit_color: one gain and offset a channel for all T pictures together.
        tolerance: difference of colours from which on a pixel counts less, in units of the typical one.
    """
    count, height, width, _ = target.pictures.shape
    K = target.K.expand(count, 3, 3)
    colors, depth = renderer.views(c2w, K, height=height, width=width)
    rendered = blurred(colors)
    if fit_color:
        rendered = _color_fitted(rendered, target.pictures)
    residual = target.pictures - rendered  # [T, h, w, 3]
    distance = residual.norm(dim=-1)  # [T, h, w]
    scale = (1.5 * distance.flatten(1).median(1).values).clamp_min(NOISE_FLOOR)[:, None, None]
    weight = 1 / (1 + (distance / (tolerance * scale)) ** 2) ** 2
    information = weight / (scale**2 * CORRELATED_PIXELS)
    slopes = torch.stack(torch.gradient(rendered, dim=(2, 1)), -1)  # [T, h, w, 3, 2]: along u, along v
    jacobian = -slopes @ interaction(depth, target.K.float())  # [T, h, w, 3, 6]
    weighted = jacobian * information[..., None, None]
    hessian = torch.einsum("thwci,thwcj->tij", weighted, jacobian)
    gradient = torch.einsum("thwci,thwc->ti", weighted, residual)
    squared = distance.square() / OUTLIER_COLOR**2
    return Linearized(
        hessian=hessian.double(), gradient=gradient.double(), error=(squared / (1 + squared)).mean((1, 2)).double()
    )


def refine_each(renderer: Renderer, target: Target, c2w: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Improve the pose of each picture on its own.

    Args:
        renderer: of the scene.
        target: T pictures.
        c2w: float64 [T, 4, 4].
        steps: of Gauss-Newton.

    Returns:
        The best poses met, [T, 4, 4], and their errors, [T].
    """
    best, best_error = c2w, torch.full((len(c2w),), torch.inf, dtype=torch.float64)
    for step in range(steps + 1):
        here = linearize(renderer, target, c2w, fit_color=False, tolerance=COARSE_TOLERANCE)
        better = here.error < best_error
        best = torch.where(better[:, None, None], c2w, best)
        best_error = torch.where(better, here.error, best_error)
        if step < steps:
            damping = torch.diag_embed(0.02 * here.hessian.diagonal(dim1=1, dim2=2) + 1.0)
            delta = torch.linalg.solve(here.hessian + damping, here.gradient)
            c2w = moved(c2w, _limited(delta))
    return best, best_error


def refine_path(
    renderer: Renderer, target: Target, c2w: Tensor, *, steps: int, hold_first: bool, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Improve the poses of all frames together, as those of one camera that moves smoothly.

    Args:
        renderer: of the scene.
        target: T pictures.
        c2w: float64 [T, 4, 4].
        steps: of Gauss-Newton.
        hold_first: whether the first pose is known and stays.
        tolerance: see `linearize`.

    Returns:
        The best path met, [T, 4, 4], and the errors of its frames, [T].
    """
    free = torch.ones(len(c2w), 6, dtype=torch.bool)
    free[0] = not hold_first
    free = free.flatten()
    best, best_error, best_cost = c2w, torch.ones(len(c2w), dtype=torch.float64), float("inf")
    for step in range(steps + 1):
        here = linearize(renderer, target, c2w, fit_color=True, tolerance=tolerance)
        cost = float(here.error.mean())
        if cost < best_cost:
            best, best_error, best_cost = c2w, here.error, cost
        if step == steps:
            break
        hessian = torch.block_diag(*here.hessian)  # [6 T, 6 T]
        hessian = hessian + torch.diag(0.01 * hessian.diagonal() + 1.0)
        gradient = here.gradient.flatten()
        for derivative, value in (_roughness(c2w), _tilt(c2w)):
            hessian = hessian + derivative.T @ derivative
            gradient = gradient - derivative.T @ value
        delta = torch.zeros_like(gradient)
        delta[free] = torch.linalg.solve(hessian[free][:, free], gradient[free])
        c2w = moved(c2w, _limited(delta.view(-1, 6)))
    return best, best_error


def moved(c2w: Tensor, delta: Tensor) -> Tensor:
    """Poses after a motion in their own axes: c2w [T, 4, 4], delta [T, 6] (turn in radians, move) -> [T, 4, 4]."""
    turned = c2w.clone()
    turned[:, :3, :3] = c2w[:, :3, :3] @ torch.linalg.matrix_exp(_skew(delta[:, :3]))
    turned[:, :3, 3] += (c2w[:, :3, :3] @ delta[:, 3:, None])[..., 0]
    return turned


def interaction(depth: Tensor, K: Tensor) -> Tensor:
    """How far pixels move under a small motion of the camera, [T, h, w, 2, 6]."""
    # A pixel beside an outline belongs to the nearer surface: there the outline's slope moves with that one.
    depth = -F.max_pool2d(-depth[:, None], 3, stride=1, padding=1)[:, 0]
    _, height, width = depth.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x, y = ((x - K[0, 2]) / K[0, 0]).expand_as(depth), ((y - K[1, 2]) / K[1, 1]).expand_as(depth)
    near, zero = 1 / depth, torch.zeros_like(depth)
    along_u = torch.stack([x * y, -(1 + x * x), y, -near, zero, x * near], -1) * K[0, 0]
    along_v = torch.stack([1 + y * y, -x * y, -x, zero, -near, y * near], -1) * K[1, 1]
    return torch.stack([along_u, along_v], -2)


def _roughness(c2w: Tensor) -> tuple[Tensor, Tensor]:
    """How much the motion changes from frame to frame, in units of what is typical, and its derivative.

    Returns:
        Derivative by all small motions, [6 (T - 2), 6 T], and value, [6 (T - 2)].
    """
    count = len(c2w)
    rotation, position = c2w[:, :3, :3], c2w[:, :3, 3]
    turns = rotation_vectors(rotation[:-1].mT @ rotation[1:])  # [T - 1, 3]
    bends = (turns[1:] - turns[:-1]) / TURN_CHANGE
    jolts = (position[2:] - 2 * position[1:-1] + position[:-2]) / MOVE_CHANGE
    derivative = torch.zeros(max(count - 2, 0), 6, count, 6, dtype=torch.float64)
    for frame in range(count - 2):
        for offset, sign in ((0, 1.0), (1, -2.0), (2, 1.0)):
            derivative[frame, :3, frame + offset, :3] = sign * torch.eye(3, dtype=torch.float64) / TURN_CHANGE
            derivative[frame, 3:, frame + offset, 3:] = sign * rotation[frame + offset] / MOVE_CHANGE
    return derivative.view(-1, 6 * count), torch.cat([bends, jolts], -1).flatten()


def _tilt(c2w: Tensor) -> tuple[Tensor, Tensor]:
    """How far the cameras' right axes rise or sink, in units of what is typical, and its derivative: [T, 6 T], [T]."""
    right, down, forward = c2w[:, 1, 0], c2w[:, 1, 1], c2w[:, 1, 2]  # the downward parts of the three axes
    derivative = torch.zeros(len(c2w), len(c2w), 6, dtype=torch.float64)
    frame = torch.arange(len(c2w))
    derivative[frame, frame, 1], derivative[frame, frame, 2] = -forward, down  # right + w x right
    return derivative.flatten(1) / TYPICAL_TILT, right / TYPICAL_TILT


def rotation_vectors(rotations: Tensor) -> Tensor:
    """Axis times angle in radians, [..., 3, 3] -> [..., 3]."""
    from scipy.spatial.transform import Rotation

    vectors = Rotation.from_matrix(rotations.reshape(-1, 3, 3).numpy()).as_rotvec()
    return torch.from_numpy(vectors).view(*rotations.shape[:-2], 3)


def _color_fitted(rendered: Tensor, pictures: Tensor) -> Tensor:
    """Renderings with the gain and offset of each channel that bring them nearest to the pictures."""
    weight = 1 / (1 + (pictures - rendered).square().sum(-1, keepdim=True) / OUTLIER_COLOR**2) ** 2

    def mean(values: Tensor) -> Tensor:
        return (weight * values).mean((0, 1, 2)) / weight.mean()

    center, shifted = mean(rendered), mean(pictures)
    gain = mean((rendered - center) * (pictures - shifted)) / mean((rendered - center) ** 2).clamp_min(1e-6)
    return (rendered - center) * gain.clamp(0.6, 1.4) + shifted


def _limited(delta: Tensor) -> Tensor:
    """Steps shortened to what the linearization is good for, [T, 6]."""
    turn = (MAX_TURN / delta[:, :3].norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    move = (MAX_MOVE / delta[:, 3:].norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    return delta * torch.minimum(turn, move)


def blurred(pictures: Tensor) -> Tensor:
    """Pictures [T, h, w, 3] under a 3 x 3 binomial filter, edges repeated."""
    channels = F.pad(pictures.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
    one = torch.tensor([0.25, 0.5, 0.25])
    kernel = (one[:, None] * one).expand(3, 1, 3, 3)
    return F.conv2d(channels, kernel, groups=3).permute(0, 2, 3, 1)


def _skew(vectors: Tensor) -> Tensor:
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
