"""AdamW with its two moments in 8 bits: what `--optimizer_type AdamW8bit` keeps, without its library.

What: `AdamW8` has the bytes of bitsandbytes' AdamW8bit (two e4m3 numbers a parameter, and a float32 scale for 256 of
them), so that a step of the kit needs the memory of a training step. It is a stand-in: it rounds in another way.

How: parameters are put one after the other into flat buffers of some million numbers, so that a step is some hundred
kernels. The second moment is kept as its root, which spans half the exponents, and never below the smallest e4m3.

Cost: 2.03 bytes a parameter; float32 copies of one buffer during the step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

RUN = 256
LARGEST = 448.0  # of e4m3
SMALLEST = 2.0**-9
GROUP_ELEMENTS = 2**21


class _Rounded:
    """Float32 numbers as e4m3 with a scale for every run."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.values = torch.zeros(length // RUN, RUN, dtype=torch.float8_e4m3fn, device=device)
        self.scale = torch.ones(length // RUN, 1, device=device)

    def get(self) -> Tensor:
        return self.values.float().mul_(self.scale).view(-1)

    def put(self, numbers: Tensor, *, least: float) -> None:
        runs = numbers.view(-1, RUN)
        self.scale = (runs.abs().amax(-1, keepdim=True) / LARGEST).clamp_(min=1e-30)
        rounded = (runs / self.scale).clamp_(least, LARGEST)
        self.values.copy_(rounded)

    def to(self, device: torch.device) -> None:
        self.values, self.scale = self.values.to(device), self.scale.to(device)


class _Group:
    """Parameters that lie one after the other."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        length = sum(parameter.numel() for parameter in parameters)
        self.padding = -length % RUN
        self.flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.bind()
        device = self.flat.device
        self.mean, self.root = (_Rounded(length + self.padding, device) for _ in range(2))

    def bind(self) -> None:
        """Let the parameters be parts of `flat`."""
        for parameter, part in zip(
            self.parameters, self.flat.split([parameter.numel() for parameter in self.parameters]), strict=True
        ):
            parameter.data = part.view(parameter.shape)

    def gradient(self) -> Tensor:
        parts = [
            torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
            for parameter in self.parameters
        ]
        if self.padding:
            parts.append(parts[0].new_zeros(self.padding))
        return torch.cat(parts)


class AdamW8:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) on rounded moments.

    Args:
        parameters: float32, on one device; their memory is replaced.
        learning_rate: of a step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, learning_rate: float) -> None:
        self.learning_rate, self.steps = learning_rate, 0
        self.decay, self.beta1, self.beta2, self.eps = 0.01, 0.9, 0.999, 1e-8
        self.groups: list[_Group] = []
        waiting: list[nn.Parameter] = []
        count = 0
        for parameter in parameters:
            waiting.append(parameter)
            count += parameter.numel()
            if count >= GROUP_ELEMENTS:
                self.groups.append(_Group(waiting))
                waiting, count = [], 0
        if waiting:
            self.groups.append(_Group(waiting))

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by their gradients, and let go of those."""
        self.steps += 1
        for group in self.groups:
            gradient = group.gradient()
            for parameter in group.parameters:
                parameter.grad = None
            mean = group.mean.get().lerp_(gradient, 1 - self.beta1)
            square = group.root.get().square_().mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            del gradient
            group.mean.put(mean, least=-LARGEST)
            root = square.sqrt_()
            group.root.put(root, least=SMALLEST)
            root.div_((1 - self.beta2**self.steps) ** 0.5).add_(self.eps)
            length = group.flat.numel()
            group.flat.mul_(1 - self.learning_rate * self.decay)
            group.flat.addcdiv_(mean[:length], root[:length], value=-self.learning_rate / (1 - self.beta1**self.steps))

    def to(self, device: torch.device) -> None:
        """Move the parameters and everything that is kept of them."""
        for group in self.groups:
            group.flat = group.flat.to(device)
            group.bind()
            group.mean.to(device)
            group.root.to(device)
