"""Filming a batch of paths is filming each path, hears the camera and the first frame, and leaves no trace."""

from dataclasses import replace

import pytest
import torch

from evaluation.filming import Cameras, FilmingExpert, Sampling, decode_frames, evaluating, film_paths
from memory.runners import run_plain
from networks import lora_camera
from networks.guided import Conditions
from scenes.motion import film
from scenes.scene import make_scene
from wan_ext.configs import VARIANTS
from wan_ext.dit import WanDiT, init_weights

FRAMES, HEIGHT, WIDTH = 5, 16, 32
SMALL = replace(VARIANTS["tiny"].dit, dim=48, ffn_dim=64, num_heads=2, num_layers=2)
FAST = Sampling(steps=2, shift=3.0, guidance_scale=2.0, guidance_scale_high_noise=3.0)


def small_variant(kind: str = "none"):
    in_dim = 36 if kind == "channels" else 16
    return replace(VARIANTS["tiny"], dit=replace(SMALL, in_dim=in_dim), image_conditioning=kind)


def small_experts(variant, *, with_camera=True):
    generator = torch.Generator().manual_seed(0)
    experts = {}
    for name in variant.experts:
        dit = WanDiT(variant.dit)
        init_weights(dit, generator)
        torch.nn.init.normal_(dit.head.head.weight, std=0.1, generator=generator)
        network = lora_camera.create_network(
            dit,
            variant=variant,
            expert=name,
            rank=2,
            alpha=2.0,
            dropout=0.5,
            network_args={"injection": "bias", "camera_hidden": "8"},
            pose_frame="scene",
            generator=generator,
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        experts[name] = FilmingExpert(dit=dit, network=network if with_camera else None)
    return experts


def cameras_of(*seeds: int) -> Cameras:
    paths = [film(make_scene(3), seed, num_frames=FRAMES, height=HEIGHT, width=WIDTH) for seed in seeds]
    return Cameras(
        c2w=torch.stack([path.c2w for path in paths]),
        K=torch.stack([path.K for path in paths]),
        height=HEIGHT,
        width=WIDTH,
    )


def conditions_of(kind: str = "none", rows: int = 1) -> Conditions:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator)

    return Conditions(
        prompt=random(4, 64),
        negative_prompt=random(4, 64)[:1],
        condition=random(20, 2, 2, 4) if kind == "channels" else None,
        first_latents=random(16, 1, 2, 4) if kind == "first_frame" else None,
    )


def shoot(variant, experts, cameras, conditions, seeds, sampling=FAST):
    return film_paths(experts, variant=variant, cameras=cameras, conditions=conditions, seeds=seeds, sampling=sampling)


@pytest.mark.parametrize("kind", ["none", "channels", "first_frame"])
def test_a_batch_is_its_clips_alone(kind):
    variant = small_variant(kind)
    experts, conditions = small_experts(variant), conditions_of(kind, rows=2)
    together = shoot(variant, experts, cameras_of(0, 1), conditions, (7, 8))
    assert together.shape == (2, 16, 2, 2, 4)
    for index in range(2):
        own = Conditions(
            **{name: None if x is None else x[index : index + 1] for name, x in vars(conditions).items()}
            | {"negative_prompt": conditions.negative_prompt}
        )
        alone = shoot(variant, experts, cameras_of(index), own, (7 + index,))
        torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=1e-4)
    if kind == "first_frame":
        torch.testing.assert_close(together[:, :, :1], conditions.first_latents)
    other = Conditions(**vars(conditions) | {"condition": None if kind != "channels" else conditions.condition + 1})
    if kind == "channels":
        assert not torch.allclose(shoot(variant, experts, cameras_of(0, 1), other, (7, 8)), together, atol=1e-3)


def test_path_seed_and_both_experts_count_and_a_base_is_deaf():
    variant = small_variant()
    experts, conditions = small_experts(variant), conditions_of()
    video = shoot(variant, experts, cameras_of(0), conditions, (7,))
    assert not torch.allclose(shoot(variant, experts, cameras_of(1), conditions, (7,)), video, atol=1e-3)
    assert not torch.allclose(shoot(variant, experts, cameras_of(0), conditions, (8,)), video, atol=1e-3)
    for scale in ("guidance_scale", "guidance_scale_high_noise", "camera_guidance"):
        other = replace(FAST, **{scale: 1.5})
        assert not torch.allclose(shoot(variant, experts, cameras_of(0), conditions, (7,), other), video, atol=1e-4)
    base = small_experts(variant, with_camera=False)
    deaf = [shoot(variant, base, cameras_of(path), conditions, (7,)) for path in (0, 1)]
    assert torch.equal(*deaf)
    with pytest.raises(ValueError, match="seeds"):
        shoot(variant, experts, cameras_of(0), conditions, (7, 8))
    with pytest.raises(ValueError, match="high"):
        shoot(variant, {"low": experts["low"]}, cameras_of(0), conditions, (7,))


def test_each_expert_has_its_own_guidance():
    """One step is at the highest noise, where only the high-noise expert is asked."""
    variant = small_variant()
    experts, conditions = small_experts(variant), conditions_of()
    one = replace(FAST, steps=1)
    video = shoot(variant, experts, cameras_of(0), conditions, (7,), one)
    for scale, heard in (("guidance_scale", False), ("guidance_scale_high_noise", True)):
        other = shoot(variant, experts, cameras_of(0), conditions, (7,), replace(one, **{scale: 1.5}))
        assert torch.equal(other, video) is not heard


def test_solver_runner_and_listener_are_those_that_are_given():
    variant = small_variant()
    experts, conditions = small_experts(variant), conditions_of()
    blocks, steps = [], []

    def counted(layers, *arguments):
        blocks.append(len(layers))
        return run_plain(layers, *arguments)

    def listen(step, latents):
        steps.append((step, latents.clone()))

    counting = {name: replace(expert, run_blocks=counted) for name, expert in experts.items()}
    arguments = {"variant": variant, "cameras": cameras_of(0), "conditions": conditions, "seeds": (7,)}
    three = replace(FAST, steps=3)
    video = film_paths(counting, sampling=three, on_step=listen, **arguments)
    assert len(blocks) == 3 * 2  # with and without text
    assert [step for step, _ in steps] == [1, 2, 3] and torch.equal(steps[-1][1], video)
    euler = film_paths(experts, sampling=replace(three, solver="euler"), **arguments)
    assert not torch.allclose(euler, video, atol=1e-4)


def test_modes_gradients_and_the_global_random_state_stay():
    variant = small_variant()
    experts = small_experts(variant)
    dit, network = experts["low"].dit, experts["low"].network
    network.train()
    dit.blocks[0].eval()
    modes = [part.training for part in dit.modules()]
    state = torch.get_rng_state()
    one, two = (shoot(variant, experts, cameras_of(0), conditions_of(), (7,)) for _ in range(2))
    assert torch.equal(one, two)  # dropout is off while filming
    assert [part.training for part in dit.modules()] == modes
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.requires_grad
    with pytest.raises(RuntimeError), evaluating([dit]):
        raise RuntimeError
    assert [part.training for part in dit.modules()] == modes


def test_frames_are_the_decoders_pictures():
    class Grey:
        def decode(self, latents):
            return latents[:, :3, :1].repeat(1, 1, 5, 8, 8)

    levels = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    latents = levels[:, None, None, None, None].expand(4, 16, 2, 2, 4)
    frames = decode_frames(Grey(), latents)
    assert frames.shape == (4, 5, 16, 32, 3)
    assert frames.dtype == torch.uint8
    assert [int(clip.unique()) for clip in frames] == [0, 128, 255, 255]
