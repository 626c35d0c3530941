"""Guidance by text and by camera: the formula, what the scales of 1 leave out, and what it costs."""

import pytest
import torch
from torch import Tensor

from networks.guided import Conditions, GuidedExpert
from tests.networks.cases import VARIANTS, camera_of, disturb, make_clip, make_dit, make_network
from wan_ext.condition import CameraCondition

VARIANT = VARIANTS["T2V"]


class Case:
    """An expert whose camera is heard, and its three predictions."""

    def __init__(self) -> None:
        self.dit, clip = make_dit(VARIANT), make_clip(VARIANT)
        network = make_network(self.dit, VARIANT, "film")
        disturb(network)
        self.latents = clip.inputs.noised
        self.camera = camera_of(network, clip)
        self.text, self.negative = clip.inputs.context, 0.5 * clip.inputs.context.flip(1)
        self.calls = 0
        self.dit.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def velocity(self, *, guidance_scale: float, camera_guidance: float, camera: bool = True) -> tuple[Tensor, int]:
        """The guided velocity, and how often the DiT ran for it."""
        expert = GuidedExpert(
            dit=self.dit,
            conditions=Conditions(prompt=self.text, negative_prompt=self.negative),
            guidance_scale=guidance_scale,
            camera=self.camera if camera else None,
            camera_guidance=camera_guidance,
        )
        self.calls = 0
        return expert.velocity(self.latents, 500.0), self.calls

    @torch.no_grad()
    def plain(self, context: Tensor, camera: CameraCondition | None) -> Tensor:
        return self.dit(self.latents, timestep=torch.full((2,), 500.0), context=context, camera=camera)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("camera_guidance", [0.0, 0.5, 3.0])
def test_the_formula(case: Case, guidance_scale: float, camera_guidance: float) -> None:
    none, heard = case.plain(case.negative, None), case.plain(case.negative, case.camera)
    both = case.plain(case.text, case.camera)
    expected = none + camera_guidance * (heard - none) + guidance_scale * (both - heard)
    found, calls = case.velocity(guidance_scale=guidance_scale, camera_guidance=camera_guidance)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert calls == 3


def test_scales_of_one_cost_nothing_and_give_the_plain_predictions(case: Case) -> None:
    found, calls = case.velocity(guidance_scale=1, camera_guidance=1)
    assert torch.equal(found, case.plain(case.text, case.camera)) and calls == 1
    found, calls = case.velocity(guidance_scale=5, camera_guidance=1)
    with_text, without = case.plain(case.text, case.camera), case.plain(case.negative, case.camera)
    assert torch.equal(found, without + 5.0 * (with_text - without)) and calls == 2


def test_without_a_camera_there_is_nothing_to_guide_towards(case: Case) -> None:
    found, calls = case.velocity(guidance_scale=5, camera_guidance=3, camera=False)
    expected, _ = case.velocity(guidance_scale=5, camera_guidance=1, camera=False)
    assert torch.equal(found, expected) and calls == 2
