"""Small models of every kind, cameras that move, and networks on them: what the tests of this folder share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from camera.moves.trajectories import smooth_random_path
from memory.quant import QuantLinear
from networks import lora, lora_camera
from networks.network import Network
from tests.wan_ext.models import Inputs, lively_dit, random_inputs
from wan_ext.condition import CameraCondition
from wan_ext.configs import DiTConfig, WanVariant, get_variant
from wan_ext.dit import WanDiT

SMALL = DiTConfig(dim=96, ffn_dim=160, num_heads=4, num_layers=2, in_dim=16, out_dim=16, text_dim=48)


def small(task: str, **changes: object) -> WanVariant:
    return replace(get_variant(task), dit=replace(SMALL, **changes))


VARIANTS = {
    "T2V": small("t2v-A14B"),
    "I2V": small("i2v-A14B", in_dim=36),
    "I2V with CLIP": small("i2v-14B", in_dim=36, image_dim=80),
    "TI2V": small("ti2v-5B", in_dim=48, out_dim=48),
}
NETWORKS = {
    "lora": (lora, {}),
    "plucker_light": (lora_camera, {"injection": "plucker_light", "camera_hidden": "64"}),
    "bias": (lora_camera, {"injection": "bias", "camera_hidden": "64"}),
    "plucker": (lora_camera, {"injection": "plucker"}),
    "latent_bias": (lora_camera, {"injection": "latent_bias", "camera_hidden": "64"}),
    "film": (lora_camera, {"injection": "film", "camera_hidden": "64", "camera_rank": "16"}),
    "cross_attention": (lora_camera, {"injection": "cross_attention", "camera_hidden": "64", "camera_rank": "16"}),
    "self_attention": (lora_camera, {"injection": "self_attention", "camera_hidden": "64", "camera_rank": "16"}),
    "self_attention, full": (lora_camera, {"injection": "self_attention", "camera_rank": "full", "camera_blocks": "1"}),
    "ray_attention": (lora_camera, {"injection": "ray_attention", "camera_absolute": "no", "camera_rank": "32"}),
    "ray_attention, absolute": (lora_camera, {"injection": "ray_attention", "camera_hidden": "64"}),
}
NUM_FRAMES, SIZE = 9, (3, 4, 6)  # video frames; latent frames, rows and columns


def make_dit(variant: WanVariant, *, quantised: bool = False, seed: int = 0) -> WanDiT:
    dit = lively_dit(variant.dit, seed)
    if quantised:
        for block in dit.blocks:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    block.set_submodule(name, QuantLinear.from_linear(module))
    return dit


def make_network(
    dit: WanDiT,
    variant: WanVariant,
    kind: str = "plucker_light",
    *,
    seed: int = 3,
    rank: int = 4,
    alpha: float = 2.0,
    **changes,
) -> Network:
    module, network_args = NETWORKS[kind]
    settings = {
        "expert": "low",
        "network_args": network_args,
        "pose_frame": "scene",
        "generator": torch.Generator().manual_seed(seed),
    }
    return module.create_network(dit, variant=variant, rank=rank, alpha=alpha, **(settings | changes))


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A batch of two clips: what the DiT takes, and two cameras that may go with it."""

    inputs: Inputs
    c2w: Tensor  # [2, T, 4, 4]
    other_c2w: Tensor
    K: Tensor  # [2, T, 3, 3]
    height: int
    width: int


def make_clip(variant: WanVariant) -> Clip:
    height, width = (size * stride for size, stride in zip(SIZE[1:], variant.vae.stride[1:], strict=True))
    bounds = {"position_low": (-1, -0.3, -1), "position_high": (1, 0.3, 1), "yaw_degrees": (-90.0, 90.0)}
    paths = [
        smooth_random_path(num_frames=NUM_FRAMES, height=height, width=width, seed=seed, **bounds) for seed in range(4)
    ]
    return Clip(
        inputs=random_inputs(variant.dit, size=SIZE, per_frame=variant.name == "ti2v-5B"),
        c2w=torch.stack([path.c2w for path in paths[:2]]),
        other_c2w=torch.stack([path.c2w for path in paths[2:]]),
        K=torch.stack([path.K for path in paths[:2]]),
        height=height,
        width=width,
    )


def camera_of(network: Network, clip: Clip, c2w: Tensor | None = None) -> CameraCondition | None:
    return network.encode_camera(clip.c2w if c2w is None else c2w, clip.K, clip.height, clip.width)


def run(dit: WanDiT, network: Network | None, clip: Clip, c2w: Tensor | None = None) -> Tensor:
    """The DiT's velocity, with the network's camera."""
    camera = None if network is None else camera_of(network, clip, c2w)
    return dit(clip.inputs.noised, camera=camera, **clip.inputs.keywords())


def train(dit: WanDiT, network: Network, clip: Clip, *, steps: int, learning_rate: float = 1e-2) -> None:
    """A few optimizer steps towards a fixed target that depends on nothing."""
    optimizer = torch.optim.AdamW(network.parameter_groups(learning_rate))
    for _ in range(steps):
        loss = (run(dit, network, clip) - clip.inputs.weights).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def disturb(network: Network, seed: int = 5) -> None:
    """Give every parameter a random value, as after long training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
