"""How a list of blocks is run, and how one block computes forward and backward.

What: a model whose body is a list of blocks takes a `BlockRunner` as an argument and calls it once. The runner decides
what stays in memory between forward and backward; the model knows nothing about it. `run_plain` keeps everything,
`run_checkpointed` keeps each block's inputs, `run_with(maths, store)` keeps what its two arguments say, and
`memory.stream.StreamedBlocks` is the same with the weights of some blocks in host memory.

How: `run_plain` and `run_checkpointed` leave everything to autograd. The other two make one autograd node of each
block. A `BlockMaths` computes it: forward without autograd, and backward from the block's inputs, what forward chose to
keep and the gradient of the output. `Recompute` does that for any block, by running it again under autograd. A `Store`
says where `x` and what was kept wait in between; without one, autograd keeps them. Random numbers and autocast of the
forward are restored for the backward. What is the same for all blocks (`inputs`) is kept once, by autograd.

Cost: plain keeps everything that each block saves for backward. The others keep one `x` a block, and all of one block's
activations while that block is in backward. Checkpointed and `Recompute` run every block's forward twice.

Exact: all give the same output and the same gradients, bit for bit, where the block itself is deterministic and its
maths is. One exception: where a tensor that needs a gradient is read several times in each of several blocks or runs,
the nodes sum its gradient by block first, which rounds differently.
"""

import dataclasses
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from memory.store import Store

Pass = Literal["alone", "there", "back"]
"""Why a block is run: without gradients (the first block follows the last), in the forward or in the backward of a step
(the last block of one is the first of the other)."""

Loader = Callable[[int, Pass], AbstractContextManager[None]]
"""`with load(number, why):` the block of that number can be computed."""


class BlockRunner(Protocol):
    """Anything that takes `x` through a list of blocks."""

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
        """Return `x` after all blocks.

        Args:
            blocks: called in order as `block(x, *inputs)`; a block must not change its inputs in place.
            x: what one block hands to the next, any shape.
            inputs: what every block receives unchanged (tensors, None, or plain containers of them).
        """
        ...


