"""Block swap: the frozen weights of some blocks live in host memory and pass through two buffers on the device.

What: `SwappedBlocks` is a `BlockRunner`. It is made once for a list of blocks; from then on the frozen parameters and
buffers of the swapped blocks (linears, 8-bit linears, norms, modulation: whatever does not require a gradient, of any
dtype) lie in host memory, one flat buffer for each block. What trains (LoRA) and the other blocks are on the device.

How: running a swapped block binds its tensors to views of a device buffer (a slot) into which its flat buffer was
copied in one transfer, and binds them back to the host when the block has run. While a block runs, the next one (in
backward the previous one) is copied into the other slot; slots keep their content until they are needed, so that the
turn from forward to backward and from one step to the next copies nothing. Swapped blocks are evenly spaced among the
resident ones, which gives each transfer as much computation to hide behind as there is. In training a swapped block
keeps only its inputs and is recomputed in backward, where recomputation and gradient share one load; its trainable
parameters are inputs of that autograd node, so their gradients take the ordinary way.

Cost: device memory for two blocks instead of all swapped ones (swapping one or two saves nothing); host memory of
exactly the swapped blocks; each swapped block one transfer in forward and one in backward, except the two that are
still in their slots; one more forward of each swapped block in training. On the CPU it saves nothing and serves tests.

Exact: output, input gradient and gradients of trainable parameters are bit for bit those of `run_plain`
(`checkpoint=False`) and `run_checkpointed` (`checkpoint=True`). One exception: where a tensor that needs a gradient is
read several times in each of several blocks or runs, its gradient is summed by block first, which rounds differently.

Rules: outside of a run every tensor of a swapped block is a view of host memory that holds its true value, so
`state_dict()`, saving and merging in place work as always (a change in place is noticed and copied again). What moves
or replaces tensors (`.to(device)` on the whole model, `load_state_dict(assign=True)`) is an error in the next run; move
the rest of a model with `move_all_but`. Buffers are constants: what a block writes into one is lost.
"""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint as run_recomputed

from core.errors import InputError
from memory.transfers import Copies, Slot, copies_for

ALIGNMENT_BYTES = 256


