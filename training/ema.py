"""--ema_decay: a moving average of what an expert trains.

What: after every step of the expert, average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at
its n-th step (n = 1 at the first): a young average follows quickly, so that the zeros that adapters start from are soon
forgotten. Saved beside the weights as OUTPUT_NAME-ema, and in the state.

Cost: 4 bytes a trained number on the device, and one pass over them a step.

Exact: float32; a resumed average equals an uninterrupted one to the bit.

Source: Polyak and Juditsky 1992; the rise of d as in TensorFlow's ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from core.errors import InputError
from networks.optimization import restored


class AdapterEMA:
    """The average of one expert's network.

    Args:
        network: whose parameters are averaged; the average begins where they are.
        decay: d of a grown average, in (0, 1).

    Raises:
        InputError: no such decay.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"--ema_decay: expected a share between 0 and 1, such as 0.999, found {decay:g}")
        self._decay = decay
        self._network = network
        self._average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        self._updates = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self._updates += 1
        updates = int(self._updates)
        decay = min(self._decay, (1 + updates) / (10 + updates))
        for name, parameter in self._network.named_parameters():
            self._average[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put the average into the network for a while; afterwards its weights are back to the bit."""
        with restored(self._network.parameters()):
            with torch.no_grad():
                for name, parameter in self._network.named_parameters():
                    parameter.copy_(self._average[name])
            yield

    def state(self) -> Mapping[str, Tensor]:
        """The live tensors, to be saved or to be written into: the average by name of parameter, and its steps."""
        return self._average | {"updates": self._updates}
