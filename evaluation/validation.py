"""Validation while training: films held-out paths with the networks as they are, recovers the cameras, scores them.

The noise is fixed, so that curves over steps show the networks alone. Text guidance is off: caches hold no negative
prompt. Nothing here draws from the global random state or changes a mode for longer than it films.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from camera.path import CameraPath, PoseFrame
from core.errors import InputError
from core.randomness import seed_of
from evaluation.estimators import Estimator, RenderEstimator, SfmEstimator
from evaluation.filming import Cameras, FilmingExpert, Sampling, decode_frames, film_paths
from evaluation.score import Comparison, VideoScore, plot_recovered, score_video, summarise, write_scores
from networks.guided import Conditions
from scenes.align import PathFinder
from scenes.render import Renderer
from scenes.scene import make_scene
from wan_ext.configs import Expert, WanVariant
from wan_ext.vae import WanVAE

CURVES = {"rot_err_degrees": "rot_err_mean_degrees", "trans_err": "trans_err_mean"}


@dataclass(frozen=True, kw_only=True)
class HeldOutClip:
    """A clip that is filmed again and again: its camera, and what its caches say of text and first frame."""

    name: str
    asked: CameraPath
    """In the pose frame and scale that the network is trained in."""
    context: Tensor  # [1, S, D]
    condition: Tensor | None = None  # [1, Cc, F, h, w]
    image_context: Tensor | None = None  # [1, tokens, width]
    first_latents: Tensor | None = None  # [1, C, 1, h, w]
    room: int | None = None
    """Seed of the room that it shows; for the estimator `render`."""


class CameraValidation:
    """Films held-out clips and measures whether they follow.

    Args:
        clips: at least one.
        variant: the task.
        vae: of the task, anywhere; it visits `device` to decode.
        estimator: "sfm" or "render".
        folder: of the results.
        seed: of the noise.
        device: where the experts run.

    Raises:
        InputError: no clips, a clip without a room (render), no pycolmap (sfm).
    """

    def __init__(
        self,
        clips: Sequence[HeldOutClip],
        *,
        variant: WanVariant,
        vae: WanVAE,
        estimator: str,
        folder: Path,
        seed: int,
        device: torch.device | str,
    ) -> None:
        if not clips:
            raise InputError("validation: expected at least one held-out clip, found none")
        lost = next((clip.name for clip in clips if estimator == "render" and clip.room is None), None)
        if lost is not None:
            raise InputError(
                f"validation: expected the room of {lost} in a scenes.json beside its video, found none; the estimator "
                "render is for the clips of render_scenes.py, use sfm for others"
            )
        self.clips, self.variant, self.vae, self.estimator = tuple(clips), variant, vae, estimator
        self.folder, self.device = folder, device
        self.seeds = [seed_of(seed, "validation", index) for index in range(len(clips))]
        self.comparison = comparison_for(estimator, clips[0].asked.pose_frame, clips[0].asked.scale_rule)
        self._sfm = SfmEstimator() if estimator == "sfm" else None
        self._finders: dict[int, PathFinder] = {}

    def __call__(self, experts: Mapping[Expert, FilmingExpert], step: int) -> dict[str, float]:
        """Film, score and write the results.

        Args:
            experts: all of the variant; those without a network run as the base does.
            step: names the files.

        Returns:
            Medians over the clips whose camera was found, and the share of failures, for curves.
        """
        name = f"step{step:08d}"
        scores: list[VideoScore] = []
        for clip, seed in zip(self.clips, self.seeds, strict=True):
            frames = self._film(experts, clip, seed)
            score, recovered = score_video(clip.name, frames, clip.asked, self._estimator(clip), self.comparison)
            scores.append(score)
            if recovered.c2w is not None:
                plot_recovered(clip.asked, recovered.c2w, self.folder / name / f"{clip.name}.png", self.comparison)
        write_scores(scores, self.folder / f"{name}.json", comparison=self.comparison, estimator=self.estimator)
        return curves_of(summarise(scores))

    def _film(self, experts: Mapping[Expert, FilmingExpert], clip: HeldOutClip, seed: int) -> Tensor:
        asked = clip.asked
        latents = film_paths(
            experts,
            variant=self.variant,
            cameras=Cameras(c2w=asked.c2w[None], K=asked.K[None], height=asked.height, width=asked.width),
            conditions=Conditions(
                prompt=clip.context,
                negative_prompt=clip.context,  # not heard at guidance 1
                condition=clip.condition,
                image_context=clip.image_context,
                first_latents=clip.first_latents,
            ),
            seeds=(seed,),
            sampling=Sampling(steps=self.variant.steps, shift=self.variant.shift),
            device=self.device,
        )
        home = self.vae.device
        try:
            return decode_frames(self.vae.to(self.device), latents)[0]
        finally:
            self.vae.to(home)

    def _estimator(self, clip: HeldOutClip) -> Estimator:
        if self._sfm is not None:
            return self._sfm
        assert clip.room is not None
        if clip.room not in self._finders:
            self._finders.clear()  # one room at a time: its views are large
            self._finders[clip.room] = PathFinder(Renderer(make_scene(clip.room), clip.asked.height))
        return RenderEstimator(clip.room, height=clip.asked.height, finder=self._finders[clip.room])


def comparison_for(estimator: str, pose_frame: PoseFrame, scale_rule: str) -> Comparison:
    """How paths are compared: as they stand only where both are metres in the coordinates of the scene."""
    in_metres = estimator == "render" and scale_rule == "none"
    if in_metres and pose_frame == "scene":
        return Comparison(pose_frame="scene", scale="none")
    return Comparison(pose_frame="first", scale="none" if in_metres else "max")


def curves_of(summary: Mapping[str, object]) -> dict[str, float]:
    """What a tracker draws of a summary: medians where there are any, and the share of failures."""
    curves = {"validation/failed_share": float(summary["failed"]) / float(summary["videos"])}  # type: ignore[arg-type]
    for curve, name in CURVES.items():
        figures = summary[name]
        if isinstance(figures, dict):
            curves[f"validation/{curve}"] = figures["median"]
    return curves