class SwappedBlocks:
    """A block runner that keeps the frozen weights of some blocks in host memory.

    Make it after LoRA has been added and `requires_grad` has been set: what is frozen then is what is swapped.

    Args:
        blocks: all blocks of the model, in order. Resident blocks, and what trains in swapped ones, are moved to
            `device` by this.
        num_swapped: how many of them live in host memory; 0 is all resident.
        device: where blocks run, CUDA or the CPU.
        checkpoint: whether resident blocks are recomputed in backward too.

    Attributes:
        host_bytes: host memory held by the swapped blocks.
        device_bytes: device memory of the slots.

    Raises:
        InputError: `num_swapped` is negative or more than there are blocks; block swap does not know the device.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], *, num_swapped: int, device: torch.device | str, checkpoint: bool
    ) -> None:
        total = len(blocks)
        if not 0 <= num_swapped <= total:
            raise InputError(f"blocks to swap: expected 0 to {total}, as many as the model has, found {num_swapped}")
        self._blocks = tuple(blocks)
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._order: dict[int, int] = {}  # block index -> its place among the swapped ones
        hosts: list[_HostBlock] = []
        if num_swapped:
            copies = copies_for(self._device)
            chosen = {(2 * place + 1) * total // (2 * num_swapped): place for place in range(num_swapped)}
            hosts = [_HostBlock(self._blocks[index], copies, self._device) for index in chosen]
            self._ring = _Ring(copies, hosts)
            self._order = chosen
        for index, block in enumerate(self._blocks):
            if index not in self._order:
                block.to(self._device)
        self.host_bytes = sum(host.buffer.numel() for host in hosts)
        self.device_bytes = self._ring.num_bytes if hosts else 0

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
        """Run the blocks one after the other.

        Args:
            blocks: those the runner was made for.
            x: what one block hands to the next, on the runner's device.
            inputs: what every block receives unchanged. A tensor inside a container must not require a gradient.

        Returns:
            `x` after the last block.
        """
        if len(blocks) != len(self._blocks) or any(a is not b for a, b in zip(blocks, self._blocks, strict=True)):
            raise RuntimeError("SwappedBlocks was made for the blocks of another model")
        for index, block in enumerate(self._blocks):
            if index in self._order:
                x = self._run_swapped(block, self._order[index], x, inputs)
            elif self._checkpoint and torch.is_grad_enabled():
                x = run_recomputed(block, x, *inputs, use_reentrant=False)
            else:
                x = block(x, *inputs)
        return x

    def _run_swapped(self, block: nn.Module, place: int, x: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        if torch.is_grad_enabled():
            call = _Call(block, self._ring, place, (x, *inputs), self._device)
            tensors = (*call.tensors, *call.trainable)
            if any(tensor.requires_grad for tensor in tensors):
                return _Recomputed.apply(call, *tensors)
        with self._ring.loaded(place, then=(place + 1) % self._ring.num_blocks):
            return block(x, *inputs)


def move_all_but(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device | str) -> None:
    """Move a model's parameters and buffers to a device, except those of the given blocks.

    Args:
        model: with `blocks` somewhere inside it.
        blocks: left where they are, with everything in them.
        device: for the rest.
    """
    kept = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in kept:
            module._apply(lambda tensor: tensor.to(device), recurse=False)


def _place(tensor: Tensor, device: torch.device | str) -> None:
    """Move a parameter or buffer, and its gradient, without making another object of it."""
    tensor.data = tensor.data.to(device)
    if tensor.grad is not None:
        tensor.grad.data = tensor.grad.data.to(device)


class _Packed:
    """One frozen tensor and its place in a flat buffer."""

    def __init__(self, owner: nn.Module, name: str, tensor: Tensor, offset: int) -> None:
        self.owner, self.name, self.tensor = owner, name, tensor
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self.start, self.end = offset, offset + tensor.numel() * tensor.element_size()

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)

    def is_at(self, view: Tensor) -> bool:
        """Whether the block still has this tensor under this name, in this memory."""
        found = self.owner._parameters.get(self.name, self.owner._buffers.get(self.name))
        return found is self.tensor and self.tensor.data_ptr() == view.data_ptr() and self.tensor.dtype == self.dtype


class _HostBlock:
    """A block whose frozen tensors lie in one flat host buffer; what trains is moved to the device."""

    def __init__(self, block: nn.Module, copies: Copies, device: torch.device) -> None:
        self.packed: list[_Packed] = []
        seen: set[int] = set()
        end = 0
        for owner in block.modules():
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                if tensor is None or id(tensor) in seen or tensor.numel() == 0:
                    continue
                seen.add(id(tensor))
                if tensor.is_meta:
                    raise RuntimeError(f"SwappedBlocks: {type(owner).__name__}.{name} is on meta, load weights first")
                if tensor.requires_grad:
                    _place(tensor, device)
                    continue
                offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                self.packed.append(_Packed(owner, name, tensor, offset))
                end = self.packed[-1].end
        with torch.inference_mode(False), torch.no_grad():  # so that training may follow
            self.buffer = copies.host_buffer(end)
            self.views = [packed.view(self.buffer) for packed in self.packed]
            for packed, view in zip(self.packed, self.views, strict=True):
                view.copy_(packed.tensor)
                packed.tensor.data = view

    def versions(self) -> list[int]:
        """A number for each tensor that grows with every change in place."""
        return [packed.tensor._version for packed in self.packed]

    def bind(self, buffer: Tensor) -> None:
        """Let the block compute with the content of a slot."""
        for packed, view in zip(self.packed, self.views, strict=True):
            if not packed.is_at(view):
                raise RuntimeError(
                    f"{type(packed.owner).__name__}.{packed.name} of a swapped block was moved or replaced after "
                    "SwappedBlocks was made; move the rest of a model with move_all_but, or make a new SwappedBlocks"
                )
        for packed in self.packed:
            packed.tensor.data = packed.view(buffer)

    def unbind(self) -> None:
        """Let the block's tensors show their host memory again."""
        for packed, view in zip(self.packed, self.views, strict=True):
            packed.tensor.data = view


