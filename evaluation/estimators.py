"""Estimators: from the frames of a video to the camera that filmed it, or the reason why there is none.

    sfm     structure from motion (extra `sfm`): any video with texture and parallax; position up to a similarity
    render  photometric alignment with a rendered scene (scenes/align.py): the embedded world; metres, scene coordinates

No estimator sees the path that was asked for; it gets the frames and the lens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from camera.path import CameraPath
from core.errors import InputError
from scenes.align import PathFinder
from scenes.render import Renderer
from scenes.scene import make_scene

ESTIMATORS = ("sfm", "render")
NOTHING_ALIKE = 0.8
"""Error of an alignment (0 to 1) from which on a video shows nothing of the scene."""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The camera of a video, or why it was not found."""

    c2w: Tensor | None = None  # [T, 4, 4]
    failure: str | None = None
    figures: dict[str, float] | None = None
    """What the estimator says of its own result (error, confidence, registered frames)."""


class Estimator(Protocol):
    """Anything that recovers cameras."""

    absolute: bool
    """Whether poses come in the coordinates of the scene, in metres."""

    def recover(self, frames: Tensor, K: Tensor) -> Recovered:
        """The camera of a video: frames uint8 [T, H, W, 3], K of every frame in pixels [T, 3, 3]."""
        ...


class SfmEstimator:
    """Structure from motion with a known focal length.

    Raises:
        InputError: pycolmap is not installed.
    """

    absolute = False

    def __init__(self, *, seed: int = 0) -> None:
        try:
            import pycolmap  # noqa: F401
        except ImportError:
            raise InputError(
                'estimator sfm: expected pycolmap, which is not installed; pip install -e ".[sfm]"'
            ) from None
        self.seed = seed

    def recover(self, frames: Tensor, K: Tensor) -> Recovered:
        """See `Estimator`."""
        from camera.estimate import EstimateFailed, estimate_path  # loads pycolmap

        if (reason := changing_lens(K)) is not None:
            return Recovered(failure=reason)
        try:
            found = estimate_path(frames, focal=float(K[0, 0, 0]), seed=self.seed)
        except EstimateFailed as error:
            return Recovered(failure=str(error))
        figures = {
            "confidence": found.confidence,
            "reprojection_error_pixels": found.reprojection_error_pixels,
            "num_points": float(found.num_points),
        }
        return Recovered(c2w=found.path.c2w, figures=figures)


class RenderEstimator:
    """Alignment with one rendered scene.

    Args:
        scene_seed: of `scenes.scene.make_scene`.
        height: of the videos, pixels.
        start: c2w of the first frame in the scene, where it is known (image-to-video). [4, 4]
        finder: for a scene whose views are made already; made here when None.
    """

    absolute = True

    def __init__(
        self, scene_seed: int, *, height: int, start: Tensor | None = None, finder: PathFinder | None = None
    ) -> None:
        self.finder = finder or PathFinder(Renderer(make_scene(scene_seed), height))
        self.start = start

    def recover(self, frames: Tensor, K: Tensor) -> Recovered:
        """See `Estimator`."""
        if (reason := changing_lens(K)) is not None:
            return Recovered(failure=reason)
        c2w, error = self.finder.recover(frames, K=K[0], start=self.start)
        if error >= NOTHING_ALIKE:
            return Recovered(
                failure=f"the video looks like the scene from nowhere (error {error:.2f} of 1)",
                figures={"alignment_error": error},
            )
        return Recovered(c2w=c2w, figures={"alignment_error": error})


def changing_lens(K: Tensor) -> str | None:
    """Why a path whose lens changes cannot be recovered; None where it does not change."""
    if torch.allclose(K, K[:1].expand_as(K), rtol=1e-4, atol=1e-6):
        return None
    return "the asked path zooms; an estimator takes one focal length for the whole clip"


def as_path(c2w: Tensor, asked: CameraPath) -> CameraPath:
    """Recovered poses with the lens and clock of the asked path, for plots; in coordinates of their own."""
    return CameraPath(
        c2w=c2w, K=asked.K.clone(), height=asked.height, width=asked.width, fps=asked.fps, pose_frame="scene"
    )
