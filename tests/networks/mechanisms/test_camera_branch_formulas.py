"""What a branch computes, against the formula written out: FiLM, cross-attention, pose and projector, ray attention."""

import pytest
import torch
from torch import Tensor

from networks.mechanisms.registry import build_camera
from networks.mechanisms.settings import CameraSettings
from tests.networks.cases import VARIANTS
from wan_ext.condition import CameraBranch
from wan_ext.rope import rope_table, rotate

DIM, HEADS, FRAMES, TOKENS, RANK = 96, 4, 3, 6, 32  # TOKENS of a frame


def branch_of(injection: str, rank: int | str = RANK) -> CameraBranch:
    """A branch of one block in which every weight is alive."""
    hidden = None if injection == "ray_attention" else 8
    absolute = False if injection == "ray_attention" else None
    settings = CameraSettings(
        injection=injection, rank=rank, hidden=hidden, absolute=absolute, blocks=(0, 0), pose_frame="scene"
    )
    generator = torch.Generator().manual_seed(0)
    _, branches = build_camera(settings, VARIANTS["T2V"], generator=generator, device="cpu")
    for parameter in branches[0].parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return branches[0]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_film_adds_a_scaled_x_and_a_shift_of_each_frame() -> None:
    branch, x, features = branch_of("film"), random(2, FRAMES * TOKENS, DIM), random(2, FRAMES, 1, 1, RANK, seed=2)
    found = branch.before(x, features)
    scale, shift = (features[:, :, 0, 0] @ branch.scale_shift.weight.T).chunk(2, -1)  # [B, F, D]
    for token in range(FRAMES * TOKENS):
        frame, place = divmod(token, TOKENS)
        expected = x[:, token] * scale[:, frame] + shift[:, frame]
        torch.testing.assert_close(found[:, frame, place], expected)


@torch.no_grad()
def test_cross_attention_reads_the_tokens_of_its_own_frame() -> None:
    branch = branch_of("cross_attention")
    q, features = random(2, FRAMES * TOKENS, HEADS, DIM // HEADS), random(2, FRAMES, 1, 1, 8, RANK, seed=2)
    x = random(2, FRAMES * TOKENS, DIM, seed=3)
    found = branch.after(x, x, q, features)  # [B, F, h w, D]
    for frame in range(FRAMES):
        k, v = (features[:, frame, 0, 0] @ branch.kv.weight.T).chunk(2, -1)  # [B, M, D]
        k = k / k.square().mean(-1, keepdim=True).sqrt() * branch.norm_k.weight
        k, v = (part.unflatten(-1, (HEADS, -1)) for part in (k, v))
        own = q[:, frame * TOKENS : (frame + 1) * TOKENS]
        weights = (torch.einsum("blnd,bmnd->bnlm", own, k) / (DIM // HEADS) ** 0.5).softmax(-1)
        attended = torch.einsum("bnlm,bmnd->blnd", weights, v).flatten(2)
        expected = attended @ branch.down.weight.T @ branch.up.weight.T
        torch.testing.assert_close(found[:, frame], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rank", [RANK, "full"])
def test_self_attention_adds_a_pose_before_and_projects_what_comes_out(rank: int | str) -> None:
    branch = branch_of("self_attention", rank)
    width = branch.pose.weight.shape[1]
    out, x = random(2, FRAMES * TOKENS, DIM), random(2, FRAMES * TOKENS, DIM, seed=2)
    features = random(2, FRAMES, 1, 1, width, seed=3)
    torch.testing.assert_close(branch.before(x, features)[:, :, 0], features[:, :, 0, 0] @ branch.pose.weight.T)
    expected = out
    for linear in branch.projector:
        expected = expected @ linear.weight.T
    torch.testing.assert_close(branch.after(out, x, random(1), features)[:, 0], expected)


@torch.no_grad()
def test_ray_attention_is_plain_attention_where_all_rays_are_one() -> None:
    """Then only the second half of each head, which turns with its place in the grid, tells tokens apart."""
    branch, grid = branch_of("ray_attention"), (FRAMES, 3, 2)
    x, features = random(2, FRAMES * TOKENS, DIM), torch.eye(4).expand(2, *grid, 2, 4, 4, 4)
    q, k, v = (x @ branch.qkv.weight.T).chunk(3, -1)
    q = q / q.square().mean(-1, keepdim=True).sqrt() * branch.norm_q.weight
    k = k / k.square().mean(-1, keepdim=True).sqrt() * branch.norm_k.weight
    q, k, v = (part.unflatten(-1, (4, -1)) for part in (q, k, v))  # four heads
    half = q.shape[-1] // 2
    rope = rope_table(*grid, head_dim=half, device="cpu")
    q, k = (torch.cat((part[..., :half], rotate(part[..., half:], rope)), -1) for part in (q, k))
    weights = (torch.einsum("blnd,bmnd->bnlm", q, k) / (2 * half) ** 0.5).softmax(-1)
    expected = torch.einsum("bnlm,bmnd->blnd", weights, v).flatten(2) @ branch.o.weight.T
    torch.testing.assert_close(branch.after(x, x, x, features)[:, 0], expected, rtol=1e-4, atol=1e-4)
