"""The LSTM optimizer computes what torch.nn.LSTM and Linear do."""

import math

import pytest
import torch
from models import refuses
from torch import nn

from lossguard.torch import LSTMOptimizer
from lossguard.torch.learned.lstm import log_and_sign


class Reference(nn.Module):
    """The optimizer as a module, coordinates first."""

    def __init__(self, layers=2):
        super().__init__()
        self.lstm = nn.LSTM(2, 20, layers)
        self.linear = nn.Linear(20, 1)

    def forward(self, gradient, state):
        size = gradient.abs()
        log = torch.where(size >= math.exp(-10), size.log() / 10, -1.0)
        sign = torch.where(size >= math.exp(-10), gradient.sign(), math.exp(10) * gradient)
        output, state = self.lstm(torch.stack([log, sign], dim=-1)[None], state)
        return self.linear(output)[0, :, 0], state


@pytest.mark.parametrize("layers", [1, 2])
def test_is_a_torch_lstm(layers):
    reference = Reference(layers)
    params = [torch.randn(4, 3), torch.randn(5)]
    expected = [p.clone() for p in params]
    states = [None, None]
    for p in params:
        p.requires_grad_()
    optimizer = LSTMOptimizer(params, reference.state_dict(), scale=0.3)
    for step in range(7):
        for k, p in enumerate(params):
            p.grad = torch.randn_like(p) * 10.0 ** (-2 * step)
            update, states[k] = reference(p.grad.flatten(), states[k])
            expected[k] += 0.3 * update.detach().reshape(p.shape)
        optimizer.step()
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_features_at_the_floor():
    floor = math.exp(-2.0)
    x = log_and_sign(torch.tensor([floor / 2, -floor / 2, 1.0, -math.e]), p=2.0)
    expected = torch.tensor([[-1.0, -1.0, 0.0, 0.5], [0.5, -0.5, 1.0, -1.0]])
    torch.testing.assert_close(x, expected)


ABOUT = {"architecture": "lstm", "hidden": "20", "layers": "2", "p": "9.0", "scale": "0.05"}


@pytest.mark.parametrize("name", ["mine", "path", "string"])
def test_pretrained_reads_what_is_shipped_and_files_of_ones_own(tmp_path, monkeypatch, name):
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in Reference().state_dict().items()}
    path = tmp_path / "mine.safetensors"
    save_file(weights, path, ABOUT)
    monkeypatch.setattr("lossguard.learned.weights_file.SHIPPED", tmp_path)
    given = {"mine": "mine", "path": path, "string": str(path)}[name]
    optimizer = LSTMOptimizer.pretrained([nn.Parameter(torch.ones(2))], given)
    assert optimizer.param_groups[0]["lr"] == 0.05 and optimizer.param_groups[0]["p"] == 9.0
    torch.testing.assert_close(optimizer.weights, weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": math.inf}, "scale must be positive and finite, got inf"),
        ({"p": -1.0}, "p must be above 0 and at most 80, got -1.0"),
        (
            {"weights": {"linear.weight": torch.ones(1, 20)}},
            "weights must hold lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, "
            "lstm.bias_hh_l0, linear.weight, linear.bias, got none of ['lstm.weight_ih_l0', "
            "'lstm.weight_hh_l0', 'lstm.bias_ih_l0', 'lstm.bias_hh_l0', 'linear.bias']",
        ),
    ],
)
def test_errors(arguments, message):
    weights = {"weights": Reference().state_dict()}
    with refuses(message, "$"):
        LSTMOptimizer([nn.Parameter(torch.ones(2))], **weights | arguments)
