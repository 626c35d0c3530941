"""A LoRALinear is its formula, forward and backward, costs no second result, and merges, stacks and comes out again."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import InputError
from memory.quant import QuantLinear
from networks.lora import LoRALinear, block_linears, select_linears
from networks.lora_linear import LoRAAdapter
from tests.networks.cases import VARIANTS, disturb, make_clip, make_dit, make_network, run


def make_layer(*, quantised: bool = False, multiplier: float = 1.0, dropout: float = 0.0) -> LoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(64, 48).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    lora = LoRAAdapter.new(64, 48, rank=4, alpha=3.0, dropout=dropout, generator=generator)
    nn.init.normal_(lora.up, generator=generator)
    return LoRALinear(QuantLinear.from_linear(base) if quantised else base, lora, multiplier=multiplier)


def formula(layer: LoRALinear, x: Tensor) -> Tensor:
    return layer.base(x) + layer.multiplier * 3.0 / 4 * (x @ layer.lora.down.T @ layer.lora.up.T)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64), (2, 3, 5, 64)])
def test_forward_and_gradients_are_the_formula(quantised: bool, shape: tuple[int, ...]) -> None:
    layer = make_layer(quantised=quantised, multiplier=0.7)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weights = torch.randn(*shape[:-1], 48, generator=generator)
    tensors = (x, layer.lora.down, layer.lora.up)
    found = torch.autograd.grad((layer(x) * weights).sum(), tensors)
    expected = torch.autograd.grad((formula(layer, x) * weights).sum(), tensors)
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantised", [False, True])
def test_adapters_stay_float32_where_activations_are_bf16(quantised: bool) -> None:
    layer = make_layer(quantised=quantised)
    if not quantised:
        layer.base.to(torch.bfloat16)
    out = layer(torch.randn(6, 64, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    for parameter in layer.lora.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


class LargeResults(TorchDispatchMode):
    """Counts the storages of at least `size` numbers that operations make."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.kept: dict[int, Tensor] = {}  # kept alive, so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.size:
            self.kept[result.untyped_storage().data_ptr()] = result
        return result


@pytest.mark.parametrize("quantised", [False, True])
def test_no_second_result_is_made(quantised: bool) -> None:
    layer = make_layer(quantised=quantised)
    x = torch.randn(2, 100, 64)
    with LargeResults(200 * 48) as alone:
        layer.base(x)
    with LargeResults(200 * 48) as with_lora:
        layer(x)
    made_by_base = len(alone.kept.keys() - {x.data_ptr()})
    assert len(with_lora.kept.keys() - {x.data_ptr()}) == made_by_base == 1


def test_dropout_acts_in_training_only() -> None:
    layer = make_layer(dropout=0.5)
    x = torch.randn(6, 64)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), formula(layer, x))
    layer.eval()
    torch.testing.assert_close(layer(x), formula(layer, x))


def test_new_adapters_are_drawn_from_the_generator_alone() -> None:
    def draw(seed: int) -> LoRAAdapter:
        return LoRAAdapter.new(64, 48, rank=4, alpha=1.0, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(1).down, draw(1).down)
    assert not torch.equal(draw(1).down, draw(2).down)
    assert not draw(1).up.any()
    assert torch.equal(state, torch.get_rng_state())


def test_merged_is_applied() -> None:
    variant = VARIANTS["T2V"]
    dit, clip = make_dit(variant), make_clip(variant)
    plain_names = list(dit.state_dict())
    network = make_network(dit, variant, "lora")
    disturb(network)
    base = {name: module.base.weight.clone() for name, module in block_linears(dit).items()}
    with torch.no_grad():
        applied = run(dit, None, clip)
        network.merge(dit)
        merged = run(dit, None, clip)
    assert list(dit.state_dict()) == plain_names
    assert all(not torch.equal(module.weight, base[name]) for name, module in block_linears(dit).items())
    torch.testing.assert_close(merged, applied, rtol=0, atol=1e-5 * applied.abs().max().item())


