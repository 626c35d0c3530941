"""What 8-bit weights cost in accuracy: every recipe on a piece of Wan, with well-behaved numbers and with outliers.

    python benchmarks/quantization.py                                         measure and print the tables
    python benchmarks/quantization.py --json benchmarks/results/quantization.json --output docs/quantization.md
    python benchmarks/quantization.py --from_json benchmarks/results/quantization.json --output docs/quantization.md

The model is Wan2.1's 1.3B with 4 of its 30 blocks, random weights and a rank-16 LoRA that is not zero, one training
step on 256 tokens. The reference is the same model in float32; the first row, bf16 without any quantisation, is the
floor that every recipe stands on, for all compute in bf16.

    bytes          of a weight with its scales
    weight         |kept - exact| / |exact| over all linears of the blocks
    output         the same of a linear's output, given the exact input; median over the linears
    input grad     the same of its input gradient, given the exact output gradient; median over the linears
    LoRA cosine    between all LoRA gradients of the step and those of the reference, errors of all blocks added up
    worst linear   the smallest cosine among the linears

"Gaussian": weights are N(0, 1 / inputs). "Outliers": in every linear four inputs have weights 20 times larger, and
four others come in 30 times larger (through the norms before them, or the linear before them).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.options import parse_options, run


@dataclass(frozen=True, kw_only=True)
class Options:
    json: Path | None = None
    """File for the figures."""
    output: Path | None = None
    """Markdown file for the tables."""
    from_json: Path | None = None
    """Figures of an earlier run: nothing is measured."""


if __name__ == "__main__":
    OPTIONS = parse_options(Options, __doc__)

import torch
from torch import Tensor, nn

from core.errors import InputError
from core.files import atomic_path
from memory.quant import RECIPES, QuantLinear, QuantRecipe, linear_backward, linear_forward
from memory.runners import run_plain
from networks.lora import create_network
from networks.lora_linear import LoRALinear
from wan_ext.configs import DiTConfig, get_variant
from wan_ext.dit import WanDiT, init_weights, storage_dtype

SETTINGS = {"Gaussian": False, "Outliers": True}
CONFIG = replace(get_variant("t2v-1.3B").dit, num_layers=4)
GRID = (2, 16, 32)  # frames, height, width of the latents: 256 tokens
RANK = 16
BASELINE = "bf16"
CANDIDATES: dict[str, QuantRecipe | None] = {
    BASELINE: None,
    **{name: recipe for name, recipe in RECIPES.items() if not recipe.transposed},
    "int8_rotated, not rotated": replace(RECIPES["int8_rotated"], rotate=False),
    "int8_w8a8, not rotated": replace(RECIPES["int8_w8a8"], rotate=False),
}
"""Rows of the tables: the recipes that differ in accuracy, and two that show what rotation buys."""
NUM_OUTLIERS = 4
WEIGHT_OUTLIER = 20.0
INPUT_OUTLIER = 30.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one recipe in one setting."""

    name: str
    bytes_per_weight: float
    weight_error: float
    output_error: float
    grad_error: float
    cosine: float
    worst_cosine: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one linear met in the reference step."""

    x: Tensor  # [L, in]
    grad: Tensor  # [L, out]


def main(options: Options) -> None:
    if options.from_json is not None:
        found = read_rows(options.from_json)
    else:
        found = {setting: measure(CONFIG, outliers=outliers) for setting, outliers in SETTINGS.items()}
    for setting, rows in found.items():
        print(f"\n{setting}\n\n{table(rows)}")
    if options.json is not None:
        with atomic_path(options.json) as file:
            figures = {setting: [asdict(row) for row in rows] for setting, rows in found.items()}
            file.write_text(json.dumps(figures, indent=2) + "\n")
    if options.output is not None:
        with atomic_path(options.output) as file:
            file.write_text(page(found))


def read_rows(path: Path) -> dict[str, list[Row]]:
    """The figures of an earlier run."""
    try:
        stored = json.loads(path.read_text())
        return {setting: [Row(**row) for row in rows] for setting, rows in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected figures that this benchmark wrote, found {error}") from error


# ---- the model -------------------------------------------------------------------------------------------------------


def make_model(config: DiTConfig, *, outliers: bool) -> WanDiT:
    """A model in float32 whose block weights are representable in bf16, so that the reference and bf16 share them."""
    dit = WanDiT(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    init_weights(dit, generator)
    nn.init.normal_(dit.head.head.weight, std=0.02, generator=generator)
    for block in dit.blocks:
        nn.init.normal_(block.modulation, std=0.3, generator=generator)  # gates that let the branches count
        for linear in linears(block).values():
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        if outliers:
            add_outliers(block, generator)
        for linear in linears(block).values():
            linear.weight.data = linear.weight.data.bfloat16().float()
    return dit


def add_outliers(block: nn.Module, generator: torch.Generator) -> None:
    """Large columns in every weight, and large inputs in other places."""
    dim, hidden = block.ffn[0].in_features, block.ffn[2].in_features
    of_dim, of_hidden = (torch.randperm(size, generator=generator) for size in (dim, hidden))
    inputs, columns = of_dim[:NUM_OUTLIERS], of_dim[NUM_OUTLIERS : 2 * NUM_OUTLIERS]
    for name, linear in linears(block).items():
        linear.weight[:, columns if name != "ffn.2" else of_hidden[NUM_OUTLIERS : 2 * NUM_OUTLIERS]] *= WEIGHT_OUTLIER
    block.modulation[:, 1, inputs] = INPUT_OUTLIER - 1  # 1 + scale multiplies what enters attention and feed-forward
    block.modulation[:, 4, inputs] = INPUT_OUTLIER - 1
    block.norm3.weight[inputs] = INPUT_OUTLIER
    block.self_attn.v.weight[inputs] *= INPUT_OUTLIER  # what enters `o` is a mean of v
    block.cross_attn.v.weight[inputs] *= INPUT_OUTLIER
    block.ffn[0].weight[of_hidden[:NUM_OUTLIERS]] *= INPUT_OUTLIER


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The frozen linears of a block by name, below any adapter."""
    found = {}
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, QuantLinear)):
            found[name.removesuffix(".base")] = module
    return found


