"""The moving average is its recurrence, and looking at it changes nothing."""

import pytest
import torch
from torch import nn

from core.errors import InputError
from training.ema import AdapterEMA


def test_the_average_is_its_recurrence():
    network = nn.Linear(3, 2)
    ema = AdapterEMA(network, decay=0.5)
    expected = network.weight.detach().double().clone()
    for step in range(1, 30):
        with torch.no_grad():
            network.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach().double()
        torch.testing.assert_close(ema.state()["weight"].double(), expected, atol=1e-6, rtol=0)
    assert ema.state()["updates"] == 29


def test_it_begins_where_the_weights_are_and_does_not_follow_them_by_itself():
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    ema = AdapterEMA(network, decay=0.9)
    with torch.no_grad():
        network.weight.add_(1)
    assert torch.equal(ema.state()["weight"], before)


def test_in_use_the_network_has_the_average_and_afterwards_its_weights_to_the_bit():
    network = nn.Linear(3, 2)
    ema = AdapterEMA(network, decay=0.9)
    with torch.no_grad():
        network.weight.add_(0.1)
    trained, average = network.weight.detach().clone(), ema.state()["weight"].clone()
    with pytest.raises(ValueError), ema.in_use():
        assert torch.equal(network.weight, average)
        raise ValueError
    assert torch.equal(network.weight, trained) and torch.equal(ema.state()["weight"], average)


def test_written_into_its_state_it_goes_on_to_the_bit():
    def change(network, step):
        with torch.no_grad():
            network.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))

    network, other = nn.Linear(3, 2), nn.Linear(3, 2)
    whole, resumed = AdapterEMA(network, decay=0.95), AdapterEMA(other, decay=0.95)
    for step in range(6):
        change(network, step)
        whole.update()
        if step == 2:
            for name, tensor in resumed.state().items():
                tensor.copy_(whole.state()[name])
        if step > 2:
            change(other, step)
            resumed.update()
    assert torch.equal(whole.state()["weight"], resumed.state()["weight"])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(InputError, match="--ema_decay: expected a share between 0 and 1"):
        AdapterEMA(nn.Linear(1, 1), decay=decay)
