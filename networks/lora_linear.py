"""LoRA on the linears of a model: the layer that replaces a linear, which linears get one, merging and removing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError, listing, nearest
from memory.quant import QuantLinear
from wan_ext.condition import CameraBranch


class LoRAAdapter(nn.Module):
    """The trained pair of matrices of one linear: delta(x) = alpha / rank * up(down(x)).

    Both are float32 whatever the base is stored in. A new one has `down` as PyTorch starts a linear (Kaiming uniform)
    and `up` at zero, so that the delta is exactly zero; `up` has a gradient at once, `down` from the second step on.

    Args:
        down: float32 [rank, in].
        up: float32 [out, rank].
        alpha: strength; the delta is scaled by alpha / rank.
        dropout: share of the `rank` values between the matrices that a training step sets to zero.

    Source: LoRA (arXiv 2106.09685), section 4.1.
    """

    def __init__(self, down: Tensor, up: Tensor, *, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.dropout = dropout
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)

    @classmethod
    def new(
        cls,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> LoRAAdapter:
        """An adapter that changes nothing yet.

        Args:
            in_features: of the linear.
            out_features: of the linear.
            rank: width between the two matrices.
            alpha: strength.
            dropout: see the class.
            generator: CPU generator that draws `down`; None: the global one.
            device: where the matrices live.
        """
        down = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)
        return cls(down.to(device), torch.zeros(out_features, rank, device=device), alpha=alpha, dropout=dropout)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """What the adapter adds to the weight of its linear, float32 [out, in]."""
        return self.scale * (self.up @ self.down)

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"{self.down.shape[1]} -> {self.rank} -> {self.up.shape[0]}, alpha={self.alpha:g}{dropout}"


class LoRALinear(nn.Module):
    """A frozen linear and its adapter: base(x) + multiplier * alpha / rank * up(down(x)), in the dtype of base(x).

    The product with `up` is accumulated into the base's result, so the only activation beside it is [L, rank].

    Args:
        base: what computes the frozen part: a linear, an 8-bit linear, or another LoRALinear.
        lora: the adapter.
        multiplier: strength of the adapter in use, beside its own alpha / rank.
    """

    def __init__(self, base: nn.Module, lora: LoRAAdapter, *, multiplier: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.lora = lora
        self.multiplier = multiplier
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # [L, in]
        result = self.base(rows)  # [L, out]
        hidden = F.linear(rows.to(result.dtype), self.lora.down.to(result.dtype))  # [L, rank]
        hidden = F.dropout(hidden, self.lora.dropout, self.lora.training) * (self.multiplier * self.lora.scale)
        result.addmm_(hidden, self.lora.up.to(result.dtype).T)
        return result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return "" if self.multiplier == 1 else f"multiplier={self.multiplier:g}"


LINEAR_TYPES = (nn.Linear, QuantLinear, LoRALinear)


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears that can take a LoRA: every one inside `blocks.*`, by name, in the order of the model.

    Those outside the blocks (embeddings, head) are left out: no loader of diffusers takes a LoRA with alpha on them.
    Those of a camera branch are not the model's.
    A linear that has a LoRA already counts as one linear.
    """

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, LINEAR_TYPES):
            yield name, module
            return
        if isinstance(module, CameraBranch):
            return
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return {name: module for name, module in walk(model, "") if name.startswith("blocks.")}