class _Place:
    """A slot and what is in it."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.content: tuple[int, list[int]] | None = None  # place of the block, versions of its tensors when copied
        self.in_use = False


class _Ring:
    """Two slots through which all swapped blocks pass."""

    def __init__(self, copies: Copies, hosts: list[_HostBlock]) -> None:
        self._copies = copies
        self._hosts = hosts
        size = max(host.buffer.numel() for host in hosts)
        with torch.inference_mode(False):
            self._places = [_Place(copies.slot(size)) for _ in hosts[:2]]
        self.num_blocks = len(hosts)
        self.num_bytes = size * len(self._places)

    @contextmanager
    def loaded(self, place: int, *, then: int | None) -> Iterator[None]:
        """Have a block's weights on the device for the body of the `with`, and start copying those of block `then`."""
        current = self._fetch(place)
        current.in_use = True
        try:
            if then is not None and then != place:
                self._fetch(then)
            self._copies.wait(current.slot)
            host = self._hosts[place]
            host.bind(current.slot.buffer)
            try:
                yield
            finally:
                host.unbind()
        finally:
            self._copies.done(current.slot)
            current.in_use = False

    def _fetch(self, place: int) -> _Place:
        """Return the slot that holds a block, or start copying it into one that is not in use."""
        content = (place, self._hosts[place].versions())
        found = next((candidate for candidate in self._places if candidate.content == content), None)
        if found is None:
            found = next((candidate for candidate in self._places if not candidate.in_use), None)
            if found is None:
                raise RuntimeError("a swapped block was run while another one was running")
            found.content = None  # should the copy fail
            self._copies.copy(found.slot, self._hosts[place].buffer)
            found.content = content
        return found


class _Call:
    """One run of a swapped block: what is needed to run it again in backward."""

    def __init__(self, block: nn.Module, ring: _Ring, place: int, given: tuple[Any, ...], device: torch.device) -> None:
        self.block, self.ring, self.place, self.device = block, ring, place, device
        self.tensors = [argument for argument in given if isinstance(argument, Tensor)]
        self.trainable = [parameter for parameter in block.parameters() if parameter.requires_grad]
        self._others = [None if isinstance(argument, Tensor) else argument for argument in given]
        self._is_tensor = [isinstance(argument, Tensor) for argument in given]
        for other in self._others:
            if any(tensor.requires_grad for tensor in _tensors_in(other)):
                raise RuntimeError("pass a tensor that needs a gradient to swapped blocks as an argument of its own")

    def __call__(self, tensors: Iterable[Tensor]) -> Tensor:
        """Run the block with the given tensors in the places of the original ones."""
        fresh = iter(tensors)
        arguments = zip(self._is_tensor, self._others, strict=True)
        return self.block(*[next(fresh) if is_tensor else other for is_tensor, other in arguments])

    def remember_surroundings(self) -> None:
        """Keep the state of random numbers and autocast for `same_surroundings`, and the tensors no longer."""
        self.tensors = []
        self._cpu_random = torch.get_rng_state()
        self._device_random = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", self.device.type}
        ]

    @contextmanager
    def same_surroundings(self) -> Generator[None, None, None]:
        """Random numbers, autocast and gradients as in a forward with gradients."""
        with ExitStack() as stack:
            devices = [self.device] if self._device_random is not None else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.set_rng_state(self._cpu_random)
            if self._device_random is not None:
                torch.cuda.set_rng_state(self._device_random, self.device)
            for kind, enabled, dtype in self._autocast:
                # Without its cache: older PyTorch returns from it what forward cast without gradients.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            stack.enter_context(torch.enable_grad())
            yield


class _Recomputed(torch.autograd.Function):
    """A swapped block as one node of the graph: it keeps its inputs, and runs again in backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.num_inputs = call, len(call.tensors)  # type: ignore[attr-defined]
        ctx.save_for_backward(*tensors)
        call.remember_surroundings()
        place = call.place
        with call.ring.loaded(place, then=place + 1 if place + 1 < call.ring.num_blocks else None):
            return call(tensors[: ctx.num_inputs])  # type: ignore[attr-defined]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call  # type: ignore[attr-defined]
        num_inputs: int = ctx.num_inputs  # type: ignore[attr-defined]
        needed: tuple[bool, ...] = ctx.needs_input_grad[1:]  # type: ignore[attr-defined]
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        inputs = [
            tensor.detach().requires_grad_(need) for tensor, need in zip(saved[:num_inputs], needed, strict=False)
        ]
        wanted = [tensor for tensor, need in zip((*inputs, *call.trainable), needed, strict=True) if need]
        place = call.place
        with call.ring.loaded(place, then=place - 1 if place > 0 else None), call.same_surroundings():
            output = call(inputs)
            found = iter(torch.autograd.grad(output, wanted, grad, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def _tensors_in(argument: Any) -> Iterator[Tensor]:
    """All tensors inside containers and dataclasses."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, dict):
        for value in argument.values():
            yield from _tensors_in(value)
    elif isinstance(argument, (list, tuple)):
        for value in argument:
            yield from _tensors_in(value)
    elif dataclasses.is_dataclass(argument) and not isinstance(argument, type):
        for field in dataclasses.fields(argument):
            yield from _tensors_in(getattr(argument, field.name))
