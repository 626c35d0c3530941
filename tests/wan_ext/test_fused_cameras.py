"""Laws of the block by hand with cameras in it: the plain block, for every mechanism and every schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from core.errors import InputError
from memory.runners import run_with
from networks.mechanisms.registry import INJECTIONS
from tests.networks.cases import NETWORKS, VARIANTS, disturb, make_clip, make_dit, make_network
from tests.wan_ext.test_fused_block import GRID, TOKENS, block_inputs, double_block, fused, plain
from wan_ext.condition import CameraBranch
from wan_ext.fused_block import BlockSchedule, FusedBlockMaths
from wan_ext.rope import rope_table

IN_BLOCKS = [kind for kind in NETWORKS if kind != "lora" and INJECTIONS[kind.split(",")[0]].branch is not None]
SCHEDULES = {
    "all at once": BlockSchedule(),
    "3 head groups, 7 tokens": BlockSchedule(head_groups=3, token_chunk=7),  # frames have 6 tokens
    "2 head groups, 4 tokens, attention kept": BlockSchedule(head_groups=2, token_chunk=4, keep_attention=True),
}


def both(kind: str, task: str, schedule: BlockSchedule, *, keep: tuple[float, ...] | None) -> tuple[list[Tensor], ...]:
    """Output and gradients of the second block, by hand and by autograd: x, features, every trained parameter."""
    variant = VARIANTS[task]
    dit, clip = make_dit(variant).requires_grad_(False), make_clip(variant)
    network = make_network(dit, variant, kind)
    disturb(network)
    block, g = dit.blocks[1].double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        features = network.encode_camera(clip.c2w, clip.K, clip.height, clip.width).features
    frames = 3 if task == "TI2V" else 1
    shapes = [(2, TOKENS, 96), (2, frames, 6, 96), (2, 7, 96)]
    x, modulation, context = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    rope = rope_table(*GRID, head_dim=24, device=x.device)
    image = torch.randn(2, 5, 96, generator=g, dtype=torch.float64) if variant.dit.image_dim else None
    dropped = None if keep is None else torch.tensor(keep)
    if features is not None and "ray" not in kind:
        features = features.double()
    inputs = (x, modulation, context, rope, image, features, dropped)
    learns_features = features is not None and "ray" not in kind
    needed = (True, False, False, False, False, learns_features, False)
    grad = torch.randn(x.shape, generator=g, dtype=torch.float64)
    return tuple([out, *grads] for out, grads in (f(block, inputs, needed, grad) for f in (fused_by(schedule), plain)))


def fused_by(schedule: BlockSchedule):
    return lambda *given: fused(*given, schedule)


@pytest.mark.parametrize(
    ("task", "keep", "schedule"),
    [
        ("T2V", None, "all at once"),
        ("T2V", None, "3 head groups, 7 tokens"),
        ("T2V", (0.0, 1.0), "2 head groups, 4 tokens, attention kept"),
        ("TI2V", None, "3 head groups, 7 tokens"),
        ("I2V with CLIP", (1.0, 1.0), "2 head groups, 4 tokens, attention kept"),
    ],
    ids=["plain", "some at a time", "one dropped", "a modulation a frame", "with an image branch"],
)
@pytest.mark.parametrize("kind", ["plucker_light", *IN_BLOCKS])
def test_is_the_plain_block_with_every_mechanism(kind, task, keep, schedule):
    by_hand, by_autograd = both(kind, task, SCHEDULES[schedule], keep=keep)
    near = 1e-5 if "ray" in kind else 1e-9  # rays are float32 inside
    for hand, auto in zip(by_hand, by_autograd, strict=True):
        torch.testing.assert_close(hand, auto, rtol=near, atol=near * max(1.0, auto.abs().max().item()))


class Listener(CameraBranch):
    """A branch that uses all that it is given, as none of the mechanisms does."""

    def __init__(self, *, tokenwise: bool) -> None:
        super().__init__()
        self.tokenwise = tokenwise  # type: ignore[misc]
        self.strength = nn.Parameter(torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).double())

    def before(self, x: Tensor, features: Tensor) -> Tensor:
        frames = features.shape[1]
        return x.unflatten(1, (frames, -1)).sin() * self.strength[0] * features[:, :, 0]

    def after(self, out: Tensor, x: Tensor, q: Tensor, features: Tensor) -> Tensor:
        frames = features.shape[1]
        mixed = out * x + q.flatten(2) * out * self.strength[1] + x * self.strength[2]
        return mixed.unflatten(1, (frames, -1)) * features[:, :, 0]


@pytest.mark.parametrize("tokenwise", [True, False])
@pytest.mark.parametrize("seam", ["self_attn", "cross_attn"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_is_the_plain_block_with_a_branch_that_uses_all_it_is_given(seam, tokenwise, schedule):
    block = double_block().requires_grad_(False)
    getattr(block, seam).camera = Listener(tokenwise=tokenwise)
    features = torch.randn(2, 3, 1, 1, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = (*block_inputs(torch.float64), features, None)
    needed = (True, False, False, False, False, True, False)
    grad = torch.randn(2, TOKENS, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output, expected = plain(block, inputs, needed, grad)
    found, gradients = fused(block, inputs, needed, grad, schedule)
    for hand, auto in zip([found, *gradients], [output, *expected], strict=True):
        torch.testing.assert_close(hand, auto, rtol=1e-9, atol=1e-9 * max(1.0, auto.abs().max().item()))


@pytest.mark.parametrize("kind", IN_BLOCKS)
def test_a_branch_that_says_it_is_tokenwise_is(kind):
    variant = VARIANTS["T2V"]
    dit, clip = make_dit(variant), make_clip(variant)
    network = make_network(dit, variant, kind)
    disturb(network)
    block = dit.blocks[1]
    branch = block.self_attn.camera or block.cross_attn.camera
    if not branch.tokenwise:
        pytest.skip("it says that it is not")
    with torch.no_grad():
        features = network.encode_camera(clip.c2w, clip.K, clip.height, clip.width).features
        g = torch.Generator().manual_seed(0)
        out, x = (torch.randn(2, 18, 96, generator=g) for _ in range(2))
        q = torch.randn(2, 18, 4, 24, generator=g)
        clips, tokens, frames = slice(1, 2), slice(8, 11), slice(1, 2)  # half a frame of the second clip
        part = (out[clips, tokens], x[clips, tokens], q[clips, tokens], features[clips, frames])
        for method, arguments, some in (("before", (x, features), part[1::2]), ("after", (out, x, q, features), part)):
            whole, found = getattr(branch, method)(*arguments), getattr(branch, method)(*some)
            if whole is None:
                assert found is None
                continue
            whole = whole.expand(2, whole.shape[1], 18 // whole.shape[1], 96).flatten(1, 2)[clips, tokens]
            torch.testing.assert_close(found.expand(1, 1, 3, 96)[0], whole)


def test_whether_a_clip_is_heard_has_no_gradient():
    dit, clip = make_dit(VARIANTS["T2V"]).requires_grad_(False), make_clip(VARIANTS["T2V"])
    network = make_network(dit, VARIANTS["T2V"], "film")
    camera = network.encode_camera(clip.c2w, clip.K, clip.height, clip.width, keep=torch.ones(2))
    keep = torch.ones(2, requires_grad=True)
    x = torch.randn(2, 18, 96)
    inputs = (torch.randn(2, 1, 6, 96), torch.randn(2, 7, 96), torch.randn(2, 18, 1, 12), None, camera.features, keep)
    out = run_with(FusedBlockMaths())(dit.blocks[:1], x, *inputs)
    with pytest.raises(InputError, match="which clips hear their camera"):
        out.sum().backward()


def test_every_mechanism_in_blocks_is_met_here():
    kinds = {kind.split(",")[0] for kind in IN_BLOCKS}
    assert kinds == {name for name, mechanism in INJECTIONS.items() if mechanism.branch is not None}
