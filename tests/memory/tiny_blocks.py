"""Small blocks with everything a transformer block has: linears, 8-bit linears, LoRA, norm, modulation, a buffer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memory.quant import QuantLinear
from memory.runners import Recompute

WIDTH = 64


class Lora(nn.Module):
    """A frozen base with a low-rank addition, as LoRA networks wrap it."""

    def __init__(self, base: nn.Module, generator: torch.Generator, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        down = F.linear(self.dropout(x), self.down.to(x.dtype))
        return self.base(x) + F.linear(down, self.up.to(x.dtype))


class Block(nn.Module):
    """x + gate * (second(gelu(first(norm(x))))), with a modulation input that may need a gradient."""

    def __init__(self, seed: int, *, lora: bool = True, quantize: bool = False, hidden: int = 96, dropout: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(WIDTH)
        self.modulation = nn.Parameter(torch.randn(1, 1, WIDTH, generator=generator))
        self.register_buffer("table", torch.randn(WIDTH, generator=generator).double())
        first, second = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH, bias=False)
        for parameter in (*first.parameters(), *second.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        self.requires_grad_(False)
        first, second = first.requires_grad_(False), second.requires_grad_(False)
        if quantize:
            first, second = QuantLinear.from_linear(first), QuantLinear.from_linear(second)
        self.first = Lora(first, generator, dropout) if lora else first
        self.second = second

    def forward(self, x: Tensor, shift: Tensor | None = None, options: dict[str, Tensor] | None = None) -> Tensor:
        y = self.norm(x) + self.modulation if shift is None else self.norm(x) + (self.modulation + shift)
        if options is not None:
            y = y * options["factor"]
        return x + self.second(F.gelu(self.first(y))) * self.table.to(x.dtype)


class KeepFirst(Recompute):
    """`Recompute` that also keeps two tensors of a block, and refuses to go back without them."""

    def forward(self, block, inputs, *, keep):  # type: ignore[no-untyped-def]
        output, _ = super().forward(block, inputs, keep=keep)
        return output, (inputs[0] * 2, output.argmax(-1)) if keep else ()

    def backward(self, block, inputs, kept, grad, *, needed):  # type: ignore[no-untyped-def]
        doubled, largest = kept
        assert torch.equal(doubled, inputs[0] * 2) and largest.dtype == torch.int64
        return super().backward(block, inputs, kept, grad, needed=needed)


def make_blocks(count: int = 5, **settings) -> nn.ModuleList:  # type: ignore[no-untyped-def]
    """The same blocks for the same arguments."""
    return nn.ModuleList(Block(seed, **settings) for seed in range(count))


def trainable(blocks: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in blocks.parameters() if parameter.requires_grad]


def frozen(blocks: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*blocks.parameters(), *blocks.buffers()) if not tensor.requires_grad]


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [2, 6, WIDTH] and shift [2, 1, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 6, WIDTH, generator=generator), torch.randn(2, 1, WIDTH, generator=generator)