def add_lora(dit: WanDiT) -> dict[str, LoRALinear]:
    """Put the same adapters on a model, neither matrix zero, so that both have gradients."""
    generator = torch.Generator().manual_seed(2)
    variant = replace(get_variant("t2v-1.3B"), dit=dit.config)
    create_network(
        dit, variant=variant, expert="low", rank=RANK, alpha=RANK, network_args={}, generator=generator
    )  # fmt: skip
    adapted = {name: module for name, module in dit.named_modules() if isinstance(module, LoRALinear)}
    for module in adapted.values():
        nn.init.normal_(module.lora.up, std=0.01, generator=generator)
    return adapted


def prepared_model(config: DiTConfig, recipe: QuantRecipe | None, *, outliers: bool) -> WanDiT:
    """The model in bf16, its block linears under a recipe."""
    dit = make_model(config, outliers=outliers)
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, torch.bfloat16))
    if recipe is not None:
        for block in dit.blocks:
            for name, linear in linears(block).items():
                block.set_submodule(name, QuantLinear.from_linear(linear, recipe=recipe))
    return dit


def lora_gradients(dit: WanDiT, adapted: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """One training step's gradients, one vector for each linear."""
    generator = torch.Generator().manual_seed(1)
    size = (1, dit.config.in_dim, *GRID)
    noised, velocity = (torch.randn(size, generator=generator) for _ in range(2))
    context = torch.randn(1, dit.config.text_len, dit.config.text_dim, generator=generator)
    predicted = dit(noised, timestep=torch.tensor([700.0]), context=context, run_blocks=run_plain)
    nn.functional.mse_loss(predicted.float(), velocity).backward()
    return {
        name: torch.cat([module.lora.down.grad.flatten(), module.lora.up.grad.flatten()]).double()
        for name, module in adapted.items()
    }


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(config: DiTConfig, *, outliers: bool, names: Sequence[str] = tuple(CANDIDATES)) -> list[Row]:
    """Figures of recipes by their names in `CANDIDATES`, on one kind of weights and activations."""
    reference = make_model(config, outliers=outliers)
    adapted = add_lora(reference)
    seen = watch(adapted)
    exact = lora_gradients(reference, adapted)
    return [measure_recipe(name, config, adapted, seen, exact, outliers=outliers) for name in names]


def watch(adapted: dict[str, LoRALinear]) -> dict[str, Seen]:
    """Have every frozen linear note its input and output gradient; the dictionary fills during the step."""
    seen: dict[str, Seen] = {}
    for name, module in adapted.items():

        def note(_: nn.Module, given: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
            x = given[0].detach().flatten(0, -2)
            # What an adapter adds has the same gradient as what it is added to.
            y.register_hook(lambda grad: seen.__setitem__(name, Seen(x=x, grad=grad.flatten(0, -2))))

        module.register_forward_hook(note)
    return seen


def measure_recipe(
    name: str,
    config: DiTConfig,
    reference: dict[str, LoRALinear],
    seen: dict[str, Seen],
    exact: dict[str, Tensor],
    *,
    outliers: bool,
) -> Row:
    recipe = CANDIDATES[name]
    dit = prepared_model(config, recipe, outliers=outliers)
    adapted = add_lora(dit)
    difference = norm = num_bytes = num_weights = 0.0
    outputs, grads = [], []
    for where, module in adapted.items():
        base, weight = module.base, reference[where].base.weight
        kept = base.weight.float() if recipe is None else base.dequantized(torch.float32)
        difference += (kept - weight).double().square().sum().item()
        norm += weight.double().square().sum().item()
        num_weights += weight.numel()
        num_bytes += sum(p.nbytes for key, p in base.named_parameters() if key != "bias")
        x, grad = seen[where].x, seen[where].grad
        outputs.append(relative(linear_forward(base, x.bfloat16()), linear_forward(reference[where].base, x)))
        grads.append(relative(linear_backward(base, grad.bfloat16()), linear_backward(reference[where].base, grad)))
    found = lora_gradients(dit, adapted)
    print(f"{name}: done", file=sys.stderr, flush=True)
    return Row(
        name=name,
        bytes_per_weight=num_bytes / num_weights,
        weight_error=(difference / norm) ** 0.5,
        output_error=statistics.median(outputs),
        grad_error=statistics.median(grads),
        cosine=cosine(torch.cat(list(found.values())), torch.cat(list(exact.values()))),
        worst_cosine=min(cosine(found[where], exact[where]) for where in exact),
    )


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


def cosine(one: Tensor, two: Tensor) -> float:
    return (one @ two / (one.norm() * two.norm())).item()


# ---- the page --------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Row], str]] = {
    "recipe": lambda row: row.name,
    "bytes": lambda row: f"{row.bytes_per_weight:.2f}",
    "weight": lambda row: f"{row.weight_error:.2%}",
    "output": lambda row: f"{row.output_error:.2%}",
    "input grad": lambda row: f"{row.grad_error:.2%}",
    "LoRA cosine": lambda row: f"{row.cosine:.5f}",
    "worst linear": lambda row: f"{row.worst_cosine:.5f}",
}


def table(rows: list[Row]) -> str:
    """Markdown, a row a recipe."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in rows])


def page(found: dict[str, list[Row]]) -> str:
    """The whole of docs/quantization.md."""
    listed = "\n".join(f"| `{name}` | {words(recipe)} |" for name, recipe in RECIPES.items())
    tables = "\n\n".join(f"## {setting}\n\n{table(rows)}" for setting, rows in found.items())
    return PAGE.format(listed=listed, tables=tables)


def words(recipe: QuantRecipe) -> str:
    """A recipe in a sentence."""
    parts = [
        recipe.values,
        "a scale for 64 inputs" if recipe.scales == "block64" else "a scale a row",
        *(["rotated"] if recipe.rotate else []),
        "multiplied in bf16" if recipe.compute == "dequant" else "multiplied in 8 bits, forward and input gradient",
        *(["a second copy, transposed"] if recipe.transposed else []),
    ]
    return ", ".join(parts)


PAGE = """# 8-bit weights, compared

Written by `python benchmarks/quantization.py --output docs/quantization.md`; the first lines of that file say what each
figure is. The code is `memory/quant/`.

| recipe | what it is |
|---|---|
{listed}

A file of one recipe serves every other with the same values, scales and rotation: `int8_rotated`, `int8_w8a8` and
`int8_w8a8_transposed` read the same bytes. A transposed copy changes no bit of any result and has no row below.
Multiplying in 8 bits needs a GPU of compute capability 8.0 (int8) or 8.9 (e4m3); the CPU does both.

The tables: relative errors of all weights, of a linear's output and of its input gradient (median over the linears),
and the cosine between the LoRA gradients of one training step and those of the same model in float32: of all together,
and of the linear that fares worst. All compute in bf16 otherwise; the row `bf16` is what that alone costs.

`int8_rotated` is more exact than `fp8` in every column of both tables. Multiplied in int8 as well (`int8_w8a8`), its
LoRA gradients still point closer to the exact ones than those of `fp8`. The last two rows are what outliers do to int8
with a scale a row when nothing is rotated.

{tables}
"""


if __name__ == "__main__":
    run(main, OPTIONS)
