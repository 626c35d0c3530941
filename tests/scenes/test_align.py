"""A camera path is found in pictures alone: exactly in renderings, nearly in bad copies, and from a known start."""

import pytest
import torch
import torch.nn.functional as F

from scenes import pose_bank
from scenes.align import PathFinder
from scenes.motion import film
from scenes.refine import blurred, interaction, moved
from scenes.render import Renderer
from scenes.scene import make_scene

FRAMES, HEIGHT, WIDTH = 5, 32, 48


@pytest.fixture(scope="module")
def finder():
    with pytest.MonkeyPatch.context() as patch:  # a coarser bank: as good here, and made in a quarter of the time
        patch.setattr(pose_bank, "SPACING", 0.8)
        patch.setattr(pose_bank, "PITCHES_DEGREES", (0, 20, 40))
        finder = PathFinder(Renderer(make_scene(0), HEIGHT))
        finder.bank(shot(finder, 0)[0].K[0], HEIGHT, WIDTH)
        yield finder


def shot(finder, seed):
    path = film(finder.renderer.scene, seed, num_frames=FRAMES, height=HEIGHT, width=WIDTH)
    return path, finder.renderer(path)


def errors(c2w, path):
    """Angle in degrees and distance in metres, [T] each."""
    relative = c2w[:, :3, :3].mT @ path.rotations
    cosine = (relative.diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))), (c2w[:, :3, 3] - path.positions).norm(dim=-1)


@pytest.mark.parametrize("seed", [1, 2])
def test_renderings_give_their_path_back(finder, seed):
    path, frames = shot(finder, seed)
    c2w, error = finder.recover(frames, K=path.K[0])
    turn, move = errors(c2w, path)
    assert turn.median() < 0.5
    assert move.median() < 0.05
    assert error < 0.05


def test_a_bad_copy_gives_nearly_its_path(finder):
    path, frames = shot(finder, 1)
    generator = torch.Generator().manual_seed(0)
    blurred = F.avg_pool2d(frames.permute(0, 3, 1, 2).float(), 3, stride=1, padding=1, count_include_pad=False)
    noisy = 0.9 * blurred.permute(0, 2, 3, 1) + 10 + 35 * torch.randn(frames.shape, generator=generator)
    noisy = noisy.round().clamp(0, 255).to(torch.uint8)
    c2w, _ = finder.recover(noisy, K=path.K[0])
    turn, move = errors(c2w, path)
    assert turn.median() < 2
    assert move.median() < 0.15


def test_a_known_start_stays_and_another_picture_leaves_an_error(finder):
    path, frames = shot(finder, 2)
    c2w, error = finder.recover(frames, K=path.K[0], start=path.c2w[0])
    assert torch.equal(c2w[0], path.c2w[0])
    assert errors(c2w, path)[0].max() < 1
    elsewhere = Renderer(make_scene(7), HEIGHT)(path)
    _, other = finder.recover(elsewhere, K=path.K[0], start=path.c2w[0])
    assert other > 3 * error


def test_the_derivative_is_that_of_the_rendering(finder):
    """How pixels change under a small turn or move is what the formula says, for each of the six."""
    path, _ = shot(finder, 1)
    size = {"height": HEIGHT, "width": WIDTH, "supersample": 3}
    before, depth = finder.renderer.views(path.c2w[:1], path.K[:1], **size)
    for direction, amount in enumerate((0.04, 0.04, 0.04, 0.06, 0.06, 0.06)):
        delta = torch.zeros(1, 6, dtype=torch.float64)
        delta[0, direction] = amount
        after, _ = finder.renderer.views(moved(path.c2w[:1], delta), path.K[:1], **size)
        before_soft, after_soft = blurred(before), blurred(after)
        slopes = torch.stack(torch.gradient((before_soft + after_soft) / 2, dim=(2, 1)), -1)
        expected = -(slopes @ interaction(depth, path.K[0].float()))[..., direction] * amount
        actual = after_soft - before_soft
        assert torch.corrcoef(torch.stack([expected.flatten(), actual.flatten()]))[0, 1] > 0.9
        assert 0.9 < float((expected * actual).sum() / (expected**2).sum()) < 1.25


def test_single_frame_and_other_sizes(finder):
    path, frames = shot(finder, 1)
    c2w, _ = finder.recover(frames[:1], K=path.K[0])
    assert c2w.shape == (1, 4, 4)
    assert errors(c2w, path.frames([0]))[0].max() < 2
