"""Ray attention hears only relative transforms: the world's coordinates do not matter, the camera's motion does."""

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from camera.path import inverse_poses
from camera.rays import pixel_directions, scale_intrinsics
from networks.mechanisms.ray_attention import inverse_rigid, ray_frames
from networks.mechanisms.registry import build_camera
from networks.mechanisms.settings import CameraSettings
from networks.network import Network
from tests.networks.cases import SIZE, VARIANTS, disturb, make_clip, make_dit, make_network, run
from wan_ext.dit import WanDiT

T2V = VARIANTS["T2V"]
FRAMES, ROWS, COLUMNS = SIZE[0], SIZE[1] // 2, SIZE[2] // 2


def world_change(seed: int = 0) -> Tensor:
    """A turn and a shift of the whole world. [4, 4]"""
    change = torch.eye(4, dtype=torch.float64)
    change[:3, :3] = torch.from_numpy(Rotation.random(rng=seed).as_matrix())
    change[:3, 3] = torch.tensor([2.0, -1.0, 3.0])
    return change


def lively(*, absolute: str) -> tuple[WanDiT, Network]:
    args = {"injection": "ray_attention", "camera_rank": "32", "camera_absolute": absolute}
    dit = make_dit(T2V)
    network = make_network(dit, T2V, network_args=args)
    disturb(network)
    return dit, network


@torch.no_grad()
def test_another_origin_and_orientation_of_the_world_change_nothing() -> None:
    clip = make_clip(T2V)
    dit, network = lively(absolute="no")
    out = run(dit, network, clip)
    torch.testing.assert_close(run(dit, network, clip, world_change() @ clip.c2w), out, rtol=0, atol=1e-4)
    assert (run(dit, network, clip, clip.other_c2w) - out).abs().max() > 1e-2
    dit, network = lively(absolute="yes")
    out = run(dit, network, clip)
    assert (run(dit, network, clip, world_change() @ clip.c2w) - out).abs().max() > 1e-2


@torch.no_grad()
def test_the_attention_itself_is_invariant_not_only_its_encoder() -> None:
    """The encoder looks from the first camera; here each ray frame is handed over as it stands in each world."""
    settings = CameraSettings(injection="ray_attention", rank=32, blocks=(0, 0), absolute=False, pose_frame="scene")
    _, branches = build_camera(settings, T2V, generator=torch.Generator().manual_seed(0), device="cpu")
    branch, clip = branches[0], make_clip(T2V)
    torch.nn.init.normal_(branch.o.weight, generator=torch.Generator().manual_seed(1))
    K = scale_intrinsics(clip.K, from_size=(clip.height, clip.width), to_size=(ROWS, COLUMNS))
    tokens = FRAMES * ROWS * COLUMNS
    x = torch.randn(2, tokens, T2V.dit.dim, generator=torch.Generator().manual_seed(2))

    def read(c2w: Tensor) -> Tensor:
        to_world = ray_frames(c2w, K, ROWS, COLUMNS)[:, :FRAMES, ..., None, :, :].expand(-1, -1, -1, -1, 4, -1, -1)
        features = torch.stack((inverse_rigid(to_world), to_world.mT), 4).float()  # [B, F, h, w, 2, N, 4, 4]
        return branch.after(x, x, x, features)

    out = read(clip.c2w)
    for seed in range(3):
        torch.testing.assert_close(read(world_change(seed) @ clip.c2w), out, rtol=1e-4, atol=1e-3)
    assert (read(clip.other_c2w) - out).abs().max() > 0.1 * out.abs().max()


@torch.no_grad()
def test_far_from_the_origin_is_as_good_as_near() -> None:
    clip = make_clip(T2V)
    dit, network = lively(absolute="no")
    far = clip.c2w.clone()
    far[..., :3, 3] += torch.tensor([1e5, -1e5, 1e5], dtype=torch.float64)
    torch.testing.assert_close(run(dit, network, clip, far), run(dit, network, clip), rtol=0, atol=1e-4)


def test_ray_frames_are_rotations_that_look_along_their_rays() -> None:
    clip = make_clip(T2V)
    frames = ray_frames(clip.c2w, clip.K, clip.height, clip.width)  # [B, T, h, w, 4, 4]
    rotation, eye = frames[..., :3, :3], torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(rotation.mT @ rotation, eye.expand_as(rotation))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(rotation.shape[:-2], dtype=torch.float64))
    directions = pixel_directions(clip.c2w, clip.K, clip.height, clip.width)
    torch.testing.assert_close(rotation[..., 2], directions.movedim(-3, -1))
    torch.testing.assert_close(frames[..., :3, 3], clip.c2w[:, :, None, None, :3, 3].expand_as(frames[..., :3, 3]))
    assert ((rotation[..., 0] * clip.c2w[:, :, None, None, :3, 0]).sum(-1) > 0.5).all()  # x near the camera's right
    torch.testing.assert_close(inverse_rigid(frames), inverse_poses(frames))


def test_the_middle_ray_frame_is_the_camera() -> None:
    clip = make_clip(T2V)
    K = torch.tensor([[30.0, 0, 0.5], [0, 30.0, 0.5], [0, 0, 1]], dtype=torch.float64)  # one pixel, seen straight on
    torch.testing.assert_close(ray_frames(clip.c2w, K, 1, 1)[..., 0, 0, :, :], clip.c2w)


@pytest.mark.parametrize(("pose_frame", "absolute"), [("scene", True), ("first", False)])
def test_the_pose_frame_decides_whether_there_is_an_absolute_term(pose_frame: str, absolute: bool) -> None:
    args = {"injection": "ray_attention"}
    network = make_network(make_dit(T2V), T2V, network_args=args, pose_frame=pose_frame)
    assert network.settings.camera.absolute is absolute
    assert bool(list(network.camera_encoder.parameters())) is absolute