def test_merging_into_8_bits_is_refused_and_changes_nothing() -> None:
    variant = VARIANTS["T2V"]
    dit = make_dit(variant, quantised=True)
    network = make_network(dit, variant, "lora")
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    with pytest.raises(InputError, match="8-bit weights in blocks.0.cross_attn.k"):
        network.merge(dit)
    assert all(torch.equal(tensor.float(), before[name].float()) for name, tensor in dit.state_dict().items())
    assert isinstance(dit.blocks[0].ffn[2], LoRALinear)


def test_removed_leaves_the_model_as_it_was_and_other_loras_in_it() -> None:
    variant = VARIANTS["T2V"]
    dit, clip = make_dit(variant), make_clip(variant)
    with torch.no_grad():
        plain = run(dit, None, clip)
        first = make_network(dit, variant, "lora", seed=1)
        disturb(first, seed=1)
        only_first = run(dit, None, clip)
        second = make_network(dit, variant, "lora", seed=2, network_args={"include_patterns": "self_attn"})
        disturb(second, seed=2)
        both = run(dit, None, clip)
        first.remove(dit)  # lies under the second
        only_second = run(dit, None, clip)
        another = make_dit(variant)
        alone = make_network(another, variant, "lora", seed=2, network_args={"include_patterns": "self_attn"})
        disturb(alone, seed=2)
        assert torch.equal(only_second, run(another, None, clip))
        second.remove(dit)
        assert torch.equal(run(dit, None, clip), plain)
    outputs = [plain, only_first, both, only_second]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert not any(isinstance(module, LoRALinear) for module in dit.modules())


def test_a_lora_is_seen_in_the_printed_model() -> None:
    variant = VARIANTS["T2V"]
    dit = make_dit(variant)
    make_network(dit, variant, "lora")
    assert "(q): LoRALinear(\n" in repr(dit) and "(lora): LoRAAdapter(96 -> 4 -> 96, alpha=2)" in repr(dit)


# ---- which linears ------------------------------------------------------------------------------------------------


def short(names: list[str]) -> set[str]:
    return {name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1.")}


SELF = {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"}
CROSS = {name.replace("self", "cross") for name in SELF}
FFN = {"ffn.0", "ffn.2"}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], SELF | CROSS | FFN),
        (["self_attn"], [], SELF),
        ([r".*self_attn\.q.*", r"ffn\.0"], [], {"self_attn.q", "ffn.0"}),
        ([], [r".*cross_attn.*"], SELF | FFN),
        ([], ["patch_embedding", "ffn"], SELF | CROSS),  # musubi-tuner's users exclude what is outside the blocks too
        ([r"cross_attn\.k"], ["cross_attn"], SELF | FFN | {"cross_attn.k"}),
    ],
)
def test_patterns_choose(include: list[str], exclude: list[str], expected: set[str]) -> None:
    dit = make_dit(VARIANTS["T2V"])
    assert short(select_linears(dit, include=include, exclude=exclude)) == expected


def test_the_image_branch_has_two_more_linears() -> None:
    dit = make_dit(VARIANTS["I2V with CLIP"])
    assert short(select_linears(dit)) == SELF | CROSS | FFN | {"cross_attn.k_img", "cross_attn.v_img"}
    assert all(name.startswith("blocks.") for name in select_linears(dit))


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["self_atn"], [], r"include_patterns: .*'self_atn'.*did you mean 'self_attn'"),
        (["blocks.0.self_attn.w"], [], r"did you mean 'blocks.0.self_attn"),
        (["head"], [], r"finds none.*they are called blocks.N.self_attn.q"),
        ([], ["fnn"], r"exclude_patterns: .*'fnn'.*did you mean 'ffn'"),
        ([], ["blocks"], r"take out all 20"),
        (["("], [], r"include_patterns: expected a regular expression, found '\('"),
    ],
)
def test_patterns_that_find_nothing_are_refused(include: list[str], exclude: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_linears(make_dit(VARIANTS["T2V"]), include=include, exclude=exclude)
