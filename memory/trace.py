"""How many bytes a computation holds at its worst moment, counted without holding them.

What: `peak_bytes(function)` runs a function and counts the storages that its tensor operations make, at every moment,
exactly. On meta tensors nothing is allocated and nothing is computed: a step of a 14B model takes a second on any
machine. The peak comes with what it is made of: by the labels that stood around the allocations (`part`), and by the
operation during which it was reached.

How: a dispatch mode sees every operation, in forward and in backward. A storage it has not seen counts from the end of
the operation that made it, while the operation's inputs still live; it stops to count in the moment in which its last
reference goes, by a weak reference. Views and results in place have no storage of their own and count nothing.
`scaled_dot_product_attention`, which PyTorch would take apart into whole matrices of scores on meta tensors, is traced
as the flash attention that a GPU runs.

Cost: 10 to 20 microseconds an operation.

Exact: for storages of the watched device. Three things are not seen. What a kernel allocates for itself: of these only
one is large, the float32 sum of the queries' gradients inside a fused attention's backward, and is added by the rule of
`inner_bytes`. What an allocator adds by rounding and by holes: the planner has a share for that. And what kernels that
compute more at once (a fused one in the place of three operations) would not need: trace the code that will run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNLABELLED = "other"


@dataclass(frozen=True, kw_only=True)
class PeakTrace:
    """What a function held at its worst moment, in bytes."""

    peak: int
    """Of everything counted, `held` tensors included."""
    by_part: dict[str, int]
    """The peak by label; "other" is what no label stood around. They add up to `peak`."""
    operation: str
    """During which the peak was reached, e.g. "aten.mm.default"."""
    remaining: int
    """Still alive at the end, `held` tensors and the function's result included."""


def peak_bytes(
    function: Callable[[], object], *, held: Mapping[str, Iterable[Tensor]] | None = None, device_type: str = "meta"
) -> PeakTrace:
    """Run a function and count what it holds.

    Args:
        function: what is counted, forward and backward. Its result stays alive until the count is taken.
        held: tensors that exist before and count from the start, by their label; their gradients do not. Tensors that
            are not named here do not count, although the function uses them.
        device_type: storages of other devices do not count.

    Returns:
        The peak.
    """
    with Tracer(device_type) as tracer, _FlashOnMeta():
        for label, tensors in (held or {}).items():
            with part(label):
                tracer.hold(tensors)
        result = function()  # noqa: F841  # kept until the count is taken
        return tracer.trace()


@contextmanager
def part(label: str) -> Iterator[None]:
    """Label what is allocated in the body of the `with`; the innermost label counts. Without a tracer, nothing."""
    if not _ACTIVE:
        yield
        return
    tracer = _ACTIVE[-1]
    before, tracer.label = tracer.label, label
    try:
        yield
    finally:
        tracer.label = before


@dataclass
class _Storage:
    """A storage that the tracer has seen and how much of it counts."""

    gone: weakref.ref[Any]  # calls the tracer when the storage goes
    label: str
    counts: bool
    num_bytes: int = 0


class Tracer(TorchDispatchMode):
    """Counts live storages while it is entered. `peak_bytes` is the short way.

    Args:
        device_type: storages of other devices do not count.
    """

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.device_type = device_type
        self.label = UNLABELLED
        self.live: Counter[str] = Counter()  # bytes by label
        self._total = 0
        self._peak, self._at_peak, self._operation = 0, dict[str, int](), ""
        self._known: dict[int, _Storage] = {}  # by address

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already, under the label that stands around this."""
        for tensor in tensors:
            self._see(tensor)
        self._note("held")

    def trace(self) -> PeakTrace:
        """The peak so far."""
        by_part = {label: count for label, count in self._at_peak.items() if count}
        return PeakTrace(peak=self._peak, by_part=by_part, operation=self._operation, remaining=self._total)

    def __enter__(self) -> Tracer:
        _ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _ACTIVE.remove(self)

    def __torch_dispatch__(self, func, types, given=(), named=None):
        for leaf in tree_leaves((given, named)):
            self._see(leaf, counts=False)  # what nobody named, so that its views do not count either
        result = func(*given, **(named or {}))
        for leaf in tree_leaves(result):
            self._see(leaf)
        watched = given and isinstance(given[0], Tensor) and given[0].device.type == self.device_type
        self._note(str(func), inner_bytes(func, given) if watched else 0)
        return result

    def _see(self, leaf: object, *, counts: bool = True) -> None:
        if not isinstance(leaf, Tensor) or leaf.device.type != self.device_type:
            return
        storage = leaf.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None:
            gone = weakref.ref(storage, partial(self._forget, key))
            known = self._known[key] = _Storage(gone, self.label, counts)
        if known.counts and known.num_bytes != num_bytes:  # new, or resized
            self._add(known.label, num_bytes - known.num_bytes)
            known.num_bytes = num_bytes

    def _forget(self, key: int, _: object) -> None:
        known = self._known.pop(key)
        self._add(known.label, -known.num_bytes)

    def _add(self, label: str, num_bytes: int) -> None:
        self.live[label] += num_bytes
        self._total += num_bytes

    def _note(self, operation: str, inner: int = 0) -> None:
        if self._total + inner <= self._peak:
            return
        self._peak, self._operation = self._total + inner, operation
        self._at_peak = dict(self.live)
        if inner:
            self._at_peak[self.label] = self._at_peak.get(self.label, 0) + inner


_ACTIVE: list[Tracer] = []


class _FlashOnMeta(TorchFunctionMode):
    """On meta tensors, `scaled_dot_product_attention` without mask or dropout is the fused operation of a GPU."""

    def __torch_function__(self, func, types, given=(), named=None):
        if func is torch.nn.functional.scaled_dot_product_attention and given and given[0].is_meta and not named:
            return torch.ops.aten._scaled_dot_product_flash_attention(*given[:3])[0]
        return func(*given, **(named or {}))


def inner_bytes(func: Any, arguments: tuple[Any, ...]) -> int:
    """What a kernel allocates for itself and gives back: the sum of dq inside the backward of a fused attention.

    Flash attention adds up the gradient of the queries in float32, beside a float32 number a row (the sum of
    out * grad). Rows are rounded up to 128 and channels to 32.

    Args:
        func: the operation.
        arguments: its positional arguments; of an attention's backward, the gradient [B, N, L, d] and queries.

    Source: flash-attention `csrc/flash_attn/flash_api.cpp` (`mha_bwd`: dq_accum, softmax_d).
    """
    name = func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else ""
    if not ("attention" in name and name.endswith("_backward")):
        return 0
    batch, heads, rows, channels = arguments[1].shape
    rows, channels = -(-rows // 128) * 128, -(-channels // 32) * 32
    return 4 * batch * heads * rows * (channels + 1)
