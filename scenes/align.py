"""Where a video was filmed in a known scene: its camera path by photometric alignment with the rendered scene.

For measuring whether a generated video follows its camera. Nothing here knows the path that was asked for. The scene is
searched from everywhere for a few frames of the video, a smooth way through the best places of each is chosen (dynamic
programming), and the whole path is refined from coarse to fine. Where the first pose is known (image-to-video), it
holds its place and the rest follows from it.

Cost: the bank of views is made once for a room and a lens (a few seconds); a video of 17 frames then takes about two
seconds on one core, whatever its size, as it is compared at about 32 rows.
"""

from __future__ import annotations

import torch
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from scenes.pose_bank import PoseBank
from scenes.refine import COARSE_TOLERANCE, FINE_TOLERANCE, make_target, refine_each, refine_path, rotation_vectors
from scenes.render import Renderer

COARSE_ROWS, FINE_ROWS = 16, 32
KEY_FRAMES, HYPOTHESES = 5, 12
TYPICAL_TURN, TYPICAL_MOVE = 12.0, 0.4  # degrees and metres between two of five key frames
MOTION_WEIGHT = 0.02  # of a typical motion, in units of the pictures' error (0 to 1)


class PathFinder:
    """Recovers camera paths in one scene; keeps the bank of views between videos.

    Args:
        renderer: of the scene.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self._banks: dict[tuple, PoseBank] = {}

    def bank(self, K: Tensor, height: int, width: int) -> PoseBank:
        """The views of the scene through one lens, made when they are first asked for."""
        lens = (*(round(float(value), 6) for value in (K / K.new_tensor([[width], [height], [1]])).flatten()),)
        if lens not in self._banks:
            self._banks.clear()  # one lens at a time: a bank is large
            self._banks[lens] = PoseBank(self.renderer, K, height=height, width=width)
        return self._banks[lens]

    def recover(self, frames: Tensor, *, K: Tensor, start: Tensor | None = None) -> tuple[Tensor, float]:
        """As `recover_path`."""
        pictures = frames.float() / 255
        height, width = frames.shape[1:3]
        K = K.double()
        coarse = make_target(pictures, K, max(round(height / COARSE_ROWS), 1))
        fine = make_target(pictures, K, max(round(height / FINE_ROWS), 1))
        keys = sorted({round(frame) for frame in torch.linspace(0, len(frames) - 1, KEY_FRAMES).tolist()})
        poses = self.bank(K, height, width).nearest(pictures[keys], HYPOTHESES)  # [keys, n, 4, 4]
        if start is not None:
            poses = torch.cat([start.double().expand(len(keys), 1, 4, 4), poses], 1)
        count = poses.shape[1]
        several = type(coarse)(pictures=coarse.pictures[keys].repeat_interleave(count, 0), K=coarse.K)
        refined, errors = refine_each(self.renderer, several, poses.flatten(0, 1), steps=4)
        refined, errors = refined.view(len(keys), count, 4, 4), errors.view(len(keys), count)
        if start is not None:
            refined[0], errors[0] = start.double(), 0.0
        c2w = _between(_smooth_way(refined, errors), keys, len(frames))
        hold = start is not None
        if start is not None:
            c2w[0] = start.double()  # to the last bit
        c2w, _ = refine_path(self.renderer, coarse, c2w, steps=8, hold_first=hold, tolerance=COARSE_TOLERANCE)
        c2w, error = refine_path(self.renderer, fine, c2w, steps=4, hold_first=hold, tolerance=FINE_TOLERANCE)
        return c2w, float(error.mean())


def recover_path(frames: Tensor, renderer: Renderer, *, K: Tensor, start: Tensor | None = None) -> tuple[Tensor, float]:
    """The camera path of a video of a known scene.

    Args:
        frames: uint8 [T, H, W, 3]
        renderer: of the scene.
        K: intrinsics in pixels, the same for all frames, [3, 3].
        start: c2w of frame 0 in scene coordinates, where it is known, [4, 4].

    Returns:
        c2w in scene coordinates, float64 [T, 4, 4], and the error that is left: 0 where the video looks as the scene
        does from there, towards 1 where it shows something else.
    """
    return PathFinder(renderer).recover(frames, K=K, start=start)


def _smooth_way(poses: Tensor, errors: Tensor) -> Tensor:
    """The way through one pose of each key frame with the least error and motion, by dynamic programming.

    Args:
        poses: [keys, n, 4, 4]
        errors: [keys, n]

    Returns:
        [keys, 4, 4]
    """
    total, came_from = errors[0], []
    for before, after, error in zip(poses[:-1], poses[1:], errors[1:], strict=True):
        turn = rotation_vectors(before[:, None, :3, :3].mT @ after[None, :, :3, :3]).norm(dim=-1)  # [n, n]
        move = torch.cdist(before[:, :3, 3], after[:, :3, 3])
        motion = (turn.rad2deg() / TYPICAL_TURN) ** 2 + (move / TYPICAL_MOVE) ** 2
        costs = total[:, None] + MOTION_WEIGHT * motion + error[None]
        total, best = costs.min(0)
        came_from.append(best)
    chosen = [int(total.argmin())]
    for best in reversed(came_from):
        chosen.append(int(best[chosen[-1]]))
    return poses[torch.arange(len(poses)), chosen[::-1]]


def _between(poses: Tensor, keys: list[int], num_frames: int) -> Tensor:
    """Poses of all frames from those of key frames: rotations on great arcs, positions on lines, [T, 4, 4]."""
    if len(keys) == 1:
        return poses.repeat(num_frames, 1, 1)
    times = torch.arange(num_frames, dtype=torch.float64)
    rotations = Slerp(keys, Rotation.from_matrix(poses[:, :3, :3].numpy()))(times.numpy()).as_matrix()
    c2w = torch.eye(4, dtype=torch.float64).repeat(num_frames, 1, 1)
    c2w[:, :3, :3] = torch.from_numpy(rotations)
    known = torch.tensor(keys, dtype=torch.float64)
    right = torch.searchsorted(known, times).clamp(1, len(keys) - 1)
    share = ((times - known[right - 1]) / (known[right] - known[right - 1]))[:, None]
    c2w[:, :3, 3] = torch.lerp(poses[right - 1, :3, 3], poses[right, :3, 3], share)
    return c2w
