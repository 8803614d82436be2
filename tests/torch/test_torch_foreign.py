"""Optimizers of PyLO go into guards as docs/own_optimizer.md says: `make foreign`."""

import copy
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lossguard.torch import BestOf, Recommended

PAGE = Path(__file__).parents[2] / "docs" / "own_optimizer.md"
STEPS = 30
TAKEN = ["AdafacLO", "MuLO", "ELO", "CELO2", "ELO_CELO2", "VeLO"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries


@pytest.fixture
def pylo(tmp_path: Path) -> dict[str, Any]:
    """Makers of optimizers with random weights, which the library else downloads."""
    optim = pytest.importorskip("pylo.optim")  # PyPI's pylo is another program
    from pylo.models import CELO2_MLP, Meta_MLP, VeLO_MLP, VeLO_RNN

    torch.manual_seed(0)
    meta = Meta_MLP.MetaMLP(39, 32, 1)
    celo = CELO2_MLP.CELO2MLP()
    saved = {"meta": meta, "rnn": VeLO_RNN.VeLORNN(), "mlp": VeLO_MLP.VeLOMLP()}
    for name, network in saved.items():
        network.save_pretrained(tmp_path / name)
    names: dict[str, Any] = {}
    (code,) = re.findall(r"^```py\n(from pylo.*?)^```", PAGE.read_text(), re.M | re.S)
    exec(code, names)

    def velo(kind: type) -> Any:
        keys = {"hf_key_rnn": str(tmp_path / "rnn"), "hf_key_mlp": str(tmp_path / "mlp")}
        return lambda params: kind(params, num_steps=STEPS, lr=1.0, **keys)

    return {
        "AdafacLO": lambda params: optim.AdafacLO_naive(params, hf_key=str(tmp_path / "meta")),
        "MuLO": lambda params: optim.MuLO_naive(params, hf_key=str(tmp_path / "meta"), lr=1.0),
        "ELO": lambda params: optim.ELO_naive(params, network=meta),
        "CELO2": lambda params: optim.CELO2_naive(params, network=celo),
        "ELO_CELO2": lambda params: optim.ELO_CELO2_naive(params, network=celo),
        "VeLO": velo(names["VeLO"]),
        "VeLO_naive": velo(optim.VeLO_naive),
    }


def network() -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return importlib.import_module("mup").set_base_shapes(model, None)  # for MuLO


def train(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    """Losses before the steps, by an optimizer or a guard."""
    losses = []
    for k in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(k))

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :2].sin()).square().mean()
            loss.backward()
            return loss

        if hasattr(optimizer, "lanes"):
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step(*[loss][: "loss" in inspect.signature(optimizer.step).parameters])
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", TAKEN)
def test_pylo(pylo, name):
    """A lane takes the steps of the optimizer alone, and a saved guard goes on bit by bit."""
    model = network()
    alone = train(model, pylo[name](model.parameters()), range(STEPS))

    def guarded() -> tuple[nn.Module, BestOf]:
        model = network()
        adam = torch.optim.Adam(model.parameters(), 0.01)
        return model, BestOf([pylo[name](model.parameters()), adam], nt=5, model=model)

    model, guard = guarded()
    first = train(model, guard, range(12))
    assert first[:5] == alone[:5]
    state = copy.deepcopy(guard.state_dict())
    train(model, guard, range(12, STEPS))
    again, resumed = guarded()
    resumed.load_state_dict(state)
    train(again, resumed, range(12, STEPS))
    for one, other in zip(guard._lanes.values(), resumed._lanes.values(), strict=True):
        for a, b in zip(one.point, other.point, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", TAKEN)
def test_pylo_over_adam(pylo, name):
    """It is tried more than once, each time from an empty memory, and does no harm."""
    model = network()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    guard = Recommended(pylo[name](model.parameters()), adam, nt=5, share=0.4, model=model)
    guarded = train(model, guard, range(4 * STEPS))
    assert sum(decision.learned_updates for decision in guard.history) > 20
    model = network()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    losses = train(model, adam, range(4 * STEPS))
    assert sum(guarded[-20:]) < 1.2 * sum(losses[-20:])


def test_the_velo_of_pylo_needs_the_class_of_the_page(pylo):
    model = network()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    guard = Recommended(pylo["VeLO_naive"](model.parameters()), adam, model=model)
    with pytest.raises(KeyError, match="mom"):
        train(model, guard, range(STEPS))