def select_linears(model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Names of the linears inside `blocks.*` that get a LoRA.

    The patterns are regular expressions, found anywhere in a name such as "blocks.0.self_attn.q". `include` alone: only
    what it finds. `exclude` alone: all but what it finds. Both: `exclude` takes out, then `include` brings back, which
    is how musubi-tuner reads the two together.

    Args:
        model: the transformer.
        include: patterns.
        exclude: patterns.

    Raises:
        InputError: a pattern that is no regular expression, an include pattern that finds no linear of a block, an
            exclude pattern that finds no module of the model, or nothing left.
    """
    names = list(block_linears(model))
    modules = [name for name, _ in model.named_modules()]
    for pattern in include:
        if not any(_compiled(pattern, "include_patterns").search(name) for name in names):
            raise InputError(
                f"network argument include_patterns: expected a pattern that finds a linear inside the blocks, found "
                f"{pattern!r} which finds none{_nearest_name(pattern, names)}; they are called {_summary(names)}"
            )
    for pattern in exclude:
        if not any(_compiled(pattern, "exclude_patterns").search(name) for name in modules):
            raise InputError(
                f"network argument exclude_patterns: expected a pattern that finds a module, found {pattern!r} which "
                f"finds none{_nearest_name(pattern, names)}; the linears inside the blocks are called {_summary(names)}"
            )

    def is_target(name: str) -> bool:
        included = any(re.search(pattern, name) for pattern in include)
        excluded = any(re.search(pattern, name) for pattern in exclude)
        return included or (bool(exclude) or not include) and not excluded

    targets = [name for name in names if is_target(name)]
    if not targets:
        raise InputError(
            f"network argument exclude_patterns: expected at least one linear to train, found that {list(exclude)} "
            f"take out all {len(names)}; take a pattern away"
        )
    return targets


def inject_lora(model: nn.Module, adapters: Mapping[str, LoRAAdapter], *, multiplier: float = 1.0) -> None:
    """Replace linears of a model by LoRALinears.

    Args:
        model: the transformer; changed in place.
        adapters: by the name of the linear that each goes on, as `block_linears` names them.
        multiplier: strength of the adapters in use.
    """
    linears = block_linears(model)
    for name, lora in adapters.items():
        model.set_submodule(name, LoRALinear(linears[name], lora, multiplier=multiplier))


def remove_lora(model: nn.Module, adapters: Mapping[str, LoRAAdapter]) -> None:
    """Take adapters out again: what `inject_lora` put in is replaced by its base, other LoRAs stay."""
    for name, lora in adapters.items():
        path, layer = _find(model, name, lora)
        model.set_submodule(path, layer.base)


def merge_lora(model: nn.Module, adapters: Mapping[str, LoRAAdapter]) -> None:
    """Add the adapters to the weights of their linears, in float32, and take them out.

    Raises:
        InputError: a linear stored in 8 bits; nothing is changed then.
    """
    found = {name: _find(model, name, lora) for name, lora in adapters.items()}
    bases = {name: _innermost(layer) for name, (_, layer) in found.items()}
    quantised = [name for name, base in bases.items() if not isinstance(base, nn.Linear)]
    if quantised:
        raise InputError(
            f"merging a LoRA needs weights in 16 or 32 bits, found 8-bit weights in {listing(quantised)}; load the "
            f"model without --fp8_base / --fp8_scaled, or use the LoRA unmerged"
        )
    for name, base in bases.items():
        layer = _find(model, name, adapters[name])[1]
        weight: Tensor = base.weight  # type: ignore[assignment]
        with torch.no_grad():
            merged = torch.add(weight, layer.lora.delta().to(weight.device), alpha=layer.multiplier)  # in float32
            weight.data = merged.to(weight.dtype)
    remove_lora(model, adapters)


def _find(model: nn.Module, name: str, lora: LoRAAdapter) -> tuple[str, LoRALinear]:
    """Path and layer of an adapter, which may lie under LoRAs that were put on later."""
    layer = model.get_submodule(name)
    while isinstance(layer, LoRALinear):
        if layer.lora is lora:
            return name, layer
        name, layer = f"{name}.base", layer.base
    raise ValueError(f"{name}: the adapter is not in this model")


def _innermost(layer: nn.Module) -> nn.Module:
    while isinstance(layer, LoRALinear):
        layer = layer.base
    return layer


def _compiled(pattern: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"network argument {argument}: expected a regular expression, found {pattern!r} ({error})"
        ) from None


def _nearest_name(pattern: str, names: Sequence[str]) -> str:
    """The hint for a pattern: it is compared with whole names and with the dotted ends that a pattern may mean."""
    plain = re.sub(r"[\\^$*+?()\[\]{}|]", "", pattern).strip(".")
    endings = {".".join(name.split(".")[start:]) for name in names for start in range(name.count(".") + 1)}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    return nearest(plain, sorted(endings | parts))


def _summary(names: Sequence[str]) -> str:
    """Linear names without their block numbers: "blocks.N.self_attn.q, ..."."""
    return ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.N.", name) for name in names))
