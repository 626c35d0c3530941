"""One expert as a sampler sees it: its DiT, the camera its network hears, and the velocity under text guidance."""

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

    Both predictions of guidance hear the camera: guidance strengthens the text, not the path.
    """

    dit: WanDiT
    conditions: Conditions
    guidance_scale: float
    """1 is the plain prediction and costs half."""
    camera: CameraCondition | None = None
    run_blocks: BlockRunner = run_plain

    @torch.no_grad()
    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """latents [B, C, F, h, w] at one timestep (1000 * sigma) -> velocity of the same shape."""
        timesteps = torch.full((latents.shape[0],), float(timestep), device=latents.device)
        if self.conditions.first_latents is not None:
            timesteps = first_frame_timestep(timesteps, latents.shape[2])  # [B, F]
        with_text = self._predict(latents, timesteps, self.conditions.prompt)
        if self.guidance_scale == 1:
            return with_text
        without_text = self._predict(latents, timesteps, self.conditions.negative_prompt)
        return guidance(with_text, without_text, self.guidance_scale)

    def _predict(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return self.dit(
            latents,
            timestep=timesteps,
            context=context,
            condition=self.conditions.condition,
            image_context=self.conditions.image_context,
            camera=self.camera,
            run_blocks=self.run_blocks,
        )
