"""One expert as a sampler sees it: its DiT, its camera, and the velocity under text and camera guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memory.runners import BlockRunner, run_plain
from wan_ext.condition import CameraCondition, first_frame_timestep
from wan_ext.dit import WanDiT
from wan_ext.sampling import guidance


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What every step of sampling is told besides the noised latents and the camera."""

    prompt: Tensor  # [B, S, D]
    negative_prompt: Tensor  # [B, S', D]
    condition: Tensor | None = None  # first-frame channels of I2V [B, 20, F, h, w]
    image_context: Tensor | None = None  # CLIP features of Wan2.1 I2V [B, 257, D]
    first_latents: Tensor | None = None  # clean first frame of TI2V [B, C, 1, h, w]


@dataclass(frozen=True, kw_only=True)
class GuidedExpert:
    """A DiT with everything it needs to predict the guided velocity.

    Text guidance strengthens the text and leaves the camera alone: both of its predictions hear the camera. Camera
    guidance is a second direction beside it, from the prediction without camera to the one with it:

        v = v(neg, -) + camera_guidance (v(neg, camera) - v(neg, -)) + guidance_scale (v(text, camera) - v(neg, camera))

    It asks for a network that was trained with camera_dropout, so that it knows what no camera looks like. A step runs
    the DiT once where both scales are 1, twice where camera_guidance is 1, and else three times.
    """

    dit: WanDiT
    conditions: Conditions
    guidance_scale: float
    """1 is the plain prediction and costs half."""
    camera: CameraCondition | None = None
    camera_guidance: float = 1.0
    """1 is no camera guidance. Without a camera there is nothing to strengthen."""
    run_blocks: BlockRunner = run_plain

    @torch.no_grad()
    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """latents [B, C, F, h, w] at one timestep (1000 * sigma) -> velocity of the same shape."""
        timesteps = torch.full((latents.shape[0],), float(timestep), device=latents.device)
        if self.conditions.first_latents is not None:
            timesteps = first_frame_timestep(timesteps, latents.shape[2])  # [B, F]
        guides_camera = self.camera is not None and self.camera_guidance != 1
        with_text = self._predict(latents, timesteps, self.conditions.prompt, self.camera)
        if self.guidance_scale == 1 and not guides_camera:
            return with_text
        without_text = self._predict(latents, timesteps, self.conditions.negative_prompt, self.camera)
        guided = guidance(with_text, without_text, self.guidance_scale)
        if not guides_camera:
            return guided
        without_camera = self._predict(latents, timesteps, self.conditions.negative_prompt, None)
        return guided + (self.camera_guidance - 1) * (without_text - without_camera)

    def _predict(self, latents: Tensor, timesteps: Tensor, context: Tensor, camera: CameraCondition | None) -> Tensor:
        return self.dit(
            latents,
            timestep=timesteps,
            context=context,
            condition=self.conditions.condition,
            image_context=self.conditions.image_context,
            camera=camera,
            run_blocks=self.run_blocks,
        )