class BlockMaths(Protocol):
    """How one block computes. Both methods are called without autograd and change none of what they are given, with one
    exception: the gradient of the output is backward's own to write into."""

    def forward(self, block: nn.Module, inputs: tuple[Any, ...], *, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run a block.

        Args:
            block: its parameters are on the device of the inputs for the time of the call.
            inputs: (x, *rest), as the block's own forward takes them.
            keep: whether a backward will follow.

        Returns:
            The output; and what backward wants besides the inputs, () if `keep` is False.
        """
        ...

    def backward(
        self,
        block: nn.Module,
        inputs: tuple[Any, ...],
        kept: tuple[Tensor, ...],
        grad: Tensor,
        *,
        needed: tuple[bool, ...],
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Gradients of a block, with the random numbers and the autocast of its forward.

        Args:
            block: the one that ran forward.
            inputs: those of forward.
            kept: what forward returned.
            grad: of the output; any strides. Nobody reads it afterwards.
            needed: for each of `inputs`, whether its gradient is wanted.

        Returns:
            Gradients of the inputs, None where not needed; and of each parameter of the block that requires a
            gradient, in the order of `block.parameters()`, None where it plays no part.
        """
        ...


class Recompute:
    """The maths of any block: backward runs it again under autograd and keeps nothing but its inputs until then."""

    def forward(self, block: nn.Module, inputs: tuple[Any, ...], *, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        return block(*inputs), ()

    def backward(
        self,
        block: nn.Module,
        inputs: tuple[Any, ...],
        kept: tuple[Tensor, ...],
        grad: Tensor,
        *,
        needed: tuple[bool, ...],
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        fresh = tuple(
            given.detach().requires_grad_(need) if isinstance(given, Tensor) else given
            for given, need in zip(inputs, needed, strict=True)
        )
        wanted = [given for given, need in zip(fresh, needed, strict=True) if need]
        parameters = trainable_parameters(block)
        with torch.enable_grad():
            output = block(*fresh)
        if not output.requires_grad:
            return (None,) * len(inputs), (None,) * len(parameters)
        found = torch.autograd.grad(output, (*wanted, *parameters), grad, allow_unused=True)
        of_inputs = iter(found[: len(wanted)])
        return tuple(next(of_inputs) if need else None for need in needed), found[len(wanted) :]


def run_plain(blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
    """Run the blocks one after the other.

    Args:
        blocks: called in order as `block(x, *inputs)`.
        x: what one block hands to the next, any shape.
        inputs: what every block receives unchanged.

    Returns:
        `x` after the last block.
    """
    for block in blocks:
        x = block(x, *inputs)
    return x


def run_checkpointed(blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
    """Run the blocks one after the other, and each a second time in backward instead of keeping its activations.

    Args:
        blocks: called in order as `block(x, *inputs)`; a block must not change its inputs in place.
        x: what one block hands to the next, any shape.
        inputs: what every block receives unchanged.

    Returns:
        `x` after the last block.
    """
    for block in blocks:
        x = checkpoint(block, x, *inputs, use_reentrant=False)
    return x


def run_with(maths: BlockMaths, store: "Store | None" = None) -> BlockRunner:
    """Return a runner for blocks that are all on the device.

    Args:
        maths: how each block computes.
        store: where `x` and what the maths keeps wait for backward; None: autograd keeps them. With a store backward
            can run once, and a second forward with gradients must wait for it.

    Returns:
        The runner.
    """

    def runner(blocks: Sequence[nn.Module], x: Tensor, *inputs: Any) -> Tensor:
        return run_nodes(blocks, x, inputs, maths=maths, store=store, load=lambda number, why: nullcontext())

    return runner


def run_nodes(
    blocks: Sequence[nn.Module],
    x: Tensor,
    inputs: tuple[Any, ...],
    *,
    maths: BlockMaths,
    store: "Store | None",
    load: Loader,
) -> Tensor:
    """Run the blocks one after the other, each as one node of the graph where gradients are wanted.

    Args:
        blocks: in order.
        x: what one block hands to the next.
        inputs: what every block receives unchanged. A tensor inside a container must not require a gradient.
        maths: how each block computes.
        store: where `x` and what the maths keeps wait for backward; None: autograd keeps them.
        load: surrounds the computation of each block.

    Returns:
        `x` after the last block.

    Raises:
        RuntimeError: a tensor inside a container requires a gradient.
    """
    if not torch.is_grad_enabled():
        for number, block in enumerate(blocks):
            with load(number, "alone"):
                x, _ = maths.forward(block, (x, *inputs), keep=False)
        return x
    step = _Step(maths, store, load)
    try:
        for number, block in enumerate(blocks):
            call = _Call(step, number, block, (x, *inputs))
            if any(tensor.requires_grad for tensor in (*call.tensors, *call.parameters)):
                x = _Node.apply(call, *call.tensors, *call.parameters)
            else:
                with torch.no_grad(), load(number, "there"):
                    x, _ = maths.forward(block, (x, *inputs), keep=False)
    except BaseException:
        step.forget()
        raise
    return _OwnGradient.apply(x)


def trainable_parameters(block: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a block that require a gradient.

    Args:
        block: any module.

    Returns:
        In the order of `block.parameters()`.
    """
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


class _Step:
    """What the nodes of one forward share; what they hold in the store goes with it."""

    def __init__(self, maths: BlockMaths, store: "Store | None", load: Loader) -> None:
        self.maths, self.store, self.load = maths, store, load
        self.held: set[int] = set()
        # A graph that is given up without a backward must not occupy the store.
        weakref.finalize(self, _drop, store, self.held).atexit = False

    def put(self, number: int, tensors: tuple[Tensor, ...]) -> None:
        assert self.store is not None
        self.store.put(number, tensors)
        self.held.add(number)

    def fetch(self, number: int) -> None:
        if self.store is not None and number in self.held:
            self.store.fetch(number)

    def get(self, number: int) -> tuple[Tensor, ...]:
        if self.store is None or number not in self.held:
            raise RuntimeError("backward ran a second time; what a store holds for a block is gone after the first")
        return tuple(self.store.get(number))

    def drop(self, number: int) -> None:
        if self.store is not None and number in self.held:
            self.held.discard(number)
            self.store.drop(number)

    def forget(self) -> None:
        """Give back all that is still in the store."""
        _drop(self.store, self.held)


def _drop(store: "Store | None", held: set[int]) -> None:
    while store is not None and held:
        store.drop(held.pop())


class _Call:
    """One run of a block: what is needed to compute its gradients later."""

    def __init__(self, step: _Step, number: int, block: nn.Module, given: tuple[Any, ...]) -> None:
        self.step, self.number, self.block = step, number, block
        self.tensors = [argument for argument in given if isinstance(argument, Tensor)]
        self.parameters = trainable_parameters(block)
        self._others = [None if isinstance(argument, Tensor) else argument for argument in given]
        self._is_tensor = [isinstance(argument, Tensor) for argument in given]
        self._device = given[0].device
        for other in self._others:
            if any(tensor.requires_grad for tensor in _tensors_in(other)):
                raise RuntimeError("pass a tensor that needs a gradient to the blocks as an argument of its own")

    def inputs(self, tensors: Iterable[Tensor]) -> tuple[Any, ...]:
        """The block's inputs with the given tensors in the places of the original ones."""
        fresh = iter(tensors)
        arguments = zip(self._is_tensor, self._others, strict=True)
        return tuple(next(fresh) if is_tensor else other for is_tensor, other in arguments)

    def needed(self, needs: Iterable[bool]) -> tuple[bool, ...]:
        """For each of the block's inputs whether its gradient is needed, from the same for its tensors."""
        of_tensors = iter(needs)
        return tuple(is_tensor and next(of_tensors) for is_tensor in self._is_tensor)

    def of_tensors(self, values: Iterable[Tensor | None]) -> list[Tensor | None]:
        """What belongs to the tensors among values for all inputs."""
        return [value for value, is_tensor in zip(values, self._is_tensor, strict=True) if is_tensor]

    def remember_surroundings(self) -> None:
        """Keep the state of random numbers and autocast for `same_surroundings`, and the tensors no longer."""
        self.tensors = []
        self._cpu_random = torch.get_rng_state()
        self._device_random = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", self._device.type} - {"meta"}
        ]

    @contextmanager
    def same_surroundings(self) -> Generator[None, None, None]:
        """Random numbers and autocast as in forward."""
        with ExitStack() as stack:
            devices = [self._device] if self._device_random is not None else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.set_rng_state(self._cpu_random)
            if self._device_random is not None:
                torch.cuda.set_rng_state(self._device_random, self._device)
            for kind, enabled, dtype in self._autocast:
                # Without its cache: older PyTorch returns from it what forward cast without gradients.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


class _Node(torch.autograd.Function):
    """A block as one node of the graph."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: _Call, *tensors: Tensor) -> Tensor:
        num_tensors, step = len(call.tensors), call.step
        ctx.call, ctx.num_tensors = call, num_tensors  # type: ignore[attr-defined]
        call.remember_surroundings()
        with step.load(call.number, "there"):
            output, kept = step.maths.forward(call.block, call.inputs(tensors[:num_tensors]), keep=True)
        if step.store is None:
            ctx.save_for_backward(*tensors, *kept)
        else:
            step.put(call.number, (tensors[0].detach(), *kept))  # or the store would hold the graph, and that the store
            ctx.save_for_backward(*tensors[1:])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call  # type: ignore[attr-defined]
        num_tensors: int = ctx.num_tensors  # type: ignore[attr-defined]
        needs: tuple[bool, ...] = ctx.needs_input_grad[1:]  # type: ignore[attr-defined]
        saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        step, number = call.step, call.number
        try:
            if step.store is None:
                kept = saved[len(needs) :]
            else:
                # Before the next weights are asked for, which would travel in front of it.
                x, *others = step.get(number)
                kept, saved = tuple(others), (x, *saved)
            with step.load(number, "back"):
                step.fetch(number - 1)
                with call.same_surroundings():
                    of_inputs, of_parameters = step.maths.backward(
                        call.block,
                        call.inputs(saved[:num_tensors]),
                        kept,
                        grad,
                        needed=call.needed(needs[:num_tensors]),
                    )
            step.drop(number)
        except BaseException:
            step.forget()
            raise
        found = (*call.of_tensors(of_inputs), *of_parameters)
        return None, *(gradient if need else None for gradient, need in zip(found, needs, strict=True))


class _OwnGradient(torch.autograd.Function):
    """The end of the last block: what arrives there may be read by others, so the blocks get a copy of it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad.clone(memory_format=torch.contiguous_format)


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
